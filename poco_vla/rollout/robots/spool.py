"""Episodes on the robot's side of the wire, on disk until the learner says that it has them on its own."""

import json
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from poco_vla.data.episode import Episode
from poco_vla.errors import ConfigError, DataError
from poco_vla.files import sync, whole_file

logger = logging.getLogger(__name__)

_OBS = "obs/"
_COLUMNS = ("action", "reward", "success", "terminal")
_NOTED = ("policy_version", "interventions")


class Spool:
    """A folder with one safetensors file per episode, named by its key. For one session at a time; within a ``with``
    block it is locked.

    A file that cannot be read is renamed ``*.damaged``, one that the learner does not take ``*.refused``: neither is
    sent again by itself, and neither is deleted.

    Args:
        folder: made when it is not there.
        tell: hears what a person should know.

    Raises:
        ConfigError: another session has it, or the folder cannot be made.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None] = logger.warning) -> None:
        self.folder, self.tell = folder, tell
        self._lock = FileLock(folder / ".lock")

    def __enter__(self) -> "Spool":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(f"{self.folder} is in use by another session; give this one its own --spool") from error
        except OSError as error:
            raise ConfigError(f"cannot keep episodes in {self.folder}: {error}. Choose another --spool") from error
        for partial in self.folder.glob(".*.partial"):  # of a session that was killed while it wrote
            partial.unlink()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lock.release()

    def put(self, episode: Episode, key: str) -> None:
        """Write an episode, whole or not at all.

        Raises:
            OSError: the disk does not take it.
        """
        with whole_file(self._path(key)) as partial, partial.open("wb") as file:
            file.write(encoded(episode))
            file.flush()
            os.fsync(file.fileno())  # robots lose their power, too
        sync(self.folder)

    def waiting(self) -> list[str]:
        """Keys of the episodes that wait, the oldest first."""
        paths = sorted(self.folder.glob("*.safetensors"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        return [path.stem for path in paths]

    def get(self, key: str) -> Episode | None:
        """The episode, None when its file is damaged: it then lies beside, and that is told."""
        try:
            return decoded(self._path(key))
        except (DataError, SafetensorError, OSError) as error:
            aside = self._aside(key, "damaged")
            self.tell(f"a waiting episode cannot be read ({error}): it is not sent, and kept as {aside}")
            return None

    def remove(self, key: str) -> None:
        """The learner has it."""
        self._path(key).unlink()

    def refuse(self, key: str) -> Path:
        """The learner does not take it. Returns where it lies now."""
        return self._aside(key, "refused")

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _aside(self, key: str, why: str) -> Path:
        return self._path(key).rename(self.folder / f"{key}.{why}")


def new_key() -> str:
    """A name for an episode that no other has."""
    return uuid.uuid4().hex


def encoded(episode: Episode) -> bytes:
    """An episode as the bytes of a safetensors file."""
    columns = {f"{_OBS}{key}": value for key, value in episode.obs.items()}
    columns |= {name: getattr(episode, name) for name in _COLUMNS}
    columns |= {name: value for name in _NOTED if (value := getattr(episode, name)) is not None}
    metadata = {"episode": json.dumps({"task": episode.task, "seed": episode.seed})}
    return save({name: np.ascontiguousarray(column) for name, column in columns.items()}, metadata)


def decoded(path: Path) -> Episode:
    """The episode of a file.

    Raises:
        DataError: it is no episode, or a torn one.
        SafetensorError, OSError: it cannot be read at all.
    """
    with safe_open(path, "np") as file:
        columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        said = (file.metadata() or {}).get("episode")
    missing = [name for name in _COLUMNS if name not in columns]
    if said is None or missing or len({len(column) for column in columns.values()}) != 1:
        raise DataError(f"{path} is no episode: {missing or 'its columns'} are missing or of unlike length")
    try:
        notes = json.loads(said)
        task, seed = notes["task"], notes["seed"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not say its task: {error!r}") from error
    obs = {name.removeprefix(_OBS): column for name, column in columns.items() if name.startswith(_OBS)}
    noted = {name: columns[name] for name in _NOTED if name in columns}
    episode = Episode(obs, **{name: columns[name] for name in _COLUMNS}, **noted, task=task, seed=seed)
    episode.check(str(path))
    return episode
