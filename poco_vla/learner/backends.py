"""The learner under each of Accelerate's backends: one process, DDP and FSDP2 (DeepSpeed: zero.py).

An algorithm is one module with a few groups of parameters, so most of it is Accelerate's own. What is not:

- DDP wants to hear that now one group, now another has no gradient.
- FSDP2 leaves each process a part of every trained parameter, and DeepSpeed makes each a stretch of one long tensor:
  whoever acts, evaluates or saves reads a whole copy, which `Learner.gather` brings up to date.
- What is frozen is not cut, sent or cast: every process holds it whole, and shares it with that copy. The rest is one
  FSDP unit (no wrap policy), since adapters call parts of their layers by themselves.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_compiled_module
from torch import Tensor, nn

from poco_vla.algorithms import Algorithm, Phase
from poco_vla.algorithms.contract import Loss
from poco_vla.config import OptimConfig
from poco_vla.noise import UpdateNoise, micro_batches
from poco_vla.types import ChunkBatch, Metrics

type MicroBatch = Callable[[ChunkBatch, UpdateNoise, Phase], int]
"""Return how many transitions of a batch are computed at once."""


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
        self.accelerator, self.config = accelerator, config
        self.algorithm = self._learned = algorithm
        self.groups = tuple(group["name"] for group in algorithm.parameter_groups())
        self.module, self.optimizer = accelerator.prepare(algorithm, make_adam(torch.optim.Adam, algorithm, config))

    def backward(self, batch: ChunkBatch, phase: Phase, micro_batch: MicroBatch) -> Loss:
        """Compute the gradients of a batch in micro-batches, and return its loss and metrics.

        Args:
            batch: this process's part of the global batch.
            phase: whose loss it is.
            micro_batch: how many transitions are computed at once.
        """
        noise = self.algorithm.draw_noise(batch, phase)
        pieces = list(micro_batches(batch, noise, micro_batch(batch, noise, phase)))
        total, means, names = 0.0, 0.0, []
        for i, (rows, its_noise, share) in enumerate(pieces, start=1):
            with self._accumulate(last=i == len(pieces)):
                loss, metrics = self.module(rows, phase, its_noise)
                self._backward(loss * share)
            total = total + loss.detach() * share
            names, means = list(metrics), means + torch.stack(list(metrics.values())) * share
        assert isinstance(total, Tensor)
        assert isinstance(means, Tensor)
        return total, dict(zip(names, means, strict=True))

    def clip(self, phase: Phase) -> Metrics:
        """Clip the gradients of each group by their own norm, and return the norms [] of the groups that have some."""
        norms: Metrics = {}
        for name, group in zip(self.groups, self.optimizer.param_groups, strict=True):
            if any(p.grad is not None for p in group["params"]):
                norm = self.accelerator.clip_grad_norm_(group["params"], self.config.max_grad_norm or float("inf"))
                assert norm is not None
                norms[f"{name}_grad_norm"] = _whole(norm.detach())
        return norms

    def step(self, phase: Phase) -> None:
        """Step the optimizer by the clipped gradients, and drop them."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._learned.after_step(phase)

    @contextmanager
    def _accumulate(self, *, last: bool) -> Iterator[None]:
        """Enter for loss and gradients of a micro-batch: with the `last` one those of the processes are reduced."""
        with nullcontext() if last else self.accelerator.no_sync(self.module):
            yield
        if not last and is_compiled_module(self.module):  # a graph's next run writes over what this one gave
            for p in self.algorithm.parameters():
                p.grad = None if p.grad is None else p.grad.clone()

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def measure(self, batch: ChunkBatch, phase: Phase, noise: UpdateNoise) -> None:
        """Compute loss and gradients of a batch, for their memory alone; `optimizer.zero_grad` drops them."""
        with self.accelerator.no_sync(self.module):
            self.accelerator.backward(self.module(batch, phase, noise)[0])

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

    def forget(self, groups: Collection[str]) -> None:
        """Let the optimizer state of some groups begin anew."""
        for name, group in zip(self.groups, self.optimizer.param_groups, strict=True):
            for parameter in group["params"] if name in groups else ():
                self.optimizer.state.pop(parameter, None)


class CopiedLearner(Learner):
    """A learner whose weights are not fit to be read by others: parts, or stretches of one long tensor (which
    safetensors refuses). `algorithm` is a copy that shares what is frozen."""

    apart = True
    _pairs: list[tuple[Tensor, Tensor]]

    def measure(self, batch: ChunkBatch, phase: Phase, noise: UpdateNoise) -> None:
        raise AssertionError("memory is refused when it is launched")

    @torch.no_grad()
    def gather(self) -> None:
        for learned, own in self._pairs:
            own.copy_(_whole(learned))

    @torch.no_grad()
    def scatter(self) -> None:
        for learned, own in self._pairs:
            learned.copy_(_part(own, learned))

    def use_copy(self, whole: Algorithm) -> None:
        """Make `whole` the copy; what was given is what learns."""
        self.algorithm = whole
        pairs = zip(self._learned.parameters(), whole.parameters(), strict=True)
        self._pairs = [(learned, own) for learned, own in pairs if learned is not own]


class ShardedLearner(CopiedLearner):
    """Under FSDP2: a part of every trained parameter, gradient and moment on each process."""

    def __init__(self, accelerator: Accelerator, algorithm: Algorithm, config: OptimConfig) -> None:
        whole = copy_sharing_frozen(algorithm.to(accelerator.device))
        frozen = nn.ParameterList(p for p in algorithm.policy.parameters() if not p.requires_grad)
        plugin: Any = accelerator.state.fsdp_plugin
        plugin.ignored_modules = [frozen]
        super().__init__(accelerator, algorithm, config)
        self.use_copy(whole)

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


def make_adam[A: torch.optim.Adam](kind: type[A], algorithm: Algorithm, config: OptimConfig) -> A:
    """Return the optimizer of what trains, with the learning rate of each group."""
    # Deviation 5: torch counts steps per parameter, so that the critic's first ones after SFT are not oversized.
    groups = algorithm.parameter_groups(config.actor_lr, config.critic_lr)
    return kind([{"params": group["params"], "lr": group["lr"]} for group in groups], fused=True)


def copy_sharing_frozen(algorithm: Algorithm) -> Algorithm:
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
