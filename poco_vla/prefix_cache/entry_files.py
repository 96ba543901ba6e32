"""Entries on disk. Files are read and written by position, through the system's page cache as a mapping would be: that
costs a copy, and a disk that fails raises an error where a mapping would end the process."""

import errno
import itertools
import os
import struct
import tempfile
import zlib
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from poco_vla.prefix_cache.entries import Entry, Layout, layout_from_json, layout_to_json

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RECORD = struct.Struct("<qQII")
"""In an index: id, where the entry's bytes begin, how many they are, their CRC-32; a CRC-32 of these four follows."""
HEAD = struct.Struct("<I")
"""Before an entry's bytes: the length of its layout as JSON, which comes next."""


class DiskFullError(Exception):
    """No room: of the budget, or of the disk."""


@dataclass
class DiskBudget:
    """Bytes that all files together may use."""

    limit: int
    taken: int = 0
    is_full: bool = False

    def take(self, size: int) -> None:
        """Reserve `size` bytes. Raises DiskFullError if they exceed the limit."""
        if self.is_full or self.taken + size > self.limit:
            raise DiskFullError
        self.taken += size

    def write(self, file: int, blob: bytes, offset: int) -> None:
        """Write `blob` at `offset`. Raises DiskFullError if the disk is full; the files do not grow after that."""
        try:
            view = memoryview(blob)
            while view:
                written = os.pwrite(file, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            if error.errno not in FULL:
                raise
            self.is_full = True
            raise DiskFullError from error


def to_blob(entry: Entry) -> bytes:
    layout = layout_to_json(entry.layout).encode()
    return HEAD.pack(len(layout)) + layout + entry.data.numpy().tobytes()


def from_blob(blob: bytearray, layouts: dict[bytes, Layout]) -> Entry:
    """Return the entry that `to_blob` wrote. `layouts` caches parsed layouts: most entries share one of few."""
    (length,) = HEAD.unpack_from(blob)
    text, begin = bytes(blob[HEAD.size : HEAD.size + length]), HEAD.size + length
    layout = layouts.setdefault(text, layout_from_json(text.decode()))
    data = torch.empty(len(blob) - begin, dtype=torch.uint8)  # aligned, which the place in the file need not be
    data.copy_(torch.frombuffer(blob, dtype=torch.uint8, offset=begin))
    return Entry(layout, data)


def read_at(file: int, size: int, offset: int) -> bytearray:
    """Read `size` bytes at `offset`. Raises OSError if the file is shorter."""
    blob = bytearray(size)
    view = memoryview(blob)
    while view:
        got = os.preadv(file, [view], offset)
        if got == 0:
            raise OSError(errno.EIO, "the file ends too early")
        view, offset = view[got:], offset + got
    return blob


class PersistentFiles:
    """Entries that stay for later runs, in files that only grow. Each of several processes writes files of its own, and
    reads those that existed when it started.

    A file ``N.data`` holds entries one behind the other, ``N.index`` a `RECORD` for each, which is written after its
    bytes: what a killed process left unfinished is in no index. After a loss of power, which may keep the index and
    lose the bytes, checksums tell: they are looked at when an entry is first read.

    Args:
        folder: of the entries; all that lies there is of one identity, which the caller sees to.
        budget: for this process's file, and what is there already.
    """

    def __init__(self, folder: Path, budget: DiskBudget) -> None:
        self.folder, self.budget = folder, budget
        self.num_damaged = 0
        self._places: dict[int, tuple[int, int, int, int]] = {}  # id -> file, offset, size, checksum
        self._unseen: set[int] = set()
        self._layouts: dict[bytes, Layout] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._lock, number = self._own_number()
        self._files = {}
        for path in sorted(folder.glob("*.index")):
            self._open(path, int(path.stem))
        flags = os.O_RDWR | os.O_CREAT
        self._data = os.open(folder / f"{number}.data", flags, 0o644)
        self._index = os.open(folder / f"{number}.index", flags, 0o644)
        if number in self._files:
            os.close(self._files[number])
        self._files[number], self._number = self._data, number
        self._end = os.fstat(self._data).st_size
        # A torn last record would shift all that come after it.
        self._index_end = os.fstat(self._index).st_size // _LINE * _LINE
        os.ftruncate(self._index, self._index_end)

    def __contains__(self, key: int) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: int) -> Entry | None:
        """Return the entry; None if there is none or its bytes are not those that were written."""
        if key not in self._places:
            return None
        file, offset, size, checksum = self._places[key]
        try:
            blob = read_at(self._files[file], size, offset)
        except OSError:
            blob = bytearray()
        if key in self._unseen and _checksum(key, blob) != checksum:
            del self._places[key]
            self._unseen.discard(key)
            self.num_damaged += 1
            return None
        self._unseen.discard(key)
        return from_blob(blob, self._layouts)

    def put(self, key: int, entry: Entry) -> None:
        """Append an entry. Raises DiskFullError."""
        if key in self._places:
            return
        blob = to_blob(entry)
        self.budget.take(len(blob) + _LINE)
        checksum = _checksum(key, blob)
        self.budget.write(self._data, blob, self._end)
        record = RECORD.pack(key, self._end, len(blob), checksum)
        try:
            self.budget.write(self._index, record + HEAD.pack(zlib.crc32(record)), self._index_end)
        except DiskFullError:
            os.ftruncate(self._index, self._index_end)
            raise
        self._index_end += _LINE
        self._places[key] = (self._number, self._end, len(blob), checksum)
        self._end += len(blob)

    def close(self) -> None:
        for file in {*self._files.values(), self._index}:
            os.close(file)
        self._files.clear()
        self._places.clear()
        self._lock.release()

    def _own_number(self) -> tuple[FileLock, int]:
        """Return the first number that no living process writes; the system releases the lock however a process
        ends."""
        for number in itertools.count():
            lock = FileLock(self.folder / f"{number}.lock")
            with suppress(Timeout):
                lock.acquire(timeout=0)
                return lock, number
        raise AssertionError

    def _open(self, index: Path, number: int) -> None:
        data = os.open(index.with_suffix(".data"), os.O_RDONLY)
        self._files[number] = data
        size = os.fstat(data).st_size
        text = index.read_bytes()
        self.budget.taken += size + len(text)
        for begin in range(0, len(text) // _LINE * _LINE, _LINE):
            record, (check,) = text[begin : begin + RECORD.size], HEAD.unpack_from(text, begin + RECORD.size)
            key, offset, length, checksum = RECORD.unpack(record)
            if zlib.crc32(record) == check and offset + length <= size:
                self._places[key] = (number, offset, length, checksum)
                self._unseen.add(key)


_LINE = RECORD.size + HEAD.size


def _checksum(key: int, blob: bytes | bytearray) -> int:
    return zlib.crc32(blob, zlib.crc32(struct.pack("<q", key)))


class RingFile:
    """Entries that end with the process: a ring in an unnamed temporary file, in which new entries replace the oldest,
    as in the replay buffer.

    Args:
        folder: on whose disk it lies.
        budget: space that it may take; where there is no more, the ring begins anew.
    """

    def __init__(self, folder: Path, budget: DiskBudget) -> None:
        self.budget = budget
        folder.mkdir(parents=True, exist_ok=True)
        self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as this lives)
        self._places: OrderedDict[int, tuple[int, int]] = OrderedDict()  # oldest first
        self._layouts: dict[bytes, Layout] = {}
        self._pointer = self._size = 0

    def __contains__(self, key: int) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: int) -> Entry | None:
        if key not in self._places:
            return None
        offset, size = self._places[key]
        return from_blob(read_at(self._file.fileno(), size, offset), self._layouts)

    def put(self, key: int, entry: Entry) -> None:
        """Store an entry. Raises DiskFullError if not even an empty ring has space for it."""
        if key in self._places:
            return
        blob = to_blob(entry)
        begin = self._begin(len(blob))
        if begin < self._pointer:  # what is left behind the pointer is the oldest of all
            self._evict(self._pointer, self._size)
        self._evict(begin, begin + len(blob))
        try:
            self.budget.write(self._file.fileno(), blob, begin)
        except DiskFullError:
            self._size, self._pointer = begin, 0
            raise
        self._places[key] = (begin, len(blob))
        self._pointer = begin + len(blob)

    def close(self) -> None:
        self._places.clear()
        self._file.close()

    def _begin(self, size: int) -> int:
        """Return the offset of the next entry: behind the last one, or the file's beginning if the file may not
        grow."""
        end = self._pointer + size
        if end > self._size:
            try:
                self.budget.take(end - self._size)
                self._size = end
            except DiskFullError:
                if size > self._size:
                    raise
                return 0
        return self._pointer

    def _evict(self, begin: int, end: int) -> None:
        """Drop the entries in [begin, end), which are the oldest."""
        while self._places:
            key, (offset, size) = next(iter(self._places.items()))
            if not (offset < end and begin < offset + size):
                return
            del self._places[key]
