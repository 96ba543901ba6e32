"""An episode in pieces, because a message is bounded and an episode is not. Both ends are here.

A piece is ``{"episode": key, "steps": T, "first": k, "rows": {column: [n, ...]}}``: rows k to k + n of T. Its reply,
``{"episode": key, "rows": k + n}``, says how many are there. They come in order, and one that starts at 0 begins anew.
The end is ``{"episode": key, "task": text, "seed": integer or None}``. Its reply, ``{"episode": key, "recorded":
True}``, comes when the episode is kept. The columns are the observations by their keys and `Episode`'s own by name.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from poco_vla.data.episode import LONGEST_TASK, Episode
from poco_vla.errors import DataError
from poco_vla.serving.codec import pack
from poco_vla.serving.feature import Feature
from poco_vla.serving.uploads import Uploads

PIECE_BYTES = 1024**2
"""Of a piece, unless messages must be shorter. Larger ones are not faster, and keep other clients waiting."""
MAX_EPISODE_BYTES = 2 * 1024**3
"""Of an episode that a server holds until it is whole: five minutes of two 320 x 240 pictures at 15 a second."""
MAX_KEY = 200
"""Characters of an episode's key."""

_OWN = {"reward": "float32", "success": "bool", "terminal": "bool"}
_OPTIONAL = {"policy_version": "int64", "interventions": "bool"}


# -- the robot's side -------------------------------------------------------------------------------------------------


def columns(episode: Episode) -> dict[str, np.ndarray]:
    """Return the columns of an episode by name, [T, ...] each.

    Raises:
        DataError: it has no steps, or a column is not as long as the others.
    """
    own = {name: getattr(episode, name) for name in ("action", *_OWN, *_OPTIONAL)}
    found = dict(episode.obs) | {name: column for name, column in own.items() if column is not None}
    lengths = {name: len(column) for name, column in found.items()}
    if not len(episode) or len({*lengths.values()}) != 1:
        raise DataError(f"an episode's columns are of one length, at least 1 step; these are of {lengths}")
    return found


def pieces(episode: Episode, key: str, max_bytes: int) -> Iterator[dict[str, Any]]:
    """Yield the messages that carry an episode's rows, each at most `max_bytes` long when it is packed.

    Raises:
        DataError: as `columns`, or one step alone is longer than that.
    """
    found, steps = columns(episode), len(episode)
    fixed = len(pack(_piece(key, steps, 0, found, 0))) + 16 * (len(found) + 4)  # longer numbers take more bytes
    each = sum(column[:1].nbytes for column in found.values())
    count = max((min(max_bytes, PIECE_BYTES) - fixed) // each, 1)
    if fixed + each > max_bytes:
        raise DataError(f"one step of the episode takes {each + fixed} bytes; the server takes messages of {max_bytes}")
    for first in range(0, steps, count):
        yield _piece(key, steps, first, found, count)


def _piece(key: str, steps: int, first: int, found: Mapping[str, np.ndarray], count: int) -> dict[str, Any]:
    rows = {name: column[first : first + count] for name, column in found.items()}
    return {"episode": key, "steps": steps, "first": first, "rows": rows}


def ending(episode: Episode, key: str) -> dict[str, Any]:
    """Return the message after the last piece."""
    return {"episode": key, "task": episode.task, "seed": episode.seed}


# -- the policy's side ------------------------------------------------------------------------------------------------


class Inbox:
    """Assembles one client's episode from its pieces, one episode at a time. A piece that is refused discards it.

    Args:
        observations: key -> what one step holds of it.
        action_dim: of the robot.
        max_bytes: of an episode. It is allocated as it comes, so that a client cannot claim what it does not send.
        uploads: bounds the episodes of all clients together; None bounds nothing more.
    """

    def __init__(
        self, observations: Mapping[str, Feature], action_dim: int, max_bytes: int, uploads: Uploads | None = None
    ) -> None:
        own = {name: Feature((), dtype) for name, dtype in _OWN.items()}
        self._needed = {**observations, "action": Feature((action_dim,), "float32"), **own}
        self._optional = {name: Feature((), dtype) for name, dtype in _OPTIONAL.items()}
        self._observations, self._max_bytes = list(observations), max_bytes
        self._uploads = uploads
        self._growing: _PartialEpisode | None = None

    def add(self, piece: Mapping[Any, Any]) -> int:
        """Append a piece and return the number of rows so far.

        Raises:
            DataError: it is not the next piece, or not of these columns; the episode is forgotten.
            BusyError: it begins an episode while others take all the room.
        """
        try:
            filled = self._add(piece)
        except BaseException:
            self.drop()
            raise
        if self._uploads is not None:
            self._uploads.touch(self)
        return filled

    def drop(self) -> None:
        """Discard the episode."""
        self._growing = None
        if self._uploads is not None:
            self._uploads.release(self)

    def _add(self, piece: Mapping[Any, Any]) -> int:
        growing, self._growing = self._growing, None
        _check_names(piece, {"episode", "steps", "first", "rows"})
        key, first, steps = _read_key(piece), _count(piece, "first"), _count(piece, "steps")
        if first == 0:
            growing = self._begin(key, steps, piece["rows"])
        if growing is None or (growing.key, growing.steps, growing.filled) != (key, steps, first):
            expected = f"row {growing.filled} of {growing.steps} of {growing.key!r}" if growing else "row 0 of any"
            raise DataError(
                f"this piece starts at row {first} of {steps} of {key!r}; expected {expected}. Send the episode from "
                "its start."
            )
        growing.add(piece["rows"])
        self._growing = growing
        return growing.filled

    def finish(self, end: Mapping[Any, Any]) -> Episode:
        """Return the complete episode and remove it from the inbox.

        Raises:
            DataError: it is not whole, or this is not its end.
        """
        growing, self._growing = self._growing, None
        _check_names(end, {"episode", "task", "seed"})
        key, task, seed = _read_key(end), end["task"], end["seed"]
        if not isinstance(task, str) or not (seed is None or type(seed) is int):
            raise DataError(f'"task" is a text and "seed" an integer or nothing, got {task!r:.100} and {seed!r:.40}')
        check_task("task", task)
        if growing is None or growing.key != key or growing.filled < growing.steps:
            found = f"{growing.filled} of the {growing.steps} rows of {growing.key!r}" if growing else "no rows"
            raise DataError(f"the end of episode {key!r}, but there are {found}. Send the episode from its start.")
        columns = growing.columns
        obs = {name: columns.pop(name) for name in self._observations}
        return Episode(obs, task=task, seed=seed, **columns)

    def _begin(self, key: str, steps: int, rows: Any) -> "_PartialEpisode":
        spec = self._needed | {n: f for n, f in self._optional.items() if isinstance(rows, dict) and n in rows}
        each = sum(feature.nbytes for feature in spec.values())
        if not 0 < steps * each <= self._max_bytes:
            raise DataError(
                f"an episode of {steps} steps of {each} bytes; from 1 step up to {self._max_bytes} bytes are taken"
            )
        if self._uploads is not None:
            self._uploads.reserve(self, steps * each)
        return _PartialEpisode(key, steps, spec)


class _PartialEpisode:
    """An episode of which `filled` of `steps` rows are there."""

    def __init__(self, key: str, steps: int, spec: Mapping[str, Feature]) -> None:
        self.key, self.steps, self.spec, self.filled = key, steps, spec, 0
        self.columns: dict[str, Any] = {n: np.empty((steps, *f.shape), np.dtype(f.dtype)) for n, f in spec.items()}

    def add(self, rows: Any) -> None:
        checked = self._check(rows)
        count = len(checked["action"])
        for name, column in checked.items():
            self.columns[name][self.filled : self.filled + count] = column
        self.filled += count

    def _check(self, rows: Any) -> dict[str, np.ndarray]:
        if not isinstance(rows, dict):
            raise DataError(f'"rows" is a map of columns, got a {type(rows).__name__}')
        _check_names(rows, set(self.spec))
        count = len(rows["action"]) if isinstance(rows["action"], np.ndarray) and rows["action"].ndim else 0
        if not 0 < count <= self.steps - self.filled:
            raise DataError(f"{count} rows from row {self.filled} on, in an episode of {self.steps}")
        return {name: feature.rows(count).check(name, rows[name]) for name, feature in self.spec.items()}


def check_task(name: str, task: str) -> None:
    """Raise DataError for an instruction that is too long for a policy."""
    if len(task) > LONGEST_TASK:
        raise DataError(f'"{name}" has {len(task)} characters; an instruction has at most {LONGEST_TASK}')


def _check_names(found: Mapping[Any, Any], expected: set[str]) -> None:
    if found.keys() != expected:
        wrong = sorted(repr(name) for name in found.keys() ^ expected)
        raise DataError(f"{', '.join(wrong)} missing or not known: a piece of an episode holds {sorted(expected)}")


def _count(message: Mapping[Any, Any], name: str) -> int:
    if type(message[name]) is not int or message[name] < 0:
        raise DataError(f'"{name}" is a number of steps, got {message[name]!r:.40}')
    return message[name]


def _read_key(message: Mapping[Any, Any]) -> str:
    key = message["episode"]
    if not isinstance(key, str) or not 0 < len(key) <= MAX_KEY:
        raise DataError(f'"episode" is its key, a text of 1 to {MAX_KEY} characters, got {key!r:.100}')
    return key
