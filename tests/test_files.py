"""Waiting for room on a disk: by what an error is known as a full one, who is told, and when it ends."""

import errno
import os
import shutil
import subprocess

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from poco_vla.errors import PocoError
from poco_vla.files import (
    atomic_folder,
    discard_partial,
    discard_partial_of_dead,
    host,
    is_out_of_space,
    partial_of_process,
    read_json,
    recover_folders,
    sync,
    wait_for_space,
    write_json,
)


def full():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def caused(error):
    outer = RuntimeError("the encoder failed")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (full(), True),
        (OSError(errno.EDQUOT, "over quota"), True),
        (RuntimeError("thread failed: [Errno 28] No space left on device: x"), True),
        (caused(full()), True),
        (caused(caused(ValueError("x"))), False),
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), False),
        (None, False),
    ],
    ids=["number", "quota", "text", "cause", "other-cause", "other", "none"],
)
def test_a_full_disk_is_known_by_number_text_or_cause(error, expected):
    assert is_out_of_space(error) is expected


def failing(times, error):
    """A write that fails so many times and then gives its number of calls."""
    calls = []

    def write():
        calls.append(1)
        if len(calls) <= times:
            raise error
        return len(calls)

    return write


def test_it_is_tried_until_there_is_room_and_told_once(tmp_path):
    told = []
    write = failing(3, full())
    assert wait_for_space(write, what="episode 7", where=tmp_path / "not" / "there", tell=told.append, every=0.01) == 4
    (message,) = told
    assert message.startswith(f"episode 7 cannot be written to {tmp_path / 'not' / 'there'}: the disk is full")
    assert "MB are free" in message
    assert "tried again every 0.01 s" in message


def test_nothing_is_told_when_there_is_room(tmp_path):
    told = []
    assert wait_for_space(failing(0, full()), what="it", where=tmp_path, tell=told.append) == 1
    assert told == []


def test_other_errors_pass_at_once(tmp_path):
    with pytest.raises(ValueError, match="other"):
        wait_for_space(failing(1, ValueError("other")), what="it", where=tmp_path, tell=print, every=60.0)


def test_giving_up_ends_even_a_long_wait_and_says_what_is_lost(tmp_path):
    ended = []
    with pytest.raises(PocoError, match=r"episode 7 cannot be written .* it is lost"):
        wait_for_space(
            failing(10**9, full()), what="episode 7", where=tmp_path, tell=ended.append, give_up=lambda: bool(ended),
            every=3600.0,
        )  # fmt: skip


def film(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", 10)
        stream.width = stream.height = 256
        stream.pix_fmt = "yuv420p"
        noise = np.random.default_rng(0).integers(0, 256, (20, 256, 256, 3), np.uint8)
        for picture in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


WRITES = {
    "bytes": lambda path: path.write_bytes(bytes(500_000)),
    "json": lambda path: write_json(path, list(range(100_000))),
    "parquet": lambda path: pq.write_table(pa.table({"x": np.random.default_rng(0).normal(size=100_000)}), path),
    "safetensors": lambda path: save_file({"x": torch.ones(200_000)}, path),
    "video": film,
}


@pytest.mark.parametrize("kind", sorted(WRITES))
def test_what_libraries_raise_on_a_really_full_disk_is_known(tmp_path, kind):
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        with pytest.raises(Exception) as found:  # noqa: PT011 (which one is what the test asks)
            WRITES[kind](tmp_path / "file.mp4")
        assert is_out_of_space(found.value)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
    assert shutil.disk_usage(tmp_path).free > 500_000


def test_files_and_folders_can_be_synced(tmp_path):
    write_json(tmp_path / "a", 1)
    sync(tmp_path / "a")
    sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "b")


# -- what a kill leaves ----------------------------------------------------------------------------------------------


def killed_between_the_renames(final):
    """An older folder moved aside, the newer one not in its place yet."""
    for name, text in ((f".{final.name}.old", "older"), (f".{final.name}.partial", "newer")):
        folder = final.with_name(name)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)
    return final


def test_a_folder_whose_replacement_was_cut_short_comes_back(tmp_path):
    final = killed_between_the_renames(tmp_path / "best")
    assert recover_folders(tmp_path) == [final]
    assert discard_partial(tmp_path) == [tmp_path / ".best.partial"]
    assert (final / "config.json").read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_the_next_writer_keeps_the_older_folder_until_its_own_is_whole(tmp_path):
    final = killed_between_the_renames(tmp_path / "policy")
    with pytest.raises(OSError, match="no room"), atomic_folder(final):
        raise OSError("no room")
    assert (final / "config.json").read_text() == "older"
    with atomic_folder(final) as partial:
        (partial / "config.json").write_text("newest")
    assert (final / "config.json").read_text() == "newest"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_a_replacement_that_was_all_but_done_stays(tmp_path):
    """Killed after both renames: the newer folder is in its place."""
    final = killed_between_the_renames(tmp_path / "7")
    final.with_name(".7.partial").rename(final)
    assert recover_folders(tmp_path) == []
    assert (final / "config.json").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["7"]


def test_half_written_folders_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    root = tmp_path / "data"
    with subprocess.Popen(["true"]) as ended:
        pass
    own, elsewhere = partial_of_process(root), tmp_path / f".data.another-machine.{ended.pid}.partial"
    dead = [tmp_path / f".data.{host()}.{ended.pid}.partial", tmp_path / f".data.{ended.pid}.partial"]
    for folder in (own, elsewhere, *dead):
        folder.mkdir()
    assert sorted(discard_partial_of_dead(root)) == sorted(dead)
    assert own.is_dir()
    assert elsewhere.is_dir()


@pytest.mark.parametrize("content", [b"", b'{"a": ', bytes(40), b"[" * 100_000])
def test_json_that_is_damaged_is_named(content, tmp_path):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(PocoError, match=r"result\.json is damaged: no JSON"):
        read_json(tmp_path / "result.json")


def test_a_written_folder_can_be_read_by_whom_the_umask_allows(tmp_path):
    old = os.umask(0o022)
    try:
        with atomic_folder(tmp_path / "policy") as partial:
            save_file({"a": torch.zeros(2)}, partial / "model.safetensors")
            (partial / "config.json").write_text("{}")
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "policy").iterdir()} == {0o644}
