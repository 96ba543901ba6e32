"""A ring of whole episodes over columns: the newest take the place of the oldest."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from poco_vla.data.columns import Column
from poco_vla.errors import DataError


@dataclass(frozen=True)
class Capacity:
    """Most that a ring holds; the smaller of both limits counts, and None is none.

    Attributes:
        steps: control steps.
        name: the configuration's field that says so.
        max_bytes: bytes of all columns (``replay.max_bytes``).
    """

    steps: int | None
    name: str
    max_bytes: int | None = None

    def limit(self, bytes_per_step: int) -> tuple[int | None, str]:
        """Return the largest number of steps, and the configuration field that sets it."""
        fit = None if self.max_bytes is None else self.max_bytes // bytes_per_step
        if fit is None or (self.steps is not None and self.steps <= fit):
            return self.steps, self.name
        return fit, "replay.max_bytes"


@dataclass(frozen=True)
class Starts:
    """Start steps of B transitions, as indices into a ring's columns.

    Attributes:
        step: [B] the start steps.
        last: [B] the last step of each one's episode.
        number: [B] what a step's index and its number differ by in each one's episode: steps are numbered in the order
            in which they entered, and keep their number.
        succeeded: [B] bool: that episode reached success.
        task: [B] number of the task at the start step.
        row: [B] row of each one's episode in the ring's table.
    """

    step: np.ndarray
    last: np.ndarray
    number: np.ndarray
    succeeded: np.ndarray
    task: np.ndarray
    row: np.ndarray


class EpisodeRing:
    """Columns in which whole episodes lie contiguously. They grow up to the capacity; from then on the oldest episodes
    make room.

    Args:
        capacity: most that it holds.
        make_column: an empty column for rows of this name, shape and dtype.
    """

    def __init__(self, capacity: Capacity, make_column: Callable[[str, tuple[int, ...], np.dtype], Column]) -> None:
        self.num_steps = 0
        self._capacity = capacity
        self._make_column = make_column
        self._columns: dict[str, Column] = {}
        self._spans = _Spans()
        self._pointer = 0
        self._reserved = 0

    def __getitem__(self, name: str) -> np.ndarray:
        return self._columns[name].rows

    @property
    def num_starts(self) -> int:
        return self._spans.num_starts

    @property
    def num_episodes(self) -> int:
        return self._spans.tail - self._spans.head

    def reserve(self, steps: int) -> None:
        """Allocate space for `steps` more steps when the next episode is added."""
        self._reserved = self._pointer + steps

    def add(
        self,
        columns: Mapping[str, np.ndarray],
        num_starts: int,
        *,
        succeeded: bool,
        task: int,
        step_tasks: np.ndarray | None = None,
    ) -> int:
        """Append an episode of which the first `num_starts` steps start transitions, and return its first step's
        number.

        Args:
            columns: [T, ...] each.
            num_starts: steps that start transitions.
            succeeded: the episode reached success.
            task: number of its task.
            step_tasks: [T] number of each step's task where they differ.

        Raises:
            DataError: it is longer than the capacity, or the disk is full; the ring stays as it was.
        """
        length = len(columns["action"])
        limit, name = self._capacity.limit(bytes_per_step(columns))
        if limit is not None and length > limit:
            raise DataError(f"an episode of {length} steps does not fit a replay buffer of {limit} steps; raise {name}")
        # The rest of the columns stays unused until the pointer comes round: episodes are never split.
        begin = 0 if limit is not None and self._pointer + length > limit else self._pointer
        end = begin + length
        self._hold(columns, end, limit)
        if limit is not None and begin < self._pointer:
            self._evict(self._pointer, limit)
        self._evict(begin, end)
        for name, column in columns.items():
            self._columns[name].rows[begin:end] = column
        number = self._spans.num_steps
        if step_tasks is not None:
            self._spans.step_tasks[number] = step_tasks
        self._spans.append(begin=begin, length=length, num_starts=num_starts, succeeded=succeeded, task=task)
        self.num_steps += length
        self._pointer = end
        return number

    def sample(self, count: int, rng: np.random.Generator, *, run: int = 1, stride: int = 1) -> Starts:
        """Sample `count` start steps, each of them uniform; in runs of `run` that lie `stride` apart in one episode.

        Start steps of an episode that lie a multiple of `stride` apart form a circle, and a run is an arc of it: after
        the last comes the first again. Of the arcs that begin anywhere, equally often, none of the steps is in more.
        """
        begin = rng.integers(self.num_starts, size=-(-count // run))
        return self.starts(begin if run == 1 else self._spans.arcs(begin, run, stride)[:count])

    def starts(self, order: np.ndarray) -> Starts:
        """Return the start steps of these numbers, counted from the oldest episode on."""
        return self._spans.starts(order)

    def steps(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the column indices of stored steps by their numbers, and the number of each one's task."""
        return self._spans.steps(numbers)

    def tasks(self, starts: Starts, steps: np.ndarray) -> np.ndarray:
        """Return the number of the task at a step [B] of each transition's episode."""
        return self._spans.tasks(starts.row, steps - self._spans.begin[starts.row])

    def _hold(self, columns: Mapping[str, np.ndarray], steps: int, limit: int | None) -> None:
        wanted = max(steps, self._reserved)
        if not self._columns:
            self._columns = {n: self._make_column(n, rows.shape[1:], rows.dtype) for n, rows in columns.items()}
        for column in self._columns.values():
            column.hold(wanted if limit is None else min(wanted, limit), limit)

    def _evict(self, begin: int, end: int) -> None:
        """Drop the oldest episodes while they begin in [begin, end)."""
        spans = self._spans
        while spans.head < spans.tail and begin <= spans.begin[spans.head] < end:
            self.num_steps -= int(spans.length[spans.head])
            spans.step_tasks.pop(int(spans.first[spans.head]), None)
            spans.head += 1


def bytes_per_step(columns: Mapping[str, np.ndarray]) -> int:
    """Return the bytes of one row of all columns."""
    return sum(rows.dtype.itemsize * int(np.prod(rows.shape[1:])) for rows in columns.values())


class _Spans:
    """Live episodes, oldest first, in rows head to tail: where each begins, how long it is, how many steps and how many
    start steps came before it since the beginning, its success and task. Few episodes have several tasks: theirs lie
    beside, by the number of the episode's first step."""

    def __init__(self) -> None:
        self.begin, self.length, self.first, self.before = (np.zeros(0, dtype=np.int64) for _ in range(4))
        self.succeeded, self.task = np.zeros(0, dtype=bool), np.zeros(0, dtype=np.int32)
        self.step_tasks: dict[int, np.ndarray] = {}
        self.head = self.tail = self.total = self.num_steps = 0

    @property
    def num_starts(self) -> int:
        return self.total - int(self.before[self.head]) if self.head < self.tail else 0

    def append(self, *, begin: int, length: int, num_starts: int, succeeded: bool, task: int) -> None:
        if self.tail == len(self.begin):
            self._make_room()
        row = self.tail
        self.begin[row], self.length[row] = begin, length
        self.first[row], self.before[row] = self.num_steps, self.total
        self.succeeded[row], self.task[row] = succeeded, task
        self.num_steps += length
        self.total += num_starts
        self.tail += 1

    def starts(self, order: np.ndarray) -> Starts:
        """Return the start steps of these numbers."""
        row, within = self._find(order)
        begin = self.begin[row]
        return Starts(
            step=begin + within,
            last=begin + self.length[row] - 1,
            number=self.first[row] - begin,
            succeeded=self.succeeded[row],
            task=self.tasks(row, within),
            row=row,
        )

    def tasks(self, row: np.ndarray, within: np.ndarray) -> np.ndarray:
        """Return the task of a step of each of these rows' episodes, counted from the episode's first step."""
        task = self.task[row]
        first = self.first[row] if self.step_tasks else np.zeros(0, dtype=np.int64)
        for number in set(first.tolist()) & self.step_tasks.keys():
            here = first == number
            task[here] = self.step_tasks[number][within[here]]
        return task

    def arcs(self, order: np.ndarray, run: int, stride: int) -> np.ndarray:
        """Return the numbers of start steps, [len(order) * run]: from each given one on, `stride` apart, continuing at
        the episode's first step after its last."""
        row, within = self._find(order)
        ends = np.append(self.before[: self.tail], self.total)
        count = ends[row + 1] - ends[row]
        phase, place = within % stride, within // stride
        length = (count - 1 - phase) // stride + 1
        places = (place[:, None] + np.arange(run)) % length[:, None]
        return (order - within + phase)[:, None].repeat(run, 1).ravel() + (places * stride).ravel()

    def steps(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the column indices of the steps of these numbers, and each one's task."""
        first = self.first[self.head : self.tail]
        row = np.searchsorted(first, numbers, side="right") - 1 + self.head
        within = numbers - self.first[row]
        assert (within >= 0).all(), "a step that is not there any more"
        assert (within < self.length[row]).all(), "a step that is not there yet"
        return self.begin[row] + within, self.tasks(row, within)

    def _find(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the row of each start step's episode, and the step's index in it."""
        before = self.before[self.head : self.tail]
        rank = order + before[0]
        row = np.searchsorted(before, rank, side="right") - 1 + self.head
        return row, rank - self.before[row]

    def _make_room(self) -> None:
        """Allocate twice as many rows as there are live ones, and move those to the front."""
        live = slice(self.head, self.tail)
        count = self.tail - self.head
        for name in ("begin", "length", "first", "before", "succeeded", "task"):
            column = getattr(self, name)
            moved = np.zeros(max(64, 2 * count), dtype=column.dtype)
            moved[:count] = column[live]
            setattr(self, name, moved)
        self.head, self.tail = 0, count
