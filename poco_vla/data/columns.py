"""Growing columns of equal rows, in memory or in a mapped file."""

import errno
import os
import tempfile
from pathlib import Path

import numpy as np

from poco_vla.errors import DataError

FILE_STEP = 64 * 1024**2
"""Fewest bytes by which a mapped file grows; from eight times as many on it grows by an eighth."""


class MemoryColumn:
    """Rows in memory.

    Attributes:
        rows: [S, ...] all rows that there is room for. What was never written takes no memory.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.rows = np.empty((0, *shape), dtype)

    def hold(self, steps: int, limit: int | None) -> None:
        """Grow to at least `steps` rows and at most `limit`. `rows` becomes another array with the same content."""
        if steps > len(self.rows):
            size = max(steps, 2 * len(self.rows)) if limit is None else _share(limit, steps)
            # Not zeros: the system gives memory as rows are written.
            grown = np.empty((size, *self.rows.shape[1:]), self.rows.dtype)
            grown[: len(self.rows)] = self.rows
            self.rows = grown


def _share(limit: int, steps: int) -> int:
    """Return the smallest of limit, limit / 2, limit / 4, ... that holds `steps`: the last copy moves half of the
    limit, so that no copy takes more memory than the full column."""
    while limit // 2 >= steps:
        limit //= 2
    return limit


class MappedColumn:
    """Rows in a mapped file of `folder`, which grows without a copy. The system keeps in memory what is in use.

    The file has no name where the platform allows it, so that nothing of it outlives the process, however that ends.

    Attributes:
        rows: [S, ...] all rows that there is room for.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, folder: Path) -> None:
        self.rows = np.empty((0, *shape), dtype)
        self._row_bytes = self.rows.dtype.itemsize * int(np.prod(shape))
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as the column lives

    def hold(self, steps: int, limit: int | None) -> None:
        """Grow to at least `steps` rows and at most `limit`, without a copy.

        Raises:
            DataError: the disk has no room; the column stays as it was.
        """
        have = len(self.rows)
        if steps > have:
            size = max(steps, have + max(have // 8, FILE_STEP // self._row_bytes))
            size = size if limit is None else min(size, limit)
            self._extend(have * self._row_bytes, size * self._row_bytes)
            mapped = np.memmap(self._file, self.rows.dtype, "r+", shape=(size, *self.rows.shape[1:]))
            self.rows = np.asarray(mapped)

    def _extend(self, begin: int, end: int) -> None:
        if not hasattr(os, "posix_fallocate"):
            self._file.truncate(end)
            return
        try:
            # A hole in the file would kill the process (SIGBUS) when a full disk cannot fill it.
            os.posix_fallocate(self._file.fileno(), begin, end - begin)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise DataError(
                f"{self._folder} has no room for pictures of the replay buffer: {end / 1e9:.2f} GB are needed "
                f"({error.strerror}). Free disk, make replay.capacity or replay.max_bytes smaller, or use another disk."
            ) from error


type Column = MemoryColumn | MappedColumn
