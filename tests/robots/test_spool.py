"""Episodes on disk between robot and learner: whole or not at all, in order, never lost silently."""

import os
from pathlib import Path

import numpy as np
import pytest

from poco_vla.data import Episode
from poco_vla.errors import ConfigError, PocoError
from poco_vla.robots.spool import Spool, new_key


def episode(steps=4, task="go", seed=None, noted=True):
    rng = np.random.default_rng(steps)
    return Episode(
        obs={
            "observation.state": rng.normal(size=(steps, 6)).astype(np.float32),
            "observation.images.front": rng.integers(0, 256, (steps, 4, 5, 3), dtype=np.uint8)[:, :, ::-1],
        },
        action=rng.normal(size=(steps, 3)).astype(np.float32),
        reward=rng.normal(size=steps).astype(np.float32),
        success=np.arange(steps) == steps - 1,
        terminal=np.arange(steps) == steps - 1,
        task=task,
        seed=seed,
        policy_version=np.arange(steps) - 1 if noted else None,
        interventions=np.arange(steps) % 2 == 0 if noted else None,
    )


def same(found, expected):
    assert (found.task, found.seed) == (expected.task, expected.seed)
    for name in ("action", "reward", "success", "terminal", "policy_version", "interventions"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    assert set(found.obs) == set(expected.obs)
    for key, column in found.obs.items():
        assert column.dtype == expected.obs[key].dtype
        np.testing.assert_array_equal(column, expected.obs[key])


@pytest.fixture
def told():
    return []


@pytest.fixture
def spool(tmp_path, told):
    with Spool(tmp_path / "deep" / "spool", told.append) as opened:
        yield opened


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("noted", [True, False], ids=["noted", "bare"])
def test_an_episode_comes_back_as_it_was(spool, seed, noted):
    expected = episode(seed=seed, noted=noted, task='lift "it" — 持ち上げる')
    spool.put(expected, "a")
    same(spool.get("a"), expected)
    spool.remove("a")
    assert spool.waiting() == []


def test_the_oldest_waits_first_whatever_its_name(spool):
    keys = [new_key() for _ in range(6)]
    assert len({*keys}) == 6
    for age, key in enumerate(keys):
        spool.put(episode(), key)
        os.utime(spool.folder / f"{key}.safetensors", (1e9 + age, 1e9 + age))
    assert spool.waiting() == keys


def test_a_file_that_cannot_be_read_is_put_aside_with_words_and_the_others_are_not(spool, told):
    for key in ("whole", "torn", "empty", "other", "short", "nan"):
        spool.put(episode(), key)
    path = {key: spool.folder / f"{key}.safetensors" for key in spool.waiting()}
    path["torn"].write_bytes(path["torn"].read_bytes()[:-1])
    path["empty"].write_bytes(b"")
    path["other"].write_bytes(b"\x02" + bytes(7) + b"{}")  # a safetensors file, of nothing
    broken = episode()
    broken.reward[2] = np.nan
    spool.put(broken, "nan")
    spool.put(Episode(**{**vars(episode()), "reward": np.zeros(3, np.float32)}), "short")
    found = {key: spool.get(key) for key in path}
    assert [key for key, value in found.items() if value is not None] == ["whole"]
    assert spool.waiting() == ["whole"]
    assert len(told) == 5
    for key in ("torn", "empty", "other", "short", "nan"):
        assert (spool.folder / f"{key}.damaged").is_file()
        assert any(f"{key}.damaged" in line for line in told)


def test_what_was_half_written_when_its_session_was_killed_is_no_episode(tmp_path):
    (tmp_path / ".half.safetensors.partial").write_bytes(b"\x00")
    with Spool(tmp_path) as spool:
        assert spool.waiting() == []
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_disk_that_takes_only_half_leaves_nothing(spool, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda number: os.write(-1, b""))
    with pytest.raises(OSError, match="descriptor"):
        spool.put(episode(), "a")
    assert [path.name for path in spool.folder.iterdir()] == [".lock"]


def test_a_folder_that_takes_no_files_any_more_is_said_with_the_option(spool, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PocoError, match=r"cannot be kept in .*Permission denied.*--spool"):
        spool.put(episode(), "a")


def test_files_that_somebody_tidied_away_are_no_error(spool):
    spool.remove("gone")
    spool.refuse("gone")
    assert spool.get("gone") is None


def test_a_refused_episode_is_kept_and_not_sent_again(spool):
    expected = episode()
    spool.put(expected, "a")
    where = spool.refuse("a")
    assert spool.waiting() == []
    where.rename(where.with_suffix(".safetensors"))  # what a person does to try once more
    same(spool.get("a"), expected)


def test_one_session_at_a_time(spool):
    with pytest.raises(ConfigError, match="--spool"), Spool(spool.folder):
        pass


def test_a_folder_that_cannot_be_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot keep episodes"), Spool(tmp_path / "file" / "spool"):
        pass
