"""POCO for vision-language-action policies: imitate first, then succeed. See README.md."""

from poco_vla.algorithm import Poco
from poco_vla.config import (
    DatasetConfig,
    DemonstrationConfig,
    EnvSpec,
    EvalConfig,
    GuardConfig,
    OptimConfig,
    PocoConfig,
    ReplayConfig,
    RewardConfig,
    TrainConfig,
)
from poco_vla.critic import ChunkCritic, polyak_update, td_target
from poco_vla.distill import clipped_distillation, flow_errors
from poco_vla.errors import DataError, PocoError, PolicyError
from poco_vla.files import whole_folder
from poco_vla.flow import Draws, integrate, interpolate, target_velocity
from poco_vla.lora import Lora, inject_lora, merge_lora
from poco_vla.policy import FlowPolicy, Prefix, propose
from poco_vla.posterior import effective_sample_size, posterior_weights
from poco_vla.registry import available_adapters, load_adapter
from poco_vla.testing import check_policy
from poco_vla.types import ActionSpec, ChunkBatch, Metrics

__version__ = "0.1.0"

__all__ = [
    "ActionSpec",
    "ChunkBatch",
    "ChunkCritic",
    "DataError",
    "DatasetConfig",
    "DemonstrationConfig",
    "Draws",
    "EnvSpec",
    "EvalConfig",
    "FlowPolicy",
    "GuardConfig",
    "Lora",
    "Metrics",
    "OptimConfig",
    "Poco",
    "PocoConfig",
    "PocoError",
    "PolicyError",
    "Prefix",
    "ReplayConfig",
    "RewardConfig",
    "TrainConfig",
    "available_adapters",
    "check_policy",
    "clipped_distillation",
    "effective_sample_size",
    "flow_errors",
    "inject_lora",
    "integrate",
    "interpolate",
    "load_adapter",
    "merge_lora",
    "polyak_update",
    "posterior_weights",
    "propose",
    "target_velocity",
    "td_target",
    "whole_folder",
]
