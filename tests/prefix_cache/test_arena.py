"""Page-locked memory: locked once, given away in pieces, taken back."""

import gc

import torch

from poco_vla.config import PrefixConfig
from poco_vla.prefix_cache import store
from poco_vla.prefix_cache.arena import ALIGN, PageLockedArena
from poco_vla.prefix_cache.entries import Entry


def arena(size, locked=None):
    return PageLockedArena(size, lambda memory: locked.append(memory.nbytes) if locked is not None else None)


def test_memory_is_locked_once_and_pieces_do_not_overlap():
    locked = []
    one = arena(100 * ALIGN, locked)
    pieces = [one.take(ALIGN + 1) for _ in range(50)]
    assert len(locked) == 1
    for i, piece in enumerate(pieces):
        piece[:] = i
    assert all((piece == i).all() and piece.nbytes == ALIGN + 1 for i, piece in enumerate(pieces))


def test_pieces_that_nobody_holds_are_given_away_again_as_one():
    one = arena(16 * ALIGN)
    pieces = [one.take(ALIGN) for _ in range(17)]
    assert pieces[-1] is not None
    assert one.take(1) is None
    tensor = torch.from_numpy(pieces[3])
    del pieces[2:6]
    gc.collect()
    held = one.take(2 * ALIGN)
    assert held is not None  # 4 and 5; of 2 and 3 the tensor holds one
    assert one.take(2 * ALIGN) is None
    del tensor
    gc.collect()
    assert one.take(2 * ALIGN) is not None


def test_a_store_locks_its_memory_at_the_start_and_not_entry_by_entry(monkeypatch):
    """Where there is a GPU; its memory is stood in for by the CPU's."""
    locked = []

    class Arena(PageLockedArena):
        def __init__(self, size):
            super().__init__(size, lambda memory: locked.append(size))

    monkeypatch.setattr(store, "PageLockedArena", Arena)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    kept = store.PrefixStore(PrefixConfig(ram_bytes=8 * ALIGN), torch.device("cuda"), beside=2 * ALIGN)
    assert locked == [10 * ALIGN]
    entries = [kept.to_ram(Entry.of({"features": torch.full((ALIGN // 4,), float(i))})) for i in range(12)]
    assert locked == [10 * ALIGN]
    for i, entry in enumerate(entries):  # those that find no room are in memory that is not locked
        assert (entry.tensors()["features"] == i).all()
