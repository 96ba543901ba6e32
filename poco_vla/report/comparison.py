"""Figures of a comparison of algorithms: success with its intervals, area under the curve, cost, significance."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np

from poco_vla.errors import DataError
from poco_vla.evaluation import wilson_interval
from poco_vla.report.curves import Curve, Floats, bootstrap_interval, curve_of, points
from poco_vla.report.runs import Group, RunRecord, read_lines, read_run

SFT = "sft"
"""Folder of the SFT runs, beside those of the algorithms."""
ATTEMPTS = "attempts.jsonl"
"""File of what each process of a run took."""


@dataclass(frozen=True)
class Entry:
    """The runs of an algorithm in a comparison.

    Attributes:
        name: of the algorithm, as its folder has it.
        group: its runs.
        cpu_seconds: processor time of each finished run by seed, where it is known.
    """

    name: str
    group: Group
    cpu_seconds: dict[int, float]

    @property
    def title(self) -> str:
        """Return the algorithm's name in tables and pictures."""
        return self.group.title

    @property
    def horizon(self) -> int | None:
        """Return the control steps of its runs' chunks; None where a run does not tell."""
        return self.group.runs[0].config.get("horizon")

    @cached_property
    def curve(self) -> Curve | None:
        """Return the mean over finished seeds; None if none is finished."""
        return curve_of(self.group) if self.group.finished else None

    @property
    def seeds(self) -> list[int]:
        """Return the seeds of the finished runs."""
        return [run.result["seed"] for run in self.group.finished]

    @property
    def shares_sft(self) -> bool:
        """Return True if its runs began with the SFT policy of the comparison."""
        return all(run.config.get("policy") is not None for run in self.group.finished)

    def rates(self, when: str) -> Floats:
        """Return [S] success of each finished run, "before" or "after" it learned online."""
        return np.array([run.result[when]["success_rate"] for run in self.group.finished], dtype=float)

    def episodes(self) -> tuple[int, int]:
        """Return successes and episodes of the last evaluations of all finished runs."""
        last = [run.result["after"] for run in self.group.finished]
        return sum(e["successes"] for e in last), sum(e["episodes"] for e in last)

    def figures(self) -> dict[str, Any]:
        """Return the entry's figures, as comparison.json has them; rates in 0..1."""
        curve, finished = self.curve, self.group.finished
        assert curve is not None
        after, (successes, episodes) = self.rates("after"), self.episodes()
        areas = [_area(run) for run in finished]
        low, high = (float(ends[0]) for ends in bootstrap_interval(after[:, None]))
        wilson = wilson_interval(successes, episodes)
        own = ("algorithm_options.", f"{self.name}.")
        return {
            "title": self.title,
            "seeds": self.seeds,
            "unfinished": [run.result["seed"] for run in self.group.unfinished],
            "horizon": self.horizon,
            "shared_sft": self.shares_sft,
            "start": float(self.rates("before").mean()),
            "start_of_seeds": [float(rate) for rate in self.rates("before")],
            "final": float(after.mean()),
            "final_of_seeds": [float(rate) for rate in after],
            "bootstrap_95": [low, high],
            "successes": successes,
            "episodes": episodes,
            "wilson_95": list(wilson),
            "area": float(np.mean(areas)),
            "area_of_seeds": areas,
            "worst_drop": float(min(0.0, (curve.mean - curve.mean[0]).min())),
            "drop_of_seeds": [_drop(run) for run in finished],
            "restored_heads": sum(run.result.get("restored_heads", 0) for run in finished),
            "stopped_early": sum(bool(run.result.get("stopped_early")) for run in finished),
            "env_steps": _mean([run.result["env_steps"] for run in finished]),
            "updates": _mean([run.result["updates"] - run.result.get("sft_steps", 0) for run in finished]),
            "seconds": _mean([run.result["seconds"] for run in finished]),
            "cpu_seconds": _mean(list(self.cpu_seconds.values())),
            "ms_per_update": _mean([ms for run in finished if (ms := _ms_per_update(run)) is not None]),
            "options": {name: value for name, value in finished[0].differences.items() if name.startswith(own)},
            "curve": {name: getattr(curve, name).tolist() for name in ("steps", "mean", "low", "high")},
        }


def read_comparison(root: Path) -> list[Entry]:
    """Return the algorithms of a comparison's folder, those with a run that has begun.

    Raises:
        DataError: there is none.
    """
    costs = _costs(root)
    entries = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name != SFT):
        runs = [read_run(path) for path in sorted(folder.glob("seed*")) if _has_begun(path)]
        if runs:
            runs.sort(key=lambda run: (not run.finished, run.result["seed"]))
            cpu = {r.result["seed"]: c for r in runs if r.finished and (c := costs.get(f"{folder.name}/{r.path.name}"))}
            entries.append(Entry(folder.name, Group(tuple(runs), folder.name), cpu))
    if not entries:
        raise DataError(f"{root} holds no runs of a comparison (ALGORITHM/seedN): nothing has begun there")
    return entries


def compared(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return all figures of a comparison: task, each algorithm with a finished run, each pair of them."""
    finished = [entry for entry in entries if entry.curve is not None]
    return {
        "task": entries[0].group.task,
        "algorithms": {entry.name: entry.figures() for entry in finished},
        "pairs": [pair(a, b) for a, b in combinations(finished, 2)],
    }


def pair(a: Entry, b: Entry) -> dict[str, Any]:
    """Return the difference of final success of two algorithms: its 95 % bootstrap interval over the seeds that both
    have, which share their SFT policy, and Fisher's exact test over all their episodes."""
    seeds = sorted(set(a.seeds) & set(b.seeds))
    first, second = (dict(zip(entry.seeds, entry.rates("after"), strict=True)) for entry in (a, b))
    gaps = np.array([[first[seed] - second[seed]] for seed in seeds], dtype=float)
    low, high = (float(ends[0]) for ends in bootstrap_interval(gaps)) if len(seeds) > 1 else (None, None)
    return {
        "a": a.name,
        "b": b.name,
        "seeds": seeds,
        "difference": float(gaps.mean()) if seeds else None,
        "bootstrap_95": [low, high],
        "fisher_p": fisher_exact(*a.episodes(), *b.episodes()),
    }


def fisher_exact(successes: int, trials: int, other_successes: int, other_trials: int) -> float:
    """Return the two-sided p-value of Fisher's exact test that two proportions are equal: the probability, with the
    sums of rows and columns given, of all tables that are no more likely than this one."""
    every, total = trials + other_trials, successes + other_successes
    lowest, highest = max(0, total - other_trials), min(trials, total)
    ways = [comb(trials, k) * comb(other_trials, total - k) for k in range(lowest, highest + 1)]
    here = ways[successes - lowest]
    return sum(way for way in ways if way <= here) / comb(every, total)


def _area(run: RunRecord) -> float:
    """Return the mean success rate over a run's environment steps: the area under its curve, divided by its length."""
    table = points(run.path, "evaluation")
    steps, rates = table["env_steps"].to_numpy(float), table["success"].to_numpy(float)
    length = steps[-1] - steps[0]
    return float(np.trapezoid(rates, steps) / length) if length else float(rates[-1])


def _drop(run: RunRecord) -> float:
    """Return how far a run's evaluations fall below its first, at most 0."""
    rates = points(run.path, "evaluation")["success"].to_numpy(float)
    return float((rates - rates[0]).min())


def _ms_per_update(run: RunRecord) -> float | None:
    """Return the milliseconds of an online update; None where the run made none, or has not noted it."""
    seconds = run.result.get("update_seconds")
    before = run.config.get("warmup_steps", 0) + run.config.get("sft_steps", 0)
    count = run.result["updates"] - before
    return 1000 * seconds / count if seconds and count > 0 else None


def _costs(root: Path) -> dict[str, float]:
    """Return the processor seconds of each run, those of all its processes since it last began anew."""
    costs: dict[str, float] = {}
    for line in read_lines(root / ATTEMPTS, ("run", "resumed", "cpu_seconds")):
        costs[line["run"]] = line["cpu_seconds"] + (costs.get(line["run"], 0.0) if line["resumed"] else 0.0)
    return costs


def _has_begun(path: Path) -> bool:
    return any((path / name).is_file() for name in ("result.json", "evaluations.jsonl", "metrics.jsonl"))


def _mean(values: Sequence[float | int]) -> float | None:
    return float(np.mean(values)) if values else None


def to_text(figures: dict[str, Any]) -> str:
    """Return figures as the text of comparison.json."""
    return json.dumps(figures, indent=1) + "\n"
