"""One process at a time in a folder, whatever happens to the lock file."""

import json
import os
import subprocess
import sys

import pytest

from poco_vla import locks
from poco_vla.locks import LOCK, NOTE, FolderLock, HeldError, started


@pytest.fixture
def held(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    yield tmp_path
    lock.release()


@pytest.mark.parametrize("deleted", [(), (LOCK,), (LOCK, NOTE)])
def test_a_held_folder_lets_nobody_in_though_its_files_are_deleted(deleted, held):
    for name in deleted:
        (held / name).unlink()
    with pytest.raises(HeldError, match=f"process {os.getpid()}" if NOTE not in deleted else "another process"):
        FolderLock(held).acquire()


def test_a_folder_that_was_given_back_is_free_and_clean(tmp_path):
    for _ in range(2):
        lock = FolderLock(tmp_path)
        lock.acquire()
        lock.release()
        lock.release()
    assert not (tmp_path / NOTE).exists()


@pytest.mark.parametrize("alive", [True, False])
def test_where_the_file_system_has_no_locks_the_noted_process_is_looked_at(alive, tmp_path, monkeypatch):
    """The note of a process that runs holds the folder; that of one whose number was given again does not."""
    monkeypatch.setattr(locks, "fcntl", None)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        began = started(child.pid) or 0
        note = {"host": locks.host(), "pid": child.pid, "started": began if alive else began - 1}
        (tmp_path / NOTE).write_text(json.dumps(note))
        lock = FolderLock(tmp_path)
        if alive:
            with pytest.raises(HeldError, match=f"process {child.pid}"):
                lock.acquire()
        else:
            lock.acquire()
            lock.release()
    finally:
        child.communicate(b"\n")
