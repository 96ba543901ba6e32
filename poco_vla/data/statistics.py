"""Statistics of a dataset's vectors: those of the frames in use, whatever its ``meta/stats.json`` says."""

import copy
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
"""LeRobot's name of each quantile in its statistics -> the quantile."""
MOMENTS = ("min", "max", "mean", "std")
TOLERANCE = 1e-3
"""Share of a dimension's range by which recorded moments may differ from the data's."""
ROUNDING = {"min": 1e-6, "max": 1e-6, "mean": 1e-5, "std": 1e-3}
"""Share of a dimension's largest number by which they may differ besides: LeRobot adds them up in float32."""
PULSES = 0.001
"""Share of frames beyond `FAR` times the middle 98 % of a dimension from which these are part of the data (a gripper
that seldom moves) and no slips."""
FAR = 100.0

type Stats = dict[str, dict[str, Any]]


def vector_statistics(
    columns: Mapping[str, np.ndarray], recorded: Mapping[str, Mapping[str, Any]] | None, *, subset: bool, name: str
) -> Stats:
    """Return the statistics of a dataset, those of its vectors checked against the frames in use.

    Recorded moments of the whole dataset are kept where they describe the frames. They are computed anew where they are
    missing, not finite or of other data, and where a subset of the episodes is in use. Quantiles are always computed:
    LeRobot 0.6.1 averages those of the episodes, which are not the quantiles of all frames
    (huggingface/lerobot#4156).

    Args:
        columns: numeric columns of the frames in use, [T, ...] each.
        recorded: LeRobot's statistics of the whole dataset, by column and kind.
        subset: only some of the episodes are in use.
        name: of the dataset, for the message.
    """
    stats: Stats = {key: dict(kinds) for key, kinds in (recorded or {}).items()}
    stale = []
    for key, column in columns.items():
        if column.dtype.kind != "f" or column.ndim < 2:
            continue
        # `read_episodes` names the frame of a number that is not finite.
        finite = column[np.isfinite(column.reshape(len(column), -1)).all(axis=1)].astype(np.float64)
        if not len(finite):
            continue
        own = stats.get(key, {})
        moments = _moments(finite)
        reason = "" if subset or "mean" not in own else _difference(own, moments, complete=len(finite) == len(column))
        if reason:
            stale.append(f'"{key}" {reason}')
        keep = not (subset or reason or "mean" not in own)
        stats[key] = own | _quantiles(finite, moments) | (_steady(own, moments) if keep else moments)
    if stale:
        logger.warning(
            "meta/stats.json of %s does not describe its data: %s. Statistics are computed from the data; "
            "LeRobot's own tools would go on with the file",
            name,
            "; ".join(stale),
        )
    return stats


def meta_in_use(dataset: Any) -> Any:
    """Return LeRobot's description of an open dataset with one attribute more: `episodes_in_use`, the numbers of the
    episodes that were asked for, None for all."""
    meta = copy.copy(dataset.meta)
    meta.episodes_in_use = dataset.episodes
    return meta


def _moments(frames: np.ndarray) -> dict[str, np.ndarray]:
    moments = {name: getattr(frames, name)(axis=0) for name in MOMENTS}
    flat = moments["min"] == moments["max"]  # added up, a constant is off by a rounding error
    moments["mean"] = np.where(flat, moments["min"], moments["mean"])
    moments["std"] = np.where(flat, 0.0, moments["std"])
    return moments | {"count": np.array([len(frames)])}


def _quantiles(frames: np.ndarray, moments: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return quantiles of each dimension; of one that moves in few frames, and far, its range in their place."""
    values = dict(zip(QUANTILES, np.quantile(frames, list(QUANTILES.values()), axis=0), strict=True))
    for low, high in (("q01", "q99"), ("q10", "q90")):
        middle, spread = (values[low] + values[high]) / 2, values[high] - values[low]
        flat = spread <= 1e-6 * np.maximum(1, np.abs(middle))
        beyond = (np.abs(frames - middle) > FAR * spread).mean(axis=0)
        pulses = (flat | (beyond >= max(PULSES, 3 / len(frames)))) & (moments["max"] > moments["min"])
        values[low] = np.where(pulses, moments["min"], values[low])
        values[high] = np.where(pulses, moments["max"], values[high])
    return values


def _steady(own: Mapping[str, Any], moments: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return recorded moments, those of constant dimensions exact: LeRobot divides what differs from them by 1e-8."""
    flat = moments["min"] == moments["max"]
    if not flat.any():
        return {}
    return {name: np.where(flat, moments[name], np.asarray(own[name], dtype=np.float64)) for name in MOMENTS}


def _difference(own: Mapping[str, Any], moments: Mapping[str, np.ndarray], *, complete: bool) -> str:
    """Return how recorded moments differ from the data's, in words; empty where they agree."""
    size = np.maximum(moments["max"] - moments["min"], 1e-6)
    largest = np.maximum(np.abs(moments["min"]), np.abs(moments["max"]))
    for name in MOMENTS:
        if name not in own:
            return f"has no {name}"
        found = np.asarray(own[name], dtype=np.float64)
        if found.shape != moments[name].shape:
            return f"has {name} of shape {found.shape}, the data {moments[name].shape}"
        if not np.isfinite(found).all():
            return f"has {name} {_short(found)}"
        if complete and (np.abs(found - moments[name]) > TOLERANCE * size + ROUNDING[name] * largest).any():
            return f"has {name} {_short(found)}, the data {_short(moments[name])}"
    return ""


def _short(values: np.ndarray) -> str:
    flat = np.asarray(values).reshape(-1)
    return f"[{', '.join(f'{value:.4g}' for value in flat[:4])}{', ...' if len(flat) > 4 else ''}]"
