"""The learner under DeepSpeed ZeRO-2, by the public functions of `deepspeed.utils`. Imported for that backend alone."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_set_full_fp32_param
from torch import Tensor, nn

from poco_vla.algorithms import Algorithm, Phase
from poco_vla.algorithms.contract import Loss
from poco_vla.config import OptimConfig
from poco_vla.errors import ConfigError
from poco_vla.learner.backends import CopiedLearner, copy_sharing_frozen, make_adam
from poco_vla.learner.launcher import DEEPSPEED_BATCH_SIZES
from poco_vla.noise import UpdateNoise
from poco_vla.types import ChunkBatch, Metrics


class ZeroLearner(CopiedLearner):
    """Train with whole parameters, and gradients and moments in parts.

    DeepSpeed lays the parameters of each group end to end and gives Adam this process's part of that as one tensor. It
    would step every group, so that a group without a gradient would go on by its momentum, and clip all of them by one
    norm: the optimizer that it is given sees to both.
    """

    def __init__(self, accelerator: Accelerator, algorithm: Algorithm, config: OptimConfig) -> None:
        self.accelerator, self.config = accelerator, config
        self.algorithm = self._learned = algorithm.to(accelerator.device)
        self.groups = tuple(group["name"] for group in algorithm.parameter_groups())
        whole = copy_sharing_frozen(algorithm)
        unfit = {str(p.dtype) for p in algorithm.parameters() if p.requires_grad and p.dtype != torch.float32}
        if unfit:
            raise ConfigError(f"DeepSpeed was given parameters to train in {', '.join(unfit)}, expected float32")
        plugin: Any = accelerator.state.deepspeed_plugin
        settings = plugin.deepspeed_config
        said = {name: settings.get(name, "auto") for name in DEEPSPEED_BATCH_SIZES}
        # Accelerate asks for a batch size here (DeepSpeed only counts with it), and would clip at 1 by itself.
        settings |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
        self._adam = make_adam(_GroupAdam, algorithm, config)
        self._parameters = [list(group["params"]) for group in self._adam.param_groups]
        self.module, self.optimizer = accelerator.prepare(_Trained(algorithm), self._adam)
        settings |= said  # the configuration outlives this run: the next one checks what the user said
        self.use_copy(whole)

    def clip(self, phase: Phase) -> Metrics:
        learning = self.algorithm.trained_groups(phase)
        norms: Metrics = {}
        self._adam.scales = {}
        for name, group, parameters in zip(self.groups, self._adam.param_groups, self._parameters, strict=True):
            if name in learning:
                gradients: Iterable[Any] = map(safe_get_full_grad, parameters)  # each whole, one after the other
                norms[f"{name}_grad_norm"] = norm = torch.stack([g.norm() for g in gradients]).norm()
                scale = (self.config.max_grad_norm or float("inf")) / (norm + 1e-6)
                self._adam.scales[id(group)] = scale.clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        return norms

    def step(self, phase: Phase) -> None:
        self.module.step()
        self._learned.after_step(phase)

    @contextmanager
    def _accumulate(self, *, last: bool) -> Iterator[None]:
        self.module.set_gradient_accumulation_boundary(last)
        yield

    def _backward(self, loss: Tensor) -> None:
        self.module.backward(loss)  # not by Accelerate, which steps as well, before anybody has looked at the loss

    def scatter(self) -> None:
        super().scatter()
        for p in (p for group in self._parameters for p in group):  # Adam's are copies of what the module holds
            safe_set_full_fp32_param(p, p)

    def optimizer_state(self) -> dict[str, Any]:
        state, begin = self._adam.state_dict(), 0
        moments: dict[int, dict[str, Tensor]] = {}
        for i, (group, parameters) in enumerate(zip(state["param_groups"], self._parameters, strict=True)):
            group["params"] = list(range(begin, begin := begin + len(parameters)))
            for name, part in state["state"].get(i, {}).items():
                for number, value in zip(group["params"], self._gather_part(i, part), strict=True):
                    moments.setdefault(number, {})[name] = value
        return state | {"state": moments}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        for i, (group, saved) in enumerate(zip(self._adam.param_groups, state["param_groups"], strict=True)):
            group |= {name: value for name, value in saved.items() if name != "params"}
            entries = [state["state"].get(number) for number in saved["params"]]
            self._adam.state.pop(self._flat(i), None)
            if any(entries):
                steps = torch.stack([entry["step"] for entry in entries if entry])  # of one group: they are the same
                moments = {
                    name: self._own_part(i, [entry[name] if entry else None for entry in entries])
                    for name in ("exp_avg", "exp_avg_sq")
                }
                self._adam.state[self._flat(i)] = {"step": steps.max().to(self.accelerator.device), **moments}

    def forget(self, groups: Collection[str]) -> None:
        for i, name in enumerate(self.groups):
            if name in groups:
                self._adam.state.pop(self._flat(i), None)

    def _flat(self, group: int) -> Tensor:
        """Return this process's part of a group, laid end to end: what Adam steps."""
        return self._adam.param_groups[group]["params"][0]

    # DeepSpeed reads and writes Adam's moments only after a step, and only those that it had then. Its functions for
    # weights work at any time: moments stand where the weights are while they are gathered or cut.

    @torch.no_grad()
    def _gather_part(self, group: int, part: Tensor) -> list[Tensor]:
        """Return a state of Adam for each parameter of a group, whole, from the processes' parts."""
        parameters, flat = self._parameters[group], self._flat(group)
        if part.ndim == 0:  # the number of steps
            return [part.clone() for _ in parameters]
        weights = flat.clone()
        flat.copy_(part)
        whole: list[Any] = [safe_get_full_fp32_param(p) for p in parameters]
        flat.copy_(weights)
        return whole

    @torch.no_grad()
    def _own_part(self, group: int, values: Sequence[Tensor | None]) -> Tensor:
        """Return this process's part of a state of Adam, from its value for each parameter of a group (None: 0)."""
        flat = self._flat(group)
        weights = flat.clone()
        flat.zero_()
        for parameter, value in zip(self._parameters[group], values, strict=True):
            if value is not None:
                safe_set_full_fp32_param(parameter, value.to(flat.device))
        part = flat.clone()
        flat.copy_(weights)
        return part


class _GroupAdam(torch.optim.Adam):
    """Step one group at a time, as DeepSpeed asks for: a process's part of it, laid end to end, its gradient averaged.

    Attributes:
        scales: factor [] of the gradient of each group that learns, by the group's id; others are left alone.
    """

    scales: dict[int, Tensor]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        (group,) = self.param_groups
        if id(group) in self.scales:
            group["params"][0].grad.mul_(self.scales[id(group)])
            super().step(closure)


class _Trained(nn.Module):
    """Hold what DeepSpeed sees of a learner: what trains, and neither the frozen rest nor target networks."""

    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__()
        self.trained = nn.ParameterList(p for p in algorithm.parameters() if p.requires_grad)
        self._algorithm = (algorithm,)  # in a tuple it is no submodule

    def forward(self, batch: ChunkBatch, phase: Phase, noise: UpdateNoise) -> Loss:
        return self._algorithm[0](batch, phase, noise)
