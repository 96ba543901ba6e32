"""Configuration: frozen dataclasses, validated when they are built, never changed afterwards.

Every field's docstring says its unit and where its default comes from ("paper": arXiv 2604.01860; "authors' code":
their released simulation code; neither: measured by this library). Every field states its role
(:mod:`poco_vla.roles`), by itself or by the record around it: what may change at a resume, what makes another setting
in a report and what the Hub is told follow from it.
"""

from poco_vla.config.acting import DEFAULT_ENV, DEFAULT_TASK, EnvSpec, EvalConfig, InteractionConfig
from poco_vla.config.data import (
    REWARDS,
    DatasetConfig,
    DemonstrationConfig,
    PrefixConfig,
    ReplayConfig,
    RewardConfig,
)
from poco_vla.config.poco import PocoConfig
from poco_vla.config.train import ALGORITHM_SECTIONS, GuardConfig, OptimConfig, TrainConfig
from poco_vla.config.values import differences, flat, from_json, num_bytes, to_json, to_scalars

__all__ = [
    "ALGORITHM_SECTIONS",
    "DEFAULT_ENV",
    "DEFAULT_TASK",
    "REWARDS",
    "DatasetConfig",
    "DemonstrationConfig",
    "EnvSpec",
    "EvalConfig",
    "GuardConfig",
    "InteractionConfig",
    "OptimConfig",
    "PocoConfig",
    "PrefixConfig",
    "ReplayConfig",
    "RewardConfig",
    "TrainConfig",
    "differences",
    "flat",
    "from_json",
    "num_bytes",
    "to_json",
    "to_scalars",
]
