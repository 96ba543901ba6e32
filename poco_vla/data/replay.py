"""The replay buffer D: offline demonstrations and online episodes as chunk transitions over column arrays.

Episodes enter whole and lie contiguously, so that no chunk crosses an episode or the ring's write pointer. What a
transition's return, bootstrap state and masks are is decided here, once, for offline and online data alike.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from poco_vla.config import ReplayConfig, RewardConfig
from poco_vla.data.columns import Column, MappedColumn, MemoryColumn
from poco_vla.data.episode import Episode
from poco_vla.data.ring import Capacity, EpisodeRing, Starts, bytes_per_step
from poco_vla.errors import ConfigError, DataError

ONLINE = 1 << 62
"""Ids of demonstrations' states lie below, those of online episodes' begin here."""


@dataclass(frozen=True)
class Transitions:
    """B sampled transitions in raw units (see :class:`poco_vla.types.ChunkBatch` for the fields' meaning).

    Attributes:
        ids: [B] int64, which state each starts from: demonstrations' steps count from 0 on in the order in which they
            were added, online episodes' from `ONLINE`.
        next_ids: [B] likewise, of the bootstrap states.
        next_tasks: [B] instructions at the bootstrap states; empty where they are `tasks`.
    """

    obs: Mapping[str, np.ndarray]
    next_obs: Mapping[str, np.ndarray]
    actions: np.ndarray
    valid: np.ndarray
    returns: np.ndarray
    discount: np.ndarray
    is_demo: np.ndarray
    is_success: np.ndarray
    tasks: list[str]
    ids: np.ndarray
    next_ids: np.ndarray
    next_tasks: list[str] = field(default_factory=list)

    def rows(self, rows: slice) -> "Transitions":
        """Return some of the transitions."""
        columns: dict[str, Any] = {
            name: {key: column[rows] for key, column in value.items()} if isinstance(value, Mapping) else value[rows]
            for name, value in vars(self).items()
        }
        return Transitions(**columns)

    def split(self, size: int) -> "Iterator[Transitions]":
        """Yield slices of at most `size` transitions."""
        return (self.rows(slice(i, i + size)) for i in range(0, len(self.actions), size))


class Replay:
    """Offline and online chunk transitions, sampled together.

    Args:
        horizon: H.
        gamma: discount per control step.
        reward: what a step is worth.
        config: how much is kept, where, and how it is mixed.
        folder: where the files of mapped pictures lie; needed for ``images="mapped"`` alone.

    Attributes:
        version: goes up with every episode that enters.

    Raises:
        ConfigError: pictures are to be mapped and there is no folder.
    """

    def __init__(
        self,
        *,
        horizon: int,
        gamma: float,
        reward: RewardConfig | None = None,
        config: ReplayConfig | None = None,
        folder: Path | None = None,
    ) -> None:
        self.horizon = horizon
        self.reward = reward or RewardConfig()
        self.config = config = config or ReplayConfig()
        self._powers = gamma ** np.arange(horizon + 1)
        self._folder = _picture_folder(config, folder)
        self._demos = EpisodeRing(Capacity(config.demo_capacity, "replay.demo_capacity"), self._column)
        self._online = EpisodeRing(Capacity(config.capacity, "replay.capacity", config.max_bytes), self._column)
        self._rows: dict[str, np.ndarray] = {}
        self._tasks: list[str] = []
        self._task_ids: dict[str, int] = {}
        self.version = 0

    @property
    def num_demo_steps(self) -> int:
        return self._demos.num_steps

    @property
    def num_online_steps(self) -> int:
        return self._online.num_steps

    @property
    def num_online_episodes(self) -> int:
        return self._online.num_episodes

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all stored steps, in memory and in mapped files."""
        return (self.num_demo_steps + self.num_online_steps) * bytes_per_step(self._rows)

    def add(self, episode: Episode, *, is_demo: bool) -> int:
        """Append a finished episode and return the id of its first step; the ids of later steps follow one by one. The
        first episode fixes the replay buffer's columns; additional columns of later episodes are left out.

        Raises:
            DataError: it has no step, lacks a column of the replay buffer or has another shape or kind of numbers, is
                longer than the capacity, or the disk of mapped pictures is full.
        """
        if len(episode) == 0:
            raise DataError("an episode without a single step cannot enter the replay buffer")
        # Environments that go on after success mark no end there: the rule is the same as for datasets.
        terminal = episode.terminal | episode.success
        columns = self._match_columns(
            {
                **episode.obs,
                "action": episode.action,
                "reward": episode.rewards(self.reward),
                "terminal": terminal,
            }
        )
        # Deviation 3: a cut-off episode has no stored state after its last step, so that step starts no transition:
        # its chunks bootstrap one step earlier, exactly, from the last stored state.
        num_starts = len(episode) if terminal[-1] else len(episode) - 1
        ring, task = self._demos if is_demo else self._online, self._task_id(episode.task)
        several = None if episode.step_tasks is None else np.array([*map(self._task_id, episode.step_tasks)], np.int32)
        number = ring.add(columns, num_starts, succeeded=episode.succeeded, task=task, step_tasks=several)
        self.version += 1
        return number if is_demo else ONLINE + number

    def extend(self, episodes: list[Episode], *, is_demo: bool) -> None:
        """Append several demonstrations or online episodes; demonstrations are copied once."""
        if is_demo:
            self._demos.reserve(sum(map(len, episodes)))
        for episode in episodes:
            self.add(episode, is_demo=is_demo)

    def sample(self, batch_size: int, rng: np.random.Generator, *, pictures: bool = True) -> Transitions:
        """Return `batch_size` transitions, uniform over start steps (of all data, or of demonstrations and online data
        under `demo_fraction`); under `consecutive` in runs. Without `pictures`, observations have none; `observations`
        returns them."""
        num_demos = self._num_demos(batch_size, rng)
        runs = {"run": self.config.consecutive, "stride": self.horizon}
        parts = []
        if num_demos:
            parts.append(self._part(self._demos, self._demos.sample(num_demos, rng, **runs), is_demo=True))
        if num_demos < batch_size:
            starts = self._online.sample(batch_size - num_demos, rng, **runs)
            parts.append(self._part(self._online, starts, is_demo=False))
        return self._join(parts, pictures=pictures)

    def observations(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], list[str]]:
        """Return the raw observations of stored states by their ids, and their tasks."""
        order, indices, rings, tasks = [], [], [], []
        for ring, first, chosen in ((self._demos, 0, ids < ONLINE), (self._online, ONLINE, ids >= ONLINE)):
            if chosen.any():
                index, task = ring.steps(ids[chosen] - first)
                order.append(np.flatnonzero(chosen))
                indices.append(index)
                rings.append(ring)
                tasks += task.tolist()
        back = np.argsort(np.concatenate(order))
        obs = {key: _gather([ring[key] for ring in rings], indices)[back] for key in self._obs_keys(pictures=True)}
        return obs, [self._tasks[tasks[i]] for i in back.tolist()]

    def demo_transitions(self, limit: int, rng: np.random.Generator) -> Transitions:
        """Return up to `limit` demonstration transitions, without repetition (zeta = "auto" is calibrated on them)."""
        order = rng.permutation(self._demos.num_starts)[:limit]
        return self._join([self._part(self._demos, self._demos.starts(order), is_demo=True)])

    def _num_demos(self, batch_size: int, rng: np.random.Generator) -> int:
        """Return the number of demonstration transitions in a batch."""
        demos, online, fraction = self._demos.num_starts, self._online.num_starts, self.config.demo_fraction
        if demos + online == 0:
            raise DataError(
                "the replay buffer holds no transition to sample: every episode is a single cut-off step, or none is"
            )
        if online == 0:
            return batch_size
        if demos == 0:
            return 0
        if fraction is not None:
            return round(fraction * batch_size)
        return int((rng.integers(demos + online, size=batch_size) < demos).sum())

    def _part(self, ring: EpisodeRing, starts: Starts, *, is_demo: bool) -> "_Part":
        last = starts.last[:, None]
        steps = starts.step[:, None] + np.arange(self.horizon)
        valid = steps <= last
        steps = np.minimum(steps, last)
        terminal = ring["terminal"][steps] & valid
        ended = terminal.any(axis=1)
        # Steps whose reward counts: up to the first terminal inside the chunk, else up to the bootstrap state.
        bootstrap = np.minimum(starts.step + self.horizon, starts.last)
        count = np.where(ended, terminal.argmax(axis=1) + 1, bootstrap - starts.step)
        counted = np.arange(self.horizon) < count[:, None]
        returns = (ring["reward"][steps] * counted) @ self._powers[: self.horizon]
        discount = np.where(ended, 0.0, self._powers[count])
        return _Part(ring, starts, bootstrap, steps, valid, returns, discount, is_demo)

    def _join(self, parts: list["_Part"], *, pictures: bool = True) -> Transitions:
        def column(name: str, indices: list[np.ndarray]) -> np.ndarray:
            return _gather([part.ring[name] for part in parts], indices)

        start, bootstrap = [part.starts.step for part in parts], [part.bootstrap for part in parts]
        keys = self._obs_keys(pictures=pictures)
        return Transitions(
            obs={key: column(key, start) for key in keys},
            next_obs={key: column(key, bootstrap) for key in keys},
            actions=column("action", [part.steps for part in parts]),
            valid=np.concatenate([part.valid for part in parts]),
            returns=np.concatenate([part.returns for part in parts]).astype(np.float32),
            discount=np.concatenate([part.discount for part in parts]).astype(np.float32),
            is_demo=np.concatenate([np.full(len(part.valid), part.is_demo) for part in parts]),
            is_success=np.concatenate([part.starts.succeeded for part in parts]),
            tasks=[self._tasks[i] for part in parts for i in part.starts.task.tolist()],
            ids=np.concatenate([part.ids(part.starts.step) for part in parts]),
            next_ids=np.concatenate([part.ids(part.bootstrap) for part in parts]),
            next_tasks=[self._tasks[i] for part in parts for i in part.next_tasks().tolist()],
        )

    def _obs_keys(self, *, pictures: bool) -> list[str]:
        names = [name for name in self._rows if name.startswith("observation.")]
        return [name for name in names if pictures or not _is_picture(self._rows[name])]

    def _match_columns(self, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the replay buffer's columns of an episode, in their types: demonstrations and online episodes share
        batches."""
        self._rows = self._rows or {name: column[:0].copy() for name, column in columns.items()}
        for name, rows in self._rows.items():
            if name not in columns:
                raise DataError(
                    f'the episode has no "{name}", which the replay buffer holds; its columns: '
                    + ", ".join(sorted(columns))
                )
            found, shape = columns[name], rows.shape[1:]
            if found.shape[1:] != shape:
                raise DataError(f'"{name}" has shape {found.shape[1:]} per step, the replay buffer holds {shape}')
            if not np.can_cast(found.dtype, rows.dtype, "same_kind"):
                raise DataError(f'"{name}" is {found.dtype}, the replay buffer holds {rows.dtype}; record both alike')
        return {name: columns[name].astype(rows.dtype, copy=False) for name, rows in self._rows.items()}

    def _column(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Column:
        picture = name.startswith("observation.") and _is_picture(np.empty((0, *shape), dtype))
        if picture and self._folder is not None:
            return MappedColumn(shape, dtype, self._folder)
        return MemoryColumn(shape, dtype)

    def _task_id(self, task: str) -> int:
        if task not in self._task_ids:
            self._task_ids[task] = len(self._tasks)
            self._tasks.append(task)
        return self._task_ids[task]


def _is_picture(column: np.ndarray) -> bool:
    return column.dtype == np.uint8 and column.ndim == 4


def _picture_folder(config: ReplayConfig, folder: Path | None) -> Path | None:
    """Return the folder of mapped pictures; None if they stay in memory."""
    if config.images == "memory":
        return None
    if folder is None:
        raise ConfigError('replay.images is "mapped", but the replay buffer was given no folder for the files')
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _gather(columns: list[np.ndarray], indices: list[np.ndarray]) -> np.ndarray:
    """Return rows of several columns, concatenated, each copied once."""
    out = np.empty((sum(map(len, indices)), *indices[0].shape[1:], *columns[0].shape[1:]), dtype=columns[0].dtype)
    end = 0
    for column, index in zip(columns, indices, strict=True):
        begin, end = end, end + len(index)
        # Any other mode than "raise" writes into `out` without a buffer between.
        np.take(column, index, axis=0, out=out[begin:end], mode="clip")
    return out


@dataclass(frozen=True)
class _Part:
    """Transitions out of one ring, as indices into its columns."""

    ring: EpisodeRing
    starts: Starts
    bootstrap: np.ndarray
    steps: np.ndarray
    valid: np.ndarray
    returns: np.ndarray
    discount: np.ndarray
    is_demo: bool

    def ids(self, steps: np.ndarray) -> np.ndarray:
        """Return the id of a step of each transition's episode, [B]."""
        return steps + self.starts.number + (0 if self.is_demo else ONLINE)

    def next_tasks(self) -> np.ndarray:
        """Return the number of the task at each bootstrap state [B]."""
        return self.ring.tasks(self.starts, self.bootstrap)
