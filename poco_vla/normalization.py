"""Statistics that a LeRobot policy normalises by: read back from its folder, and checked before they are relied on.

LeRobot leaves a column as it is, without a word, where they are missing. For adapters of LeRobot's policies.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poco_vla.errors import DataError
from poco_vla.heads import read_tensors

NEEDED = {
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
    "MIN_MAX": ("min", "max"),
    "MEAN_STD": ("mean", "std"),
}
"""Statistics of each of LeRobot's normalisation modes."""

type Stats = Mapping[str, Mapping[str, Any]]


def saved_stats(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Statistics of the normaliser saved in a policy's folder; empty where none are saved.

    Raises:
        PolicyError: a file is damaged.
    """
    stats: dict[str, dict[str, Tensor]] = {}
    for file in sorted(folder.glob("policy_preprocessor*normalizer*.safetensors")):
        for name, value in read_tensors(file).items():
            key, kind = name.rsplit(".", 1)
            stats.setdefault(key, {})[kind] = value
    return stats


def check_stats(config: Any, stats: Stats, where: str) -> None:
    """Raise DataError unless state and actions have the statistics that their normalisation needs, with a range.

    Args:
        config: LeRobot's configuration of the policy: its features and `normalization_mapping`.
        stats: by column and kind.
        where: they come from, for the message.
    """
    for key, feature in {**(config.input_features or {}), **(config.output_features or {})}.items():
        kind = feature.type.value
        mode = getattr(config.normalization_mapping.get(kind), "value", None)
        if kind == "VISUAL" or mode not in NEEDED:
            continue
        low, high = NEEDED[mode]
        values = stats.get(key, {})
        if low not in values or high not in values:
            raise DataError(
                f'{where} has no {low} and {high} for "{key}" (found: {", ".join(values) or "nothing"}), which '
                f"{mode} normalisation needs. Add them with LeRobot's augment_dataset_quantile_stats script, or "
                'give policy_options {"normalization_mapping": {"STATE": "MEAN_STD", "ACTION": "MEAN_STD"}}.'
            )
        bottom, top = (torch.as_tensor(values[name], dtype=torch.float64).flatten() for name in (low, high))
        if bottom.numel() != feature.shape[0]:
            raise DataError(
                f'{where} has statistics of {bottom.numel()} dimensions for "{key}", which has {feature.shape[0]}'
            )
        by_deviation = mode == "MEAN_STD"
        spreads, sizes = (top, bottom.abs()) if by_deviation else (top - bottom, top.abs())
        flat = [i for i, spread in enumerate(spreads) if not spread > 1e-6 * sizes[i].clamp_min(1)]
        if flat:
            raise DataError(
                f'"{key}" hardly varies in dimension{"s" * (len(flat) > 1)} {", ".join(map(str, flat))} of {where}: '
                f"{'std = 0' if by_deviation else f'{low} = {high}'}, and {mode} normalisation would divide by "
                'zero. Drop what never moves from the dataset, or give policy_options {"normalization_mapping": '
                f'{{"{kind}": "{"IDENTITY" if by_deviation else "MEAN_STD"}"}}}}.'
            )
