"""Page-locked RAM for entries: locked once, at the start, since locking takes a second for some gigabytes."""

import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch

ALIGN = 512
"""Bytes at whose multiples a piece begins."""
SLACK = 16
"""Which part of the bytes asked for is added, for the gaps between pieces of different sizes."""


def lock_pages(memory: np.ndarray) -> None:
    """Page-lock memory, so that a GPU copies from it without waiting; leave it as it is where CUDA refuses.

    Torch's own pinned memory comes in powers of two: up to twice the bytes that a budget counts.
    """
    runtime: Any = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)) == 0:
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.ctypes.data).atexit = False
    else:
        with suppress(RuntimeError):  # CUDA reports a refusal at the next call, whatever that is
            torch.zeros(1, device="cuda")


class PageLockedArena:
    """One stretch of page-locked RAM, given away in pieces. May be used from several threads.

    Args:
        size: bytes.
        lock: page-locks the memory.
    """

    def __init__(self, size: int, lock: Callable[[np.ndarray], None] = lock_pages) -> None:
        size = _aligned(size + size // SLACK)
        self._memory = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
        lock(self._memory)
        self._free = [(0, size)]  # begin and end, in their order
        self._returned: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()

    def take(self, size: int) -> np.ndarray | None:
        """Return uint8 [size], the arena's own again when nobody holds it; None where no gap is large enough."""
        length = _aligned(size)
        with self._lock:
            self._merge()
            for i, (begin, end) in enumerate(self._free):
                if end - begin >= length:
                    self._free[i : i + 1] = [(begin + length, end)] if end - begin > length else []
                    piece = self._memory[begin : begin + size]
                    # A method: the memory stays locked while a piece of it is held.
                    weakref.finalize(piece, self._give_back, begin, begin + length).atexit = False
                    return piece
        return None

    def _give_back(self, begin: int, end: int) -> None:
        self._returned.append((begin, end))  # without the lock: garbage is collected anywhere, also inside `take`

    def _merge(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())
        merged: list[tuple[int, int]] = []
        for begin, end in sorted(self._free):
            if merged and merged[-1][1] == begin:
                merged[-1] = merged[-1][0], end
            else:
                merged.append((begin, end))
        self._free = merged


def _aligned(size: int) -> int:
    return max(ALIGN, -(-size // ALIGN) * ALIGN)
