"""Online episodes on disk: a dataset that LeRobot opens at any moment, whatever is killed, full, sent or run again."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from killed import FPS, KILLED, episode
from lerobot.datasets.aggregate import aggregate_datasets
from lerobot.datasets.dataset_tools import delete_episodes
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from poco_vla.config import DatasetConfig
from poco_vla.data import open_dataset, read_episodes
from poco_vla.errors import DataError, PocoError
from poco_vla.recording import consolidate as consolidation
from poco_vla.recording import recorder as module
from poco_vla.recording.recorder import EpisodeRecorder, write_dataset

STATE = ("observation.state",)
TOP, SIDE = "observation.images.top", "observation.images.side"


def opened(root):
    return LeRobotDataset("local/episodes", root=root)


def read(root, obs_keys=STATE, dataset=None):
    config = DatasetConfig(repo_id="local/test", root=root)
    return read_episodes(dataset or open_dataset(config), config, obs_keys)


def assert_same(found, expected, keys=STATE):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for name in ("action", "reward", "success", "terminal", "policy_version"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        for key in keys:
            np.testing.assert_array_equal(a.obs[key], b.obs[key], err_msg=key)
        assert a.task == b.task


def snapshot(folder):
    """Every path below a folder, with content and the time it was written."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None for path in folder.rglob("*")
    }


def contents(root):
    """What is in every file below a folder."""
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def numbered(root, count, **options):
    """A recorder that holds the first `count` episodes."""
    recorder = EpisodeRecorder(root, FPS, **options)
    for i in range(count):
        recorder.add(episode(i), key=f"k{i}")
    return recorder


def film(length, seed=0, side=64):
    """Smooth pictures of two cameras that brighten with time."""
    slope = np.linspace(20, 160, side)[:, None, None] + 8 * np.arange(length)[:, None, None, None] + seed
    pictures = np.broadcast_to(slope, (length, side, 48, 3)).astype(np.uint8)
    plain = episode(seed, length)
    return replace(plain, obs=dict(plain.obs) | {TOP: pictures, SIDE: pictures[:, ::-1].copy()})


# --- growing


def test_after_every_episode_the_dataset_is_one_that_lerobot_opens(tmp_path):
    root = tmp_path / "episodes"
    recorder = EpisodeRecorder(root, FPS)
    assert (recorder.num_episodes, recorder.num_steps, recorder.load(STATE)) == (0, 0, [])
    played = [episode(i, length) for i, length in enumerate((1, 3, 6, 2))]
    played[2] = replace(played[2], task=played[0].task)
    for i, each in enumerate(played):
        recorder.add(each)
        dataset = opened(root)
        steps = sum(map(len, played[: i + 1]))
        assert (recorder.num_episodes, recorder.num_steps) == (i + 1, steps)
        assert (dataset.meta.total_episodes, len(dataset)) == (i + 1, steps)
        frame = dataset[steps - len(each)]
        np.testing.assert_array_equal(frame["action"], each.action[0])
        assert frame["task"] == each.task
        assert_same(read(root), played[: i + 1])
    assert_same(recorder.load(STATE, first=2), played[2:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["episodes"]


def test_one_by_one_is_the_same_dataset_as_all_at_once(tmp_path):
    """Frame indices, tasks, episode table and statistics, by LeRobot's own writer in both ways."""
    played = [replace(episode(i, 4 + i), task=f"task {i % 2}", interventions=np.zeros(4 + i, bool)) for i in range(4)]
    grown = EpisodeRecorder(tmp_path / "grown", FPS)
    for each in played:
        grown.add(each)
    a = opened(grown.root)
    b = opened(write_dataset(played, tmp_path / "whole", fps=FPS, repo_id="local/whole"))
    assert a.hf_dataset.with_format("arrow")[:].equals(b.hf_dataset.with_format("arrow")[:])
    for column in ("episode_index", "length", "tasks", "dataset_from_index", "dataset_to_index"):
        assert a.meta.episodes[column] == b.meta.episodes[column]
    assert a.meta.tasks.equals(b.meta.tasks)
    assert a.meta.info.splits == b.meta.info.splits == {"train": "0:4"}
    assert_close_stats(a.meta.stats, b.meta.stats)


def assert_close_stats(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].keys() == b[key].keys()
        for name in a[key]:
            np.testing.assert_allclose(a[key][name], b[key][name], rtol=1e-6, atol=1e-9, err_msg=f"{key} {name}")


def test_a_recorder_goes_on_where_another_ended(tmp_path):
    for i in range(3):
        recorder = EpisodeRecorder(tmp_path / "episodes", FPS)
        assert (recorder.num_episodes, recorder.num_steps) == (i, 3 * i)
        recorder.add(episode(i))
    assert_same(read(tmp_path / "episodes"), [episode(i) for i in range(3)])


def test_folders_hold_as_many_files_as_lerobot_says_and_then_another_begins(tmp_path):
    """chunks_size of meta/info.json: 1000, here 2."""
    root = numbered(tmp_path / "episodes", 1).root
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"chunks_size": 2}))
    recorder = EpisodeRecorder(root, FPS)
    for i in range(1, 5):
        recorder.add(episode(i))
    assert sorted(p.relative_to(root / "data").as_posix() for p in root.glob("data/*/*")) == [
        f"chunk-{i // 2:03d}/file-{i % 2:03d}.parquet" for i in range(5)
    ]
    assert_same(EpisodeRecorder(root, FPS).load(STATE), [episode(i) for i in range(5)])


def test_png_pictures_are_exact_and_videos_close(tmp_path):
    played = [film(1), film(4, 3), film(1, 5), film(6, 7)]
    for video in (False, True):
        recorder = EpisodeRecorder(tmp_path / f"{video}", FPS, video=video)
        for each in played:
            recorder.add(each)
        assert opened(recorder.root).meta.video_keys == ([TOP, SIDE] if video else [])
        back = EpisodeRecorder(recorder.root, FPS, video=video).load((*STATE, TOP, SIDE))
        assert_same(back, played, STATE if video else (*STATE, TOP, SIDE))
        for a, b in zip(back, played, strict=True):
            for key in (TOP, SIDE):
                np.testing.assert_allclose(a.obs[key].astype(float), b.obs[key].astype(float), atol=6)


def test_adding_leaves_the_terminal_and_the_threads_priority_alone(tmp_path, capfd):
    """Another thread may be drawing: nothing is written to stderr, and nothing is turned away from it either."""
    before = os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None
    for video in (False, True):
        EpisodeRecorder(tmp_path / f"{video}", FPS, video=video).add(film(3))
    assert capfd.readouterr() == ("", "")
    assert before is None or os.sched_getscheduler(0) == before


# --- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": np.zeros((3, 5), np.float32)}, r'"action" is float32 \(5,\) instead of float32 \(2,\)'),
        ({"obs": {}}, '"observation.state" is not there instead of float32'),
        ({"reward": np.array([0, np.nan, 0], np.float32)}, '"next.reward" is not finite at frame 1'),
    ],
    ids=["action", "state", "nan"],
)
def test_an_episode_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, change, message):
    recorder = numbered(tmp_path / "episodes", 1)
    before = snapshot(tmp_path)
    with pytest.raises(DataError, match=message):
        recorder.add(replace(episode(1), **change))
    assert snapshot(tmp_path) == before
    recorder.add(episode(1))
    assert recorder.num_episodes == 2


@pytest.mark.parametrize("first", [{"policy_version": None}, {"interventions": np.zeros(3, bool)}, {}])
def test_whoever_comes_first_settles_no_columns_for_the_others(tmp_path, first):
    """An openpi-like client says neither versions nor interventions, a robot both, a simulator its versions."""
    recorder = EpisodeRecorder(tmp_path / "episodes", FPS)
    drove = np.array([True, False, True])
    for i, changes in enumerate([first, {"interventions": drove}, {"policy_version": None}]):
        recorder.add(replace(episode(i), **changes))
    bare, robot, other = EpisodeRecorder(recorder.root, FPS).load(STATE)
    assert bare.policy_version.tolist() == [-1 if "policy_version" in first else 0] * 3
    assert not bare.interventions.any()
    assert robot.interventions.tolist() == drove.tolist()
    assert robot.policy_version.tolist() == [1] * 3
    assert other.policy_version.tolist() == [-1] * 3


def test_a_recording_of_an_older_version_goes_on_with_the_columns_that_it_has(tmp_path, monkeypatch):
    with monkeypatch.context() as old:
        old.setattr(EpisodeRecorder, "_completed", lambda self, each: each)
        numbered(tmp_path / "episodes", 1)
    recorder = EpisodeRecorder(tmp_path / "episodes", FPS)
    recorder.add(replace(episode(1), interventions=np.ones(3, bool)))
    recorder.add(replace(episode(2), policy_version=None))
    _, second, third = recorder.load(STATE)
    assert second.interventions is None
    assert third.policy_version.tolist() == [-1] * 3


def test_numbers_are_recorded_as_float32_whatever_a_simulator_gives(tmp_path):
    plain = episode(0)
    wide = replace(
        plain, obs={k: v.astype(np.float64) for k, v in plain.obs.items()}, action=plain.action.astype(float)
    )
    recorder = EpisodeRecorder(tmp_path / "episodes", FPS)
    recorder.add(wide)
    assert_same(recorder.load(STATE), [plain])


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    root = tmp_path / "episodes"
    (root / "part-00000").mkdir(parents=True)
    before = snapshot(tmp_path)
    with pytest.raises(DataError, match="something else than recorded episodes"):
        EpisodeRecorder(root, FPS)
    assert snapshot(tmp_path) == before


def test_a_dataset_that_was_not_recorded_one_by_one_is_refused(tmp_path):
    root = write_dataset([episode(0), episode(1)], tmp_path / "data", fps=FPS, repo_id="local/x")
    with pytest.raises(DataError, match="another dataset, or files were taken away"):
        EpisodeRecorder(root, FPS)
    root = write_dataset([episode(0)], tmp_path / "single", fps=FPS, repo_id="local/x")
    with pytest.raises(DataError, match="is not the metadata of a recorded episode"):
        EpisodeRecorder(root, FPS)


def test_a_file_that_was_taken_away_is_missed(tmp_path):
    recorder = numbered(tmp_path / "episodes", 3)
    (recorder.root / "data/chunk-000/file-001.parquet").unlink()
    with pytest.raises(DataError, match="holds 5 files of episodes, 3 episodes recorded one by one have 6"):
        EpisodeRecorder(recorder.root, FPS)


def test_another_rate_is_refused(tmp_path):
    numbered(tmp_path / "episodes", 1)
    with pytest.raises(DataError, match="recorded at 10 fps, this run has 20"):
        EpisodeRecorder(tmp_path / "episodes", 20)


# --- keys


def test_an_episode_sent_again_is_written_once(tmp_path):
    recorder = numbered(tmp_path / "episodes", 2)
    before = snapshot(tmp_path)
    for again in (recorder, EpisodeRecorder(recorder.root, FPS)):
        assert again.has("k0")
        assert again.has("k1")
        assert not again.has("k2")
        again.add(episode(7), key="k1")
        assert again.num_episodes == 2
    assert snapshot(tmp_path) == before


def test_no_key_is_never_the_same_key(tmp_path):
    recorder = EpisodeRecorder(tmp_path / "episodes", FPS)
    for _ in range(2):
        recorder.add(episode(0))
    assert recorder.num_episodes == 2
    assert not recorder.has("")
    assert opened(recorder.root).meta.episodes["poco/key"] == ["", ""]


# --- at any moment


@contextmanager
def looking_between_renames(monkeypatch, root, look):
    """Give a list of what `look` returns before and after every rename and replacement.

    While no byte below `root` changes, the answer is the one before: a reader's look takes half a second.
    """
    seen, files = [], None

    def look_again():
        nonlocal files
        before, files = files, contents(root)
        seen.append(seen[-1] if files == before else look())

    for name in ("rename", "replace"):
        original = getattr(Path, name)

        def looked(path, target, original=original):
            look_again()
            result = original(path, target)
            look_again()
            return result

        monkeypatch.setattr(Path, name, looked)
    yield seen
    monkeypatch.undo()


@pytest.mark.parametrize("video", [False, True])
def test_readers_see_whole_episodes_between_any_two_steps_of_an_add(tmp_path, monkeypatch, video):
    played = [film(3, i) for i in range(3)] if video else [episode(i) for i in range(3)]
    recorder = EpisodeRecorder(tmp_path / "episodes", FPS, video=video)
    for each in played[:2]:
        recorder.add(each)

    def look():
        dataset = opened(recorder.root)
        count = dataset.meta.total_episodes
        dataset[3 * count - 1]
        assert_same(read(recorder.root, dataset=dataset), played[:count])
        return count

    with looking_between_renames(monkeypatch, recorder.root, look) as seen:
        recorder.add(played[2])
    assert seen == sorted(seen)
    assert seen[-2:] == [2, 3]  # the last step is the one that counts
    assert len(seen) == 2 * (7 if video else 5)  # data, task, metadata, statistics, info; two cameras


def test_readers_see_whole_episodes_while_those_that_differ_are_set_aside(tmp_path, monkeypatch):
    recorder = numbered(tmp_path / "episodes", 4, tell=[].append)
    recorder.rewind(1)

    def look():
        dataset = opened(recorder.root)
        count = dataset.meta.total_episodes
        changed = [episode(0), episode(101)] if count < 4 else [episode(i) for i in range(4)]
        assert_same(read(recorder.root, dataset=dataset), changed[:count])
        return count

    with looking_between_renames(monkeypatch, recorder.root, look) as seen:
        recorder.add(episode(101))
    assert set(seen) == {4, 1, 2}


def test_other_threads_read_counts_while_one_adds(tmp_path):
    recorder = EpisodeRecorder(tmp_path / "episodes", FPS)
    thread = threading.Thread(target=lambda: [recorder.add(episode(i), key=f"k{i}") for i in range(8)])
    thread.start()
    seen = []
    while thread.is_alive():
        steps, count = recorder.num_steps, recorder.num_episodes
        assert steps <= 3 * count
        assert all(recorder.has(f"k{i}") for i in range(count))
        seen.append(count)
        time.sleep(0.001)
    assert seen == sorted(seen)
    assert len(set(seen)) > 2
    assert recorder.num_episodes == 8


# --- killed


@pytest.fixture(scope="module")
def killer():
    """Runs and kills children that add episodes; see killed.py."""
    script = Path(__file__).with_name("killed.py")
    process = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=script.parents[2]
    )

    def run(root, first, count, operation, wait=None):
        process.stdin.write(f"{root} {first} {count} {operation}\n")
        process.stdin.flush()
        child = int(process.stdout.readline())
        if wait is not None:
            wait()
            os.kill(child, signal.SIGKILL)
        return int(process.stdout.readline())

    yield run
    process.stdin.close()
    process.wait(timeout=60)


def check_survivors(root, acknowledged, expected):
    """At most one episode more than was acknowledged, all whole, as found and after the next start."""
    told = []
    assert_survived(root, expected)
    recorder = EpisodeRecorder(root, FPS, tell=told.append)
    assert recorder.num_episodes in (acknowledged, acknowledged + 1)
    survivors = expected[: recorder.num_episodes]
    aside = root.with_name(f"{root.name}.set_aside")
    assert aside.exists() == bool(told)
    assert not list(root.parent.glob(f".{root.name}*"))
    recorder.add(episode(50), key="after")
    stats = assert_survived(root, [*survivors, episode(50)])
    assert stats["index"]["count"].tolist() == [recorder.num_steps]
    return bool(told)


def assert_survived(root, expected):
    """The dataset opens and holds the first of these episodes; gives its statistics."""
    dataset = opened(root)
    assert_same(read(root, dataset=dataset), expected[: dataset.meta.total_episodes])
    return dataset.meta.stats


def test_a_kill_before_any_renaming_loses_at_most_the_episode_being_written(tmp_path, killer):
    """The second and the third episode of a run, killed before the first renaming, the second, and so on."""
    base = tmp_path / "base" / "episodes"
    numbered(base, 1)
    expected = [episode(i) for i in range(3)]
    outcomes = []
    for operation in range(1, 500):
        root = tmp_path / f"{operation}" / "episodes"
        shutil.copytree(base.parent, root.parent)
        code = killer(root, -1, 2, operation)
        assert code in (0, KILLED)
        acknowledged = Path(f"{root}.acknowledged").stat().st_size
        if code == 0:
            break
        outcomes.append((acknowledged, check_survivors(root, 1 + acknowledged, expected)))
        shutil.rmtree(root.parent)
    assert len(outcomes) == 2 * 5  # data, task, metadata, statistics, info
    assert {acknowledged for acknowledged, _ in outcomes} == {0, 1}
    assert {set_aside for _, set_aside in outcomes} == {False, True}


def test_a_kill_while_episodes_are_set_aside_loses_none_that_count(tmp_path, killer):
    """Three recorded, the last two run again and different: they are in the dataset or in the set-aside folder."""
    base = tmp_path / "base" / "episodes"
    numbered(base, 3)
    for operation in range(1, 500):
        root = tmp_path / f"{operation}" / "episodes"
        shutil.copytree(base.parent, root.parent)
        code = killer(root, 1, 1, operation)
        assert code in (0, KILLED)
        if code == 0:
            break
        number = EpisodeRecorder(root, FPS, tell=[].append).num_episodes
        stats = assert_survived(root, [episode(i) for i in range(3)] if number == 3 else [episode(0), episode(101)])
        assert stats["index"]["count"].tolist() == [3 * number]
        aside = list(root.with_name("episodes.set_aside").glob("*/data/*/*.parquet"))
        assert {path.name for path in aside} >= {"file-001.parquet", "file-002.parquet"} or number == 3
        shutil.rmtree(root.parent)
    assert operation - 1 == 6 + 5  # info, two files of two episodes, statistics; then an episode comes


def test_kills_at_random_moments_lose_at_most_the_episode_being_written(tmp_path, killer):
    rng = random.Random(0)
    root = tmp_path / "episodes"
    expected = [episode(i) for i in range(1000)]
    file = Path(f"{root}.acknowledged")

    def acknowledgements():
        return file.stat().st_size if file.exists() else 0

    found = 0
    for kill in range(8):

        def wait(added=kill % 2):
            deadline = time.monotonic() + 60
            while acknowledgements() < added and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.15))

        file.unlink(missing_ok=True)
        assert killer(root, -1, 1000, 0, wait) == -signal.SIGKILL
        acknowledged = found + acknowledgements()
        told = []
        if root.exists():
            assert_survived(root, expected)
        found = EpisodeRecorder(root, FPS, tell=told.append).num_episodes
        assert found in (acknowledged, acknowledged + 1)
    assert found >= 4  # each second kill waits for an episode
    assert_same(read(root), expected[:found])


# --- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk, free):
    """Leave `free` bytes on the disk."""
    (disk / "filler").unlink(missing_ok=True)
    (disk / "filler").write_bytes(bytes(max(shutil.disk_usage(disk).free - free, 0)))


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(module, "wait_for_space", partial(module.wait_for_space, every=0.02))


@pytest.mark.parametrize("pictures", ["none", "png", "video"])
def test_a_full_disk_damages_nothing_wherever_it_strikes(small_disk, impatient, pictures):
    """Less and less room, by steps of one page: the episode is lost only when `give_up` says so."""
    root = small_disk / "episodes"
    make = episode if pictures == "none" else lambda i: film(3, i, side=32)
    recorder = EpisodeRecorder(root, FPS, video=pictures == "video", tell=[].append, give_up=lambda: True)
    recorder.add(make(0))
    kept, outcomes, checked = [make(0)], set(), None
    for pages in (0, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 30, 40):
        fill(small_disk, 4096 * pages)
        each = make(1 + pages)
        with suppress(PocoError):
            recorder.add(each)
            kept.append(each)
        outcomes.add(kept[-1] is each)
        assert not list(small_disk.glob(".episodes*"))
        assert recorder.num_episodes == len(kept)
        if checked != (files := contents(root)):  # an episode that was lost left no byte of it
            assert_same(read(root), kept)
            checked = files
    assert outcomes == {True, False}
    (small_disk / "filler").unlink()
    recorder.add(make(0))
    assert_same(EpisodeRecorder(root, FPS, video=pictures == "video").load(STATE), [*kept, make(0)])


def test_on_a_full_disk_add_waits_until_there_is_room(small_disk, impatient):
    told = []
    recorder = EpisodeRecorder(small_disk / "episodes", FPS, tell=told.append)
    recorder.add(episode(0))
    fill(small_disk, 0)
    thread = threading.Thread(target=recorder.add, args=(episode(1),))
    thread.start()
    deadline = time.monotonic() + 60
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert thread.is_alive()
    assert recorder.num_episodes == 1  # whoever asks does not wait
    assert not recorder.has("x")
    assert_same(read(recorder.root), [episode(0)])
    (small_disk / "filler").unlink()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert_same(read(recorder.root), [episode(0), episode(1)])
    (message,) = told
    assert "episode 1 (3 steps) cannot be written" in message
    assert "(0.0 MB are free)" in message


# --- run again


def test_episodes_run_again_the_same_are_not_written_again(tmp_path):
    numbered(tmp_path / "episodes", 4)
    before = snapshot(tmp_path)
    told = []
    recorder = EpisodeRecorder(tmp_path / "episodes", FPS, tell=told.append)
    recorder.rewind(2)
    assert (recorder.num_episodes, recorder.num_steps) == (2, 6)
    assert recorder.has("k1")
    assert not recorder.has("k2")
    assert_same(recorder.load(STATE), [episode(0), episode(1)])
    for i in (2, 3):
        recorder.add(episode(i), key=f"k{i}")
        assert recorder.num_episodes == i + 1
        assert recorder.has(f"k{i}")
    assert snapshot(tmp_path) == before
    assert told == []
    recorder.add(episode(4))
    assert_same(read(recorder.root), [episode(i) for i in range(5)])


@pytest.mark.parametrize("change", ["action", "reward", "success", "state", "length", "task"])
def test_whatever_is_learned_from_makes_an_episode_another(change):
    assert module._same(episode(2), episode(2))
    assert not module._same(episode(2), different(episode(2), change))


def test_the_first_that_differs_and_all_after_it_are_set_aside(tmp_path):
    told = []
    recorder = numbered(tmp_path / "episodes", 5, tell=told.append)
    recorder.rewind(1)
    recorder.add(episode(1))
    other = different(episode(2), "action")
    recorder.add(other, key="k2")
    kept = [episode(0), episode(1), other]
    assert_same(read(recorder.root), kept)
    assert (recorder.num_episodes, recorder.has("k2"), recorder.has("k4")) == (3, True, False)
    (message,) = told
    assert "episode 2, run again, is not what it was; 3 older episodes: moved to" in message
    aside = sorted(p.name for p in (tmp_path / "episodes.set_aside/000/data/chunk-000").iterdir())
    assert aside == [f"file-{i:03d}.parquet" for i in (2, 3, 4)]
    noted = [replace(each, interventions=np.zeros(len(each), bool)) for each in kept]  # a column of every recording
    whole = write_dataset(noted, tmp_path / "whole", fps=FPS, repo_id="local/whole")
    stats = [{k: v for k, v in opened(root).meta.stats.items() if k != "task_index"} for root in (recorder.root, whole)]
    assert_close_stats(*stats)
    recorder.add(episode(4))
    assert_same(EpisodeRecorder(recorder.root, FPS).load(STATE), [*kept, episode(4)])


def different(each, change):
    late = np.arange(len(each)) == len(each) - 1
    return {
        "action": lambda: replace(each, action=each.action + 1e-6 * late[:, None].astype(np.float32)),
        "reward": lambda: replace(each, reward=each.reward + late.astype(np.float32)),
        "success": lambda: replace(each, success=~late, terminal=np.ones(len(each), bool)),
        "state": lambda: replace(each, obs={"observation.state": each.obs["observation.state"] + np.float32(1)}),
        "length": lambda: episode(2, 4),
        "task": lambda: replace(each, task="another"),
    }[change]()


@pytest.mark.parametrize(("video", "written"), [(False, True), (True, False)])
def test_pictures_are_compared_when_they_are_stored_exactly(tmp_path, video, written):
    told = []
    recorder = EpisodeRecorder(tmp_path / "episodes", FPS, video=video, tell=told.append)
    recorder.add(film(3, 0))
    recorder.add(film(3, 1))
    recorder.rewind(0)
    recorder.add(film(3, 0))
    assert not told
    other = film(3, 1)
    other.obs[TOP][0, 0, 0, 0] += 1
    recorder.add(other)
    assert bool(told) is written
    assert recorder.num_episodes == 2


def test_when_the_very_first_differs_the_whole_folder_is_set_aside(tmp_path):
    told = []
    recorder = numbered(tmp_path / "episodes", 2, tell=told.append)
    recorder.rewind(0)
    assert (recorder.num_episodes, recorder.num_steps) == (0, 0)
    recorder.add(episode(9))
    assert_same(read(recorder.root), [episode(9)])
    assert_same(read(tmp_path / "episodes.set_aside/000/episodes"), [episode(0), episode(1)])
    assert len(told) == 1


def test_episodes_that_nobody_runs_again_stay(tmp_path):
    recorder = numbered(tmp_path / "episodes", 3)
    recorder.rewind(1)
    assert_same(EpisodeRecorder(recorder.root, FPS).load(STATE), [episode(i) for i in range(3)])
    assert_same(read(recorder.consolidate(tmp_path / "all")), [episode(i) for i in range(3)])


def test_nobody_can_rewind_to_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match="holds 2 episodes, not 3"):
        numbered(tmp_path / "episodes", 2).rewind(3)


# --- consolidated


def files(root, kind):
    return [path for path in root.rglob("*") if path.suffix == kind]


def test_nothing_recorded_is_nothing_consolidated(tmp_path):
    assert EpisodeRecorder(tmp_path / "episodes", FPS).consolidate(tmp_path / "all") is None
    assert not (tmp_path / "all").exists()


def test_a_consolidated_dataset_holds_the_same_frames_in_few_files(tmp_path):
    recorder = EpisodeRecorder(tmp_path / "episodes", FPS)
    for i in range(6):
        recorder.add(episode(i, 2 + i))
        if i % 3 == 2:  # the second time, an older one is replaced
            root = recorder.consolidate(tmp_path / "all")
    a, b = opened(recorder.root), opened(root)
    assert a.hf_dataset.with_format("arrow")[:].equals(b.hf_dataset.with_format("arrow")[:])
    assert_same(read(root), [episode(i, 2 + i) for i in range(6)])
    assert len(files(root, ".parquet")) == 3  # data, episodes, tasks
    assert_close_stats(a.meta.stats, b.meta.stats)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all", "episodes"]


def test_consolidated_videos_are_the_same_pictures(tmp_path):
    keys = (*STATE, TOP, SIDE)
    recorder = EpisodeRecorder(tmp_path / "episodes", FPS, video=True)
    for i, length in enumerate((5, 1, 8, 3)):
        recorder.add(film(length, i))
    root = recorder.consolidate(tmp_path / "all")
    assert len(files(root, ".mp4")) == 2
    assert_same(read(root, keys), recorder.load(keys), keys)
    a, b = opened(recorder.root), opened(root)
    for i in (0, 4, 5, 6, 13, 14, 16):
        np.testing.assert_array_equal(a[i][TOP], b[i][TOP])


@pytest.mark.parametrize("video", [False, True])
def test_files_that_would_grow_too_large_are_followed_by_others(tmp_path, monkeypatch, video):
    recorder = EpisodeRecorder(tmp_path / "episodes", FPS, video=video)
    played = [film(3, i) for i in range(5)]
    for each in played:
        recorder.add(each)
    sizes = [path.stat().st_size for path in files(recorder.root / "data", ".parquet")]
    monkeypatch.setattr(consolidation, "MB", 2.5 * max(sizes) / 100)  # LeRobot's limit for data is 100 MB
    root = recorder.consolidate(tmp_path / "all")
    assert len(files(root / "data", ".parquet")) == 3
    keys = (*STATE, TOP, SIDE)
    assert_same(read(root, keys), recorder.load(keys), keys)


def test_lerobots_own_tools_take_grown_and_consolidated_datasets(tmp_path):
    """Merging two datasets, and taking an episode out of one."""
    recorder = numbered(tmp_path / "episodes", 3)
    roots = [recorder.root, recorder.consolidate(tmp_path / "all")]
    aggregate_datasets(["local/a", "local/b"], "local/merged", roots=roots, aggr_root=tmp_path / "merged")
    assert_same(read(tmp_path / "merged"), [episode(i % 3) for i in range(6)])
    for root in roots:
        out = tmp_path / f"{root.name}-cut"
        delete_episodes(opened(root), [1], output_dir=out, repo_id="local/cut")
        assert_same(read(out), [episode(0), episode(2)])
