"""Pictures and tables of runs, from the files that a run writes."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from poco_vla.errors import DataError

WINDOW = 20
"""Training episodes in the running success rate (paper)."""
SFT, POCO = "#8a8f98", "#0b6bcb"


def finish(run: Path, console: Console) -> None:
    """Draw a finished run's curve and print what it brought."""
    curve = draw_curves([run], run / "curve.png")
    console.print(result_table([run]))
    result = read_result(run)
    console.print(f"learning curve  {curve}")
    for name in ("failure_before.mp4", "success_after.mp4"):
        if (run / name).exists():
            console.print(f"video           {run / name}")
    console.print(f"figures         {run / 'result.json'}")
    console.print(f"policy          {run / result['policy']}")
    command = eval_command(run)
    if command:
        console.print(f"\nLeRobot evaluates it with:\n\n  {command}\n")


def eval_command(run: Path) -> str | None:
    """The lerobot-eval command line of a run's exported policy."""
    result = read_result(run)
    env = result["env"]
    if env is None:
        return None
    options = [
        f"--env.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in env["options"].items()
    ]
    return shlex.join(
        [
            "lerobot-eval",
            f"--policy.path={run / result['policy']}",
            f"--policy.device={result.get('device', 'cpu')}",
            *result.get("lerobot_arguments", ()),
            "--env.discover_packages_path=poco_vla.rollout.environments",
            f"--env.type={env['type']}",
            f"--env.task={env['task']}",
            *options,
            f"--eval.n_episodes={result['after']['episodes']}",
            f"--eval.batch_size={min(10, result['after']['episodes'])}",
        ]
    )


def read_result(run: Path) -> dict[str, Any]:
    """``result.json`` of a finished run.

    Raises:
        DataError: the folder holds none, or a damaged one.
    """
    try:
        return json.loads((run / "result.json").read_text())
    except FileNotFoundError as error:
        raise DataError(f"no result.json in {run}: not the folder of a finished run") from error
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{run / 'result.json'} cannot be read: {error}") from error


def result_table(runs: Sequence[Path]) -> Table:
    """Success before and after with 95 % intervals, steps, wall time: one row per run."""
    table = Table(
        title="success in % [95 % interval, Wilson], environment steps",
        title_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("run", no_wrap=True)
    for name in ("seed", "SFT", "after POCO", "gain", "steps", "updates", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        result = read_result(run)
        before, after = result["before"], result["after"]
        minutes, seconds = divmod(round(result["seconds"]), 60)
        table.add_row(
            run.name,
            str(result["seed"]),
            _rate(before),
            _rate(after),
            f"{100 * (after['success_rate'] - before['success_rate']):+.0f}" if before else "-",
            f"{result['env_steps']:,}",
            f"{result['updates']:,}",
            f"{minutes}:{seconds:02d}",
        )
    return table


def _rate(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "-"
    low, high = (100 * bound for bound in figures["interval_95"])
    return f"{100 * figures['success_rate']:.0f} [{low:.0f}, {high:.0f}]"


def draw_curves(runs: Sequence[Path], path: Path) -> Path:
    """Success against environment steps: running average over training episodes, evaluations with their intervals."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")  # no pyplot: a notebook keeps its own backend
    axes = figure.subplots()
    for run in runs:
        _draw_run(axes, run, single=len(runs) == 1)
    if len(runs) == 1 and (steps := _warmup_steps(runs[0])):
        axes.axvspan(0, steps, color="#f1f3f5", zorder=0, label="critic warm-up, actor frozen")
    axes.set(xlabel="environment steps", ylabel="success rate", ylim=(-0.02, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)
    return path


def _draw_run(axes: Axes, run: Path, *, single: bool) -> None:
    result = read_result(run)
    (line,) = axes.plot(*_running_success(run), linewidth=1.8, color=POCO if single else None)
    line.set_label(f"training episodes, average of {WINDOW}" if single else f"seed {result['seed']}")
    if single and result["before"]:
        axes.axhline(result["before"]["success_rate"], color=SFT, linestyle="--", linewidth=1.2, label="after SFT")
    steps = [e["env_steps"] for e in result["evaluations"]]
    rates = np.array([e["success_rate"] for e in result["evaluations"]])
    if len(rates) == 0:
        return
    low, high = np.array([e["interval_95"] for e in result["evaluations"]]).T
    axes.errorbar(
        steps,
        rates,
        yerr=[rates - low, high - rates],
        fmt="o",
        markersize=5,
        capsize=3,
        color=line.get_color(),
        label=f"evaluation, {result['evaluations'][0]['episodes']} episodes, 95 % interval" if single else None,
    )


def _warmup_steps(run: Path) -> int:
    """Environment steps until the actor began to learn."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return max((line["env_steps"] for line in lines if line["stage"] == "warmup"), default=0)


def _running_success(run: Path) -> tuple[list[int], list[float]]:
    path = run / "episodes.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    success = [line["success"] for line in lines]
    steps = [line["env_steps"] for line in lines]
    # The first episodes average over what there is, once a quarter of the window is filled.
    points = [i for i in range(len(lines)) if i + 1 >= WINDOW // 4]
    return [steps[i] for i in points], [float(np.mean(success[max(0, i + 1 - WINDOW) : i + 1])) for i in points]
