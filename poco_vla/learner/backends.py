"""The learner under each of Accelerate's backends: one process, DDP, FSDP2 and DeepSpeed ZeRO-2.

An algorithm is one module with a few groups of parameters, so most of it is Accelerate's own. What is not:

- DDP wants to hear that now one group, now another has no gradient.
- FSDP2 leaves each process a part of every trained parameter, and DeepSpeed makes each a stretch of one long tensor:
  whoever acts, evaluates or saves reads a whole copy, which `Learner.gather` brings up to date.
- What is frozen is not cut, sent or cast: every process holds it whole, and shares it with that copy. The rest is one
  FSDP unit (no wrap policy), since adapters call parts of their layers by themselves.
- DeepSpeed steps the whole of a group, so it would go on moving an actor that has no gradient by its momentum, and it
  clips all groups by one norm: the optimizer that it is given sees to both.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
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
    is_compiled_module,
)
from torch import Tensor, distributed, nn

from poco_vla.algorithms import Algorithm, Phase
from poco_vla.config import OptimConfig, TrainConfig
from poco_vla.errors import ConfigError
from poco_vla.learner.launcher import (
    DEEPSPEED_BATCH_SIZES,
    launched_precision,
    refuse_unfit_deepspeed,
    refuse_unheeded,
)
from poco_vla.noise import UpdateNoise, micro_batches
from poco_vla.types import ChunkBatch, Metrics

type Loss = tuple[Tensor, Metrics]
type MicroBatch = Callable[[ChunkBatch, UpdateNoise, Phase], int]
"""Return how many transitions of a batch are computed at once."""


# -- how it was launched ----------------------------------------------------------------------------------------------


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
    accelerator = Accelerator(
        cpu=gloo and not zero,
        mixed_precision=launched_precision(config),
        log_with=list(config.trackers) or None,
        project_dir=config.output_dir,  # trackers want one here; it becomes the run's own folder later
        # Before the critic learns, and while the actor is frozen, one of the two has no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True), group],
    )
    if fsdp and accelerator.distributed_type == DistributedType.MULTI_CPU and gloo:
        _shard_on_cpus(accelerator)
    _check(accelerator, config, launched, fsdp=fsdp, zero=zero)
    return accelerator


def _asked_for(what: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{what}", "").lower() in ("1", "true", "yes", "on")


def _shard_on_cpus(accelerator: Accelerator) -> None:
    """FSDP2 over gloo. Torch has it; Accelerate 1.15 takes FSDP for a matter of GPUs and falls back to DDP silently."""
    state = accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin()  # from the environment variables of the launcher
    state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


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


# -- the learner ------------------------------------------------------------------------------------------------------


class Learner:
    """Module and optimizer under one process or DDP: whole on every process.

    Args:
        accelerator: its backend.
        algorithm: what learns.
        config: learning rates and the bound of the gradients' norms.

    Attributes:
        algorithm: whole, for all that acts, evaluates or saves. It is what learns, or a copy (`apart`).
        apart: it is a copy, as new as the last `gather`.
        optimizer: Accelerate's; its first group is the actor's.
        groups: names of the optimizer's groups, in its order.
    """

    apart = False

    def __init__(self, accelerator: Accelerator, algorithm: Algorithm, config: OptimConfig) -> None:
        self.accelerator, self.algorithm, self.config = accelerator, algorithm, config
        self.groups = _names(algorithm)
        self.module, self.optimizer = accelerator.prepare(algorithm, _adam(torch.optim.Adam, algorithm, config))

    def update(
        self,
        batch: ChunkBatch,
        phase: Phase,
        *,
        micro_batch: MicroBatch | None = None,
        check_loss: Callable[[Tensor, Metrics], None] = lambda loss, metrics: None,
        check_norms: Callable[[Metrics], None] = lambda norms: None,
        changing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Loss:
        """Update the weights by a batch, and return its loss and metrics.

        Args:
            batch: this process's part of the global batch.
            phase: whose loss it is.
            micro_batch: how many transitions are computed at once; all when None.
            check_loss: is given loss and metrics before the step; when it raises, nothing was changed.
            check_norms: is given the gradients' norms, which are among the metrics by then, likewise.
            changing: entered while weights change.
        """
        loss, metrics = self.gradients(batch, phase, micro_batch)
        check_loss(loss, metrics)

        def check(norms: Metrics) -> None:
            metrics.update(norms)
            check_norms(norms)

        with changing():
            metrics |= self.step(phase, check)
        return loss, metrics

    def gradients(self, batch: ChunkBatch, phase: Phase, micro_batch: MicroBatch | None = None) -> Loss:
        """Compute the gradients of a batch, in micro-batches, and return its loss and metrics."""
        noise = self.algorithm.draw_noise(batch, phase)
        pieces = list(micro_batches(batch, noise, micro_batch(batch, noise, phase) if micro_batch else len(batch)))
        total, means, names = 0.0, 0.0, []
        for i, (rows, its_noise, share) in enumerate(pieces, start=1):
            loss, metrics = self._backward(rows, phase, its_noise, share, last=i == len(pieces))
            total = total + loss * share
            names, means = list(metrics), means + torch.stack(list(metrics.values())) * share
        assert isinstance(total, Tensor)
        assert isinstance(means, Tensor)
        return total, dict(zip(names, means, strict=True))

    def _backward(self, batch: ChunkBatch, phase: Phase, noise: UpdateNoise, share: float, *, last: bool) -> Loss:
        """Return loss and metrics of a micro-batch; add `share` of its gradient to that of those before it. With the
        `last` one the gradients of the processes are reduced."""
        with nullcontext() if last else self.accelerator.no_sync(self.module):
            loss, metrics = self.module(batch, phase, noise)
            self.accelerator.backward(loss * share)
        if not last and is_compiled_module(self.module):  # a graph's next run writes over what this one gave
            for p in self.algorithm.parameters():
                p.grad = None if p.grad is None else p.grad.clone()
        return loss.detach(), metrics

    def measure(self, batch: ChunkBatch, phase: Phase, noise: UpdateNoise) -> None:
        """Compute loss and gradients of a batch, for their memory alone; `optimizer.zero_grad` drops them."""
        with self.accelerator.no_sync(self.module):
            self.accelerator.backward(self.module(batch, phase, noise)[0])

    def step(self, phase: Phase, check: Callable[[Metrics], None] = lambda norms: None) -> Metrics:
        """Clip each group by itself, step, drop the gradients, and return the norms [] of those that there were.

        `check` is given these norms before the step; when it raises, weights and optimizer are as they were."""
        norms: Metrics = {}
        for name, group in zip(self.groups, self.optimizer.param_groups, strict=True):
            if any(p.grad is not None for p in group["params"]):
                norm = self.accelerator.clip_grad_norm_(group["params"], self.config.max_grad_norm or float("inf"))
                assert norm is not None
                norms[f"{name}_grad_norm"] = _whole(norm.detach())
        check(norms)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._after_step(phase)
        return norms

    def _after_step(self, phase: Phase) -> None:
        self.algorithm.after_step(phase)

    def gather(self) -> None:
        """Bring a copy up to date. All processes call this together."""

    def scatter(self) -> None:
        """Take over the weights of `algorithm`, to which others were given."""

    def optimizer_state(self) -> dict[str, Any]:
        """Return the state that one process's Adam gives, whatever the backend. All processes call this together."""
        return self.optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Take `optimizer_state` of any backend back."""
        self.optimizer.load_state_dict(state)

    def forget_actor(self) -> None:
        """The actor's optimizer state begins anew."""
        for parameter in self.optimizer.param_groups[0]["params"]:
            self.optimizer.state.pop(parameter, None)


class _ApartLearner(Learner):
    """A learner whose weights are not fit to be read by others: parts, or stretches of one long tensor (which
    safetensors refuses). `algorithm` is a copy that shares what is frozen."""

    apart = True
    _learned: Algorithm
    _pairs: list[tuple[Tensor, Tensor]]

    def measure(self, batch: ChunkBatch, phase: Phase, noise: UpdateNoise) -> None:
        raise AssertionError("memory is refused when it is launched")

    def _after_step(self, phase: Phase) -> None:
        self._learned.after_step(phase)

    @torch.no_grad()
    def gather(self) -> None:
        for learned, own in self._pairs:
            own.copy_(_whole(learned))

    @torch.no_grad()
    def scatter(self) -> None:
        for learned, own in self._pairs:
            learned.copy_(_part(own, learned))

    def _copied_to(self, whole: Algorithm) -> None:
        """Make `whole` the copy; what was given is what learns."""
        self._learned, self.algorithm = self.algorithm, whole
        pairs = zip(self._learned.parameters(), whole.parameters(), strict=True)
        self._pairs = [(learned, own) for learned, own in pairs if learned is not own]


class ShardedLearner(_ApartLearner):
    """Under FSDP2: a part of every trained parameter, gradient and moment on each process."""

    def __init__(self, accelerator: Accelerator, algorithm: Algorithm, config: OptimConfig) -> None:
        whole = _copy(algorithm.to(accelerator.device))
        frozen = nn.ParameterList(p for p in algorithm.policy.parameters() if not p.requires_grad)
        plugin: Any = accelerator.state.fsdp_plugin
        plugin.ignored_modules = [frozen]
        super().__init__(accelerator, algorithm, config)
        self._copied_to(whole)

    def optimizer_state(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        moments = {i: {name: _whole(value) for name, value in entry.items()} for i, entry in state["state"].items()}
        return state | {"state": moments}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            i: {name: value if value.ndim == 0 else _part(value, parameters[i]) for name, value in entry.items()}
            for i, entry in state["state"].items()
        }
        self.optimizer.load_state_dict(state | {"state": moments})


class ZeroLearner(_ApartLearner):
    """Under DeepSpeed ZeRO-2: parameters whole, gradients and moments in parts."""

    def __init__(self, accelerator: Accelerator, algorithm: Algorithm, config: OptimConfig) -> None:
        self.accelerator, self.algorithm, self.config = accelerator, algorithm.to(accelerator.device), config
        self.groups = _names(algorithm)
        whole = _copy(algorithm)
        unfit = {str(p.dtype) for p in algorithm.parameters() if p.requires_grad and p.dtype != torch.float32}
        if unfit:
            raise ConfigError(f"DeepSpeed was given parameters to train in {', '.join(unfit)}, expected float32")
        plugin: Any = accelerator.state.deepspeed_plugin
        settings = plugin.deepspeed_config
        said = {name: settings.get(name, "auto") for name in DEEPSPEED_BATCH_SIZES}
        # Accelerate wants a batch size, of which DeepSpeed here only counts; and would clip at 1 by itself.
        settings |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
        self._adam = _adam(_GroupAdam, algorithm, config)
        self._parameters = [list(group["params"]) for group in self._adam.param_groups]
        self.module, self.optimizer = accelerator.prepare(_Trained(algorithm), self._adam)
        plugin.deepspeed_config |= said  # the configuration outlives this run: the next one checks what the user said
        self._zero: Any = self.optimizer.optimizer
        self._copied_to(whole)

    def _backward(self, batch: ChunkBatch, phase: Phase, noise: UpdateNoise, share: float, *, last: bool) -> Loss:
        # Not by `accelerator.backward`: that one steps as well, before anybody has looked at the loss.
        self.module.set_gradient_accumulation_boundary(last)
        loss, metrics = self.module(batch, phase, noise)
        self.module.backward(loss * share)
        return loss.detach(), metrics

    def step(self, phase: Phase, check: Callable[[Metrics], None] = lambda norms: None) -> Metrics:
        learning = self.algorithm.trained_groups(phase)
        names = {id(group): name for group, name in zip(self._zero.param_groups, self.groups, strict=True)}
        self._adam.begin({key for key, name in names.items() if name in learning})
        self._adam.max_norm = self.config.max_grad_norm
        check(self._norms(learning))  # DeepSpeed steps one group after the other: all are looked at before
        self.module.step()
        self._after_step(phase)
        return {f"{names[key]}_grad_norm": norm for key, norm in self._adam.norms.items()}

    def _norms(self, learning: Set[str]) -> Metrics:
        """Norm [] of each learning group's averaged gradient, of which this process holds a part."""
        parts: dict[int, list[Tensor]] = self._zero.averaged_gradients
        squares = [
            sum((part.float().square().sum() for part in parts.get(i) or []), torch.zeros((), device=flat.device))
            for i, flat in enumerate(self._flats())
        ]
        total = torch.stack(squares)
        if distributed.get_world_size() > 1:
            distributed.all_reduce(total)
        return {
            f"{name}_grad_norm": norm for name, norm in zip(self.groups, total.sqrt(), strict=True) if name in learning
        }

    def scatter(self) -> None:
        super().scatter()
        self._zero.refresh_fp32_params()  # what it steps is a copy of what the module holds

    def optimizer_state(self) -> dict[str, Any]:
        moments: dict[int, dict[str, Tensor]] = {}
        begin = 0
        for flat, parameters in zip(self._flats(), self._parameters, strict=True):
            entry = self._adam.state.get(flat, {})
            for i, parameter in enumerate(parameters if entry else (), start=begin):
                moments[i] = {
                    name: value.clone() if value.ndim == 0 else self._gathered(parameter, value)
                    for name, value in entry.items()
                }
            begin += len(parameters)
        numbers = iter(range(begin))
        groups = [
            {name: value for name, value in group.items() if name != "params"}
            | {"params": [next(numbers) for _ in parameters]}
            for group, parameters in zip(self._zero.param_groups, self._parameters, strict=True)
        ]
        return {"state": moments, "param_groups": groups}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        begin = 0
        for flat, parameters, group, saved in zip(
            self._flats(), self._parameters, self._zero.param_groups, state["param_groups"], strict=True
        ):
            group |= {name: value for name, value in saved.items() if name != "params"}
            entries = {p: state["state"].get(i) for i, p in enumerate(parameters, start=begin)}
            begin += len(parameters)
            self._adam.state.pop(flat, None)
            if any(entries.values()):
                self._adam.state[flat] = self._laid_out(flat, entries)

    def forget_actor(self) -> None:
        self._adam.state.pop(self._flats()[0], None)

    def _flats(self) -> list[Tensor]:
        """This process's part of each group, laid end to end: what Adam steps."""
        return list(self._zero.single_partition_of_fp32_groups)

    def _laid_out(self, flat: Tensor, entries: Mapping[Tensor, Mapping[str, Tensor] | None]) -> dict[str, Tensor]:
        """Adam's state of `flat` out of its parameters' own. They have stepped together: one number of steps."""
        laid = {"step": torch.zeros((), dtype=torch.float32, device=flat.device)}
        laid |= {name: torch.zeros_like(flat) for name in ("exp_avg", "exp_avg_sq")}
        for parameter, entry in entries.items():
            if entry is None:
                continue
            laid["step"].copy_(torch.maximum(laid["step"], entry["step"].to(flat.device)))
            for of_flat, of_parameter in self._overlap(parameter):
                for name in ("exp_avg", "exp_avg_sq"):
                    laid[name][of_flat] = entry[name].flatten()[of_parameter].to(flat.device)
        return laid

    def _gathered(self, parameter: Tensor, values: Tensor) -> Tensor:
        """Return whole what the processes hold in parts for one parameter."""
        whole = torch.zeros(parameter.numel(), dtype=values.dtype, device=values.device)
        for of_flat, of_parameter in self._overlap(parameter):
            whole[of_parameter] = values[of_flat]
        if self.accelerator.num_processes > 1:
            distributed.all_reduce(whole)
        return whole.view_as(parameter)

    @staticmethod
    def _overlap(parameter: Any) -> Iterator[tuple[slice, slice]]:
        """Yield where a parameter lies in this process's part of its group, and which of its entries do."""
        found = parameter._hp_mapping
        if found is not None:
            flat, own = found.hp_fragment_address, found.lp_fragment_address
            yield slice(flat.start, flat.start + flat.numel), slice(own.start, own.start + own.numel)


class _GroupAdam(torch.optim.Adam):
    """Adam that DeepSpeed steps one group at a time: a process's part of it, laid end to end, its gradient averaged."""

    learning: frozenset[int] = frozenset()
    max_norm: float | None = None
    norms: dict[int, Tensor]

    def begin(self, learning: set[int]) -> None:
        """An update in which groups of these ids have a gradient; the others are left alone."""
        self.learning, self.norms = frozenset(learning), dict[int, Tensor]()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        (group,) = self.param_groups
        if id(group) not in self.learning:
            return
        (flat,) = group["params"]
        square = flat.grad.square().sum()
        if distributed.get_world_size() > 1:
            distributed.all_reduce(square)
        self.norms[id(group)] = norm = square.sqrt()
        if self.max_norm is not None:
            flat.grad.mul_(torch.clamp(self.max_norm / (norm + 1e-6), max=1.0))  # as torch.nn.utils.clip_grad_norm_
        super().step(closure)


class _Trained(nn.Module):
    """Hold what DeepSpeed sees of a learner: what trains, and neither the frozen rest nor target networks."""

    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__()
        self.trained = nn.ParameterList(p for p in algorithm.parameters() if p.requires_grad)
        self._algorithm = (algorithm,)  # in a tuple it is no submodule

    def forward(self, batch: ChunkBatch, phase: Phase, noise: UpdateNoise) -> Loss:
        return self._algorithm[0](batch, phase, noise)


def learner_of(accelerator: Accelerator, algorithm: Algorithm, config: OptimConfig) -> Learner:
    """Return the learner of the accelerator's backend."""
    kinds = {DistributedType.FSDP: ShardedLearner, DistributedType.DEEPSPEED: ZeroLearner}
    return kinds.get(accelerator.distributed_type, Learner)(accelerator, algorithm, config)


def _names(algorithm: Algorithm) -> tuple[str, ...]:
    return tuple(group["name"] for group in algorithm.parameter_groups())


def _adam[A: torch.optim.Adam](kind: type[A], algorithm: Algorithm, config: OptimConfig) -> A:
    # Deviation 5: torch counts steps per parameter, so that the critic's first ones after SFT are not oversized.
    groups = algorithm.parameter_groups(config.actor_lr, config.critic_lr)
    return kind([{"params": group["params"], "lr": group["lr"]} for group in groups], fused=True)


def _copy(algorithm: Algorithm) -> Algorithm:
    """Return a copy that shares what is frozen, buffers and random numbers."""
    shared = [p for p in algorithm.policy.parameters() if not p.requires_grad]
    return deepcopy(algorithm, {id(one): one for one in [*shared, *algorithm.buffers(), algorithm.rng]})


# DTensor is told by what it has: importing it takes half a second, which nobody but FSDP has a use for.


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _part(whole: Tensor, like: Any) -> Tensor:
    """This process's part of a tensor that all of them have, cut as `like` is; all of it where `like` is whole."""
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    placed = whole.to(like.device, like.dtype)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)
