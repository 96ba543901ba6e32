"""One page of several comparisons: curves, success per task, aggregates over tasks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from poco_vla.errors import DataError
from poco_vla.files import atomic_file
from poco_vla.report.aggregate import Scores, interquartile_mean, probability_of_improvement, stratified_interval
from poco_vla.report.comparison_plot import comparisons_svg, draw_comparisons
from poco_vla.report.page import style, template
from poco_vla.report.plots import COLOURS

COMPARISON = "comparison.json"
"""File of a comparison's figures, which `poco-vla compare` writes."""
Tasks = Mapping[str, Mapping[str, Any]]
"""Name of each comparison, its folder's -> its figures."""


@dataclass(frozen=True)
class WrittenComparisons:
    """Hold what a page of several comparisons consists of.

    Attributes:
        table: for the console.
        paths: files that were written.
    """

    table: Table
    paths: tuple[Path, ...]


def write_comparisons(root: Path) -> WrittenComparisons:
    """Write the page of all comparisons in a folder, from each one's comparison.json.

    Raises:
        DataError: it holds none, or one that no version of this library has written.
    """
    tasks = _read(root)
    figures = aggregated(tasks)
    with atomic_file(root / "comparisons.json") as partial:
        partial.write_text(json.dumps(figures, indent=1) + "\n")
    picture = draw_comparisons(tasks, root / "comparisons.png")
    with atomic_file(root / "comparisons.html") as partial:
        partial.write_text(_page(tasks, figures), encoding="utf-8")
    return WrittenComparisons(_table(tasks, figures), (root / "comparisons.json", picture, root / "comparisons.html"))


def _read(root: Path) -> dict[str, dict[str, Any]]:
    """Return the figures of each comparison in a folder that has a finished run."""
    tasks = {}
    for path in sorted(root.glob(f"*/{COMPARISON}")):
        try:
            figures = json.loads(path.read_text())
            complete = all("drop_of_seeds" in one for one in figures["algorithms"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} does not hold the figures of a comparison: {error!r}") from error
        if not complete:
            raise DataError(
                f"{path} lacks figures of single runs, which older versions did not write: "
                f"poco-vla compare {path.parent} writes it again"
            )
        if figures["algorithms"]:
            tasks[path.parent.name] = figures
    if not tasks:
        raise DataError(
            f"no comparison in {root} has a finished run: none of its folders holds a {COMPARISON} with one"
        )
    return tasks


def aggregated(tasks: Tasks) -> dict[str, Any]:
    """Return the figures over all tasks: of each algorithm, and of each ordered pair on the tasks that both have."""
    names = list(dict.fromkeys(name for figures in tasks.values() for name in figures["algorithms"]))
    return {
        "tasks": {name: figures["task"] for name, figures in tasks.items()},
        "algorithms": {name: _figures(tasks, name) for name in names},
        "improvement": [one for a in names for b in names if a != b and (one := _improvement(tasks, a, b)) is not None],
    }


def _figures(tasks: Tasks, name: str) -> dict[str, Any]:
    mine = [figures["algorithms"][name] for figures in tasks.values() if name in figures["algorithms"]]
    final, area = _scores(mine, "final_of_seeds"), _scores(mine, "area_of_seeds")
    return {
        "title": mine[0]["title"],
        "tasks": len(mine),
        "runs": sum(len(one) for one in final),
        "final": float(interquartile_mean(final)),
        "final_95": stratified_interval(interquartile_mean, final),
        "area": float(interquartile_mean(area)),
        "area_95": stratified_interval(interquartile_mean, area),
        "worst_drop": min(drop for one in mine for drop in one["drop_of_seeds"]),
        "restored_heads": sum(one["restored_heads"] for one in mine),
        "below_start": sum(
            end < start for one in mine for start, end in zip(one["start_of_seeds"], one["final_of_seeds"], strict=True)
        ),
        "ms_per_step": float(np.mean([1000 * one["seconds"] / one["env_steps"] for one in mine])),
    }


def _improvement(tasks: Tasks, a: str, b: str) -> dict[str, Any] | None:
    """Return the probability that a run of `a` ends better than one of `b`; None if they have no task in common."""
    both = [figures["algorithms"] for figures in tasks.values() if {a, b} <= set(figures["algorithms"])]
    if not both:
        return None
    first, second = (_scores([one[name] for one in both], "final_of_seeds") for name in (a, b))
    interval = stratified_interval(probability_of_improvement, first, second)
    return {
        "a": a,
        "b": b,
        "tasks": len(both),
        "probability": float(probability_of_improvement(first, second)),
        "interval_95": interval,
    }


def _scores(figures: Sequence[Mapping[str, Any]], name: str) -> Scores:
    return [np.array(one[name], dtype=float) for one in figures]


def _ordered(figures: Mapping[str, Any]) -> list[str]:
    """Return the algorithms: those with most tasks first, among them the best."""
    every = figures["algorithms"]
    return sorted(every, key=lambda name: (-every[name]["tasks"], -every[name]["final"]))


def _page(tasks: Tasks, figures: Mapping[str, Any]) -> str:
    """Return the text of the HTML page."""
    ordered = _ordered(figures)
    pairs = {(one["a"], one["b"]): one for one in figures["improvement"]}
    return template("comparisons.html.j2").render(
        colours=COLOURS,
        style=style(),
        today=f"{datetime.now(UTC):%d %B %Y}",
        picture=comparisons_svg(tasks),
        tasks=figures["tasks"],
        starts=[_percent(one["sft"]) for one in tasks.values()],
        titles=[figures["algorithms"][name]["title"] for name in ordered],
        success=[(figures["algorithms"][name]["title"], _success(tasks, name)) for name in ordered],
        columns=COLUMNS,
        rows=[_row(figures["algorithms"][name], len(tasks)) for name in ordered],
        matrix=[(figures["algorithms"][a]["title"], [_cell(pairs.get((a, b))) for b in ordered]) for a in ordered],
    )


def _success(tasks: Tasks, name: str) -> list[dict[str, Any] | None]:
    """Return final success of an algorithm on each task and its interval as text, and whether none has more."""
    cells: list[dict[str, Any] | None] = []
    for figures in tasks.values():
        one = figures["algorithms"].get(name)
        best = max(other["final"] for other in figures["algorithms"].values())
        cells.append(
            None
            if one is None
            else {
                "final": _percent(one["final"]),
                "interval": _interval(one["bootstrap_95"]) if len(one["seeds"]) > 1 else "one seed",
                "best": one["final"] == best,
            }
        )
    return cells


COLUMNS = ("algorithm", "tasks", "runs", "final", "interval", "area", "interval", "drop", "below", "collapses", "ms")


def _row(one: Mapping[str, Any], num_tasks: int) -> list[str]:
    return [
        one["title"],
        str(one["tasks"]) + (f" of {num_tasks}" if one["tasks"] < num_tasks else ""),
        str(one["runs"]),
        _percent(one["final"]),
        _interval(one["final_95"]),
        _percent(one["area"]),
        _interval(one["area_95"]),
        _percent(one["worst_drop"]),
        str(one["below_start"]),
        str(one["restored_heads"]),
        f"{one['ms_per_step']:.0f}",
    ]


def _cell(one: Mapping[str, Any] | None) -> dict[str, str] | None:
    if one is None:
        return None
    ends = one["interval_95"]
    interval = "one seed" if ends is None else f"[{ends[0]:.2f}, {ends[1]:.2f}]"
    return {"probability": f"{one['probability']:.2f}", "interval": interval}


def _table(tasks: Tasks, figures: Mapping[str, Any]) -> Table:
    """Return final success of each task, and the interquartile mean over all, for the console."""
    table = Table(title="success in %", title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("algorithm")
    for name in (*tasks, "IQM"):
        table.add_column(name, justify="right")
    for name in _ordered(figures):
        one = figures["algorithms"][name]
        cells = [cell["final"] if cell else "-" for cell in _success(tasks, name)]
        table.add_row(one["title"], *cells, f"{_percent(one['final'])} {_interval(one['final_95'])}")
    return table


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.0f}"


def _interval(ends: Sequence[float] | None) -> str:
    return "one seed" if ends is None else f"[{100 * ends[0]:.0f}, {100 * ends[1]:.0f}]"
