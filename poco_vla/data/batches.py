"""Transitions in raw units -> ChunkBatch in the network's: LeRobot's processors, padding, this process's share."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from poco_vla.data.replay import Replay, Transitions
from poco_vla.errors import ConfigError
from poco_vla.policy import FlowPolicy, Prefix
from poco_vla.types import ChunkBatch

_CPU = torch.device("cpu")


@runtime_checkable
class Prefixes(Protocol):
    """Give batches their prefixes, as :class:`poco_vla.prefix_cache.source.PrefixSource` does."""

    @property
    def is_used(self) -> bool:
        """Return True if batches get their prefixes here."""
        ...

    def prefixes(
        self, raw: Transitions, ahead: Future[Any] | None = None, *, bootstrap: bool = True
    ) -> tuple[Prefix, Prefix | None]:
        """Return the prefixes of the states that transitions start from, and of those that they bootstrap from."""
        ...

    def prefetch(self, raw: Transitions, *, bootstrap: bool = True) -> Future[Any] | None:
        """Begin to load what `prefixes` will be asked for; None where there is nothing to load from."""
        ...


def preprocess_obs(policy: FlowPolicy, obs: Mapping[str, np.ndarray], tasks: Sequence[str]) -> dict[str, Any]:
    """Return B raw observations as the network takes them. Training and acting both preprocess through this
    function."""
    return _observations(policy.preprocess(_tensors(obs, _device(policy)) | {"task": list(tasks)}))


def get_preprocessor(policy: FlowPolicy) -> Any:
    """Return LeRobot's pre-processor itself, without the checks that an adapter's `preprocess` may add."""
    return getattr(policy, "preprocessor", None) or policy.preprocess


def chunk_batch(policy: FlowPolicy, raw: Transitions, *, bootstrap: bool = True) -> ChunkBatch:
    """Return a batch for the algorithm, on the device of the policy's processors.

    Chunks are normalised together with the state they start from (a processor may express them relative to it) and
    padded with zeros to the network's width. Without `bootstrap`, ``next_obs`` stays empty: imitation reads none.
    """
    next_obs = preprocess_obs(policy, raw.next_obs, raw.next_tasks or raw.tasks) if bootstrap else {}
    processed = policy.preprocess(_with_actions(raw, _device(policy)))
    return _batch(policy, raw, processed["action"], obs=_observations(processed), next_obs=next_obs)


def encoded_batch(
    policy: FlowPolicy,
    raw: Transitions,
    prefixes: Prefixes,
    ahead: Future[Any] | None = None,
    *,
    bootstrap: bool = True,
) -> ChunkBatch:
    """Return the batch that `chunk_batch` returns, with prefixes in place of observations, from transitions without
    pictures."""
    prefix, next_prefix = prefixes.prefixes(raw, ahead, bootstrap=bootstrap)
    actions = policy.preprocess_actions(_with_actions(raw))
    return _batch(policy, raw, actions, obs={}, next_obs={}, prefix=prefix, next_prefix=next_prefix)


def _batch(policy: FlowPolicy, raw: Transitions, actions: Tensor, **states: Any) -> ChunkBatch:
    padding = policy.spec.width - actions.shape[-1]
    signals = ("valid", "returns", "discount", "is_demo", "is_success")
    return ChunkBatch(
        actions=torch.nn.functional.pad(actions, (0, padding)) if padding else actions,
        **{name: torch.from_numpy(getattr(raw, name)).to(actions.device) for name in signals},
        **states,
    )


def _with_actions(raw: Transitions, device: torch.device = _CPU) -> dict[str, Any]:
    return _tensors(raw.obs, device) | {"task": raw.tasks, "action": torch.from_numpy(raw.actions)}


@dataclass(frozen=True)
class _Prefetched:
    """Transitions that were sampled before they are needed; valid if generator and replay buffer have not changed
    since.

    Attributes:
        before: state of the generator that they were drawn from, and `after` that.
        version: the replay buffer's.
        bootstrap: whether bootstrap states are loaded, too.
        raw: the transitions.
        loading: their stored prefixes.
    """

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    version: int
    bootstrap: bool
    raw: Transitions
    loading: Future[Any] | None


class BatchSource(Iterator[ChunkBatch]):
    """Endless batches from a replay buffer. Every process samples the same global batch and keeps its own rows.

    Args:
        replay: the replay buffer.
        policy: whose processors are used.
        batch_size: transitions per global batch.
        seed: of the sampling order, the same on every process.
        rank: this process.
        world_size: number of processes; must divide `batch_size`.
        prefixes: where prefixes come from; None leaves them to whoever gets the batches.

    Attributes:
        rng: where the drawing order stands: what the next batch is drawn from.
    """

    def __init__(
        self,
        replay: Replay,
        policy: FlowPolicy,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        prefixes: Prefixes | None = None,
    ) -> None:
        if batch_size % world_size:
            near = batch_size // world_size * world_size
            raise ConfigError(
                f"batch_size {batch_size} is not a multiple of the {world_size} processes that share it: take "
                f"{near or world_size} or {near + world_size} (--optim.batch-size)"
            )
        self.replay = replay
        self.policy = policy
        self.batch_size = batch_size
        self.rows = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.rng = np.random.default_rng(seed)
        self.prefixes = prefixes
        self._ahead: _Prefetched | None = None

    def __next__(self) -> ChunkBatch:
        return self.draw()

    def draw(self, *, bootstrap: bool = True) -> ChunkBatch:
        """Return the next batch; without `bootstrap` (imitation), without the bootstrap states."""
        if self.prefixes is None or not self.prefixes.is_used:
            return chunk_batch(self.policy, self._sample(self.rng, pictures=True), bootstrap=bootstrap)
        raw, loading = self._take_prefetched(bootstrap=bootstrap) or (self._sample(self.rng, pictures=False), None)
        batch = encoded_batch(self.policy, raw, self.prefixes, loading, bootstrap=bootstrap)
        self._prefetch(self.prefixes, bootstrap=bootstrap)
        return batch

    def state(self) -> Mapping[str, Any]:
        """Return where the sampling order stands."""
        return self.rng.bit_generator.state

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; a prefetched batch is dropped."""
        self.rng.bit_generator.state = state

    def _sample(self, rng: np.random.Generator, *, pictures: bool) -> Transitions:
        return self.replay.sample(self.batch_size, rng, pictures=pictures).rows(self.rows)

    def _prefetch(self, prefixes: Prefixes, *, bootstrap: bool) -> None:
        """Sample the next batch and start loading its prefixes while the current one is trained on. `rng` is not
        advanced."""
        rng, before = np.random.Generator(type(self.rng.bit_generator)()), self.rng.bit_generator.state
        rng.bit_generator.state = before
        raw = self._sample(rng, pictures=False)
        loading = prefixes.prefetch(raw, bootstrap=bootstrap)
        self._ahead = _Prefetched(before, rng.bit_generator.state, self.replay.version, bootstrap, raw, loading)

    def _take_prefetched(self, *, bootstrap: bool) -> tuple[Transitions, Future[Any] | None] | None:
        """Return the prefetched batch, or None if it is not the one that would be sampled now, as after a new episode
        or a resume."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or (ahead.before, ahead.version) != (self.rng.bit_generator.state, self.replay.version):
            return None
        if ahead.bootstrap != bootstrap:
            return None
        self.rng.bit_generator.state = ahead.after
        return ahead.raw, ahead.loading


def _observations(processed: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in processed.items() if key.startswith("observation.") and value is not None}


def _tensors(obs: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Convert to tensors; images uint8 [B, height, width, 3] become float32 [B, 3, height, width] in [0, 1], as in
    LeRobot. On a GPU it does that itself: a quarter of the bytes are sent, and the host does not wait."""
    out = {}
    for key, column in obs.items():
        tensor = torch.from_numpy(column)
        if tensor.dtype == torch.uint8:
            if device.type == "cuda":
                tensor = tensor.pin_memory().to(device, non_blocking=True)
            tensor = tensor.permute(0, 3, 1, 2).float() / 255
        out[key] = tensor
    return out


def _device(policy: FlowPolicy) -> torch.device:
    return next((p.device for p in policy.parameters()), _CPU)
