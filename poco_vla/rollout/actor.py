"""From raw observations to the chunks that a robot executes."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from poco_vla.critic import ChunkCritic, aggregate
from poco_vla.data import network_obs
from poco_vla.errors import NonFiniteError
from poco_vla.policy import FlowPolicy, Prefix, propose
from poco_vla.simulators.observations import require_pictures


class Actor:
    """Samples chunks from a policy: plain samples (paper), or the best of `best_of_n` by the critic.

    Args:
        policy: the policy that acts.
        seed: of the actor's own noise.
        best_of_n: candidates per state; above 1 needs a critic.
        critic: values them.
        aggregation: how the critics' values become one.

    Attributes:
        weights_version: of the weights that the last chunks are samples of: updates made until then.
        on_encoded: is told raw observations, their tasks and the prefix of each.
    """

    weights_version: int = 0
    on_encoded: Callable[[Mapping[str, np.ndarray], Sequence[str], Prefix], None] | None = None

    def __init__(
        self,
        policy: FlowPolicy,
        seed: int,
        best_of_n: int = 1,
        critic: ChunkCritic | None = None,
        aggregation: Literal["mean", "min"] = "mean",
    ) -> None:
        assert best_of_n == 1 or critic is not None, "best_of_n > 1 needs a critic"
        self.policy = policy
        self.critic = critic
        self.best_of_n = best_of_n
        self.aggregation: Literal["mean", "min"] = aggregation
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
        prefix = self.policy.encode(network_obs(self.policy, obs, tasks))
        if self.on_encoded is not None:
            self.on_encoded(obs, tasks, prefix)
        n = best_of_n or self.best_of_n
        x = propose(self.policy, prefix, n, generator=self.generator)
        if self.critic is not None and n > 1:
            q = aggregate(self.critic(prefix.features, x), self.aggregation)
            x = x[torch.arange(len(x), device=x.device), q.argmax(dim=1)][:, None]
        actions = self.policy.postprocess(x[:, 0, :, : self.policy.spec.action_dim]).float().cpu().numpy()
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

    Args:
        actor: whose policy and critic are learned meanwhile.
        weights: when these may be read.
        seed: of the copy's own noise.
    """

    def __init__(self, actor: Actor, weights: WeightsVersion, seed: int) -> None:
        shared = _frozen(actor.policy)
        policy, critic = copy.deepcopy((actor.policy, actor.critic), shared)
        super().__init__(policy, seed, actor.best_of_n, critic, actor.aggregation)
        self.weights = weights
        self._pairs = [(own, learned) for own, learned in _trained_pairs(self, actor) if own is not learned]
        for own, _ in self._pairs:
            own.requires_grad_(False)
        self._renew()

    @torch.no_grad()
    def chunks(
        self, obs: Mapping[str, np.ndarray], tasks: Sequence[str], *, best_of_n: int | None = None
    ) -> np.ndarray:
        """Return what :meth:`Actor.chunks` returns, with the newest weights."""
        if self._seen != self.weights.changes:
            self._renew()
        return super().chunks(obs, tasks, best_of_n=best_of_n)

    def _renew(self) -> None:
        with torch.no_grad(), self.weights.lock:
            for own, learned in self._pairs:
                own.copy_(learned)
            self.weights_version, self._seen = self.weights.version, self.weights.changes


def _frozen(policy: FlowPolicy) -> dict[int, object]:
    """Return a memo for deepcopy: the tensors in it are shared, not copied."""
    tensors = [p for p in policy.parameters() if not p.requires_grad] + list(policy.buffers())
    return {id(tensor): tensor for tensor in tensors}


def _trained_pairs(own: Actor, learned: Actor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield from zip(own.policy.parameters(), learned.policy.parameters(), strict=True)
    if own.critic is not None and learned.critic is not None:
        yield from zip(own.critic.parameters(), learned.critic.parameters(), strict=True)
