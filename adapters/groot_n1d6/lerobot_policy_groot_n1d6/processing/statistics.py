"""What normalisation needs to know of the data: per key, and per step of the chunk for relative actions.

A table of statistics has the layout of a checkpoint's ``statistics.json`` for one embodiment (section 1):
``{"state" | "action" | "relative_action": {key: {"min" | "max" | "mean" | "std" | "q01" | "q99": values}}}`` with
values [D], and [horizon, D] in ``relative_action``.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from lerobot_policy_groot_n1d6.processing.embodiment import ActionKey, Embodiment, Encoding, StateKey
from lerobot_policy_groot_n1d6.processing.errors import ProcessingError
from lerobot_policy_groot_n1d6.processing.poses import relative_pose

if TYPE_CHECKING:
    from lerobot_policy_groot_n1d6.processing.normalization import Rules

type Statistics = dict[str, dict[str, dict[str, Tensor]]]
type Columns = Mapping[str, np.ndarray]
type Episode = tuple[np.ndarray | Columns, np.ndarray]
"""States [T, D], or several observation columns by name, and actions [T, D]."""

KINDS = ("min", "max", "mean", "std", "q01", "q99")
SEPARATOR = "/"


def from_episodes(embodiment: Embodiment, episodes: Iterable[Episode]) -> Statistics:
    """Statistics of a new embodiment.

    Step k of a relative key is described by all pairs of a frame s and the action of frame s + k of the same episode:
    every target that a trainer which masks the steps beyond an episode's end can meet.

    Args:
        embodiment: its keys, and the horizon of the statistics.
        episodes: raw states and actions, frame by frame.

    Raises:
        ProcessingError: there are no frames, numbers that are not finite, missing columns, or, where actions are
            relative, no episode of the horizon's length.
    """
    columns, actions, remaining = _joined(embodiment, episodes)
    values = {key.name: columns[key.column][:, key.start : key.stop] for key in embodiment.state}
    state = {name: _describe(column) for name, column in values.items()}
    action = {key.name: _describe(actions[:, key.start : key.stop]) for key in embodiment.action}
    relative = {
        key.name: _describe_relative(
            key, actions[:, key.start : key.stop], values[key.reference], remaining, embodiment
        )
        for key in embodiment.action
        if key.is_relative
    }
    return {"state": state, "action": action, "relative_action": relative}


def from_dataset(embodiment: Embodiment, dataset: Any) -> Statistics:
    """The same, of the episodes that an open LeRobotDataset gives: its table is read, no image or video.

    Raises:
        ProcessingError: it lacks a mapped column; and as in `from_episodes`.
    """
    return _from_table(embodiment, dataset.hf_dataset.with_format("arrow")[:], dataset.meta.features)


def from_metadata(embodiment: Embodiment, meta: Any) -> Statistics:
    """The same, of the dataset that a LeRobotDatasetMetadata describes, from its files on disk: of the episodes in its
    `episodes_in_use`, or of all where it has no such attribute.

    Raises:
        ProcessingError: its files are not there; and as in `from_dataset`.
    """
    from pyarrow import concat_tables
    from pyarrow.parquet import read_table

    embodiment.check_columns(sizes_of(meta.features))
    files = sorted((Path(meta.root) / "data").glob("**/*.parquet"))
    if not files:
        raise ProcessingError(
            f"no data in {meta.root}: relative actions need statistics of the frames themselves. Download the dataset "
            "(LeRobotDataset does), or make the action keys ABSOLUTE."
        )
    wanted = ["episode_index", "frame_index", ACTION, *dict.fromkeys(key.column for key in embodiment.state)]
    in_files = getattr(meta, "names_in_files", {})
    names = {in_files.get(name, name): name for name in wanted}
    table = concat_tables([read_table(file, columns=list(names)).rename_columns(names) for file in files])
    episodes = getattr(meta, "episodes_in_use", None)
    episodes = range(meta.total_episodes) if episodes is None else episodes  # a file may be there before it counts
    table = table.filter(np.isin(table["episode_index"].to_numpy(), list(episodes)))
    return _from_table(embodiment, table, meta.features)


def from_dataset_stats(embodiment: Embodiment, stats: Mapping[str, Mapping[str, Any]]) -> Statistics:
    """From LeRobot's statistics of a dataset, which suffice where no action is relative.

    Raises:
        ProcessingError: an action is relative, or a mapped column has no statistics.
    """
    relative = [key.name for key in embodiment.action if key.is_relative]
    if relative:
        raise ProcessingError(
            f'action {", ".join(relative)} of embodiment "{embodiment.tag}" is relative: its statistics are those of '
            "differences, per step of the chunk, which a dataset's own cannot tell. Compute them with from_dataset, or "
            "make the keys ABSOLUTE."
        )
    state = {key.name: _sliced(stats, key.column, key) for key in embodiment.state}
    action = {key.name: _sliced(stats, ACTION, key) for key in embodiment.action}
    return {"state": state, "action": action, "relative_action": {}}


def from_json(table: Mapping[str, Any]) -> Statistics:
    """One embodiment's part of a ``statistics.json``."""
    return {
        group: {
            key: {kind: torch.tensor(values, dtype=torch.float32) for kind, values in kinds.items() if kind in KINDS}
            for key, kinds in table.get(group, {}).items()
        }
        for group in ("state", "action", "relative_action")
    }


def check_statistics(statistics: Statistics, embodiment: Embodiment, rules: "Rules") -> None:
    """Raise ProcessingError unless these are all the statistics that an embodiment needs, in its dimensions."""
    groups: list[tuple[str, StateKey | ActionKey]] = [("state", key) for key in embodiment.state]
    groups += [("relative_action" if key.is_relative else "action", key) for key in embodiment.action]
    for group, key in groups:
        if key.encoding is Encoding.SIN_COS:
            continue
        found = statistics.get(group, {}).get(key.name, {})
        needed = rules.needs(key.encoding)
        if not set(needed) <= set(found):
            raise ProcessingError(
                f'no {" and ".join(needed)} of {group} key "{key.name}" (embodiment "{embodiment.tag}"); the '
                f"statistics hold {sorted(statistics.get(group, {}))}"
                + (f", for this key {sorted(found)}" if found else "")
            )
        for kind in needed:
            _check_shape(tuple(found[kind].shape), group, key, embodiment)


def flatten(statistics: Statistics) -> dict[str, Tensor]:
    """One flat table of tensors, as safetensors hold it."""
    return {
        SEPARATOR.join((group, key, kind)): values.contiguous()
        for group, keys in statistics.items()
        for key, kinds in keys.items()
        for kind, values in kinds.items()
    }


def unflatten(table: Mapping[str, Tensor]) -> Statistics:
    """Undoes `flatten`."""
    statistics: Statistics = {"state": {}, "action": {}, "relative_action": {}}
    for name, values in table.items():
        group, rest = name.split(SEPARATOR, 1)
        key, kind = rest.rsplit(SEPARATOR, 1)
        statistics[group].setdefault(key, {})[kind] = values
    return statistics


def sizes_of(features: Mapping[str, Any]) -> dict[str, int | None]:
    """Columns of LeRobot's feature table, and how many numbers its vectors have."""
    sizes: dict[str, int | None] = {}
    for name, feature in features.items():
        vector = feature["dtype"] not in ("image", "video", "string") and len(feature["shape"]) == 1
        sizes[name] = feature["shape"][0] if vector else None
    return sizes


def _check_shape(shape: tuple[int, ...], group: str, key: StateKey | ActionKey, embodiment: Embodiment) -> None:
    if shape[-1:] != (key.dim,):
        raise ProcessingError(
            f'the statistics of {group} key "{key.name}" have {shape[-1] if shape else 0} dimensions, embodiment '
            f'"{embodiment.tag}" has {key.dim}'
        )
    if group != "relative_action":
        expected: tuple[int, ...] = (key.dim,)
    else:
        expected = (embodiment.horizon, key.dim)
    if shape != expected and group == "relative_action" and len(shape) == 2:
        raise ProcessingError(
            f'the statistics of the relative action "{key.name}" are of chunks of {shape[0]} steps, embodiment '
            f'"{embodiment.tag}" has {embodiment.horizon}. They hold per step: compute them again with this horizon, '
            f"or take horizon {shape[0]}."
        )
    if shape != expected:
        raise ProcessingError(f'the statistics of {group} key "{key.name}" have shape {shape}: expected {expected}')


def _joined(
    embodiment: Embodiment, episodes: Iterable[Episode]
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """All frames in one: observation columns, actions, and how many frames of its episode follow each one."""
    parts = [(state if isinstance(state, Mapping) else {OBS_STATE: state}, action) for state, action in episodes]
    parts = [(state, action) for state, action in parts if len(action)]
    if not parts:
        raise ProcessingError("no frames: statistics need at least one episode")
    available: dict[str, int | None] = {name: np.asarray(column).shape[-1] for name, column in parts[0][0].items()}
    available |= {view.column: None for view in embodiment.views} | {ACTION: parts[0][1].shape[-1]}
    embodiment.check_columns(available)
    names = dict.fromkeys(key.column for key in embodiment.state)
    columns = {name: np.concatenate([np.asarray(state[name]) for state, _ in parts]) for name in names}
    actions = np.concatenate([action for _, action in parts])
    for name, column in {**columns, ACTION: actions}.items():
        if len(column) != len(actions):
            raise ProcessingError(f'"{name}" has {len(column)} frames, "{ACTION}" has {len(actions)}')
        if not np.isfinite(column).all():
            frame = int(np.argwhere(~np.isfinite(column))[0, 0])
            raise ProcessingError(f'"{name}" is NaN or infinite in frame {frame}')
    remaining = np.concatenate([np.arange(len(action))[::-1] for _, action in parts])
    return columns, actions, remaining


def _describe_relative(
    key: ActionKey, actions: np.ndarray, states: np.ndarray, remaining: np.ndarray, embodiment: Embodiment
) -> dict[str, Tensor]:
    longest = int(remaining.max()) + 1
    if longest < embodiment.horizon:
        raise ProcessingError(
            f'action "{key.name}" is relative, and no episode has the {embodiment.horizon} frames of a chunk: the '
            f"longest has {longest}. Shorten the horizon, or make the key ABSOLUTE."
        )
    steps = []
    for step in range(embodiment.horizon):
        frames = np.flatnonzero(remaining >= step)
        steps.append(_describe(_relative(key, actions[frames + step], states[frames])))
    return {kind: torch.stack([step[kind] for step in steps]) for kind in KINDS}


def _relative(key: ActionKey, actions: np.ndarray, states: np.ndarray) -> np.ndarray:
    actions, states = actions.astype(np.float64), states.astype(np.float64)
    if not key.is_pose:
        return actions - states
    return relative_pose(torch.from_numpy(actions), torch.from_numpy(states), key.format).numpy()


def _describe(values: np.ndarray) -> dict[str, Tensor]:
    wide = values.astype(np.float64)
    q01, q99 = np.quantile(wide, [0.01, 0.99], axis=0)
    moments = {"min": wide.min(0), "max": wide.max(0), "mean": wide.mean(0), "std": wide.std(0), "q01": q01, "q99": q99}
    return _steady({kind: torch.from_numpy(moments[kind]).float() for kind in KINDS})


def _steady(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return statistics of a dataset that a constant dimension can be normalised by: percentiles that are equal though
    it moves become its range, a deviation of zero, by which `normalise` leaves values as they are, nearly zero."""
    if not {"min", "max"} <= set(values):
        return values
    low, high, out = values["min"], values["max"], dict(values)
    moves = ~torch.isclose(low, high)
    if {"q01", "q99"} <= set(values):
        seldom = moves & torch.isclose(values["q01"], values["q99"])
        out |= {"q01": torch.where(seldom, low, values["q01"]), "q99": torch.where(seldom, high, values["q99"])}
    if {"mean", "std"} <= set(values):
        least = 1e-6 * values["mean"].abs().clamp_min(1)
        flat = ~moves & (values["std"] <= least)
        out |= {"mean": torch.where(low == high, low, values["mean"]), "std": torch.where(flat, least, values["std"])}
    return out


def _from_table(embodiment: Embodiment, table: Any, features: Mapping[str, Any]) -> Statistics:
    embodiment.check_columns(sizes_of(features))
    order = np.lexsort((table["frame_index"].to_numpy(), table["episode_index"].to_numpy()))
    episode = table["episode_index"].to_numpy()[order]
    bounds = np.flatnonzero(np.diff(episode)) + 1
    names = dict.fromkeys(key.column for key in embodiment.state)
    columns = {name: np.split(_array(table, name)[order], bounds) for name in names}
    actions = np.split(_array(table, ACTION)[order], bounds)
    return from_episodes(
        embodiment, [({name: columns[name][i] for name in names}, action) for i, action in enumerate(actions)]
    )


def _array(table: Any, name: str) -> np.ndarray:
    """A column of vectors as [frames, D]; LeRobot stores those of length 1 as bare numbers."""
    flat = table.column(name).combine_chunks()
    while hasattr(flat, "flatten") and hasattr(flat.type, "value_type"):
        flat = flat.flatten()
    return flat.to_numpy(zero_copy_only=False).reshape(table.num_rows, -1)


def _sliced(stats: Mapping[str, Mapping[str, Any]], column: str, key: StateKey | ActionKey) -> dict[str, Tensor]:
    if column not in stats:
        raise ProcessingError(f'the dataset has no statistics of "{column}", only of {", ".join(sorted(stats))}')
    tensors = {kind: torch.as_tensor(stats[column][kind]).float().flatten() for kind in KINDS if kind in stats[column]}
    short: Sequence[str] = [kind for kind, values in tensors.items() if len(values) < key.stop]
    if short:
        raise ProcessingError(
            f'key "{key.name}" is columns {key.start} to {key.stop} of {column}, whose statistics have '
            f"{len(tensors[short[0]])}"
        )
    return _steady({kind: values[key.start : key.stop].clone() for kind, values in tensors.items()})
