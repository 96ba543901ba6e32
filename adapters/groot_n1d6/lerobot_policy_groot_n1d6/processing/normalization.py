"""Raw numbers <-> the network's, key by key (sections 7.2 and 7.3). Pure functions on tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lerobot_policy_groot_n1d6.processing.embodiment import ActionKey, Embodiment, Encoding, StateKey
from lerobot_policy_groot_n1d6.processing.errors import ProcessingError
from lerobot_policy_groot_n1d6.processing.poses import absolute_pose, relative_pose
from lerobot_policy_groot_n1d6.processing.statistics import Statistics

type KeyStatistics = Mapping[str, Tensor]


@dataclass(frozen=True)
class Rules:
    """What a checkpoint chooses about normalisation.

    Attributes:
        use_percentiles: q01 and q99 stand for the minimum and the maximum. Off in N1.6.
        clip_outliers: limit normalised numbers to [-1, 1]: states by range, and actions.
        clip_deviations: limit actions by deviation as well, to one deviation, as NVIDIA's checkpoints were trained. Off
            for statistics of a dataset, whose actions reach further.
    """

    use_percentiles: bool = False
    clip_outliers: bool = True
    clip_deviations: bool = True

    @property
    def bounds(self) -> tuple[str, str]:
        return ("q01", "q99") if self.use_percentiles else ("min", "max")

    def clips(self, encoding: Encoding) -> bool:
        """Return True if actions of an encoding are limited to [-1, 1]."""
        return self.clip_outliers and (self.clip_deviations or encoding is not Encoding.MEAN_STD)

    def needs(self, encoding: Encoding) -> tuple[str, ...]:
        """The statistics that an encoding reads."""
        return {Encoding.MIN_MAX: self.bounds, Encoding.MEAN_STD: ("mean", "std"), Encoding.SIN_COS: ()}[encoding]


def encode_state(columns: Mapping[str, Tensor], embodiment: Embodiment, statistics: Statistics, rules: Rules) -> Tensor:
    """The state as the network sees it, not yet padded.

    Args:
        columns: raw observation vectors [B, D], by column.

    Returns:
        [B, embodiment.state_dim], keys in the embodiment's order.
    """
    groups = statistics.get("state", {})
    parts = [_state_part(_cut(columns, key), key, groups.get(key.name, {}), rules) for key in embodiment.state]
    return torch.cat(parts, dim=-1)


def references_of(columns: Mapping[str, Tensor], embodiment: Embodiment) -> Tensor:
    """The raw states that relative actions refer to, side by side: [B, embodiment.reference_dim]."""
    return torch.cat([_cut(columns, key) for key in embodiment.references], dim=-1)


def encode_action(
    action: Tensor,
    references: Tensor | None,
    steps: Tensor,
    embodiment: Embodiment,
    statistics: Statistics,
    rules: Rules,
) -> Tensor:
    """Raw actions -> normalised ones, in the network's order of keys.

    Args:
        action: dataset columns, [B, H, D], or [B, D] for one step of each row's chunk.
        references: from `references_of`; None where no key is relative.
        steps: which step of its chunk each action is: [H], or [B].

    Returns:
        The same shape, not yet padded.
    """
    parts = []
    for key in embodiment.action:
        values = _of_key(action, references, key, embodiment)
        part = normalise(values, _rows(key, steps, statistics, values), key.encoding, rules)
        parts.append(part.clamp(-1, 1) if rules.clips(key.encoding) else part)
    return torch.cat(parts, dim=-1)


def decode_action(
    action: Tensor,
    references: Tensor | None,
    steps: Tensor,
    embodiment: Embodiment,
    statistics: Statistics,
    rules: Rules,
) -> Tensor:
    """Normalised actions -> raw ones, in the dataset's order of columns. Arguments as in `encode_action`.

    Returns:
        [B, H, D] or [B, D], float32.
    """
    values = action[..., : embodiment.action_dim].float()
    raw = torch.empty_like(values)
    start = 0
    for key in embodiment.action:
        part = values[..., start : start + key.dim]
        part = denormalise(part, _rows(key, steps, statistics, values), key.encoding, rules)
        if key.is_relative:
            reference = _reference(references, key, embodiment, action)
            part = absolute_pose(part, reference, key.format) if key.is_pose else part + reference
        raw[..., key.start : key.stop] = part
        start += key.dim
    return raw


def unencoded_columns(
    batch: Mapping[str, Any], embodiment: Embodiment, statistics: Statistics | None, rules: Rules
) -> Sequence[tuple[str, Tensor, str, KeyStatistics]]:
    """Return column, raw numbers, LeRobot's name of the normalisation and statistics of each key that is normalised.

    Args:
        batch: dataset columns, states [B, D] and actions [B, H, D].
        embodiment: its keys.
        statistics: theirs.
        rules: of normalisation.
    """
    mode = {Encoding.MIN_MAX: "QUANTILES" if rules.use_percentiles else "MIN_MAX", Encoding.MEAN_STD: "MEAN_STD"}
    if statistics is None:
        return []
    found = [
        (key.column, _cut(batch, key), mode[key.encoding], statistics["state"][key.name])
        for key in embodiment.state
        if key.encoding in mode
    ]
    action = batch["action"]
    references = references_of(batch, embodiment) if embodiment.references else None
    steps = torch.arange(action.shape[1], device=action.device)
    for key in embodiment.action:
        values = _of_key(action, references, key, embodiment)
        found.append(("action", values, mode[key.encoding], _rows(key, steps, statistics, action)))
    return found


def _of_key(action: Tensor, references: Tensor | None, key: ActionKey, embodiment: Embodiment) -> Tensor:
    """Return a key's part of raw actions, relative where the key is."""
    values = action[..., key.start : key.stop]
    if key.is_relative:
        reference = _reference(references, key, embodiment, action)
        values = relative_pose(values, reference, key.format) if key.is_pose else values - reference
    return values


def normalise(values: Tensor, statistics: KeyStatistics, encoding: Encoding, rules: Rules) -> Tensor:
    """2 (v - min) / (max - min) - 1, or (v - mean) / std. Never clipped here.

    A dimension without a range becomes 0, one without a deviation stays as it is.
    """
    first, second = (statistics[name].to(values) for name in rules.needs(encoding))
    if encoding is Encoding.MEAN_STD:
        constant = second == 0
        return torch.where(constant, values, (values - first) / second.masked_fill(constant, 1))
    constant = torch.isclose(first, second)
    scaled = 2 * (values - first) / (second - first).masked_fill(constant, 1) - 1
    return torch.where(constant, torch.zeros_like(values), scaled)


def denormalise(values: Tensor, statistics: KeyStatistics, encoding: Encoding, rules: Rules) -> Tensor:
    """Undoes `normalise`. By range, values are limited to [-1, 1] first. A constant dimension becomes its constant."""
    first, second = (statistics[name].to(values) for name in rules.needs(encoding))
    if encoding is Encoding.MEAN_STD:
        return values * second + first
    return (values.clamp(-1, 1) + 1) / 2 * (second - first) + first


def pad_chunk(
    action: Tensor, *, horizon: int, width: int, action_dim: int, is_pad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A chunk padded with zeros to the network's size, and which of its numbers count in the loss.

    Args:
        action: normalised, [B, H, D], padded in width or not.
        horizon: the network's, e.g. 50.
        width: the network's, e.g. 128.
        action_dim: real dimensions, the embodiment's.
        is_pad: [B, H] steps beyond the end of the episode, LeRobot's ``action_is_pad``.

    Returns:
        [B, horizon, width] actions, and a mask of the same shape with 1 on valid steps and dimensions.
    """
    steps, dims = action.shape[1:]
    if steps > horizon or dims > width:
        raise ProcessingError(f"a chunk of {steps} steps and {dims} dimensions does not fit into {horizon} x {width}")
    valid = torch.ones_like(action[..., 0]) if is_pad is None else (~is_pad.bool()).to(action)
    mask = valid[..., None] * (torch.arange(width, device=action.device) < action_dim).to(action)
    missing = (0, 0, 0, horizon - steps)
    return torch.nn.functional.pad(action, (0, width - dims, *missing[2:])), torch.nn.functional.pad(mask, missing)


def _state_part(values: Tensor, key: StateKey, statistics: KeyStatistics, rules: Rules) -> Tensor:
    if key.encoding is Encoding.SIN_COS:
        return torch.cat([values.sin(), values.cos()], dim=-1)
    encoded = normalise(values, statistics, key.encoding, rules)
    # Only states by range are clipped; deviations are not (section 7.2).
    by_range = key.encoding is Encoding.MIN_MAX
    return encoded.clamp(-1, 1) if by_range and rules.clip_outliers else encoded


def _cut(columns: Mapping[str, Tensor], key: StateKey) -> Tensor:
    return columns[key.column][..., key.start : key.stop]


def _rows(key: ActionKey, steps: Tensor, statistics: Statistics, like: Tensor) -> dict[str, Tensor]:
    """A key's statistics; those of a relative one at these steps."""
    if not key.is_relative:
        return statistics["action"][key.name]
    index = steps.to(like.device)
    return {name: value.to(like)[index] for name, value in statistics["relative_action"][key.name].items()}


def _reference(references: Tensor | None, key: ActionKey, embodiment: Embodiment, like: Tensor) -> Tensor:
    assert references is not None
    start = 0
    for state in embodiment.references:
        if state.name == key.reference:
            break
        start += state.dim
    values = references[..., start : start + key.dim].to(device=like.device, dtype=torch.float32)
    return values[:, None] if like.ndim == 3 else values
