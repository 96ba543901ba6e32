"""Statistics that a LeRobot policy normalises by: read back from its folder, and checked before they are relied on.

LeRobot leaves a column as it is, without a word, where they are missing. For adapters of LeRobot's policies.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poco_vla.errors import DataError
from poco_vla.pretrained.tensor_files import read_tensors

logger = logging.getLogger(__name__)

NEEDED = {
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
    "MIN_MAX": ("min", "max"),
    "MEAN_STD": ("mean", "std"),
}
"""Statistics of each of LeRobot's normalisation modes."""

ANOTHER = (
    "Give a policy that was trained on this robot, or, where its model can take another's columns, --statistics dataset"
)

type Stats = Mapping[str, Mapping[str, Any]]


def saved_stats(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the statistics of the normaliser saved in a policy's folder; empty where none are saved.

    Raises:
        PolicyError: a file is damaged.
    """
    stats: dict[str, dict[str, Tensor]] = {}
    for file in sorted(folder.glob("policy_preprocessor*normalizer*.safetensors")):
        for name, value in read_tensors(file).items():
            key, _, kind = name.rpartition(".")
            stats.setdefault(key, {})[kind] = value
    return stats


def take_sizes(config: Any, stats: Stats, *keys: str) -> None:
    """Let columns of a policy have as many numbers as the statistics that they are normalised by.

    LeRobot's training keeps the inputs of the base that it starts from in config.json, so that a state is said to have
    the base's numbers (32 in lerobot/pi05_base), beside the statistics of the data.

    Args:
        config: LeRobot's configuration of the policy, which is changed.
        stats: the checkpoint's, by column and kind.
        keys: the columns.
    """
    kinds = {kind for needed in NEEDED.values() for kind in needed}
    for features in (config.input_features, config.output_features):
        for key in (features or {}).keys() & set(keys):
            sizes = {_flat(value).numel() for kind, value in stats.get(key, {}).items() if kind in kinds}
            if len(sizes) == 1:
                features[key] = replace(features[key], shape=(sizes.pop(),))


def check_stats(config: Any, stats: Stats, where: str) -> None:
    """Raise DataError unless state and actions have the statistics that their normalisation needs, finite and in order.

    Dimensions without a range are none of its business: LeRobot turns them into a constant, and back.

    Args:
        config: LeRobot's configuration of the policy: its features and `normalization_mapping`.
        stats: by column and kind.
        where: they come from, for the message.
    """
    for key, feature, mode in _normalised(config):
        low, high = NEEDED[mode]
        values = stats.get(key, {})
        if low not in values or high not in values:
            raise DataError(
                f'{where} has no {low} and {high} for "{key}" (found: {", ".join(values) or "nothing"}), which '
                f"{mode} normalisation needs. Add them with LeRobot's augment_dataset_quantile_stats script, or "
                'give policy_options {"normalization_mapping": {"STATE": "MEAN_STD", "ACTION": "MEAN_STD"}}.'
            )
        bottom, top = (_flat(values[name]) for name in (low, high))
        if feature.type.value != "VISUAL" and bottom.numel() != feature.shape[0]:
            raise DataError(
                f'{where} has statistics of {bottom.numel()} dimensions for "{key}", which has {feature.shape[0]}'
            )
        ordered = top >= 0 if mode == "MEAN_STD" else top >= bottom
        wrong = [i for i, good in enumerate(torch.isfinite(bottom) & torch.isfinite(top) & ordered) if not good]
        if wrong:
            i = wrong[0]
            raise DataError(
                f'{where} has statistics of "{key}" that cannot be: {low} {bottom[i]:g} and {high} {top[i]:g} in '
                f"{_dimensions(wrong)}. Compute them anew with LeRobot's augment_dataset_quantile_stats script."
            )


def usable_stats(config: Any, stats: Stats, where: str, names: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return statistics of a dataset that keep all that a network is given of order one.

    A dimension that never moves becomes the constant that LeRobot makes of it (0 by MEAN_STD, else -1), and an action
    comes back as the value that it always had; one message names such dimensions. A dimension whose quantiles are equal
    though it moves, such as a gripper that seldom closes, is normalised by its range.

    Args:
        config: LeRobot's configuration of the policy.
        stats: by column and kind, of the dataset.
        where: they come from, for messages.
        names: LeRobot's feature table of the dataset, which names dimensions.

    Raises:
        DataError: statistics are missing, not finite, or of other dimensions.
    """
    check_stats(config, stats, where)
    out: dict[str, Any] = {key: dict(kinds) for key, kinds in stats.items()}
    constant = []
    for key, feature, mode in _normalised(config):
        kind = feature.type.value
        if kind == "VISUAL":
            continue
        changed, flat = _steady({name: _flat(value) for name, value in out[key].items()}, mode, action=kind == "ACTION")
        out[key] |= changed
        if flat:
            constant.append(f'"{key}" in {_dimensions(flat, _names(names, key))}')
    if constant:
        logger.warning(
            "%s never moves %s: the policy is given a constant there, and answers with the value that it always had",
            where,
            " and ".join(constant),
        )
    return out


def check_features(
    config: Any, features: Mapping[str, Any], policy: str, renamed: Mapping[str, str] | None = None
) -> None:
    """Raise DataError where columns of a dataset have other dimensions than those that a policy was trained on.

    Args:
        config: LeRobot's configuration of the policy.
        features: LeRobot's feature table of the dataset.
        policy: its name, for the message.
        renamed: the dataset's names of columns -> the policy's, where its pre-processor renames them.
    """
    names = {new: old for old, new in (renamed or {}).items()}
    for key, feature in {**(config.input_features or {}), **(config.output_features or {})}.items():
        column = str(names.get(key, key))
        if column not in features:
            continue  # the trainer says which inputs are missing
        size = tuple(features[column].get("shape") or ())
        if feature.type.value != "VISUAL" and size != tuple(feature.shape):
            raise DataError(
                f'"{column}" has {_size(size)} in the dataset, and {policy} was trained on {_size(feature.shape)}. '
                f"{ANOTHER}"
            )


def in_order(stats: Stats, index: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return statistics of a dataset for a policy whose columns have their numbers in another order.

    Args:
        stats: by column and kind.
        index: column -> the data's position of each of the policy's numbers.
    """
    out: dict[str, Any] = {key: dict(kinds) for key, kinds in stats.items()}
    for key, positions in index.items():
        whole = {kind: _flat(value) for kind, value in out.get(key, {}).items()}
        out[key] = {kind: v[list(positions)] if v.numel() == len(positions) else v for kind, v in whole.items()}
    return out


def action_range(mode: str, stats: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the range that normalised actions of a dataset lie in, [-1, 1] at least; None where it is not known.

    Args:
        mode: LeRobot's normalisation of actions.
        stats: of the actions, by kind.
    """
    if mode == "MIN_MAX":
        return -1.0, 1.0
    if "min" not in stats or "max" not in stats or not set(NEEDED.get(mode, ())) <= set(stats):
        return None
    ends = torch.stack([_flat(stats["min"]), _flat(stats["max"])])
    if mode in NEEDED:
        centre, half = unit_range(mode, stats)
        moves = half > _least(centre)
        ends = torch.where(moves, (ends - centre) / half.clamp_min(1e-30), 0)
    if not torch.isfinite(ends).all():
        return None
    return min(-1.0, float(ends.min())), max(1.0, float(ends.max()))


def unit_range(mode: str, stats: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the centre and half the width, in raw units, of what LeRobot's normalisation maps onto [-1, 1]."""
    low, high = (torch.as_tensor(stats[name], dtype=torch.float64) for name in NEEDED[mode])
    return (low, high) if mode == "MEAN_STD" else ((low + high) / 2, (high - low) / 2)


@dataclass(frozen=True)
class NormalisedColumn:
    """Numbers as a policy's pre-processor normalises them, and the statistics that it does so by.

    Attributes:
        name: column of the dataset.
        values: [B, D] states or [B, H, D] actions in raw units, relative ones where the policy acts so.
        mode: LeRobot's name of the normalisation.
        stats: by kind, [D], or [H, D] where each step of a chunk has its own.
    """

    name: str
    values: Tensor
    mode: str
    stats: Mapping[str, Any]

    @property
    def is_action(self) -> bool:
        return self.name == "action"


def normalised_columns(pipeline: Any, batch: Mapping[str, Any], order: Any = None) -> list[NormalisedColumn]:
    """Return what LeRobot's normaliser step in `pipeline` would be given of a batch without pictures.

    Args:
        pipeline: a pre-processor; one without such a step normalises nothing.
        batch: raw states, actions [B, H, D], and `task`.
        order: brings the data's numbers into the policy's order, where the pipeline does not do so itself.
    """
    order, pipeline = getattr(pipeline, "order", order), getattr(pipeline, "pipeline", pipeline)
    batch = batch if order is None else order.to_policy(batch)
    steps: list[Any] = list(getattr(pipeline, "steps", ()))
    found = next((i for i, step in enumerate(steps) if hasattr(step, "norm_map") and hasattr(step, "stats")), None)
    if found is None:
        return []
    before = [s for s in steps[:found] if not hasattr(s, "tokenizer_name") and not hasattr(s, "device")]
    columns, step = [], steps[found]
    raw = replace(pipeline, steps=before)(dict(batch))
    for key, feature in step.features.items():
        mode = getattr(step.norm_map.get(feature.type), "value", "IDENTITY")
        stats = (step.stats or {}).get(key, {})
        if feature.type.value != "VISUAL" and mode in NEEDED and set(NEEDED[mode]) <= set(stats) and key in raw:
            columns.append(NormalisedColumn(key, torch.as_tensor(raw[key]), mode, stats))
    return columns


def statistics_of(pipelines: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the statistics in pipelines of processors, by name of the pipeline, number and tensor of the step."""
    return {
        f"{name}.{i}.{key}": value.detach().cpu()
        for name, pipeline in pipelines.items()
        for i, step in _steps_with_statistics(pipeline)
        for key, value in step.state_dict().items()
    }


def put_statistics(pipelines: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> None:
    """Put the result of `statistics_of` back into pipelines of the same steps.

    Raises:
        DataError: they have other steps.
    """
    expected = {f"{name}.{i}" for name, pipeline in pipelines.items() for i, _ in _steps_with_statistics(pipeline)}
    beyond = sorted({".".join(key.split(".", 2)[:2]) for key in statistics} - expected)
    if beyond:
        raise DataError(f"saved statistics belong to processors of other steps ({', '.join(beyond)})")
    for name, pipeline in pipelines.items():
        for i, step in _steps_with_statistics(pipeline):
            prefix = f"{name}.{i}."
            own = {key.removeprefix(prefix): value for key, value in statistics.items() if key.startswith(prefix)}
            if own and hasattr(step, "stats"):
                step.stats = _nested(own)  # `load_state_dict` keeps statistics that a step was built with
                step.to(device=step.device)
            elif own:
                step.load_state_dict(own)


def _steps_with_statistics(pipeline: Any) -> list[tuple[int, Any]]:
    steps = getattr(pipeline, "steps", ())
    return [(i, step) for i, step in enumerate(steps) if hasattr(step, "stats") or hasattr(step, "statistics")]


def _nested(flat: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    stats: dict[str, dict[str, Tensor]] = {}
    for name, value in flat.items():
        key, kind = name.rsplit(".", 1)
        stats.setdefault(key, {})[kind] = value
    return stats


def _normalised(config: Any) -> list[tuple[str, Any, str]]:
    """Return name, feature and mode of what a policy normalises by statistics."""
    features = {**(config.input_features or {}), **(config.output_features or {})}
    out = []
    for key, feature in features.items():
        mode = getattr(config.normalization_mapping.get(feature.type.value), "value", "IDENTITY")
        if mode in NEEDED:
            out.append((key, feature, mode))
    return out


def _steady(values: dict[str, Tensor], mode: str, *, action: bool) -> tuple[dict[str, Tensor], list[int]]:
    """Return the statistics of a column that need a change, and its constant dimensions."""
    low, high = NEEDED[mode]
    centre, half = unit_range(mode, values)
    still = half <= _least(centre)
    if not still.any():
        return {}, []
    known = "min" in values and "max" in values and values["min"].shape == centre.shape == values["max"].shape
    bottom, top = (values["min"], values["max"]) if known else (centre - half, centre + half)
    moves = still & (top - bottom > 2 * _least(centre))
    flat = still & ~moves
    if mode == "MEAN_STD":
        # The mean of a constant is off by a rounding error, which LeRobot would divide by 1e-8.
        exact = flat & (bottom == top) & known
        mean = torch.where(exact, bottom, values[low])
        # What a network is given needs a divisor; what it answers with must not depend on it.
        least = torch.where(exact, 0.0, _least(centre)) if action else centre.abs().clamp_min(1)
        return {low: mean, high: torch.where(flat, least, values[high])}, _numbers(flat)
    # By its range: quantiles of a constant with some noise may be equal. Noise of 1e-7 is of order one by its own
    # range, and comes back.
    bottom, top = torch.where(still, bottom, values[low]), torch.where(still, top, values[high])
    if not action:  # one that moves after all is then told by its own size, not by 1e8 times that
        top = torch.where(flat, bottom + 2 * centre.abs().clamp_min(1), top)
    return {low: bottom, high: top}, _numbers(flat)


def _size(shape: Sequence[int]) -> str:
    return f"{shape[0]} dimensions" if len(shape) == 1 else f"shape {tuple(shape)}"


def _least(centre: Tensor) -> Tensor:
    """Return half the range below which a dimension counts as constant, in raw units."""
    return 1e-6 * centre.abs().clamp_min(1)


def _flat(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64).flatten()


def _numbers(flags: Tensor) -> list[int]:
    return [int(i) for i in flags.nonzero().flatten()]


def _names(features: Mapping[str, Any] | None, key: str) -> list[str]:
    """Return the names of a column's dimensions in LeRobot's feature table."""
    names = (features or {}).get(key, {}).get("names")
    if isinstance(names, Mapping):
        names = [one for part in names.values() for one in (part if isinstance(part, list | tuple) else [part])]
    return [str(name) for name in names or ()]


def _dimensions(numbers: Sequence[int], names: Sequence[str] = ()) -> str:
    """Return dimensions in words, with their names where there are any."""
    words = [f"{i} ({names[i]})" if i < len(names) else str(i) for i in numbers]
    listed = ", ".join(words[:12]) + (f" and {len(words) - 12} more" if len(words) > 12 else "")
    return f"dimension{'s' * (len(words) > 1)} {listed}"
