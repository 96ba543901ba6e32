"""Prefixes that acting has encoded, kept until the episodes of their states enter the replay buffer."""

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from poco_vla.data.episode import Episode
from poco_vla.policy import FlowPolicy, Prefix
from poco_vla.prefix_cache.entries import Entry
from poco_vla.prefix_cache.store import MemoryTier


class ActorPrefixBuffer:
    """Prefixes that the actor computed, by the exact bytes of their observations and task: a state that differs in a
    single bit is not found. The least recently used are dropped beyond the budget.

    `add` may be called from another thread than `take`.

    Args:
        policy: packs; what its `resize_images` leaves of a picture is what the replay buffer has of it.
        to_ram: moves an entry there.
        budget: most bytes of all entries.
        dtype: of what is kept.

    Attributes:
        num_taken: entries that were asked for and found.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        to_ram: Callable[[Entry], Entry],
        budget: int,
        dtype: Literal["exact", "fp8"] = "exact",
    ) -> None:
        self.num_taken = 0
        self._policy, self._to_ram = policy, to_ram
        self._dtype: Literal["exact", "fp8"] = dtype
        self._entries = MemoryTier(budget)
        self._lock = threading.Lock()

    @torch.no_grad()
    def add(self, obs: Mapping[str, np.ndarray], tasks: Sequence[str], prefix: Prefix) -> None:
        """Store the prefixes of B raw observations."""
        if self._entries.budget == 0:
            return
        seen = {key: obs[key] for key in self._policy.input_keys}
        shrunk = {key: self._policy.resize_images(x) if x.dtype == np.uint8 else x for key, x in seen.items()}
        packed = self._policy.pack(prefix)
        for i, (task, tensors) in enumerate(zip(tasks, packed, strict=True)):
            entry = self._to_ram(Entry.of(tensors, dtype=self._dtype))
            with self._lock:
                self._entries.put(self._key(shrunk, i, task), entry)

    def take(self, episode: Episode) -> dict[int, Entry]:
        """Remove and return the stored prefixes of an episode's steps, by the step's index."""
        steps = range(len(episode) if len(self._entries) else 0)
        keys = [self._key(episode.obs, step, episode.task_at(step)) for step in steps]
        with self._lock:  # a state may come several times
            entries = {key: self._entries.pop(key) for key in set(keys)}
        found = {step: entry for step, key in enumerate(keys) if (entry := entries[key]) is not None}
        self.num_taken += len(found)
        return found

    def close(self) -> None:
        """Drop all entries and store none any more."""
        with self._lock:
            self._entries = MemoryTier(0)

    def _key(self, obs: Mapping[str, np.ndarray], row: int, task: str) -> int:
        digest = hashlib.blake2b(task.encode(), digest_size=16)
        for name in self._policy.input_keys:
            value = np.ascontiguousarray(obs[name][row])
            digest.update(f"{name}{value.dtype}{value.shape}".encode())
            digest.update(value.reshape(-1).view(np.uint8).data)
        return int.from_bytes(digest.digest())
