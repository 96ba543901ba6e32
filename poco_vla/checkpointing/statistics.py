"""Statistics of a run: in its checkpoint, put back by a resume, and held against the demonstrations."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poco_vla.adapting.normalization import (
    NormalisedColumn,
    normalised_columns,
    put_statistics,
    statistics_of,
    unit_range,
)
from poco_vla.checkpointing import checkpoint
from poco_vla.config import TrainConfig
from poco_vla.data import DatasetInfo, Episode
from poco_vla.errors import CheckpointError, DataError
from poco_vla.policy import FlowPolicy

MOST_STARTS = 20_000
"""States, spread over the demonstrations, that are held against the statistics."""
BEYOND = {"MEAN_STD": 10.0, "MIN_MAX": 4.0, "QUANTILES": 4.0, "QUANTILE10": 4.0}
"""Normalised size from which a number is far outside."""
SHARE_BEYOND = {"MEAN_STD": 0.05, "MIN_MAX": 0.05, "QUANTILES": 0.05, "QUANTILE10": 0.25}
"""Share of a dimension's numbers that may be far outside. Data never reaches it by statistics of its own: at most 1 %
lie beyond ten deviations (Chebyshev), none outside the range, 2 % or 20 % outside the quantiles."""
SHARE_OUTSIDE = 0.5
"""Share of a column's numbers that may lie outside the range of the statistics."""
NARROW, RATHER_NARROW = 0.03, 0.1
"""Share of the statistics' range that half of the dimensions that move must use: below the first the data is refused,
below the second a message says so. A task of small motions uses some 10 %; deltas and other units 0.1 to 2 %."""
COLUMN, PROCESSORS = "dataset/", "processors/"


@dataclass(frozen=True)
class Fit:
    """How a column of the demonstrations fits the statistics that it is normalised by.

    Attributes:
        column: its name.
        outside: share of its numbers outside the statistics' range.
        far: dimensions in which too many numbers are far outside, and the largest normalised size there.
        width: share of the statistics' range that the median dimension uses; None where none moves.
        numbers: how many numbers were looked at.
    """

    column: str
    outside: float
    far: Mapping[int, float]
    width: float | None
    numbers: int

    @property
    def fault(self) -> str:
        """Return the problem in words; empty where the column fits."""
        if self.far:
            dims = ", ".join(map(str, list(self.far)[:12])) + (", ..." if len(self.far) > 12 else "")
            return (
                f'"{self.column}" lies far outside the statistics in use, in dimension{"s" * (len(self.far) > 1)} '
                f"{dims} by up to {max(self.far.values()):.3g} times their range"
            )
        if self.outside > SHARE_OUTSIDE:
            return f'{self.outside:.0%} of the numbers of "{self.column}" lie outside the statistics in use'
        if self.width is not None and self.width < NARROW:
            return f'"{self.column}" takes up {self.width:.2%} of the range of the statistics in use'
        return ""


class RunStatistics:
    """Hold the statistics that a run normalises by.

    Args:
        config: the run's.
        info: of its dataset.
        say: shows a line.

    Attributes:
        info: of the dataset, with the statistics of the checkpoint that the run goes on from.
        found: the dataset's own statistics as they are now.
    """

    def __init__(self, config: TrainConfig, info: DatasetInfo, say: Callable[[str], None]) -> None:
        self.config, self.say, self.found = config, say, info.stats
        path, self._kept = _newest(config) if config.resume else (None, {})
        if path is not None and not self._kept:
            say(f"{path} holds no statistics (an older version wrote it): those of the dataset as it is now are used")
        self.info = replace(info, stats=self._dataset()) if self._kept else info
        if self._kept:
            _check_sizes(self.info, str(path))

    def _dataset(self) -> dict[str, dict[str, np.ndarray]]:
        stats: dict[str, dict[str, np.ndarray]] = {}
        for name, value in self._kept.items():
            if name.startswith(COLUMN):
                key, kind = name.removeprefix(COLUMN).rsplit("/", 1)
                stats.setdefault(key, {})[kind] = value.numpy()
        return stats

    def put_on(self, policy: FlowPolicy) -> FlowPolicy:
        """Let a policy normalise by the checkpoint's statistics, if the run goes on from one.

        Raises:
            CheckpointError: they are not this policy's.
        """
        own = {k.removeprefix(PROCESSORS): v for k, v in self._kept.items() if k.startswith(PROCESSORS)}
        try:
            if own:
                put_statistics(_pipelines(policy), own)
        except DataError as error:
            raise CheckpointError(f"the checkpoint does not fit this policy: {error}") from error
        return policy

    def state(self, policy: FlowPolicy) -> dict[str, Tensor]:
        """Return all that `put_on` and `info` need of a checkpoint."""
        columns = {
            f"{COLUMN}{key}/{kind}": torch.from_numpy(np.array(value))
            for key, kinds in self.info.stats.items()
            for kind, value in kinds.items()
            if np.asarray(value).dtype.kind in "fiu"
        }
        return columns | {f"{PROCESSORS}{k}": v.clone() for k, v in statistics_of(_pipelines(policy)).items()}

    def check(self, policy: FlowPolicy, demos: Sequence[Episode]) -> None:
        """Say which share of the demonstrations lies outside the statistics in use.

        Raises:
            DataError: they do not fit them, and the configuration does not allow it.
        """
        fits = measure(policy, demos, self.config.horizon)
        if not fits:
            return
        self.say(f"{_summary(fits)} outside the statistics in use")
        faults = [fit.fault for fit in fits if fit.fault]
        if faults and self.config.outside_statistics == "refuse":
            raise DataError(f"{'; '.join(faults)}. {self._advice()}")
        for fault in faults:
            self.say(f"{fault}; trained all the same, as outside_statistics says")
        for fit in fits:
            if not fit.fault and fit.column == "action" and fit.width is not None and fit.width < RATHER_NARROW:
                self.say(
                    f'"{fit.column}" takes up {fit.width:.1%} of the range of the statistics in use: if these are '
                    "deltas or other units than the policy was trained on, give --statistics dataset"
                )

    def _advice(self) -> str:
        cause = (
            "Other units (degrees and radians, metres and millimetres) look like this, and deltas where positions are "
            "meant, or the other way round. "
        )
        if self._kept:
            return cause + (
                "The statistics are those of the run's checkpoint, and the dataset has changed since: put the "
                "demonstrations back, start a new run (--output-dir), or give --outside-statistics allow."
            )
        return cause + (
            "Take the dataset's own with --statistics dataset, convert the dataset, or give --outside-statistics "
            "allow to train all the same."
        )


def measure(policy: FlowPolicy, demos: Sequence[Episode], horizon: int) -> list[Fit]:
    """Hold demonstrations against the statistics that a policy normalises by, column by column."""
    batch, valid = _batch(demos, horizon)
    columns = policy.normalised_columns(batch)
    columns = _of_pipeline(policy, batch) if columns is None else columns
    return [_fit(column, valid if column.is_action else None) for column in columns]


def _of_pipeline(policy: FlowPolicy, batch: Mapping[str, Any]) -> list[NormalisedColumn]:
    return normalised_columns(_pipelines(policy)["pre"], batch, getattr(policy, "order", None))


def _newest(config: TrainConfig) -> tuple[Path, dict[str, Tensor]]:
    """Return the newest checkpoint and its statistics, which are the same throughout a run."""
    root = config.output_dir / "checkpoints"
    newest = checkpoint.latest(root)
    for path in reversed(checkpoint.available(root)):
        with suppress(CheckpointError):  # a damaged checkpoint is told of where it is loaded
            if kept := checkpoint.load_statistics(path):
                return path, kept
    return newest, {}


def _fit(column: NormalisedColumn, valid: Tensor | None) -> Fit:
    values = column.values.double()
    centre, half = unit_range(column.mode, column.stats)
    least = 1e-6 * centre.abs().clamp_min(1)
    moving = half > least
    unit = (values - centre) / torch.maximum(half, least)
    if "min" in column.stats and "max" in column.stats:
        low, high = (torch.as_tensor(column.stats[name], dtype=torch.float64) for name in ("min", "max"))
        slack = 1e-3 * (high - low) + least
        outside = (values < low - slack) | (values > high + slack)
    else:
        outside = unit.abs() > (3 if column.mode == "MEAN_STD" else 1.001)
    moving = moving.expand(unit.shape[1:])
    if valid is not None:
        unit, outside = unit[valid], outside[valid]
        moving = moving.all(dim=0)
    beyond = (unit.abs() > BEYOND[column.mode]).double().mean(dim=0) > SHARE_BEYOND[column.mode]
    far = {int(i): float(unit[:, i].abs().max()) for i in beyond.nonzero().flatten()}
    return Fit(column.name, float(outside.double().mean()), far, _width(unit[:, moving], column.mode), outside.numel())


def _width(unit: Tensor, mode: str) -> float | None:
    """Return the share of the statistics' range that the median of the dimensions that move takes up."""
    moves = unit.amax(dim=0) - unit.amin(dim=0) > 1e-6
    if not moves.any():
        return None
    unit = unit[:, moves]
    spread = unit.std(dim=0, correction=0)
    if mode != "MEAN_STD":
        low, high = (torch.from_numpy(np.quantile(unit.numpy(), q, axis=0)) for q in (0.01, 0.99))
        spread = torch.maximum(high - low, 12**0.5 * spread) / 2
    return float(spread.median())


def _batch(demos: Sequence[Episode], horizon: int) -> tuple[dict[str, Any], Tensor]:
    """Return states of the demonstrations with the chunks that start there, [B, H, D], and which steps are real."""
    stride = 1 + sum(map(len, demos)) // MOST_STARTS
    columns: dict[str, list[np.ndarray]] = {}
    valid, tasks = [], []
    for episode in demos:
        steps = np.arange(0, len(episode), stride)[:, None] + np.arange(horizon)
        valid.append(steps < len(episode))
        tasks += [episode.task] * len(steps)
        chunk = episode.action[np.minimum(steps, len(episode) - 1)]
        rows = {key: column[::stride] for key, column in episode.obs.items() if column.dtype != np.uint8}
        for key, column in ({"action": chunk} | rows).items():
            columns.setdefault(key, []).append(column)
    batch: dict[str, Any] = {key: torch.from_numpy(np.concatenate(parts)) for key, parts in columns.items()}
    return batch | {"task": tasks}, torch.from_numpy(np.concatenate(valid))


def _summary(fits: Sequence[Fit]) -> str:
    """Return "0.4 % of actions and 0.0 % of states lie", over all columns of each."""
    words = []
    for kind, of in (("actions", True), ("states", False)):
        mine = [fit for fit in fits if (fit.column == "action") is of]
        total = sum(fit.numbers for fit in mine)
        if total:
            words.append(f"{100 * sum(fit.outside * fit.numbers for fit in mine) / total:.1f} % of {kind}")
    return " and ".join(words) + " lie"


def _check_sizes(info: DatasetInfo, where: str) -> None:
    """Raise CheckpointError where a checkpoint's statistics have other dimensions than the dataset."""
    for key, kinds in info.stats.items():
        shape = tuple(info.features.get(key, {}).get("shape", ()))
        found = tuple(kinds["mean"].shape) if "mean" in kinds else shape
        if len(shape) == 1 and key.startswith(("action", "observation.")) and found != shape:
            raise CheckpointError(
                f'{where} was trained on a dataset whose "{key}" has {found[0]} dimensions, and that of '
                f"{info.repo_id} has {shape[0]}: put the dataset back that it was trained on"
            )


def _pipelines(policy: FlowPolicy) -> dict[str, Any]:
    """Return LeRobot's pipelines, in front of which an adapter's methods may check batches."""
    return {
        "pre": getattr(policy, "preprocessor", None) or policy.preprocess,
        "post": getattr(policy, "postprocessor", None) or policy.postprocess,
    }
