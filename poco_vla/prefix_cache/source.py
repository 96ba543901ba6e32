"""Prefixes of a batch: each distinct state is encoded once, or read from the prefix cache."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from itertools import batched
from typing import Any, Literal

import numpy as np
import torch

from poco_vla.data.batches import preprocess_obs
from poco_vla.data.episode import Episode
from poco_vla.data.replay import Replay, Transitions
from poco_vla.policy import FlowPolicy, Prefix
from poco_vla.prefix_cache.actor_buffer import ActorPrefixBuffer
from poco_vla.prefix_cache.entries import Entry
from poco_vla.prefix_cache.store import PrefixStore

AT_ONCE = 32
"""States that are encoded together: enough for a GPU, few enough for its memory."""
TRIALS = 3
"""Batches that are measured, after one that is not, before it is decided whether a store pays."""
TRIED = 8
"""States that are encoded in a trial at least."""
ALIKE = 0.1
"""How far a stored prefix may be from a fresh one, of its root mean square: bfloat16's rounding over 18 layers is some
0.02, that of 8-bit floats 0.04; other weights or pictures give 1."""
WORTH = 0.9
"""Share of the time without a store that must not be exceeded with one, for it to be worth its memory."""


@dataclass(frozen=True)
class Costs:
    """Seconds per state.

    Attributes:
        encode: to process and encode it.
        keep: to store it.
        load: to take it out of memory, and to join it with others.
        read: to read it from disk before that; files that were just written come out of the system's memory.
        num_bytes: it takes.
    """

    encode: float
    keep: float
    load: float
    read: float
    num_bytes: float


@dataclass(frozen=True)
class Demand:
    """How often states will be asked for.

    Attributes:
        states: that there are, or will be.
        num_sampled: states sampled in the whole run.
        memory: bytes for them in memory.
        disk: bytes for them on disk.
    """

    states: int
    num_sampled: int
    memory: int
    disk: int

    def hit_rate(self, num_bytes: float) -> float:
        """Return the share of sampled states that will be found: of states that fit into the cache, after each one's
        first time."""
        kept = min(1.0, (self.memory + self.disk) / (num_bytes * max(1, self.states)))
        return kept * max(0.0, 1 - self.states / max(1, self.num_sampled))

    def from_disk(self, num_bytes: float) -> float:
        """Return the share of found states that will be read from disk."""
        kept = min(num_bytes * self.states, self.memory + self.disk)
        return max(0.0, 1 - self.memory / max(1.0, kept))


def saves_time(costs: Costs, demand: Demand) -> bool:
    """True if a store saves at least a tenth of the time that encoding takes."""
    rate = demand.hit_rate(costs.num_bytes)
    load = costs.load + demand.from_disk(costs.num_bytes) * costs.read
    return rate * load + (1 - rate) * (costs.encode + costs.keep) < WORTH * costs.encode


class PrefixSource:
    """Prefixes of states by their ids.

    Args:
        policy: encodes; it can pack.
        replay: has the observations of states that were not found.
        store: None encodes each distinct state of a batch, and keeps nothing.
        actor_buffer: prefixes that the actor encoded, stored with the episodes that they belong to.
        demand: given, `store` is closed after the first batches if it does not pay; None keeps it whatever it costs.
        shares: encode each distinct state of a batch once even without a store.
        dtype: of what is stored.
        autocast: the context in which the policy is trained.
        say: tells a person one line.

    Attributes:
        hits: states that were found.
        encoded: states that were not.
        batch_bytes: of what the last batch was given.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        replay: Replay,
        store: PrefixStore | None,
        *,
        actor_buffer: ActorPrefixBuffer | None = None,
        demand: Demand | None = None,
        shares: bool = False,
        dtype: Literal["exact", "fp8"] = "exact",
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.policy, self.replay, self.store, self.actor_buffer = policy, replay, store, actor_buffer
        self.costs: Costs | None = None
        self.shares, self.hits, self.encoded, self.batch_bytes = shares, 0, 0, 0
        self._demand, self._autocast, self._say = demand, autocast, say
        self._dtype: Literal["exact", "fp8"] = dtype
        self._trials: list[Costs] = []
        self._shown = (0, 0, 0)
        self._clock = time.monotonic()
        self._thread = ThreadPoolExecutor(1, "prefixes")
        self._told_full = False

    @property
    def is_used(self) -> bool:
        """True if batches get their prefixes from this source."""
        return self.shares or self.store is not None

    def prefixes(
        self, raw: Transitions, ahead: "Future[dict[int, Entry]] | None" = None, *, bootstrap: bool = True
    ) -> tuple[Prefix, Prefix | None]:
        """Return the prefixes of the states that transitions start from, and of those that they bootstrap from.

        Args:
            raw: the transitions.
            ahead: from `prefetch` of the same ones.
            bootstrap: whether the second are wanted.
        """
        wanted = _wanted(raw, bootstrap=bootstrap)
        distinct = np.unique(np.concatenate(wanted))
        found = ahead.result() if ahead is not None else self._fetch(distinct)
        missing = [key for key in distinct.tolist() if key not in found]
        self.hits, self.encoded = self.hits + len(found), self.encoded + len(missing)
        if self.store is not None and len(self._trials) <= TRIALS:
            found |= self._try(self.store, missing, found)
        else:
            made = self._encode(missing)
            if self.store is not None:
                self.store.use(found)
                self.store.put(made)
            found |= made
        if self.store is not None and self.store.disk_is_full and not self._told_full:
            self._told_full = True
            self._say("the disk of the prefix cache is full: stored prefixes stay in use, and no more are written")
        self.batch_bytes = sum(found[key].num_bytes for keys in wanted for key in keys.tolist())
        first, *second = (self.policy.unpack([found[key].tensors() for key in keys.tolist()]) for keys in wanted)
        return first, second[0] if second else None

    def prefetch(self, raw: Transitions, *, bootstrap: bool = True) -> "Future[dict[int, Entry]] | None":
        """Start loading the entries that `prefixes` will read; None without a store."""
        if self.store is None:
            return None
        return self._thread.submit(self._fetch, np.unique(np.concatenate(_wanted(raw, bootstrap=bootstrap))))

    def add_from_actor(self, episode: Episode, first: int) -> None:
        """Store the prefixes that the actor computed of an episode that is in the replay buffer now.

        Args:
            episode: as the replay buffer has it.
            first: id of its first step.
        """
        if self.actor_buffer is not None and self.store is not None:
            self.store.put_in_ram({first + step: entry for step, entry in self.actor_buffer.take(episode).items()})

    def rates(self) -> dict[str, float]:
        """Return rates since the last call: share of states found, megabytes loaded per second, seconds saved per
        second."""
        if self.store is None or self.costs is None:
            return {}
        counts, clock = (self.hits, self.encoded, self.store.loads.num_bytes), time.monotonic()
        hits, encoded, num_bytes = (now - then for now, then in zip(counts, self._shown, strict=True))
        seconds = max(clock - self._clock, 1e-6)
        self._shown, self._clock = counts, clock
        return {
            "prefix_hits": hits / max(1, hits + encoded),
            "prefix_mb_per_s": num_bytes / seconds / 1e6,
            "prefix_s_saved_per_s": self._saved(self.costs, hits, encoded) / seconds,
        }

    def figures(self) -> dict[str, Any]:
        """Return statistics of the whole run, for result.json."""
        if self.store is None or self.costs is None:
            return {"on": False}
        return {
            "on": True,
            "hits": self.hits,
            "encoded": self.encoded,
            "acted": 0 if self.actor_buffer is None else self.actor_buffer.num_taken,
            "hit_rate": self.hits / max(1, self.hits + self.encoded),
            "seconds_saved": self._saved(self.costs, self.hits, self.encoded),
            "bytes_per_state": self.costs.num_bytes,
            "encode_ms": self.costs.encode * 1e3,
            "load_ms": self.costs.load * 1e3,
            "loads": vars(self.store.loads),
            "bytes": self.store.num_bytes,
            "damaged": self.store.num_damaged,
        }

    @staticmethod
    def _saved(costs: Costs, hits: int, encoded: int) -> float:
        return hits * (costs.encode - costs.load) - encoded * costs.keep

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self.store is not None:
            self.store.close()

    def _fetch(self, keys: np.ndarray) -> dict[int, Entry]:
        return {} if self.store is None else self.store.fetch(keys.tolist())

    @torch.no_grad()
    def _encode(self, keys: Sequence[int]) -> dict[int, Entry]:
        made = {}
        for some in batched(keys, AT_ONCE):
            raw, tasks = self.replay.observations(np.array(some))
            obs = preprocess_obs(self.policy, raw, tasks)
            with self._autocast():
                prefix = self.policy.encode(obs)
            packed = self.policy.pack(prefix)
            made |= {key: Entry.of(one, dtype=self._dtype) for key, one in zip(some, packed, strict=True)}
        return made

    def _try(self, store: PrefixStore, missing: list[int], found: Mapping[int, Entry]) -> dict[int, Entry]:
        """Encode and store missing states, and measure the time. Some of the found states are encoded as well: they
        must come out the same, and give the time of encoding where next to nothing is missing."""
        known = list(found)[: max(1, TRIED - len(missing))]
        times = [self._now(store)]

        def took() -> float:
            times.append(self._now(store))
            return times[-1] - times[-2]

        made = self._encode([*missing, *known])
        encode, count = took() / len(made), len(made)
        again = {key: made.pop(key) for key in known}
        took()
        store.use(found)
        store.put(made)
        keep = took() / count
        loaded = made | store.fetch(list(made)) | again
        store.use(loaded)
        self.policy.unpack([entry.tensors() for entry in loaded.values()])
        load = took() / count
        read = store.from_disk(list(loaded))
        read_seconds = took() / max(1, len(read))
        size = sum(entry.num_bytes for entry in loaded.values()) / count
        self._trials.append(Costs(encode, keep, load, read_seconds, size))
        stale = [key for key, entry in again.items() if not _alike(entry, found[key])]
        if stale:
            self._say(
                f"{len(stale)} of {len(again)} stored prefixes differ from what this policy encodes now: "
                "stored prefixes are not used"
            )
            store.discard_persistent()
            made |= self._encode([key for key in found if key not in again]) | again
        if len(self._trials) > TRIALS:
            # The first one pays for what is made once.
            self.costs = Costs(*(min(getattr(costs, f.name) for costs in self._trials[1:]) for f in fields(Costs)))
            if self._demand is not None:
                self._decide(store, self.costs, self._demand)
        return made

    def _now(self, store: PrefixStore) -> float:
        """Return the time in seconds, after the device has finished its queued work."""
        if store.device.type == "cuda":
            torch.cuda.synchronize(store.device)
        return time.perf_counter()

    def _decide(self, store: PrefixStore, costs: Costs, demand: Demand) -> None:
        on = saves_time(costs, demand)
        self._say(
            f"prefix cache {'on' if on else 'off: it saves no time'}: a state takes {costs.num_bytes / 1e6:.2f} MB, "
            f"{costs.encode * 1e3:.1f} ms to encode and {costs.load * 1e3:.1f} ms to load; "
            f"{demand.hit_rate(costs.num_bytes):.0%} of {demand.num_sampled:,} samples of {demand.states:,} states "
            "would be found"
        )
        if not on:
            store.close()
            self.store = None
            if self.actor_buffer is not None:
                self.actor_buffer.close()


def _alike(entry: Entry, other: Entry) -> bool:
    """True if two entries are equal up to the rounding of another batch."""
    if [(name, shape) for name, _, shape in entry.layout] != [(name, shape) for name, _, shape in other.layout]:
        return False
    mine, its = entry.tensors(), other.tensors()
    return all(_rms(mine[name].float() - its[name].float()) <= ALIKE * _rms(its[name].float()) for name in mine)


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def _wanted(raw: Transitions, *, bootstrap: bool) -> Sequence[np.ndarray]:
    """Return the ids of the states of transitions. Where nothing follows, the bootstrap state is arbitrary: the first
    state serves."""
    return (raw.ids, np.where(raw.discount == 0, raw.ids, raw.next_ids)) if bootstrap else (raw.ids,)
