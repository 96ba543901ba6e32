"""From raw observations to the chunks that a robot executes."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from poco_vla.algorithms import Algorithm
from poco_vla.algorithms.on_policy.contract import OnPolicy
from poco_vla.data import preprocess_obs
from poco_vla.errors import NonFiniteError
from poco_vla.policy import FlowPolicy, Prefix
from poco_vla.simulators.observations import require_pictures

UNTRAINED = 0
"""Stands for `best_of_n` where the algorithm has learned nothing beyond SFT (`Algorithm.act_untrained`)."""


@runtime_checkable  # for the test run's machine-checked signatures
class RolloutObserver(Protocol):
    """Take the rollouts of an algorithm that learns from its latest ones."""

    def acted(
        self, obs: Mapping[str, np.ndarray], tasks: Sequence[str], chunk: Tensor, acted: Mapping[str, Tensor]
    ) -> None:
        """Take the chunks that were chosen in a round, and what :meth:`OnPolicy.explore` noted of them."""

    def received(
        self,
        brought: Sequence[Mapping[str, Any] | None],
        obs: Mapping[str, np.ndarray],
        tasks: Sequence[str],
    ) -> None:
        """Take what they brought (`EnvPool.brought`), and the states that follow."""


class Actor:
    """Return chunks for raw observations, as an algorithm acts.

    Args:
        acting: the algorithm that acts; a policy alone acts by plain samples.
        seed: of the actor's own noise.
        best_of_n: candidates per state; above 1 needs an algorithm that ranks them. `UNTRAINED`: none are ranked yet.

    Attributes:
        weights_version: of the weights that the last chunks are samples of: updates made until then.
        rollouts: receives what an algorithm that learns from its latest rollouts does, which acts by `explore` then.
        on_encoded: receives raw observations, their tasks and the prefix of each.
    """

    weights_version: int = 0
    rollouts: RolloutObserver | None = None
    on_encoded: Callable[[Mapping[str, np.ndarray], Sequence[str], Prefix], None] | None = None

    def __init__(self, acting: FlowPolicy | Algorithm, seed: int, best_of_n: int = 1) -> None:
        algorithm = acting if isinstance(acting, Algorithm) else Algorithm(acting)
        assert best_of_n <= 1 or algorithm.ranks_candidates, "best_of_n > 1 needs a critic"
        self.algorithm = algorithm.for_acting(max(1, best_of_n))
        self.policy = self.algorithm.policy
        self.best_of_n = best_of_n
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def chunks(
        self, obs: Mapping[str, np.ndarray], tasks: Sequence[str], *, best_of_n: int | None = None
    ) -> np.ndarray:
        """Return one chunk per state: [B, H, action_dim] float32, in the robot's units. `best_of_n` None takes the
        actor's own.

        Raises:
            NonFiniteError: an observation or a sampled action is NaN or infinite.
        """
        for key, column in obs.items():
            if column.dtype.kind == "f" and not np.isfinite(column).all():
                raise NonFiniteError(f'the environment returned a non-finite "{key}": nothing was sent to it')
        require_pictures(obs, list(self.policy.input_keys), "the environment")
        prefix = self.policy.encode(preprocess_obs(self.policy, obs, tasks))
        if self.on_encoded is not None:
            self.on_encoded(obs, tasks, prefix)
        n = self.best_of_n if best_of_n is None else best_of_n
        if self.rollouts is not None:
            assert isinstance(self.algorithm, OnPolicy)
            chunk, acted = self.algorithm.explore(prefix, self.generator)
            self.rollouts.acted(obs, tasks, chunk, acted)
        else:
            act = self.algorithm.act_untrained if n == UNTRAINED else partial(self.algorithm.act, n=n)
            chunk = act(prefix, generator=self.generator)
        actions = self.policy.postprocess(chunk[..., : self.policy.spec.action_dim]).float().cpu().numpy()
        if not np.isfinite(actions).all():
            raise NonFiniteError("the policy sampled a non-finite action: nothing was sent to the environment")
        return actions


@dataclass
class WeightsVersion:
    """Version and lock of a learner's weights: another thread may read them between two updates, never inside one.

    Attributes:
        version: updates that made them.
        changes: goes up with every change, also with one that goes back.
        lock: held by the learner while it changes them, by others while they copy them.
    """

    version: int = 0
    changes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def change(self, version: int) -> Iterator[None]:
        """Hold the lock while the learner changes its weights; they have `version` afterwards."""
        with self.lock:
            yield
            self.version = version
            self.changes += 1


class ActingCopy(Actor):
    """An actor beside a learner: with trained weights of its own, which it renews before a chunk and never inside one.

    What is frozen (the backbone) is shared with the learner's policy, not copied.

    On a GPU it has a stream of its own, of high priority: in the learner's a chunk would wait for all that is queued
    there, up to an update. New weights are copied in the learner's stream, between two updates, into a second set, by
    which the actor acts from the first chunk on that finds it complete.

    Args:
        actor: whose algorithm is learned meanwhile.
        weights: when these may be read.
        seed: of the copy's own noise.
    """

    def __init__(self, actor: Actor, weights: WeightsVersion, seed: int) -> None:
        algorithm = copy.deepcopy(actor.algorithm, _not_learned(actor.algorithm))
        super().__init__(algorithm, seed, actor.best_of_n)
        self.weights = weights
        pairs = zip(learned_parameters(algorithm), learned_parameters(actor.algorithm), strict=True)
        self._pairs = list(pairs)
        for own, _ in self._pairs:
            own.requires_grad_(False)
        self._stream = _own_stream(self._pairs[0][0].device)
        self._arriving = [torch.empty_like(own) for own, _ in self._pairs] if self._stream is not None else []
        self._copied: torch.cuda.Event | None = None
        self._arriving_version = 0
        self._renew()
        self._settle()

    @torch.no_grad()
    def chunks(
        self, obs: Mapping[str, np.ndarray], tasks: Sequence[str], *, best_of_n: int | None = None
    ) -> np.ndarray:
        """Return what :meth:`Actor.chunks` returns, with the newest weights; on a GPU, the newest that are there."""
        if self._seen != self.weights.changes and self._copied is None:
            self._renew()
        if self._copied is not None and self._copied.query():
            self._settle()
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            return super().chunks(obs, tasks, best_of_n=best_of_n)

    def _renew(self) -> None:
        """Copy the learner's weights; on a GPU, begin to."""
        with torch.no_grad(), self.weights.lock:
            self._arriving_version, self._seen = self.weights.version, self.weights.changes
            targets = self._arriving if self._stream is not None else [own for own, _ in self._pairs]
            for target, (_, learned) in zip(targets, self._pairs, strict=True):
                target.copy_(learned)
            if self._stream is None:
                self.weights_version = self._arriving_version
            else:
                self._copied = torch.cuda.Event()
                self._copied.record()

    def _settle(self) -> None:
        """Act with the weights that have arrived. The actor's stream is idle: chunks leave the GPU with their call."""
        if self._copied is not None:
            self._copied.synchronize()
            for i, (own, _) in enumerate(self._pairs):
                own.data, self._arriving[i] = self._arriving[i], own.data
            self._copied, self.weights_version = None, self._arriving_version


def _own_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None


def learned_parameters(algorithm: Algorithm) -> list[nn.Parameter]:
    """Return what changes in an algorithm while it is learned: what trains of its policy, and all else, since target
    networks change too."""
    frozen = {id(p) for p in algorithm.policy.parameters() if not p.requires_grad}
    return [p for p in algorithm.parameters() if id(p) not in frozen]


def _not_learned(algorithm: Algorithm) -> dict[int, object]:
    """Return a memo for deepcopy: what is in it is shared, not copied."""
    shared = [p for p in algorithm.policy.parameters() if not p.requires_grad] + list(algorithm.buffers())
    return {id(tensor): tensor for tensor in shared}
