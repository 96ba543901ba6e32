"""Success against environment steps: of one run, as a table; over the seeds of a group, with an interval."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from poco_vla.evaluation import wilson_interval
from poco_vla.files import atomic_file
from poco_vla.report.runs import Group, read_lines, read_run

WINDOW = 20
"""Training episodes in the running success rate (paper)."""
RESAMPLES = 10_000
"""Draws of the bootstrap over seeds."""
ENOUGH_SEEDS = 3
"""Fewest seeds for a bootstrap over seeds; with fewer, the interval is that of their pooled episodes."""
COLUMNS = ("kind", "env_steps", "success", "low", "high", "episodes", "update")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Success rate against environment steps.

    Attributes:
        steps: [P] environment steps, rising.
        mean: [P] success rate in 0..1.
        low: [P] lower end of its 95 % interval.
        high: [P] upper end.
        label: which task it is of, or what the interval is over.
    """

    steps: Floats
    mean: Floats
    low: Floats
    high: Floats
    label: str

    def at(self, step: float | int) -> float:
        """Return the rate at a step, interpolated linearly."""
        return float(np.interp(step, self.steps, self.mean))


def write_curve(run: Path) -> Path:
    """Write a run's ``curve.parquet``, whole or not at all."""
    with atomic_file(run / "curve.parquet") as partial:
        _build(run).to_parquet(partial, index=False)
    return run / "curve.parquet"


def read_curve(run: Path) -> pd.DataFrame:
    """Read a run's points, one per row: kind ("evaluation" or "training"), env_steps, success in 0..1, low and high (95
    %, Wilson; NaN for training), episodes, update (where it is known).

    Taken from ``curve.parquet``, or from what it is made of where that is newer.
    """
    path = run / "curve.parquet"
    made = path.stat().st_mtime_ns if path.is_file() else -1
    sources = [run / name for name in ("result.json", "evaluations.jsonl", "episodes.jsonl")]
    stale = any(source.exists() and source.stat().st_mtime_ns > made for source in sources)
    if not stale and made >= 0:
        with suppress(OSError, ValueError):  # damaged: made again of what it is made of
            return pd.read_parquet(path)
    return _build(run)


def _build(run: Path) -> pd.DataFrame:
    episodes = read_lines(run / "episodes.jsonl", ("env_steps", "success"))
    rows = [_evaluated(e) for e in read_run(run).result["evaluations"]] + _trained(episodes)
    floats = dict.fromkeys(("success", "low", "high"), "float64")
    whole = dict.fromkeys(("env_steps", "episodes"), "int64") | {"update": "Int64"}
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS)).astype({"kind": "str"} | floats | whole)


def _evaluated(figures: dict[str, Any]) -> tuple[object, ...]:
    low, high = figures["interval_95"]
    point = (figures["env_steps"], figures["success_rate"], low, high, figures["episodes"], figures.get("update"))
    return ("evaluation", *point)


def _trained(lines: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    """Return averages over the last episodes, or over all so far once a quarter of the window is filled."""
    rows = []
    for i in range(WINDOW // 4 - 1, len(lines)):
        window = [line["success"] for line in lines[max(0, i + 1 - WINDOW) : i + 1]]
        rows.append(
            ("training", lines[i]["env_steps"], np.mean(window), np.nan, np.nan, len(window), lines[i].get("update"))
        )
    return rows


def points(run: Path, kind: str) -> pd.DataFrame:
    """Return a run's points of one kind, by environment steps, the last of several at the same step."""
    table = read_curve(run)
    kept = table.loc[table["kind"] == kind]
    return kept.drop_duplicates(subset=["env_steps"], keep="last").sort_values("env_steps")


def curve_of(group: Group) -> Curve | None:
    """Return the mean over a group's finished seeds, or over all if none is finished, and its 95 % interval; None if
    nothing was evaluated."""
    tables = [points(run.path, "evaluation") for run in group.finished or group.runs]
    tables = [table for table in tables if len(table)]
    if not tables:
        return None
    steps = common_grid([table["env_steps"].to_numpy(float) for table in tables])
    rates = np.stack([np.interp(steps, t["env_steps"], t["success"]) for t in tables])
    episodes = np.stack([np.interp(steps, t["env_steps"], t["episodes"]) for t in tables])
    mean, low, high = over_seeds(rates, episodes)
    label = interval_label(len(tables), int(episodes[:, -1].sum()))
    return Curve(steps, mean, low, high, label if group.finished else f"{label}, unfinished")


def common_grid(seeds: list[Floats]) -> Floats:
    """Return [P] the evaluation steps of the seed that ended first, where every seed has begun: none is
    extrapolated."""
    shortest = min(seeds, key=lambda steps: steps[-1])
    grid = shortest[shortest >= max(steps[0] for steps in seeds)]
    return grid if len(grid) else shortest[-1:]


def over_seeds(rates: Floats, episodes: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the mean over seeds and its 95 % interval: bootstrap over seeds from three on (as QC), else Wilson of all
    episodes.

    Args:
        rates: [S P] success of each seed at each point.
        episodes: [S P] episodes that each of them rests on.
    """
    mean = rates.mean(axis=0)
    if len(rates) >= ENOUGH_SEEDS:
        return mean, *bootstrap_interval(rates)
    trials = episodes.sum(axis=0)
    successes = (rates * episodes).sum(axis=0)
    ends = [wilson_interval(round(s), round(n)) for s, n in zip(successes, trials, strict=True)]
    low, high = np.array(ends, dtype=float).reshape(-1, 2).T
    return mean, low, high


def bootstrap_interval(values: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[Floats, Floats]:
    """Return [P] ends of the 95 % percentile bootstrap of the mean over the first axis of `values` [S P]."""
    count = len(values)
    draws = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=resamples)
    low, high = np.quantile(draws @ values / count, (0.025, 0.975), axis=0)
    return low, high


def interval_label(seeds: int, episodes: int) -> str:
    """Return the name of the interval, for legends."""
    if seeds >= ENOUGH_SEEDS:
        return f"95 % bootstrap over {seeds} seeds"
    return f"95 % Wilson, {episodes} episodes" + (" of 2 seeds" if seeds > 1 else "")


def tasks_of(group: Group) -> list[str]:
    """List the tasks of a group's suite; none where there is a single task."""
    figures = [run.result["before"] for run in group.finished]
    return list(dict.fromkeys(name for f in figures if f for name in f.get("tasks", ())))


def rate_of(group: Group, when: str, task: str | None = None) -> tuple[float, float, float] | None:
    """Return mean and 95 % interval over a group's finished seeds of "before" or "after", of one `task` of a suite;
    None if nothing was evaluated."""
    figures = [run.result[when] for run in group.finished]
    if task is not None:
        figures = [(f or {}).get("tasks", {}).get(task) for f in figures]
    if not figures or any(f is None for f in figures):
        return None
    rates, episodes = (np.array([[float(f[name])] for f in figures]) for name in ("success_rate", "episodes"))
    mean, low, high = (float(ends[0]) for ends in over_seeds(rates, episodes))
    return mean, low, high
