"""Episodes written as LeRobot datasets: LeRobot opens them, what was played is read back, nothing is half written."""

import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny_gym  # noqa: F401 (registers the environments)
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from tiny_env import FPS, homing_chunks, point_spec

from poco_vla.config import DatasetConfig
from poco_vla.data import Episode, Replay, open_dataset, read_episodes
from poco_vla.errors import DataError
from poco_vla.recording.recorder import can_be_video, write_dataset
from poco_vla.rollout import EnvPool

STATE = ("observation.state",)


@pytest.fixture(scope="module")
def episodes():
    """Played in the tiny environment: successes, a failure and time limits."""
    played = []
    with EnvPool(point_spec(3, episode_length=5), 4) as pool:
        for seed, count, sign in ((0, 8, 1), (50, 1, -1)):
            pool.reset(seed, count)
            while not pool.idle.all():
                played += pool.step(sign * homing_chunks(pool.obs, 4))[0]
    assert {(bool(e.success[-1]), bool(e.terminal[-1])) for e in played} == {
        (True, True),
        (False, True),
        (False, False),
    }
    return played


def read(root, obs_keys=STATE):
    config = DatasetConfig(repo_id="local/test", root=root)
    return read_episodes(open_dataset(config), config, obs_keys)


def assert_same_content(a, b):
    for name in ("action", "reward", "success", "terminal"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert getattr(a, name).dtype == getattr(b, name).dtype
    np.testing.assert_array_equal(a.obs["observation.state"], b.obs["observation.state"])
    assert a.task == b.task


def test_lerobot_opens_what_was_written(tmp_path, episodes):
    root = write_dataset(episodes, tmp_path / "data", fps=FPS, repo_id="local/played")
    dataset = LeRobotDataset("local/played", root=root)
    assert dataset.meta.total_episodes == len(episodes)
    assert len(dataset) == sum(map(len, episodes))
    assert dataset.meta.fps == FPS
    frame = dataset[len(episodes[0])]
    np.testing.assert_array_equal(frame["observation.state"], episodes[1].obs["observation.state"][0])
    np.testing.assert_array_equal(frame["action"], episodes[1].action[0])
    assert frame["task"] == episodes[1].task
    assert frame["next.reward"] == pytest.approx(float(episodes[1].reward[0]))


def test_the_last_frame_of_each_episode_says_how_it_ended(tmp_path, episodes):
    """LeRobot's names: done at every end, truncated at a time limit, success at success."""
    dataset = LeRobotDataset(
        "local/played", root=write_dataset(episodes, tmp_path / "data", fps=FPS, repo_id="local/played")
    )
    table = dataset.hf_dataset.with_format("numpy")[:]
    ends = np.cumsum([len(e) for e in episodes]) - 1
    assert np.flatnonzero(table["next.done"]).tolist() == ends.tolist()
    assert table["next.truncated"][ends].tolist() == [not e.terminal[-1] for e in episodes]
    assert table["next.success"][ends].tolist() == [bool(e.success[-1]) for e in episodes]


def test_episodes_read_back_are_those_played(tmp_path, episodes):
    back = read(write_dataset(episodes, tmp_path / "data", fps=FPS, repo_id="local/played"))
    for a, b in zip(episodes, back, strict=True):
        assert_same_content(a, b)


def test_one_dimensional_states_and_actions_come_back(tmp_path):
    """LeRobot stores a vector of length 1 as a bare number."""
    column = np.arange(4, dtype=np.float32)[:, None]
    signals = np.zeros(4, np.float32), np.zeros(4, bool), np.array([False, False, False, True])
    episode = Episode({"observation.state": column}, column + 10, *signals, task="slide")
    (back,) = read(write_dataset([episode], tmp_path / "data", fps=FPS, repo_id="local/slide"))
    assert_same_content(episode, back)


def test_the_pool_cannot_tell_episodes_read_back_from_those_played(tmp_path, episodes):
    """What a resumed run samples is what the interrupted one would have, also where success did not end an episode."""
    late = replace(episodes[0], success=np.arange(len(episodes[0])) == 1, terminal=np.zeros(len(episodes[0]), bool))
    played = [*episodes, late]
    back = read(write_dataset(played, tmp_path / "data", fps=FPS, repo_id="local/played"))
    samples = []
    for source in (played, back):
        replay = Replay(horizon=3, gamma=0.9)
        replay.extend(source, is_demo=False)
        samples.append(replay.sample(300, np.random.default_rng(0)))
    for name in ("actions", "valid", "returns", "discount", "is_success"):
        np.testing.assert_array_equal(getattr(samples[0], name), getattr(samples[1], name), err_msg=name)


def test_images_come_back_as_they_were(tmp_path):
    with EnvPool(point_spec(1, pixels=True, episode_length=6), 3) as pool:
        pool.reset(0, 1)
        (episode,) = [e for _ in range(2) for e in pool.step(homing_chunks(pool.obs, 3) / 4)[0]]
    root = write_dataset([episode], tmp_path / "data", fps=FPS, repo_id="local/filmed")
    (back,) = read(root, ("observation.state", "observation.images.top"))
    wrote = episode.obs["observation.images.top"]
    assert wrote[:, 0, 0, 0].std() > 5
    np.testing.assert_array_equal(back.obs["observation.images.top"], wrote)


TOP, SIDE = "observation.images.top", "observation.images.side"


@pytest.fixture(scope="module")
def filmed():
    """Two episodes by two cameras: smooth pictures that brighten with time, one camera's upside down."""
    episodes = []
    for length in (5, 7):
        slope = np.linspace(20, 180, 64)[:, None, None] + 8 * np.arange(length)[:, None, None, None]
        pictures = np.broadcast_to(slope, (length, 64, 48, 3)).astype(np.uint8)
        state = np.arange(2 * length, dtype=np.float32).reshape(length, 2)
        last = np.arange(length) == length - 1
        obs = {"observation.state": state, TOP: pictures, SIDE: pictures[:, ::-1].copy()}
        episodes.append(Episode(obs, state, last.astype(np.float32), last, last, task="watch"))
    return episodes


def test_a_video_dataset_is_lerobots_own_and_reads_back_within_a_few_levels(tmp_path, filmed):
    root = write_dataset(filmed, tmp_path / "data", fps=FPS, repo_id="local/filmed", video=True)
    dataset = LeRobotDataset("local/filmed", root=root)
    assert dataset.meta.video_keys == [TOP, SIDE]
    assert {dataset.meta.features[key]["dtype"] for key in (TOP, SIDE)} == {"video"}
    assert dataset[6][TOP].shape == (3, 64, 48)
    for wrote, back in zip(filmed, read(root, ("observation.state", TOP, SIDE)), strict=True):
        assert_same_content(wrote, back)
        for key in (TOP, SIDE):
            assert back.obs[key].shape == wrote.obs[key].shape
            assert back.obs[key].dtype == np.uint8
            np.testing.assert_allclose(back.obs[key].astype(float), wrote.obs[key].astype(float), atol=6)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_without_video_pictures_are_exact(tmp_path, filmed):
    root = write_dataset(filmed, tmp_path / "data", fps=FPS, repo_id="local/filmed")
    assert LeRobotDataset("local/filmed", root=root).meta.video_keys == []
    for wrote, back in zip(filmed, read(root, (TOP, SIDE)), strict=True):
        for key in (TOP, SIDE):
            np.testing.assert_array_equal(back.obs[key], wrote.obs[key])


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="this system schedules by other rules")
def test_the_encoder_does_not_leave_this_thread_ahead_of_all_others(tmp_path, filmed):
    """SVT-AV1 under root sets SCHED_FIFO 99 for who calls it."""
    before = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    write_dataset(filmed[:1], tmp_path / "data", fps=FPS, repo_id="local/filmed", video=True)
    assert (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority) == before


@pytest.mark.parametrize(
    ("height", "width", "fits"), [(32, 48, True), (30, 64, False), (65, 64, False), (64, 65, False)]
)
def test_pictures_fit_a_video_when_their_sides_are_even_and_not_tiny(height, width, fits):
    assert can_be_video((height, width, 3)) is fits


def test_versions_and_interventions_come_back(tmp_path, episodes):
    noted = [
        replace(e, policy_version=np.arange(len(e)) + 2**40, interventions=np.arange(len(e)) % 2 == 0)
        for e in episodes[:3]
    ]
    root = write_dataset(noted, tmp_path / "data", fps=FPS, repo_id="local/noted")
    for a, b in zip(noted, read(root), strict=True):
        assert_same_content(a, b)
        np.testing.assert_array_equal(a.policy_version, b.policy_version)
        np.testing.assert_array_equal(a.interventions, b.interventions)
        assert (b.policy_version.dtype, b.interventions.dtype) == (np.int64, np.bool_)


def test_what_nobody_noted_is_not_there(tmp_path, episodes):
    bare = replace(episodes[0], policy_version=None, interventions=None)
    (back,) = read(write_dataset([bare], tmp_path / "data", fps=FPS, repo_id="local/played"))
    assert back.policy_version is None
    assert back.interventions is None


def test_encoders_leave_the_terminal_clean(tmp_path, filmed, capfd):
    write_dataset(filmed, tmp_path / "data", fps=FPS, repo_id="local/filmed", video=True)
    print("and it works again", file=sys.stderr)
    assert capfd.readouterr() == ("", "and it works again\n")


@pytest.mark.parametrize("side", [16, 65])
def test_pictures_that_would_crash_or_smear_the_encoder_are_refused(tmp_path, filmed, side):
    pictures = np.zeros((len(filmed[0]), side, 64, 3), np.uint8)
    episode = replace(filmed[0], obs={TOP: pictures})
    with pytest.raises(DataError, match=rf'"{TOP}" is {side} x 64 pixels; video needs even sides of at least 32'):
        write_dataset([episode], tmp_path / "data", fps=FPS, repo_id="local/filmed", video=True)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_no_dataset_and_can_be_repeated(tmp_path, episodes):
    root = tmp_path / "data"
    bad = [episodes[0], replace(episodes[1], action=np.zeros((len(episodes[1]), 7), np.float32))]
    with pytest.raises(ValueError, match="action"):
        write_dataset(bad, root, fps=FPS, repo_id="local/played")
    assert not root.exists()
    write_dataset(episodes[:2], root, fps=FPS, repo_id="local/played")
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    assert len(read(root)) == 2


def test_a_finished_dataset_stays_when_a_second_writer_comes(tmp_path, episodes):
    for written in (episodes[:1], episodes[1:3]):
        root = write_dataset(written, tmp_path / "data", fps=FPS, repo_id="local/played")
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    (found,) = read(root)
    assert_same_content(found, episodes[0])
