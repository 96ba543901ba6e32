"""Episodes on the robot's side of the wire, on disk until the learner says that it has them on its own."""

import errno
import logging
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from poco_vla.data.episode import Episode
from poco_vla.errors import ConfigError, DataError, PocoError
from poco_vla.files import atomic_file, sync
from poco_vla.recording.episode_file import decoded, encoded

logger = logging.getLogger(__name__)

_NO_FOLDER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)
"""Error numbers of a folder that cannot be written to, or is gone."""


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
            PocoError: the folder takes no files any more; the episode is lost.
        """
        try:
            with atomic_file(self._path(key)) as partial, partial.open("wb") as file:
                file.write(encoded(episode))
                file.flush()
                os.fsync(file.fileno())  # robots lose their power, too
            sync(self.folder)
        except OSError as error:
            if error.errno not in _NO_FOLDER:
                raise
            raise PocoError(
                f"an episode of {len(episode)} steps cannot be kept in {self.folder}, and is lost: {error}. Make the "
                "folder writable, or give another --spool"
            ) from error

    def waiting(self) -> list[str]:
        """Return the keys of waiting episodes, oldest first."""
        paths = sorted(self.folder.glob("*.safetensors"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        return [path.stem for path in paths]

    def get(self, key: str) -> Episode | None:
        """Return the episode; None if its file is damaged, which is then renamed and reported."""
        try:
            return decoded(self._path(key))
        except (DataError, SafetensorError, OSError) as error:
            aside = self._aside(key, "damaged")
            self.tell(f"a waiting episode cannot be read ({error}): it is not sent, and kept as {aside}")
            return None

    def remove(self, key: str) -> None:
        """Delete an episode that the learner has confirmed."""
        self._path(key).unlink(missing_ok=True)  # somebody may have tidied up

    def refuse(self, key: str) -> Path:
        """Rename an episode that the learner refused, and return its new path."""
        return self._aside(key, "refused")

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _aside(self, key: str, why: str) -> Path:
        place = self.folder / f"{key}.{why}"
        with suppress(FileNotFoundError):  # somebody has taken it away
            self._path(key).rename(place)
        return place


def new_key() -> str:
    """Return a unique name for an episode."""
    return uuid.uuid4().hex
