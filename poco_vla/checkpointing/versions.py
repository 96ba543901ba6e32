"""Versions of the weights that act: a number is never given to other weights, whatever a kill takes back."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from poco_vla.errors import PocoError
from poco_vla.files import read_json, write_json

FILE = "versions.json"
AHEAD = 1000
"""Versions that are reserved on disk at a time."""


class ReservedVersions:
    """Keeps on disk below which number all versions may have been seen by somebody: a robot that was served, an episode
    that is recorded. A run that goes on from an earlier checkpoint begins there.

    Args:
        folder: of the run.
        written: calls what writes something, named by its first argument, until there is room for it.
        used: False where a resumed run makes the same weights again, and on processes that write nothing.
    """

    def __init__(self, folder: Path, written: Callable[[str, Callable[[], Any]], Any], *, used: bool) -> None:
        self._path, self._written, self._used = folder / FILE, written, used
        self._below = 0

    def newest_seen(self) -> int:
        """Return the newest version that somebody may have seen; 0 where none is known."""
        with suppress(PocoError):
            found = read_json(self._path) if self._used and self._path.is_file() else {}
            below = found.get("below", 1) if isinstance(found, dict) else 1
            return int(below) - 1 if isinstance(below, int) else 0
        return 0

    def cover(self, version: int) -> None:
        """Reserve `version` before anybody sees it."""
        if self._used and version >= self._below:
            self._keep(version + AHEAD)

    def settle(self, version: int) -> None:
        """End with `version`, which a checkpoint holds: what was reserved beyond it was never seen."""
        if self._used and self._below:
            self._keep(version + 1)

    def _keep(self, below: int) -> None:
        self._written("the versions of the weights", lambda: write_json(self._path, {"below": below}))
        self._below = below
