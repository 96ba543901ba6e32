"""Open Accelerate as `accelerate launch` was told, refuse what would not run as asked, choose the learner."""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)

from poco_vla.algorithms import Algorithm
from poco_vla.config import OptimConfig, TrainConfig
from poco_vla.errors import ConfigError
from poco_vla.learner.backends import Learner, ShardedLearner
from poco_vla.learner.launcher import launched_precision, refuse_unfit_deepspeed, refuse_unheeded


def open_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate as `accelerate launch` was told, on CPUs too.

    Raises:
        ConfigError: what was asked for is not what would run, or cannot be combined.
    """
    refuse_unheeded()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    fsdp, zero = _asked_for("FSDP"), _asked_for("DEEPSPEED")
    gloo = (launched > 1 or fsdp or zero) and not torch.accelerator.is_available()
    if zero and _asked_for("CPU"):
        raise ConfigError(
            "DeepSpeed was asked for together with ACCELERATE_USE_CPU, with which Accelerate leaves DeepSpeed out "
            "without a word. Unset that variable: where there is no GPU, the CPU is taken anyway."
        )
    group = InitProcessGroupKwargs(
        backend="gloo" if zero and gloo else None,
        timeout=timedelta(hours=12),  # others wait while the main one makes demonstrations or evaluates
    )
    tf32 = torch.backends.cuda.matmul.allow_tf32
    accelerator = Accelerator(
        cpu=gloo and not zero,
        mixed_precision=launched_precision(config),
        log_with=list(config.trackers) or None,
        project_dir=config.output_dir,  # trackers want one here; it becomes the run's own folder later
        # Before the critic learns, and while the actor is frozen, one of the two has no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True), group],
    )
    torch.backends.cuda.matmul.allow_tf32 = tf32  # it switches TF32 on where a run is compiled; see `gpu_arithmetic`
    if fsdp and accelerator.distributed_type == DistributedType.MULTI_CPU and gloo:
        _shard_on_cpus(accelerator)
    _check(accelerator, config, launched, fsdp=fsdp, zero=zero)
    return accelerator


def learner_of(accelerator: Accelerator, algorithm: Algorithm, config: OptimConfig) -> Learner:
    """Return the learner of the accelerator's backend."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from poco_vla.learner.zero import ZeroLearner  # it imports DeepSpeed

        return ZeroLearner(accelerator, algorithm, config)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    return (ShardedLearner if sharded else Learner)(accelerator, algorithm, config)


def _asked_for(what: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{what}", "").lower() in ("1", "true", "yes", "on")


def _shard_on_cpus(accelerator: Accelerator) -> None:
    """FSDP2 over gloo. Torch has it; Accelerate 1.15 takes FSDP for a matter of GPUs and falls back to DDP silently."""
    state = accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin()  # from the environment variables of the launcher
    state.distributed_type = DistributedType.FSDP
    PartialState().distributed_type = DistributedType.FSDP


def _check(accelerator: Accelerator, config: TrainConfig, launched: int, *, fsdp: bool, zero: bool) -> None:
    kind = accelerator.distributed_type
    if launched != accelerator.num_processes:
        raise ConfigError(
            f"{launched} processes were launched, but Accelerate sees {accelerator.num_processes}: each would "
            "train by itself. On CPUs set ACCELERATE_USE_CPU=true."
        )
    for asked, name, wanted in ((fsdp, "FSDP", DistributedType.FSDP), (zero, "DeepSpeed", DistributedType.DEEPSPEED)):
        if asked and kind != wanted:
            raise ConfigError(
                f"{name} was asked for, but Accelerate runs {kind.value}: with ACCELERATE_USE_CPU it leaves {name} out "
                "without a word. Unset that variable, or take a configuration of DDP (recipes/accelerate/ddp_cpu.yaml)."
            )
    if kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    name = "FSDP" if kind == DistributedType.FSDP else "DeepSpeed"
    if launched_precision(config) != "no" or accelerator.mixed_precision != "no":
        raise ConfigError(
            f"mixed precision under {name} would take the critic along, whose values need float32: leave "
            "mixed_precision at no (an adapter's own options may keep its backbone in bfloat16), or use DDP"
        )
    if config.memory is not None:
        raise ConfigError(f"memory cannot be measured under {name}: say optim.micro_batch instead")
    _check_fsdp(accelerator) if kind == DistributedType.FSDP else _check_zero(accelerator)


def _check_fsdp(accelerator: Accelerator) -> None:
    plugin: Any = accelerator.state.fsdp_plugin
    unfit = {
        f"fsdp_version is {plugin.fsdp_version}, expected 2": plugin.fsdp_version != 2,
        "fsdp_auto_wrap_policy is set, expected NO_WRAP": plugin.auto_wrap_policy is not None,
        "fsdp_cpu_ram_efficient_loading is true, expected false": plugin.cpu_ram_efficient_loading,
        "fsdp_activation_checkpointing is true, expected false": plugin.activation_checkpointing,
        "fsdp_offload_params is true, expected false": "Offload" in type(plugin.cpu_offload).__name__
        and type(plugin.cpu_offload).__name__ != "OffloadPolicy",
    }
    _refuse(unfit, "recipes/accelerate/fsdp2.yaml")


def _check_zero(accelerator: Accelerator) -> None:
    plugin: Any = accelerator.state.deepspeed_plugin
    settings = plugin.deepspeed_config
    zero = settings["zero_optimization"]
    devices = [zero.get(f"offload_{what}", {}).get("device", "none") for what in ("optimizer", "param")]
    steps, clip = settings.get("gradient_accumulation_steps", 1), settings.get("gradient_clipping", "auto")
    unfit = {
        f"zero_stage is {zero['stage']}, expected 2": zero["stage"] != 2,
        "an offload device is set, expected none": devices != ["none", "none"],
        f"gradient_accumulation_steps is {steps}, expected 1 (optim.micro_batch does that)": steps not in (1, "auto"),
        f"gradient_clipping is {clip}, expected 0.0 (optim.max_grad_norm does that)": clip not in (0, "auto"),
        **dict.fromkeys(refuse_unfit_deepspeed(settings), True),
    }
    _refuse(unfit, "recipes/accelerate/zero2.yaml")


def _refuse(unfit: Mapping[str, bool], example: str) -> None:
    wrong = [words for words, holds in unfit.items() if holds]
    if wrong:
        raise ConfigError(f"the Accelerate configuration does not fit: {'; '.join(wrong)}. {example} does.")
