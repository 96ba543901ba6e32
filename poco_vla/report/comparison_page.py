"""The report of a comparison: comparison.json, picture.png, report.html, and a table for the console."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from poco_vla.files import atomic_file
from poco_vla.report.commands import shown
from poco_vla.report.comparison import Entry, compared, read_comparison, to_text
from poco_vla.report.comparison_plot import comparison_svg, draw_comparison
from poco_vla.report.curves import Curve
from poco_vla.report.page import style, template
from poco_vla.report.plots import COLOURS
from poco_vla.report.published import credit_of, published_by_source


@dataclass(frozen=True)
class WrittenComparison:
    """Hold what a comparison's report consists of.

    Attributes:
        table: for the console.
        paths: files that were written.
    """

    table: "ComparisonTable"
    paths: tuple[Path, ...]


def write_comparison(root: Path) -> WrittenComparison:
    """Write the report of a comparison's folder.

    Raises:
        DataError: it holds no runs of a comparison, or a damaged one.
    """
    entries = read_comparison(root)
    figures = compared(entries)
    figures["sft"] = shared_start(entries)
    published = published_by_source(entries[0].group.task)
    end = max((one["curve"]["steps"][-1] for one in figures["algorithms"].values()), default=0.0)
    figures["published"] = [
        {"whose": who, "method": method, "start": _at(curve, 0), "there": _at(curve, end)}
        | {"last": float(curve.mean[-1]), "steps": float(curve.steps[-1])}
        for who, curves in published.items()
        for method, curve in curves.items()
    ]
    with atomic_file(root / "comparison.json") as partial:
        partial.write_text(to_text(figures))
    picture = draw_comparison(figures, root / "picture.png", published)
    with atomic_file(root / "report.html") as partial:
        partial.write_text(_page(entries, figures, comparison_svg(figures, published)), encoding="utf-8")
    return WrittenComparison(ComparisonTable(figures), (root / "comparison.json", picture, root / "report.html"))


def _page(entries: Sequence[Entry], figures: Mapping[str, Any], picture: str) -> str:
    """Return the text of the HTML page."""
    ordered = _ordered(figures)
    pairs = {(one["a"], one["b"]): one for one in figures["pairs"]}
    return template("comparison.html.j2").render(
        task=figures["task"],
        colours=COLOURS,
        style=style(),
        today=f"{datetime.now(UTC):%d %B %Y}",
        picture=picture,
        published=figures["published"],
        credits=[credit_of(who) for who in dict.fromkeys(one["whose"] for one in figures["published"])],
        waiting=[f"{e.title}, seed {r.result['seed']} ({r.status})" for e in entries for r in e.group.unfinished],
        columns=COLUMNS,
        rows=rows(figures),
        names=[figures["algorithms"][name]["title"] for name in ordered],
        matrix=[(figures["algorithms"][a]["title"], [_cell(pairs, a, b) for b in ordered]) for a in ordered],
        num_pairs=len(pairs),
        settings=[(figures["algorithms"][name]["title"], _options(figures["algorithms"][name])) for name in ordered],
    )


def _ordered(figures: Mapping[str, Any]) -> list[str]:
    """Return the names of the algorithms, best final success first."""
    return sorted(figures["algorithms"], key=lambda name: -figures["algorithms"][name]["final"])


def _cell(pairs: Mapping[tuple[str, str], Any], a: str, b: str) -> dict[str, str] | None:
    """Return difference, interval and p-value of a pair as text; None of an algorithm and itself."""
    found, sign = (pairs[a, b], 1) if (a, b) in pairs else (pairs.get((b, a)), -1)
    if found is None:
        return None
    gap, ends = found["difference"], found["bootstrap_95"]
    low, high = sorted(100 * sign * end for end in ends) if None not in ends else (None, None)
    return {
        "difference": "-" if gap is None else f"{100 * sign * gap:+.0f}",
        "interval": "" if low is None else f"[{low:+.0f}, {high:+.0f}]",
        "p": "p < 0.001" if found["fisher_p"] < 0.001 else f"p = {found['fisher_p']:.3f}",
    }


def _at(curve: Curve, step: float | int) -> float | None:
    """Return the success rate of a published curve at a step; None before its first point."""
    return None if step < curve.steps[0] else curve.at(step)


def _options(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.partition('.')[2]} {shown(value)}" for name, value in figures["options"].items())


def shared_start(entries: list[Entry]) -> float | None:
    """Return the success of the SFT policy that most algorithms start from, the mean over seeds; None without one."""
    starts = [float(entry.rates("before").mean()) for entry in entries if entry.curve is not None and entry.shares_sft]
    return max(set(starts), key=starts.count) if starts else None


@dataclass(frozen=True)
class ComparisonTable:
    """The table of a comparison, best final success first, with the columns that fit the terminal.

    Attributes:
        figures: those of comparison.json.
    """

    figures: Mapping[str, Any]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [dict(zip(COLUMNS, row, strict=True)) for row in rows(self.figures)]
        widths = {name: max(len(name), *(len(line[name]) for line in lines)) for name in COLUMNS}
        columns, spare = list(COLUMNS), list(SPARED)
        while spare and sum(widths[name] + 2 for name in columns) > options.max_width:
            columns.remove(spare.pop(0))
        title = f"{self.figures['task']}: success in % [95 % interval]"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        for name in columns:
            table.add_column(name, justify="left" if name == COLUMNS[0] else "right", no_wrap=True)
        for line in lines:
            table.add_row(*(line[name] for name in columns))
        yield table


COLUMNS = (
    *("algorithm", "seeds", "start", "final", "over seeds", "Wilson", "area", "drop", "collapses", "steps"),
    *("min", "CPU min", "ms"),
)
SPARED = ("min", "collapses", "steps", "ms", "CPU min", "area", "seeds", "drop")
"""Columns that a narrow terminal leaves out, the first ones first."""


def rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """Return the cells of each algorithm, best final success first."""
    ordered = [figures["algorithms"][name] for name in _ordered(figures)]
    return [
        [
            one["title"] + ("" if one["shared_sft"] else " *") + ("" if one["horizon"] != 1 else " (H = 1)"),
            str(len(one["seeds"])) + (f" of {len(one['seeds']) + len(one['unfinished'])}" if one["unfinished"] else ""),
            f"{100 * one['start']:.0f}",
            f"{100 * one['final']:.0f}",
            _interval(one["bootstrap_95"]) if len(one["seeds"]) > 1 else "-",
            _interval(one["wilson_95"]),
            f"{100 * one['area']:.0f}",
            f"{100 * one['worst_drop']:.0f}",
            str(one["restored_heads"]),
            f"{one['env_steps']:,.0f}",
            f"{one['seconds'] / 60:.1f}",
            "-" if one["cpu_seconds"] is None else f"{one['cpu_seconds'] / 60:.1f}",
            "-" if one["ms_per_update"] is None else f"{one['ms_per_update']:.1f}",
        ]
        for one in ordered
    ]


def _interval(ends: list[float]) -> str:
    return f"[{100 * ends[0]:.0f}, {100 * ends[1]:.0f}]"
