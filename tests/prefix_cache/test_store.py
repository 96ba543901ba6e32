"""The store's tiers and files: bytes come back as they went in, budgets hold, what is not whole is not believed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poco_vla.config import PrefixConfig
from poco_vla.data.replay import ONLINE
from poco_vla.prefix_cache import entry_files
from poco_vla.prefix_cache.entries import Entry, layout_from_json, layout_to_json
from poco_vla.prefix_cache.entry_files import DiskBudget, DiskFullError, PersistentFiles, RingFile
from poco_vla.prefix_cache.store import MemoryTier, PrefixStore

CPU = torch.device("cpu")


def entry(seed=0, tokens=5, width=8, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(3, 2, tokens, width, generator=generator).to(dtype)
    return Entry.of({"features": torch.randn(7, generator=generator), "kv": kv})


def same(a, b):
    mine, its = a.tensors(), b.tensors()
    assert mine.keys() == its.keys()
    return all(torch.equal(mine[name], its[name]) and mine[name].dtype == its[name].dtype for name in mine)


# -- entries --------------------------------------------------------------------------------------------------------


def test_an_entry_gives_back_what_it_was_made_of():
    tensors = {"a": torch.randn(5), "b": torch.randn(2, 3).to(torch.bfloat16), "c": torch.arange(3), "d": torch.ones(0)}
    made = Entry.of(tensors)
    for name, tensor in made.tensors().items():
        assert torch.equal(tensor, tensors[name])
        assert tensor.dtype == tensors[name].dtype
    assert layout_from_json(layout_to_json(made.layout)) == made.layout


def test_an_entry_is_a_copy():
    kv = torch.ones(1, 2)
    made = Entry.of({"kv": kv})
    kv.zero_()
    assert made.tensors()["kv"].all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([torch.float32, torch.bfloat16]), st.floats(-20, 20))
def test_eight_bit_floats_are_off_by_at_most_what_three_bits_of_mantissa_round(seed, dtype, exponent):
    """Half a unit in the last of 3 places is 2^-4 of a number, or 2^-10 scales where it is subnormal; a dtype of 8
    bits rounds twice more on the way, scale and result."""
    x = (torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent).to(dtype)
    x[0, 0], x[1] = 0, 0
    found = Entry.of({"x": x, "v": x[2]}, dtype="fp8").tensors()
    assert found["x"].dtype == dtype
    scale = x.float().abs().amax(dim=-1, keepdim=True) / 448
    allowed = x.float().abs() * (2**-4 + 2**-7) + scale * 2**-10 * (1 + 2**-7)
    assert ((found["x"].float() - x.float()).abs() <= allowed).all()
    assert torch.equal(found["v"], x[2]), "vectors stay exact"
    assert not found["x"][1].any()


def test_eight_bit_floats_take_half_the_bytes_of_bfloat16_and_a_scale_per_row():
    x = {"kv": torch.randn(4, 256).to(torch.bfloat16)}
    assert Entry.of(x).num_bytes == 4 * 256 * 2
    assert Entry.of(x, dtype="fp8").num_bytes == 4 * 256 + 16


# -- memory ---------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_leaves_first():
    size = entry().num_bytes
    tier = MemoryTier(3 * size)
    assert [tier.put(key, entry(key)) for key in (1, 2, 3)] == [[], [], []]
    tier.get(1)
    assert [key for key, _ in tier.put(4, entry(4))] == [2]
    assert [key for key, _ in tier.put(5, entry(5))] == [3]
    assert 1 in tier


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 30)), max_size=60), st.integers(0, 4000))
def test_a_tier_never_takes_more_than_its_budget_and_nothing_is_lost_on_the_way(puts, budget):
    tier, held = MemoryTier(budget), {}
    for key, tokens in puts:
        one = entry(tokens, tokens)
        held[key] = one
        for gone, _ in tier.put(key, one):
            del held[gone]
        assert tier.taken == sum(e.num_bytes for e in held.values()) <= budget
        assert len(tier) == len(held)
    assert all(tier.get(key) is one for key, one in held.items())


# -- files ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 40)), max_size=60), st.integers(1500, 8000))
def test_a_nameless_file_gives_back_what_it_still_holds_within_its_budget(tmp_path_factory, puts, budget):
    room = DiskBudget(budget)
    file, kept = RingFile(tmp_path_factory.mktemp("ring"), room), {}
    try:
        for key, tokens in puts:
            one = entry(tokens, tokens)
            try:
                if key not in file:
                    kept[key] = one
                file.put(key, one)
            except DiskFullError:
                del kept[key]
            assert room.taken <= budget
            for k, e in kept.items():
                got = file.get(k)
                assert got is None or same(got, e)
        assert len(file) == sum(key in file for key in kept)
    finally:
        file.close()


def test_a_ring_keeps_the_newest(tmp_path):
    size = len(entry_files.to_blob(entry()))
    file = RingFile(tmp_path, DiskBudget(4 * size))
    for key in range(10):
        file.put(key, entry(key))
    assert [key for key in range(10) if key in file] == [6, 7, 8, 9]
    assert same(file.get(7), entry(7))
    file.close()
    assert list(tmp_path.iterdir()) == []


def persistent(folder, budget=1_000_000):
    return PersistentFiles(folder, DiskBudget(budget))


def test_persistent_files_are_there_again_for_the_next_process(tmp_path):
    first = persistent(tmp_path)
    for key in range(5):
        first.put(key, entry(key, tokens=key + 1))
    first.close()
    second = persistent(tmp_path)
    assert len(second) == 5
    assert all(same(second.get(key), entry(key, tokens=key + 1)) for key in range(5))
    second.put(7, entry(7))
    second.close()
    assert same(persistent(tmp_path).get(7), entry(7))


def test_processes_beside_each_other_write_files_of_their_own_and_read_the_others_later(tmp_path):
    one, two = persistent(tmp_path), persistent(tmp_path)
    one.put(1, entry(1))
    two.put(2, entry(2))
    one.close()
    two.close()
    assert sorted(path.name for path in tmp_path.glob("*.data")) == ["0.data", "1.data"]
    after = persistent(tmp_path)
    assert same(after.get(1), entry(1))
    assert same(after.get(2), entry(2))


def test_what_was_there_before_counts_towards_the_budget(tmp_path):
    size = len(entry_files.to_blob(entry()))
    for keys in ((1, 2), (3, 4)):
        one = persistent(tmp_path, budget=int(3.5 * size))
        with pytest.raises(DiskFullError) if 4 in keys else _nothing():
            for key in keys:
                one.put(key, entry(key))
        one.close()
    assert len(persistent(tmp_path)) == 3


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


@pytest.mark.parametrize("damage", ["a byte of an entry", "the index's last record", "the data's end", "another's id"])
def test_an_entry_whose_bytes_are_not_whole_is_not_believed(tmp_path, damage):
    one = persistent(tmp_path)
    for key in range(3):
        one.put(key, entry(key))
    one.close()
    data, index = tmp_path / "0.data", tmp_path / "0.index"
    blob, lines = bytearray(data.read_bytes()), bytearray(index.read_bytes())
    if damage == "a byte of an entry":
        blob[-3] ^= 1
    elif damage == "the index's last record":
        lines = lines[:-5]
    elif damage == "the data's end":
        blob = blob[:-20]
    else:
        line = len(lines) // 3
        key, _, size, _ = entry_files.RECORD.unpack_from(lines, 2 * line)
        swapped = entry_files.RECORD.pack(key, 0, size, entry_files.RECORD.unpack_from(lines, 0)[3])
        lines[2 * line :] = swapped + entry_files.HEAD.pack(entry_files.zlib.crc32(swapped))
    data.write_bytes(blob)
    index.write_bytes(lines)
    two = persistent(tmp_path)
    assert same(two.get(0), entry(0))
    assert same(two.get(1), entry(1))
    assert two.get(2) is None
    two.put(2, entry(2))
    two.close()
    assert same(persistent(tmp_path).get(2), entry(2))


WRITER = """
import sys
sys.path[:0] = {here!r}
from pathlib import Path
from test_store import entry, persistent
one, key = persistent(Path({folder!r}), 10**9), 0
while True:
    one.put(key, entry(key % 7, tokens=300, width=256))
    key += 1
    if key == 3:
        print("writing", flush=True)
"""


def test_a_writer_that_is_killed_leaves_only_whole_entries(tmp_path):
    """Three times over, each at another moment, and the next one goes on in the same files."""
    program = WRITER.format(here=[str(folder) for folder in Path(__file__).parents[:2]], folder=str(tmp_path))
    writer = forked.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        time.sleep(0.2)
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    found = persistent(tmp_path, 10**9)
    assert len(found) >= 3
    assert all(same(found.get(key), entry(key % 7, tokens=300, width=256)) for key in range(len(found)))
    assert found.num_damaged == 0
    found.close()
    # A kill between the two writes: bytes without a record, and a record cut off.
    with (tmp_path / "0.data").open("ab") as data, (tmp_path / "0.index").open("ab") as index:
        data.write(b"unfinished")
        index.write(b"cut")
    again, number = persistent(tmp_path, 10**9), len(found)
    again.put(10**6, entry(1))
    again.close()
    assert same(persistent(tmp_path, 10**9).get(10**6), entry(1))
    assert number >= 0


def test_a_full_disk_stops_growth_and_nothing_else(tmp_path, monkeypatch):
    config = PrefixConfig(ram_bytes=2 * entry().num_bytes, disk_bytes=10**6)
    store = PrefixStore(config, CPU, tmp_path)
    store.put({1: entry(1)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    store.put({2: entry(2), 3: entry(3)})
    assert store.disk_is_full
    monkeypatch.undo()
    taken = store.num_bytes["disk"]
    store.put({4: entry(4), ONLINE: entry(5)})
    assert store.num_bytes["disk"] == taken
    found = store.fetch([1, 2, 3, 4, ONLINE])
    assert set(found) == {1, 4, ONLINE}
    assert same(found[1], entry(1))
    store.close()


# -- all tiers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, ONLINE], ids=["demonstrations", "online"])
def test_what_leaves_ram_is_found_on_disk(tmp_path, first):
    size = entry().num_bytes
    store = PrefixStore(PrefixConfig(ram_bytes=3 * size, disk_bytes=10**6), CPU, tmp_path)
    keys = range(first, first + 10)
    for key in keys:
        store.put({key: entry(key - first)})
    assert store.num_bytes["ram"] <= 3 * size
    found = store.fetch(list(keys))
    assert all(same(found[key], entry(key - first)) for key in keys)
    assert (store.loads.from_ram, store.loads.from_disk) == (3, 7)
    store.close()


def test_without_a_disk_what_leaves_ram_is_gone():
    store = PrefixStore(PrefixConfig(ram_bytes=3 * entry().num_bytes), CPU)
    store.put({key: entry(key) for key in range(10)})
    assert sorted(store.fetch(list(range(10)))) == [7, 8, 9]


def test_only_demonstrations_stay_for_later_runs(tmp_path):
    config = PrefixConfig(ram_bytes=0, disk_bytes=10**6)
    store = PrefixStore(config, CPU, tmp_path)
    store.put({5: entry(5), ONLINE + 5: entry(6)})
    assert same(store.fetch([ONLINE + 5])[ONLINE + 5], entry(6))
    store.close()
    later = PrefixStore(config, CPU, tmp_path)
    assert later.num_kept == 1
    found = later.fetch([5, ONLINE + 5])
    assert set(found) == {5}
    assert same(found[5], entry(5))
    later.close()


def test_budgets_hold_in_bytes_whatever_comes(tmp_path):
    rng = np.random.default_rng(0)
    config = PrefixConfig(ram_bytes=5000, disk_bytes=20_000)
    store = PrefixStore(config, CPU, tmp_path)
    for _ in range(60):
        key = int(rng.integers(40)) + (ONLINE if rng.random() < 0.5 else 0)
        if not store.fetch([key]):
            store.put({key: entry(key % 11, tokens=int(rng.integers(1, 20)))})
        taken = store.num_bytes
        assert taken["ram"] <= 5000
        assert taken["disk"] <= 20_000
        on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert on_disk <= 20_000
    store.close()
