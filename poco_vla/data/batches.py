"""Transitions in raw units -> ChunkBatch in the network's: LeRobot's processors, padding, this process's share."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poco_vla.data.replay import Replay, Transitions
from poco_vla.errors import ConfigError
from poco_vla.policy import FlowPolicy
from poco_vla.types import ChunkBatch


def network_obs(policy: FlowPolicy, obs: Mapping[str, np.ndarray], tasks: Sequence[str]) -> dict[str, Any]:
    """B raw observations, processed for the network: the one way in, for training and for acting."""
    return _observations(policy.preprocess(_tensors(obs) | {"task": list(tasks)}))


def chunk_batch(policy: FlowPolicy, raw: Transitions, *, bootstrap: bool = True) -> ChunkBatch:
    """A batch ready for :class:`poco_vla.algorithm.Poco`, on the device of the policy's processors.

    Chunks are normalised together with the state they start from (a processor may express them relative to it) and
    padded with zeros to the network's width. Without `bootstrap`, ``next_obs`` stays empty: imitation reads none.
    """
    next_obs = network_obs(policy, raw.next_obs, raw.tasks) if bootstrap else {}
    actions = torch.from_numpy(raw.actions)
    processed = policy.preprocess(_tensors(raw.obs) | {"task": raw.tasks, "action": actions})
    actions = processed["action"]
    padding = policy.spec.width - actions.shape[-1]
    return ChunkBatch(
        obs=_observations(processed),
        next_obs=next_obs,
        actions=torch.nn.functional.pad(actions, (0, padding)) if padding else actions,
        **{
            name: torch.from_numpy(getattr(raw, name)).to(actions.device)
            for name in ("valid", "returns", "discount", "is_demo", "is_success")
        },
    )


class BatchSource(Iterator[ChunkBatch]):
    """Endless batches from a pool. Every process draws the same global batch and keeps its own rows.

    Args:
        replay: the pool.
        policy: whose processors are used.
        batch_size: transitions per global batch.
        seed: of the sampling order, the same on every process.
        rank: this process.
        world_size: number of processes; must divide `batch_size`.
    """

    def __init__(
        self, replay: Replay, policy: FlowPolicy, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size % world_size:
            raise ConfigError(f"batch_size {batch_size} is not a multiple of the {world_size} processes that share it")
        self.replay = replay
        self.policy = policy
        self.batch_size = batch_size
        self.rows = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.rng = np.random.default_rng(seed)

    def __next__(self) -> ChunkBatch:
        return self.draw()

    def draw(self, *, bootstrap: bool = True) -> ChunkBatch:
        """The next batch; imitation needs none of the bootstrap states."""
        raw = self.replay.sample(self.batch_size, self.rng)
        return chunk_batch(self.policy, raw.rows(self.rows), bootstrap=bootstrap)


def _observations(processed: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in processed.items() if key.startswith("observation.") and value is not None}


def _tensors(obs: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Images uint8 [B, height, width, 3] become float32 [B, 3, height, width] in [0, 1], as LeRobot loads them."""
    out = {}
    for key, column in obs.items():
        tensor = torch.from_numpy(column)
        out[key] = tensor.permute(0, 3, 1, 2).float() / 255 if tensor.dtype == torch.uint8 else tensor
    return out
