"""What a run tells as it goes: to the live view, to Accelerate's trackers, and into its .jsonl files."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor

from poco_vla.algorithms import Stage
from poco_vla.checkpointing.progress import Progress
from poco_vla.errors import UnknownNameError
from poco_vla.evaluation import wilson_interval
from poco_vla.files import atomic_file
from poco_vla.progress import Bar


def refuse_unknown_trackers(trackers: Sequence[str]) -> None:
    """Refuse trackers that are not installed, which Accelerate leaves out silently.

    Raises:
        UnknownNameError: a tracker is not installed.
    """
    known = {"all", *map(str, get_available_trackers())}
    for name in trackers:
        if name not in known:
            raise UnknownNameError("installed tracker", name, known)


class Logbook:
    """Means over each `every` updates, one line per episode, one per evaluation.

    Args:
        folder: of the run; holds metrics.jsonl, episodes.jsonl and evaluations.jsonl.
        accelerator: means are over all processes; the main one writes.
        progress: how far the run is.
        every: updates per line of metrics.jsonl.
        written: calls what writes something, named by its first argument, until there is room for it.

    Attributes:
        beside: further figures since its last call that differ from run to run, as rates do.
        watch: is shown the means of each line of the online stage.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        progress: Progress,
        every: int,
        written: Callable[[str, Callable[[], Any]], None],
    ) -> None:
        self.folder, self.accelerator, self.progress, self.every = folder, accelerator, progress, every
        self.written = written
        self._stage: Stage | None = None
        self._windows: dict[tuple[str, ...], tuple[Tensor, int]] = {}
        self._ages = (0, 0)
        self._logged = (time.monotonic(), progress.update, progress.env_steps)
        self.beside: Callable[[], Mapping[str, float]] = dict
        self.watch: Callable[[Mapping[str, float]], object] = dict

    def begin(self) -> None:
        """Updates begin now: rates count from here."""
        self._logged = (time.monotonic(), self.progress.update, self.progress.env_steps)

    def updated(self, stage: Stage, metrics: Mapping[str, Tensor], bar: Bar) -> None:
        """An update was made; `metrics` are scalars on its device, fetched only when a line is due.

        Updates of a stage may have other phases, and so other metrics: each name's mean is over the updates that have
        it.
        """
        if self._stage not in (stage, None):
            self._windows = {}
        self._stage, names = stage, tuple(metrics)
        values = torch.stack(list(metrics.values()))  # one sum on a GPU instead of one for each name
        sums, count = self._windows.get(names, (values, 0))
        self._windows[names] = (sums + values if count else values, count + 1)
        if sum(count for _, count in self._windows.values()) == self.every:
            self._log(stage, bar)

    def acted(self, versions: np.ndarray) -> None:
        """Steps have come that weights of these versions chose."""
        total, count = self._ages
        self._ages = total + int((self.progress.version - versions).sum()), count + len(versions)

    def episode(self, length: int, success: bool) -> None:
        """An episode has entered the pool."""
        self._write("episodes.jsonl", {"env_steps": self.progress.env_steps, "length": length, "success": success})

    def evaluated(self, figures: Mapping[str, Any]) -> None:
        """An evaluation has ended."""
        self._write("evaluations.jsonl", figures)

    def told(self) -> dict[str, Any]:
        """Return how the online stage goes, in words and numbers for people elsewhere."""
        now = self.progress
        shown = _success(now.recent) if now.recent else "no episode yet"
        return {"env_steps": now.env_steps, "updates": now.update, "episodes": now.episodes, "success": shown}

    def state(self) -> dict[str, Any]:
        """The window that is not full yet, for a checkpoint; `load` takes it back."""
        windows = [[list(names), sums.tolist(), count] for names, (sums, count) in self._windows.items()]
        return {"stage": self._stage, "windows": windows, "ages": self._ages}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; lines from after it are dropped, since their updates are run again."""
        self._stage = state.get("stage")
        if "sums" in state:  # a checkpoint from before updates had phases
            state = {"windows": [[list(state["sums"]), list(state["sums"].values()), state["num_summed"]]], **state}
        self._windows = {
            tuple(names): (torch.tensor(sums, device=self.accelerator.device), count)
            for names, sums, count in state["windows"]
            if count
        }
        self._ages = tuple(state["ages"])
        now = self.progress
        self.begin()
        if self.accelerator.is_main_process:
            made = [line for line in self._lines("metrics.jsonl", "update") if line["update"] <= now.update]
            self._rewrite("metrics.jsonl", made)
            self._rewrite("episodes.jsonl", self._lines("episodes.jsonl", "env_steps")[: now.episodes])
            self._rewrite("evaluations.jsonl", now.evaluations)

    def _log(self, stage: Stage, bar: Bar) -> None:
        totals: dict[str, tuple[Tensor, int]] = {}
        for names, (sums, count) in self._windows.items():
            for name, value in zip(names, sums.float(), strict=True):
                total, counted = totals.get(name, (None, 0))
                totals[name] = (value if total is None else total + value, counted + count)
        means = torch.stack([total / count for total, count in totals.values()])
        means = self.accelerator.reduce(means, "mean")
        assert isinstance(means, Tensor)
        scalars = dict(zip(totals, means.tolist(), strict=True))
        self._windows = {}
        if stage == "online":
            self.watch(scalars)
        now = self.progress
        if stage != "sft":
            scalars |= self._acting()
        rates = {f"{name}_per_s": value for name, value in self._rates().items()}
        beside = dict(self.beside())
        shown = {name: f"{value:.0f}" for name, value in rates.items() if value}
        shown |= {"prefix_hits": f"{beside['prefix_hits']:.0%}"} if "prefix_hits" in beside else {}
        bar.note(_headline(scalars, now.recent) | shown)
        tracked = scalars | rates | beside
        shown_there = {f"{stage}/{name}": value for name, value in tracked.items()}
        self.written("a line of the trackers", lambda: self.accelerator.log(shown_there, step=now.update))
        seconds = round(now.elapsed(), 2)
        line = {"stage": stage, "update": now.update, "env_steps": now.env_steps, "seconds": seconds}
        self._write("metrics.jsonl", line | scalars)

    def _acting(self) -> dict[str, float]:
        """Updates per control step, updates by which the weights that acted were older than the learner's, success."""
        now, (total, count) = self.progress, self._ages
        self._ages = (0, 0)
        scalars = {"utd": now.stage_update / max(1, now.env_steps)}
        if count:
            scalars["weight_age"] = total / count
        if now.recent:
            scalars["train_success"] = sum(now.recent) / len(now.recent)
        return scalars

    def _rates(self) -> dict[str, float]:
        """Updates and environment steps per second since the last log line. They differ from run to run, so that they
        are shown and tracked, but not in metrics.jsonl, which a resumed run repeats."""
        clock, now = time.monotonic(), self.progress
        then, updates, steps = self._logged
        self._logged = (clock, now.update, now.env_steps)
        seconds = max(clock - then, 1e-6)
        return {"updates": (now.update - updates) / seconds, "steps": (now.env_steps - steps) / seconds}

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.written(f"a line of {name}", lambda: _append(self.folder / name, json.dumps(values) + "\n"))

    def _lines(self, name: str, needed: str) -> list[dict[str, Any]]:
        """Return what a file holds. Lines that are no object with the number `needed` are left out: a kill may have
        torn the last one, a loss of power may have emptied some."""
        path = self.folder / name
        lines = []
        for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
            with suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get(needed), int):
                    lines.append(line)
        return lines

    def _rewrite(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        def write() -> None:
            with atomic_file(self.folder / name) as partial:
                partial.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

        self.written(name, write)


def _append(path: Path, line: str) -> None:
    """All of the line or nothing of it."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(line)
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


HEADLINE = (
    *("train_success", "bc_loss", "q", "critic_loss", "posterior_loss", "clipped_fraction", "effective_sample_size"),
    *("utd", "weight_age"),
)
"""Metrics shown below the live bar, in this order and by the names of metrics.jsonl."""


def _headline(scalars: Mapping[str, float], recent: Sequence[bool]) -> dict[str, float | str]:
    """Return the scalars that fit below a bar; success with its 95 % interval."""
    out: dict[str, float | str] = {name: scalars[name] for name in HEADLINE if name in scalars}
    if "train_success" in scalars:
        out["train_success"] = _success(recent)
    return out


def _success(recent: Sequence[bool]) -> str:
    """Share of successes with its 95 % interval."""
    low, high = wilson_interval(sum(recent), len(recent))
    return f"{sum(recent) / len(recent):.0%} [{low:.0%}, {high:.0%}]"
