"""The prefix cache: entries in the accelerator's memory, in RAM and on disk, each tier with a budget in bytes."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from poco_vla.config import PrefixConfig
from poco_vla.data.replay import ONLINE
from poco_vla.prefix_cache.arena import PageLockedArena
from poco_vla.prefix_cache.entries import Entry
from poco_vla.prefix_cache.entry_files import DiskBudget, DiskFullError, PersistentFiles, RingFile


class MemoryTier:
    """Entries in one kind of memory; the least recently used go first.

    Args:
        budget: most bytes of all entries.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.taken = budget, 0
        self._entries: OrderedDict[int, Entry] = OrderedDict()  # least recently used first

    def __contains__(self, key: int) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: int) -> Entry | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def has_room(self, entry: Entry) -> bool:
        return self.taken + entry.num_bytes <= self.budget

    def put(self, key: int, entry: Entry) -> list[tuple[int, Entry]]:
        """Store an entry and return the evicted ones; the entry itself if it is larger than the whole tier."""
        self.pop(key)
        if entry.num_bytes > self.budget:
            return [(key, entry)]
        gone = []
        while not self.has_room(entry):
            old, its = self._entries.popitem(last=False)
            self.taken -= its.num_bytes
            gone.append((old, its))
        self._entries[key] = entry
        self.taken += entry.num_bytes
        return gone

    def pop(self, key: int) -> Entry | None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.taken -= entry.num_bytes
        return entry


@dataclass
class Loads:
    """Entries that were loaded, read ahead in vain included.

    Attributes:
        from_device: from the accelerator's memory; likewise the next two.
        num_bytes: of those from RAM or disk.
    """

    from_device: int = 0
    from_ram: int = 0
    from_disk: int = 0
    num_bytes: int = 0


class PrefixStore:
    """Three tiers: device memory, RAM, disk. A new entry goes to the fastest; an entry that is evicted from a tier goes
    to the next. An entry that is found moves up if it fits without evicting another: under uniform sampling no entry is
    worth more than another. Entries of demonstrations are written to disk at once, where they stay for later runs.

    Each process stores what its own rows of the batches need: every process samples other rows at every update, so that
    a share of the states for each would make most of them travel between processes instead of out of memory.

    May be used from several threads.

    Args:
        config: budgets.
        device: where entries are wanted.
        folder: of the files, made for one identity; None keeps nothing on disk.
        beside: bytes of RAM that others keep entries in which `to_ram` made.
    """

    def __init__(
        self, config: PrefixConfig, device: torch.device, folder: Path | None = None, *, beside: int = 0
    ) -> None:
        self.device = device
        self.loads = Loads()
        self.disk_is_full = False
        on_gpu = device.type == "cuda"
        self._fast = MemoryTier(config.device_bytes if on_gpu else 0)
        self._ram = MemoryTier(config.ram_bytes)
        in_ram = config.ram_bytes + beside
        self._arena = PageLockedArena(in_ram) if on_gpu and in_ram else None
        self._disk = DiskBudget(config.disk_bytes)
        self._persistent = self._file = None
        if folder is not None and config.disk_bytes:
            self._persistent, self._file = PersistentFiles(folder, self._disk), RingFile(folder, self._disk)
        self._copying = torch.cuda.Stream(device) if on_gpu else None
        self._lock = threading.RLock()

    def fetch(self, keys: Sequence[int]) -> dict[int, Entry]:
        """Return the stored entries of these keys, on the device, ready for the stream that calls `use`."""
        found: dict[int, Entry] = {}
        sources: list[Entry] = []  # stay until they are copied, wherever they are evicted from meanwhile
        with self._stream():
            for key in keys:
                with self._lock:
                    entry = self._get(key, sources)
                if entry is not None:
                    found[key] = entry
        if self._copying is not None:
            self._copying.synchronize()
        return found

    def use(self, entries: Mapping[int, Entry]) -> None:
        """Record that the current stream reads these entries, so that their memory is not reused before it has."""
        if self._copying is not None:
            for entry in entries.values():
                entry.data.record_stream(torch.cuda.current_stream(self.device))

    def put(self, entries: Mapping[int, Entry]) -> None:
        """Store new entries, which are on the device."""
        with self._lock:
            if self._copying is not None:  # what was just copied to the device may have to leave it
                torch.cuda.current_stream(self.device).wait_stream(self._copying)
            for key, entry in entries.items():
                cpu = None
                if key < ONLINE and self._persistent is not None:
                    cpu = self.to_ram(entry)
                    self._write(self._persistent, key, cpu)
                for old, its in self._fast.put(key, entry):
                    self._demote(old, cpu if cpu is not None and old == key else self.to_ram(its))

    def put_in_ram(self, entries: Mapping[int, Entry]) -> None:
        """Store new entries of online states, which are in RAM (`to_ram`)."""
        with self._lock:
            for key, entry in entries.items():
                self._demote(key, entry)

    def from_disk(self, keys: Sequence[int]) -> dict[int, Entry]:
        """Return the entries that are on disk, read from there even if RAM has them, too."""
        with self._lock:
            found = {key: self._read_disk(key) for key in keys}
        return {key: entry for key, entry in found.items() if entry is not None}

    def discard_persistent(self) -> None:
        """Stop reading and writing the persistent files, and drop all entries in memory."""
        with self._lock:
            if self._persistent is not None:
                self._persistent.close()
            self._persistent = None
            self._fast, self._ram = MemoryTier(self._fast.budget), MemoryTier(self._ram.budget)

    def close(self) -> None:
        with self._lock:
            for file in (self._persistent, self._file):
                if file is not None:
                    file.close()
            self._persistent = self._file = self._arena = None
            self._fast, self._ram = MemoryTier(0), MemoryTier(0)

    def __len__(self) -> int:
        """Return the number of entries in memory and on disk; an entry in several tiers counts once for each."""
        files = [file for file in (self._persistent, self._file) if file is not None]
        return sum(map(len, (self._fast, self._ram, *files)))

    @property
    def num_damaged(self) -> int:
        """Return the number of entries on disk that failed their checksum."""
        return 0 if self._persistent is None else self._persistent.num_damaged

    @property
    def num_kept(self) -> int:
        """Return the number of entries on disk that stay for later runs."""
        return 0 if self._persistent is None else len(self._persistent)

    @property
    def num_bytes(self) -> dict[str, int]:
        """Return the bytes of each tier."""
        return {"device": self._fast.taken, "ram": self._ram.taken, "disk": self._disk.taken}

    def _get(self, key: int, sources: list[Entry]) -> Entry | None:
        entry = self._fast.get(key)
        if entry is not None:
            self.loads.from_device += 1
            return entry
        entry = self._ram.get(key)
        if entry is not None:
            self.loads.from_ram += 1
        else:
            entry = self._read_disk(key)
            if entry is None:
                return None
            self.loads.from_disk += 1
            if self._ram.has_room(entry):
                self._ram.put(key, entry := self.to_ram(entry))
        self.loads.num_bytes += entry.num_bytes
        if self._copying is not None:
            sources.append(entry)
            entry = entry.to(self.device)
            if self._fast.has_room(entry):
                self._fast.put(key, entry)
        return entry

    def _read_disk(self, key: int) -> Entry | None:
        file = self._persistent if key < ONLINE else self._file
        entry = None if file is None else file.get(key)
        # Demonstrations that found the persistent files full may have left RAM for the run's own file.
        return self._file.get(key) if entry is None and self._file is not None else entry

    def _demote(self, key: int, entry: Entry) -> None:
        for old, its in self._ram.put(key, entry):
            if self._file is not None and not (self._persistent is not None and old in self._persistent):
                self._write(self._file, old, its)

    def _write(self, file: Any, key: int, entry: Entry) -> None:
        try:
            file.put(key, entry)
        except DiskFullError:
            self.disk_is_full = self._disk.is_full

    def to_ram(self, entry: Entry) -> Entry:
        """Return a copy of the entry in RAM, page-locked if there is a GPU to copy from it and room for it."""
        memory = None if self._arena is None else self._arena.take(entry.num_bytes)
        if memory is None:
            return Entry(entry.layout, entry.data.cpu())
        return Entry(entry.layout, torch.from_numpy(memory).copy_(entry.data))

    @contextmanager
    def _stream(self) -> Iterator[None]:
        with torch.cuda.stream(self._copying) if self._copying is not None else nullcontext():
            yield
