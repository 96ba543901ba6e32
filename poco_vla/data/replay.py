"""The pool D: offline demonstrations and online episodes as chunk transitions over column arrays.

Episodes enter whole and lie contiguously, so that no chunk crosses an episode or the ring's write pointer. What a
transition's return, bootstrap state and masks are is decided here, once, for offline and online data alike.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from poco_vla.config import RewardConfig
from poco_vla.data.episode import Episode
from poco_vla.errors import DataError


@dataclass(frozen=True)
class Transitions:
    """B sampled transitions in raw units (see :class:`poco_vla.types.ChunkBatch` for the fields' meaning)."""

    obs: Mapping[str, np.ndarray]
    next_obs: Mapping[str, np.ndarray]
    actions: np.ndarray
    valid: np.ndarray
    returns: np.ndarray
    discount: np.ndarray
    is_demo: np.ndarray
    is_success: np.ndarray
    tasks: list[str]

    def rows(self, rows: slice) -> "Transitions":
        """Some of the transitions."""
        columns: dict[str, Any] = {
            name: {key: column[rows] for key, column in value.items()} if isinstance(value, Mapping) else value[rows]
            for name, value in vars(self).items()
        }
        return Transitions(**columns)

    def split(self, size: int) -> "Iterator[Transitions]":
        """Pieces of at most `size` transitions."""
        return (self.rows(slice(i, i + size)) for i in range(0, len(self.actions), size))


class Replay:
    """Offline and online chunk transitions, sampled together.

    Args:
        horizon: H.
        gamma: discount per control step.
        reward: what a step is worth.
        capacity: online control steps that are kept; the oldest episodes go first. Demonstrations stay.
        demo_fraction: share of each batch from demonstrations; None samples the pool uniformly.
    """

    def __init__(
        self,
        *,
        horizon: int,
        gamma: float,
        reward: RewardConfig | None = None,
        capacity: int = 2_000_000,
        demo_fraction: float | None = None,
    ) -> None:
        self.horizon = horizon
        self.reward = reward or RewardConfig()
        self.demo_fraction = demo_fraction
        self._powers = gamma ** np.arange(horizon + 1)
        self._demos = _EpisodeRing(None)
        self._online = _EpisodeRing(capacity)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._tasks: list[str] = []
        self._task_ids: dict[str, int] = {}

    @property
    def num_demo_steps(self) -> int:
        return self._demos.num_steps

    @property
    def num_online_steps(self) -> int:
        return self._online.num_steps

    @property
    def num_online_episodes(self) -> int:
        return self._online.num_episodes

    def add(self, episode: Episode, *, is_demo: bool) -> None:
        """Append a finished episode. The first one settles the pool's columns; what later ones have beside is left out.

        Raises:
            DataError: it has no step, lacks a column of the pool or has another shape, or is longer than the capacity.
        """
        if len(episode) == 0:
            raise DataError("an episode without a single step cannot enter the pool")
        # Environments that go on after success mark no end there: the rule is the same as for datasets.
        terminal = episode.terminal | episode.success
        columns = {
            **episode.obs,
            "action": episode.action,
            "reward": episode.rewards(self.reward),
            "terminal": terminal,
            "succeeded": np.full(len(episode), episode.succeeded),
            "task": np.full(len(episode), self._task_id(episode.task), dtype=np.int32),
        }
        self._check_shapes(columns)
        columns = {name: columns[name] for name in self._shapes}
        # Deviation 3: a cut-off episode has no stored state after its last step, so that step starts no transition:
        # its chunks bootstrap one step earlier, exactly, from the last stored state.
        num_starts = len(episode) if terminal[-1] else len(episode) - 1
        (self._demos if is_demo else self._online).add(columns, num_starts)

    def extend(self, episodes: list[Episode], *, is_demo: bool) -> None:
        """Append several demonstrations or online episodes; demonstrations are copied once."""
        if is_demo:
            self._demos.reserve(sum(map(len, episodes)))
        for episode in episodes:
            self.add(episode, is_demo=is_demo)

    def sample(self, batch_size: int, rng: np.random.Generator) -> Transitions:
        """`batch_size` transitions, uniform over start steps (of the pool, or of each side under `demo_fraction`)."""
        demo_starts, online_starts = self._demos.num_starts, self._online.num_starts
        if demo_starts + online_starts == 0:
            raise DataError(
                "the pool holds no transition to sample: every episode is a single cut-off step, or none is"
            )
        if online_starts == 0:
            num_demos = batch_size
        elif demo_starts == 0:
            num_demos = 0
        elif self.demo_fraction is None:
            num_demos = int((rng.integers(demo_starts + online_starts, size=batch_size) < demo_starts).sum())
        else:
            num_demos = round(self.demo_fraction * batch_size)
        parts = []
        if num_demos:
            parts.append(self._gather(self._demos, self._demos.sample(num_demos, rng), is_demo=True))
        if num_demos < batch_size:
            starts = self._online.sample(batch_size - num_demos, rng)
            parts.append(self._gather(self._online, starts, is_demo=False))
        return self._join(parts)

    def demo_transitions(self, limit: int, rng: np.random.Generator) -> Transitions:
        """Up to `limit` demonstration transitions, without repetition (zeta = "auto" is calibrated on them)."""
        order = rng.permutation(self._demos.num_starts)[:limit]
        return self._join([self._gather(self._demos, self._demos.start_steps(order), is_demo=True)])

    def _gather(self, ring: "_EpisodeRing", start: np.ndarray, *, is_demo: bool) -> "_Part":
        last = ring.last[start]
        steps = start[:, None] + np.arange(self.horizon)
        valid = steps <= last[:, None]
        steps = np.minimum(steps, last[:, None])
        terminal = ring["terminal"][steps] & valid
        ended = terminal.any(axis=1)
        # Steps whose reward counts: up to the first terminal inside the chunk, else up to the bootstrap state.
        bootstrap = np.minimum(start + self.horizon, last)
        count = np.where(ended, terminal.argmax(axis=1) + 1, bootstrap - start)
        counted = np.arange(self.horizon) < count[:, None]
        returns = (ring["reward"][steps] * counted) @ self._powers[: self.horizon]
        discount = np.where(ended, 0.0, self._powers[count])
        return _Part(ring, start, bootstrap, steps, valid, returns, discount, is_demo)

    def _join(self, parts: list["_Part"]) -> Transitions:
        def column(name: str, index: str) -> np.ndarray:
            return np.concatenate([part.ring[name][getattr(part, index)] for part in parts])

        def field_of(name: str) -> np.ndarray:
            return np.concatenate([getattr(part, name) for part in parts])

        keys = parts[0].ring.obs_keys
        return Transitions(
            obs={key: column(key, "start") for key in keys},
            next_obs={key: column(key, "bootstrap") for key in keys},
            actions=column("action", "steps"),
            valid=field_of("valid"),
            returns=field_of("returns").astype(np.float32),
            discount=field_of("discount").astype(np.float32),
            is_demo=np.concatenate([np.full(len(part.start), part.is_demo) for part in parts]),
            is_success=column("succeeded", "start"),
            tasks=[self._tasks[i] for i in column("task", "start")],
        )

    def _check_shapes(self, columns: Mapping[str, np.ndarray]) -> None:
        """Demonstrations and online episodes meet in one batch: they must fit together."""
        shapes = {name: column.shape[1:] for name, column in columns.items()}
        self._shapes = self._shapes or shapes
        for name, shape in self._shapes.items():
            if name not in shapes:
                raise DataError(
                    f'the episode has no "{name}", which the pool holds; its columns: {", ".join(sorted(shapes))}'
                )
            if shapes[name] != shape:
                raise DataError(f'"{name}" has shape {shapes[name]} per step, the pool holds {shape}')

    def _task_id(self, task: str) -> int:
        if task not in self._task_ids:
            self._task_ids[task] = len(self._tasks)
            self._tasks.append(task)
        return self._task_ids[task]


@dataclass(frozen=True)
class _Part:
    """Transitions out of one ring, as indices into its columns."""

    ring: "_EpisodeRing"
    start: np.ndarray
    bootstrap: np.ndarray
    steps: np.ndarray
    valid: np.ndarray
    returns: np.ndarray
    discount: np.ndarray
    is_demo: bool


@dataclass
class _Spans:
    """Live episodes, oldest first: where each begins and how many start steps came before it since the beginning."""

    begin: np.ndarray = field(default_factory=lambda: np.zeros(64, dtype=np.int64))
    before: np.ndarray = field(default_factory=lambda: np.zeros(65, dtype=np.int64))
    head: int = 0
    tail: int = 0

    def append(self, begin: int, num_starts: int) -> None:
        if self.tail == len(self.begin):
            self.begin = np.concatenate([self.begin, np.zeros_like(self.begin)])
            self.before = np.concatenate([self.before, np.zeros(len(self.begin) + 1 - len(self.before), np.int64)])
        self.begin[self.tail] = begin
        self.before[self.tail + 1] = self.before[self.tail] + num_starts
        self.tail += 1


class _EpisodeRing:
    """Column arrays in which whole episodes lie contiguously. They grow up to `capacity` steps; from then on the oldest
    episodes make room. With capacity None they grow without end, and nothing is evicted.
    """

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.last = np.zeros(0, dtype=np.int64)
        self.num_steps = 0
        self._columns: dict[str, np.ndarray] = {}
        self._spans = _Spans()
        self._lengths: list[int] = []
        self._pointer = 0
        self._reserved = 0

    def __getitem__(self, name: str) -> np.ndarray:
        return self._columns[name]

    @property
    def obs_keys(self) -> list[str]:
        return [name for name in self._columns if name.startswith("observation.")]

    @property
    def num_starts(self) -> int:
        return int(self._spans.before[self._spans.tail] - self._spans.before[self._spans.head])

    @property
    def num_episodes(self) -> int:
        return self._spans.tail - self._spans.head

    def reserve(self, steps: int) -> None:
        """Make room for `steps` more without copying again while they come (growing rings only)."""
        if self.capacity is None and self._columns:
            self._grow(self._pointer + steps)
        self._reserved = self._pointer + steps

    def add(self, columns: Mapping[str, np.ndarray], num_starts: int) -> None:
        length = len(columns["action"])
        if self.capacity is not None and length > self.capacity:
            raise DataError(
                f"an episode of {length} steps does not fit a pool of {self.capacity}; raise replay.capacity"
            )
        self._allocate(columns, length)
        needed = self._pointer + length
        if needed > len(self.last) and (self.capacity is None or len(self.last) < self.capacity):
            # Memory is taken as episodes come, not for the whole capacity at once.
            wanted = max(2 * len(self.last), needed)
            self._grow(wanted if self.capacity is None else min(wanted, self.capacity))
        if self.capacity is not None and needed > self.capacity:
            # The rest of the array stays unused until the pointer comes round: episodes are never split.
            self._evict_until(self._pointer, self.capacity)
            self._pointer = 0
        begin, end = self._pointer, self._pointer + length
        if self.capacity is not None:
            self._evict_until(begin, end)
        for name, column in columns.items():
            self._columns[name][begin:end] = column
        self.last[begin:end] = end - 1
        self._spans.append(begin, num_starts)
        self._lengths.append(length)
        self.num_steps += length
        self._pointer = end

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Indices of start steps, uniform."""
        return self.start_steps(rng.integers(self.num_starts, size=count))

    def start_steps(self, order: np.ndarray) -> np.ndarray:
        """Index of the i-th start step, oldest episode first."""
        spans = self._spans
        rank = order + spans.before[spans.head]
        episode = np.searchsorted(spans.before[spans.head : spans.tail + 1], rank, side="right") - 1 + spans.head
        return spans.begin[episode] + rank - spans.before[episode]

    def _evict_until(self, begin: int, end: int) -> None:
        """Drop the oldest episodes while they overlap [begin, end)."""
        spans = self._spans
        while spans.head < spans.tail:
            oldest = spans.begin[spans.head]
            if not begin <= oldest < end:
                break
            self.num_steps -= self._lengths[spans.head]
            spans.head += 1

    def _allocate(self, columns: Mapping[str, np.ndarray], length: int) -> None:
        if not self._columns:
            size = max(self._reserved, length)
            self._columns = {
                name: np.zeros((size, *column.shape[1:]), dtype=column.dtype) for name, column in columns.items()
            }
            self.last = np.zeros(size, dtype=np.int64)

    def _grow(self, size: int) -> None:
        if size <= len(self.last):
            return
        for name, column in self._columns.items():
            bigger = np.zeros((size, *column.shape[1:]), dtype=column.dtype)
            bigger[: self._pointer] = column[: self._pointer]
            self._columns[name] = bigger
        self.last = np.concatenate([self.last, np.zeros(size - len(self.last), dtype=np.int64)])
