"""One process at a time in a folder, whatever happens to the files in it."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from poco_vla.errors import PocoError
from poco_vla.files import host, is_alive, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
"""File that is locked, for programs that know of it alone."""
NOTE = ".learner.json"
"""File that says which process holds the folder."""


class HeldError(PocoError):
    """A folder that another process holds; the message says which, as far as it is known."""


class FolderLock:
    """Hold a folder until `release`, or until the process ends in whatever way.

    The kernel locks the folder itself: deleting the lock file lets nobody in. Where a file system cannot (some network
    ones), a note of the holder's process is looked at instead.

    Args:
        folder: an existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = FileLock(folder / LOCK)
        self._handle: int | None = None
        self._noted = False

    def acquire(self) -> None:
        """Take the folder.

        Raises:
            HeldError: another process has it.
        """
        try:
            self._file.acquire(timeout=0)
            held = not self._lock_folder() and self._holder_is_alive()
        except (Timeout, BlockingIOError):
            held = True
        if held:
            self.release()
            raise HeldError(self._holder())
        with suppress(OSError):  # a full disk: the kernel's locks hold
            write_json(self.folder / NOTE, {"host": host(), "pid": os.getpid(), "started": started(os.getpid())})
            self._noted = True

    def release(self) -> None:
        """Give the folder back. May be called twice."""
        if self._noted:
            (self.folder / NOTE).unlink(missing_ok=True)
            self._noted = False
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        self._file.release()

    def _lock_folder(self) -> bool:
        """Lock the folder's own inode; False where the file system cannot.

        Raises:
            BlockingIOError: another process has locked it.
        """
        if fcntl is None:
            return False
        self._handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            return False
        return True

    def _note(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            found = json.loads((self.folder / NOTE).read_text())
            return found if isinstance(found, dict) else {}
        return {}

    def _holder_is_alive(self) -> bool:
        note = self._note()
        pid = note.get("pid")
        if not isinstance(pid, int) or note.get("host") != host() or not is_alive(pid):
            return False
        return note.get("started") == started(pid)

    def _holder(self) -> str:
        note = self._note()
        return f"process {note['pid']} of {note.get('host')}" if isinstance(note.get("pid"), int) else "another process"


def started(pid: int) -> int | None:
    """When a process of this machine began, in its kernel's ticks: a number is given again, both together are not. None
    where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
