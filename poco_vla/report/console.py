"""What the console shows of runs, and the end of a run."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from poco_vla.report.commands import acting_note
from poco_vla.report.curves import write_curve
from poco_vla.report.plots import draw_curves
from poco_vla.report.runs import RunRecord, eval_command, read_result, read_run

COLUMNS: tuple[str, ...] = ("run", "seed", "SFT", "after", "gain", "steps", "updates", "time")
SPARED: tuple[str, ...] = ("updates", "time", "steps", "seed")
"""Columns that a narrow terminal leaves out, the first ones first."""
NAME_WIDTH = 16
"""Letters of a run's name that stay on one line, at least."""


def finish(run: Path, console: Console) -> None:
    """Write a finished run's curve, as a table and as a picture, and print what it brought."""
    write_curve(run)
    curve = draw_curves([run], run / "curve.png")
    console.print(result_table([run]))
    result = read_result(run)
    if (result["before"] or {}).get("tasks"):
        console.print(_task_table(result["before"]["tasks"], result["after"]["tasks"]))
    console.print(f"learning curve  {curve}")
    for name in ("failure_before.mp4", "success_after.mp4"):
        if (run / name).exists():
            console.print(f"video           {run / name}")
    console.print(f"figures         {run / 'result.json'}")
    console.print(f"policy          {run / result['policy']}")
    if best := result.get("best"):
        console.print(f"best evaluation {run / best['policy']}  {_rate(best)} at {best['env_steps']:,} steps")
    if note := acting_note(result, str(run)):
        console.print(f"\n{note}")
    command = eval_command(run)
    if command:
        console.print(f"\nLeRobot evaluates it with:\n\n  {command}\n")


def result_table(runs: Sequence[Path]) -> RenderableType:
    """Return a table of success before and after with 95 % intervals, steps and wall time, one row per run, and below
    it how far those are that did not end. A narrow terminal leaves out updates, time and steps, never success."""
    rows, notes, titles = [], [], set()
    for path, name in zip(runs, _names(runs), strict=True):
        run = read_run(path)
        result = run.result
        titles.add(run.title)
        notes += [] if run.finished else [Text(f"{name} (seed {result['seed']}): {_so_far(run)}")]
        before, after = result["before"], result["after"]
        minutes, seconds = divmod(round(result["seconds"]), 60)
        cells = (
            name,
            str(result["seed"]),
            _rate(before),
            _rate(after) if run.finished else "unfinished",
            f"{100 * (after['success_rate'] - before['success_rate']):+.0f}" if before and after else "-",
            f"{result['env_steps']:,}",
            f"{result['updates']:,}",
            f"{minutes}:{seconds:02d}",
        )
        rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return Lines(_ResultTable(rows, f"after {titles.pop()}" if len(titles) == 1 else "after"), *notes)


def _task_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """Return success of each task of a suite, before and after."""
    table = Table(title="each task", title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("task", overflow="fold")
    for name in ("SFT", "after", "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, first in before.items():
        last = after.get(name)
        gain = f"{100 * (last['success_rate'] - first['success_rate']):+.0f}" if last else "-"
        table.add_row(name, _rate(first), _rate(last), gain)
    return table


@dataclass(frozen=True)
class _ResultTable:
    """Rows of :func:`result_table`, which take the columns that fit the terminal.

    Attributes:
        rows: cells by column.
        after: heading of the column "after".
    """

    rows: Sequence[Mapping[str, str]]
    after: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(
            title="success in % [95 % interval, Wilson], environment steps",
            title_justify="left",
            box=SIMPLE_HEAD,
            collapse_padding=True,
            pad_edge=False,
        )
        shown = self._fitting(options.max_width)
        table.add_column("run", overflow="fold")
        for name in shown[1:]:
            table.add_column(self._heading(name), justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*(Text(row[name]) for name in shown))
        yield table

    def _fitting(self, width: int) -> list[str]:
        shown, spare = list(COLUMNS), list(SPARED)
        while spare and self._width(shown) > width:
            shown.remove(spare.pop(0))
        return shown

    def _width(self, names: Sequence[str]) -> int:
        """Return the width of these columns, with a readable part of the runs' names."""
        widest = [max(len(self._heading(name)), *(len(row[name]) for row in self.rows)) for name in names[1:]]
        folder = min(NAME_WIDTH, max(len(row["run"]) for row in self.rows))
        return folder + sum(widest) + 2 * len(names) + 2

    def _heading(self, column: str) -> str:
        return self.after if column == "after" else column


def _so_far(run: RunRecord) -> str:
    """Return the progress of an unfinished run and its success so far, as text."""
    figures = run.latest
    return run.status + (
        f"; success {_rate(figures)} at {figures['env_steps']:,}" if figures else "; not evaluated yet"
    )


def _names(runs: Sequence[Path]) -> list[str]:
    """Return the folders' names, or their paths from the common parent on if two names are equal."""
    if len({run.name for run in runs}) == len(runs):
        return [run.name for run in runs]
    above = Path(os.path.commonpath([run.absolute().parent for run in runs]))
    return [str(run.absolute().relative_to(above)) for run in runs]


def _rate(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "-"
    low, high = (100 * bound for bound in figures["interval_95"])
    return f"{100 * figures['success_rate']:.0f} [{low:.0f}, {high:.0f}]"
