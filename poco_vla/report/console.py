"""What the console shows of runs, and the end of a run."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from poco_vla.report.curves import write_curve
from poco_vla.report.plots import draw_curves
from poco_vla.report.runs import Run, eval_command, read_result, read_run


def finish(run: Path, console: Console) -> None:
    """Write a finished run's curve, as a table and as a picture, and print what it brought."""
    write_curve(run)
    curve = draw_curves([run], run / "curve.png")
    console.print(result_table([run]))
    result = read_result(run)
    console.print(f"learning curve  {curve}")
    for name in ("failure_before.mp4", "success_after.mp4"):
        if (run / name).exists():
            console.print(f"video           {run / name}")
    console.print(f"figures         {run / 'result.json'}")
    console.print(f"policy          {run / result['policy']}")
    if best := result.get("best"):
        console.print(f"best evaluation {run / best['policy']}  {_rate(best)} at {best['env_steps']:,} steps")
    command = eval_command(run)
    if command:
        console.print(f"\nLeRobot evaluates it with:\n\n  {command}\n")


def result_table(runs: Sequence[Path]) -> RenderableType:
    """Success before and after with 95 % intervals, steps, wall time: one row per run. Below it, how far those are that
    did not end."""
    table = Table(
        title="success in % [95 % interval, Wilson], environment steps",
        title_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("run", overflow="fold")
    for name in ("seed", "SFT", "after POCO", "gain", "steps", "updates", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    notes = []
    for path, name in zip(runs, _names(runs), strict=True):
        run = read_run(path)
        result = run.result
        notes += [] if run.finished else [f"{name} (seed {result['seed']}): {_so_far(run)}"]
        before, after = result["before"], result["after"]
        minutes, seconds = divmod(round(result["seconds"]), 60)
        table.add_row(
            Text(name),
            str(result["seed"]),
            _rate(before),
            _rate(after) if run.finished else "unfinished",
            f"{100 * (after['success_rate'] - before['success_rate']):+.0f}" if before and after else "-",
            f"{result['env_steps']:,}",
            f"{result['updates']:,}",
            f"{minutes}:{seconds:02d}",
        )
    return Lines(table, *(Text(note) for note in notes))


def _so_far(run: Run) -> str:
    """How far an unfinished run is, and what it brought until then."""
    figures = run.latest
    return run.status + (
        f"; success {_rate(figures)} at {figures['env_steps']:,}" if figures else "; not evaluated yet"
    )


def _names(runs: Sequence[Path]) -> list[str]:
    """Folders' names; from their common parent on where two are alike."""
    if len({run.name for run in runs}) == len(runs):
        return [run.name for run in runs]
    above = Path(os.path.commonpath([run.absolute().parent for run in runs]))
    return [str(run.absolute().relative_to(above)) for run in runs]


def _rate(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "-"
    low, high = (100 * bound for bound in figures["interval_95"])
    return f"{100 * figures['success_rate']:.0f} [{low:.0f}, {high:.0f}]"
