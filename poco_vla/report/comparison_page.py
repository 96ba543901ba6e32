"""The report of a comparison: comparison.json, picture.png, report.html, and a table for the console."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from poco_vla.files import atomic_file
from poco_vla.report.comparison import Entry, compared, read_comparison, to_text
from poco_vla.report.comparison_plot import draw_comparison
from poco_vla.report.published import published_by_source


@dataclass(frozen=True)
class WrittenComparison:
    """What a comparison's report consists of.

    Attributes:
        table: for the console.
        paths: files that were written.
    """

    table: Table
    paths: tuple[Path, ...]


def write_comparison(root: Path) -> WrittenComparison:
    """Write the report of a comparison's folder.

    Raises:
        DataError: it holds no runs of a comparison, or a damaged one.
    """
    entries = read_comparison(root)
    figures = compared(entries)
    sft = shared_start(entries)
    figures["sft"] = sft
    sources = published_by_source(entries[0].group.task)
    figures["published"] = {source: sorted(curves) for source, curves in sources.items()}
    with atomic_file(root / "comparison.json") as partial:
        partial.write_text(to_text(figures))
    others = {name: curve for curves in sources.values() for name, curve in curves.items()}
    picture = draw_comparison(entries, sft, root / "picture.png", others)
    return WrittenComparison(comparison_table(figures), (root / "comparison.json", picture))


def shared_start(entries: list[Entry]) -> float | None:
    """Return the success of the SFT policy that most algorithms start from, the mean over seeds; None without one."""
    starts = [float(entry.rates("before").mean()) for entry in entries if entry.curve is not None and entry.shares_sft]
    return max(set(starts), key=starts.count) if starts else None


def comparison_table(figures: Mapping[str, Any]) -> Table:
    """Return the table of a comparison, best final success first."""
    table = Table(title=f"{figures['task']}: success in % [95 % interval]", title_justify="left", box=SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "algorithm" else "right", no_wrap=True)
    for row in rows(figures):
        table.add_row(*row)
    return table


COLUMNS = (
    *("algorithm", "seeds", "start", "final", "over seeds", "Wilson", "area", "drop", "collapses", "steps"),
    *("min", "CPU min", "ms/update"),
)


def rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """Return the cells of each algorithm, best final success first."""
    ordered = sorted(figures["algorithms"].values(), key=lambda one: -one["final"])
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
