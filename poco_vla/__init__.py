"""POCO for vision-language-action policies: imitate first, then succeed. See README.md."""

from typing import TYPE_CHECKING

from poco_vla.deprecated import install
from poco_vla.lazy import load_on_demand

if TYPE_CHECKING:
    from poco_vla.algorithms import Algorithm, available_algorithms, load_algorithm
    from poco_vla.algorithms.poco import Poco
    from poco_vla.config import (
        DatasetConfig,
        DemonstrationConfig,
        EnvSpec,
        EvalConfig,
        GuardConfig,
        InteractionConfig,
        OptimConfig,
        PocoConfig,
        PrefixConfig,
        ReplayConfig,
        RewardConfig,
        TrainConfig,
    )
    from poco_vla.conformance.algorithm import check_algorithm
    from poco_vla.conformance.kit import check_policy
    from poco_vla.critic import ChunkCritic, polyak_update, td_target
    from poco_vla.dense import linear
    from poco_vla.distill import clipped_distillation, flow_errors
    from poco_vla.errors import AlgorithmError, DataError, PocoError, PolicyError
    from poco_vla.evaluation import evaluate
    from poco_vla.files import atomic_folder
    from poco_vla.flow import integrate, interpolate, target_velocity
    from poco_vla.hub import export_policy, load_critic, load_head, push_head
    from poco_vla.noise import GlobalBatchRNG
    from poco_vla.policy import FlowPolicy, Prefix, propose
    from poco_vla.posterior import effective_sample_size, posterior_weights
    from poco_vla.pretrained.lora import Lora, inject_lora, merge_lora
    from poco_vla.registry import available_adapters, load_adapter
    from poco_vla.training.trainer import train
    from poco_vla.types import ActionSpec, ChunkBatch, Metrics

install()
del install

__getattr__, __dir__ = load_on_demand(
    __name__,
    {
        "algorithms": ["Algorithm", "available_algorithms", "load_algorithm"],
        "algorithms.poco": ["Poco"],
        "config": [
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
        ],
        "critic": ["ChunkCritic", "polyak_update", "td_target"],
        "dense": ["linear"],
        "distill": ["clipped_distillation", "flow_errors"],
        "errors": ["AlgorithmError", "DataError", "PocoError", "PolicyError"],
        "evaluation": ["evaluate"],
        "files": ["atomic_folder"],
        "flow": ["integrate", "interpolate", "target_velocity"],
        "hub": ["export_policy", "load_critic", "load_head", "push_head"],
        "pretrained.lora": ["Lora", "inject_lora", "merge_lora"],
        "noise": ["GlobalBatchRNG"],
        "policy": ["FlowPolicy", "Prefix", "propose"],
        "posterior": ["effective_sample_size", "posterior_weights"],
        "registry": ["available_adapters", "load_adapter"],
        "conformance.algorithm": ["check_algorithm"],
        "conformance.kit": ["check_policy"],
        "training.trainer": ["train"],
        "types": ["ActionSpec", "ChunkBatch", "Metrics"],
    },
)

__version__ = "0.1.0"

__all__ = [
    "ActionSpec",
    "Algorithm",
    "AlgorithmError",
    "ChunkBatch",
    "ChunkCritic",
    "DataError",
    "DatasetConfig",
    "DemonstrationConfig",
    "EnvSpec",
    "EvalConfig",
    "FlowPolicy",
    "GlobalBatchRNG",
    "GuardConfig",
    "InteractionConfig",
    "Lora",
    "Metrics",
    "OptimConfig",
    "Poco",
    "PocoConfig",
    "PocoError",
    "PolicyError",
    "Prefix",
    "PrefixConfig",
    "ReplayConfig",
    "RewardConfig",
    "TrainConfig",
    "atomic_folder",
    "available_adapters",
    "available_algorithms",
    "check_algorithm",
    "check_policy",
    "clipped_distillation",
    "effective_sample_size",
    "evaluate",
    "export_policy",
    "flow_errors",
    "inject_lora",
    "integrate",
    "interpolate",
    "linear",
    "load_adapter",
    "load_algorithm",
    "load_critic",
    "load_head",
    "merge_lora",
    "polyak_update",
    "posterior_weights",
    "propose",
    "push_head",
    "target_velocity",
    "td_target",
    "train",
]
