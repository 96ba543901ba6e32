"""What a LeRobot v3 dataset on disk holds is what the episodes hold, and what cannot work is said in words."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from lerobot_on_disk import FPS, SIGNALS, STATE_ONLY, random_columns, write

from poco_vla.config import DatasetConfig, RewardConfig
from poco_vla.data import dataset as module
from poco_vla.data import open_dataset, read_episodes
from poco_vla.data.dataset import describe_dataset
from poco_vla.errors import DataError

STATE = ("observation.state",)
LENGTHS = (4, 7, 5)


def config_of(root, **options):
    return DatasetConfig(repo_id="local/test", root=root, **options)


def read(root, obs_keys=STATE, *, horizon=1, fps=None, **options):
    config = config_of(root, **options)
    return read_episodes(open_dataset(config), config, obs_keys, horizon=horizon, fps=fps)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """State and action alone: (folder, columns written)."""
    columns = [random_columns(length, STATE_ONLY, seed) for seed, length in enumerate(LENGTHS)]
    root = tmp_path_factory.mktemp("plain") / "data"
    return write(root, columns, STATE_ONLY, tasks=["push", "pull", "push"]), columns


def test_states_actions_and_tasks_are_what_was_written(plain):
    root, columns = plain
    episodes = read(root)
    assert [len(e) for e in episodes] == list(LENGTHS)
    assert [e.task for e in episodes] == ["push", "pull", "push"]
    for episode, wrote in zip(episodes, columns, strict=True):
        assert set(episode.obs) == {"observation.state"}
        assert episode.obs["observation.state"].dtype == episode.action.dtype == np.float32
        np.testing.assert_array_equal(episode.obs["observation.state"], wrote["observation.state"])
        np.testing.assert_array_equal(episode.action, wrote["action"])


def test_a_subset_of_episodes_is_just_those(plain):
    root, columns = plain
    episodes = read(root, episodes=(0, 2))
    assert [e.task for e in episodes] == ["push", "push"]
    for episode, wrote in zip(episodes, (columns[0], columns[2]), strict=True):
        np.testing.assert_array_equal(episode.action, wrote["action"])


def test_the_last_episode_alone_can_be_read(plain):
    root, columns = plain
    (episode,) = read(root, episodes=(2,))
    np.testing.assert_array_equal(episode.obs["observation.state"], columns[2]["observation.state"])


def test_bare_demonstrations_succeed_and_end_at_their_last_step(plain):
    """Neither success nor reward is recorded: a demonstration is taken to succeed, worth 1, where it ends."""
    for episode in read(plain[0]):
        last = np.arange(len(episode)) == len(episode) - 1
        np.testing.assert_array_equal(episode.success, last)
        np.testing.assert_array_equal(episode.terminal, last)
        np.testing.assert_array_equal(episode.reward, last.astype(np.float32))


def test_without_success_at_end_bare_data_neither_succeeds_nor_ends(plain):
    for episode in read(plain[0], success_at_end=False):
        assert not episode.success.any()
        assert not episode.terminal.any()
        assert not episode.reward.any()


def test_info_is_the_datasets_own(plain):
    root, columns = plain
    info = describe_dataset(open_dataset(config_of(root)))
    assert info.fps == FPS
    assert info.features["observation.state"]["shape"] == (3,)
    stacked = np.concatenate([c["action"] for c in columns])
    np.testing.assert_allclose(info.stats["action"]["min"], stacked.min(axis=0), rtol=1e-6)
    np.testing.assert_allclose(info.stats["action"]["mean"], stacked.mean(axis=0), atol=1e-6)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Two episodes whose actions and states lie far apart: (folder, columns written)."""
    columns = [random_columns(length, STATE_ONLY, seed) for seed, length in enumerate((30, 70))]
    for name in ("action", "observation.state"):
        columns[1][name] = 5 * columns[1][name] + 40
    return write(tmp_path_factory.mktemp("uneven") / "data", columns, STATE_ONLY), columns


@pytest.mark.parametrize("key", ["action", "observation.state"])
def test_quantiles_are_those_of_all_frames(uneven, key):
    """LeRobot's own, the mean of the episodes' quantiles, are not: a tenth of all lies in the first episode."""
    root, columns = uneven
    dataset = open_dataset(config_of(root))
    stats, frames = describe_dataset(dataset).stats[key], np.concatenate([c[key] for c in columns])
    for name, share in (("q01", 0.01), ("q10", 0.1), ("q50", 0.5), ("q90", 0.9), ("q99", 0.99)):
        np.testing.assert_allclose(stats[name], np.quantile(frames, share, axis=0), rtol=1e-5, atol=1e-5)
    assert np.abs(dataset.meta.stats[key]["q10"] - stats["q10"]).min() > 5
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_array_equal(stats[name], dataset.meta.stats[key][name])


def test_statistics_are_of_the_episodes_in_use(uneven):
    root, columns = uneven
    stats = describe_dataset(open_dataset(config_of(root, episodes=(1,)))).stats["action"]
    frames = columns[1]["action"]
    np.testing.assert_allclose(stats["q50"], np.quantile(frames, 0.5, axis=0), rtol=1e-5)
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(stats[name], getattr(frames, name)(axis=0), rtol=1e-4)
    assert stats["count"] == [70]


def with_signals(tmp_path, names, rows):
    """A dataset of one episode per entry of `rows`, each {signal: list of T values}, with the signals `names`."""
    features = STATE_ONLY | {name: SIGNALS[name] for name in names}
    episodes = []
    for seed, signals in enumerate(rows):
        columns = random_columns(len(next(iter(signals.values()))), features, seed)
        for name, values in signals.items():
            columns[name] = np.array(values, dtype=SIGNALS[name]["dtype"])[:, None]
        episodes.append(columns)
    return write(tmp_path / "data", episodes, features)


def test_recorded_signals_are_read_as_they_are(tmp_path):
    """Success ends one episode, failure (done, no success) another, a time limit (done and truncated) the third."""
    rows = [
        {"next.reward": [-1, -1, 0], "next.done": [0, 0, 1], "next.truncated": [0, 0, 0], "next.success": [0, 0, 1]},
        {"next.reward": [-1, -1, -9], "next.done": [0, 0, 1], "next.truncated": [0, 0, 0], "next.success": [0, 0, 0]},
        {"next.reward": [-1, 0.5, -1], "next.done": [0, 0, 1], "next.truncated": [0, 0, 1], "next.success": [0, 0, 0]},
    ]
    success, failure, limit = read(with_signals(tmp_path, SIGNALS, rows))
    assert [e.success.tolist() for e in (success, failure, limit)] == [[False, False, True], [False] * 3, [False] * 3]
    assert [e.terminal.tolist() for e in (success, failure, limit)] == [
        [False, False, True],
        [False, False, True],
        [False, False, False],
    ]
    assert limit.reward.tolist() == [-1.0, 0.5, -1.0]
    assert failure.rewards(RewardConfig(source="recorded")).tolist() == [-1.0, -1.0, -9.0]


def test_a_positive_reward_is_success_where_success_is_not_recorded(tmp_path):
    """LeRobot data of sparse tasks records next.reward alone: a positive step is success, and nothing follows it."""
    rows = [{"next.reward": [0, 0, 1]}, {"next.reward": [0, 0, 0]}]
    good, bad = read(with_signals(tmp_path, ["next.reward"], rows))
    assert good.success.tolist() == good.terminal.tolist() == [False, False, True]
    assert bad.success.tolist() == bad.terminal.tolist() == [False, False, False]


def test_done_without_truncated_is_an_end(tmp_path):
    rows = [{"next.reward": [0, 0, 0], "next.done": [0, 0, 1]}]
    (episode,) = read(with_signals(tmp_path, ["next.reward", "next.done"], rows))
    assert episode.terminal.tolist() == [False, False, True]
    assert not episode.success.any()


def test_success_ends_an_episode_even_where_done_is_not_set(tmp_path):
    """Recorders that keep filming after success set next.done on the last frame only."""
    rows = [{"next.success": [0, 1, 0], "next.done": [0, 0, 1]}]
    (episode,) = read(with_signals(tmp_path, ["next.success", "next.done"], rows))
    assert episode.terminal.tolist() == [False, True, True]


def test_an_image_column_is_read_pixel_by_pixel(tmp_path):
    features = STATE_ONLY | {"observation.images.top": {"dtype": "image", "shape": (16, 24, 3), "names": None}}
    features["observation.images.top"]["names"] = ["height", "width", "channels"]
    columns = [random_columns(length, features, seed) for seed, length in enumerate((3, 4))]
    episodes = read(write(tmp_path / "data", columns, features), ("observation.images.top",))
    for episode, wrote in zip(episodes, columns, strict=True):
        assert episode.obs["observation.images.top"].dtype == np.uint8
        np.testing.assert_array_equal(episode.obs["observation.images.top"], wrote["observation.images.top"])


def test_a_video_column_is_read_frame_by_frame(tmp_path):
    """Videos are lossy: each frame, of one brightness 20 levels from its neighbours', stays nearest to its own."""
    top = {"dtype": "video", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
    features = STATE_ONLY | {"observation.images.top": top}
    columns = [random_columns(length, features, seed) for seed, length in enumerate((5, 6))]
    for shift, episode in enumerate(columns):
        levels = 20 * (1 + np.arange(len(episode["action"]))) + 100 * shift
        episode["observation.images.top"] = np.broadcast_to(
            levels[:, None, None, None], (len(levels), 64, 64, 3)
        ).astype(np.uint8)
    episodes = read(write(tmp_path / "data", columns, features), ("observation.state", "observation.images.top"))
    for episode, wrote in zip(episodes, columns, strict=True):
        video = episode.obs["observation.images.top"]
        assert video.dtype == np.uint8
        assert video.shape == wrote["observation.images.top"].shape
        means = video.mean(axis=(1, 2, 3))
        np.testing.assert_allclose(means, wrote["observation.images.top"][:, 0, 0, 0].astype(float), atol=6)


def test_videos_read_many_frames_at_once_are_lerobots_own_frames(tmp_path, monkeypatch):
    """Two cameras, calls that do not divide the episodes, and a subset that begins in mid-file."""
    monkeypatch.setattr(module, "FRAMES_PER_CALL", 3)
    video = {"dtype": "video", "shape": (64, 32, 3), "names": ["height", "width", "channels"]}
    features = STATE_ONLY | {"observation.images.top": video, "observation.images.side": video}
    columns = [random_columns(length, features, seed) for seed, length in enumerate((4, 7, 5))]
    root = write(tmp_path / "data", columns, features)
    keys = ("observation.images.top", "observation.images.side")
    for chosen in (None, (1, 2)):
        dataset = open_dataset(config_of(root, episodes=chosen))
        episodes = read(root, keys, episodes=chosen)
        for key in keys:
            frames = np.concatenate([episode.obs[key] for episode in episodes])
            own = np.stack([dataset[i][key].permute(1, 2, 0).numpy() for i in range(len(dataset))])
            np.testing.assert_array_equal(frames, own)


def test_only_the_asked_for_observations_are_read(tmp_path):
    features = STATE_ONLY | {"observation.environment_state": {"dtype": "float32", "shape": (1,), "names": None}}
    root = write(tmp_path / "data", [random_columns(4, features)], features)
    assert set(read(root)[0].obs) == {"observation.state"}
    both = read(root, ("observation.state", "observation.environment_state"))[0]
    assert both.obs["observation.environment_state"].shape == (4, 1)


def test_a_matrix_valued_column_keeps_its_shape(tmp_path):
    features = STATE_ONLY | {"observation.pose": {"dtype": "float32", "shape": (2, 3), "names": None}}
    columns = random_columns(4, features)
    (episode,) = read(write(tmp_path / "data", [columns], features), ("observation.pose",))
    np.testing.assert_array_equal(episode.obs["observation.pose"], columns["observation.pose"])


# -- what cannot work ------------------------------------------------------------------------------------------------


def test_a_missing_action_column_is_named(tmp_path):
    features = {"observation.state": STATE_ONLY["observation.state"]}
    root = write(tmp_path / "data", [random_columns(4, features)], features)
    with pytest.raises(DataError, match=r"has no column action. Its columns: .*observation.state"):
        read(root)


def test_missing_observation_columns_are_named_beside_those_there_are(plain):
    with pytest.raises(
        DataError, match=r"no column observation.images.wrist\. Its columns: action, .*observation.state"
    ):
        read(plain[0], ("observation.state", "observation.images.wrist"))


def test_another_rate_is_refused_with_both_numbers(plain):
    with pytest.raises(DataError, match="recorded at 10 fps, the environment runs at 20"):
        read(plain[0], fps=20)
    assert len(read(plain[0], fps=FPS)) == len(LENGTHS)


@pytest.mark.parametrize(("column", "bad"), [("observation.state", np.nan), ("action", np.inf)])
def test_a_number_that_is_not_finite_is_found_by_episode_and_frame(tmp_path, column, bad):
    columns = [random_columns(4, STATE_ONLY, seed) for seed in range(2)]
    columns[1][column][2, 1] = bad
    root = write(tmp_path / "data", columns, STATE_ONLY)
    with pytest.raises(DataError, match=f'episode 1: "{column}" is not finite at frame 2 .* 1 of 4 frames'):
        read(root)


def test_data_shorter_than_a_chunk_is_refused(plain):
    with pytest.raises(DataError, match=r"holds 3 episodes, the longest of 7 steps: fewer than one chunk of 8"):
        read(plain[0], horizon=8)
    assert len(read(plain[0], horizon=7)) == 3


def test_images_over_the_memory_budget_are_refused_before_they_are_decoded(tmp_path):
    """4 frames of 16 x 24 x 3 bytes are 4,608 bytes."""
    features = STATE_ONLY | {
        "observation.image": {"dtype": "image", "shape": (16, 24, 3), "names": ["height", "width", "channels"]}
    }
    root = write(tmp_path / "data", [random_columns(4, features)], features)
    with pytest.raises(DataError, match=r"4 frames of observation.image .*max_image_bytes"):
        read(root, ("observation.image",), max_image_bytes=4607)
    assert len(read(root, ("observation.image",), max_image_bytes=4608)) == 1


def test_a_folder_that_is_no_dataset_is_said_to_be_none(tmp_path):
    with pytest.raises(DataError, match=r"no LeRobot v3 dataset in .*meta/info.json is missing"):
        open_dataset(config_of(tmp_path))


def test_no_dataset_at_all_is_asked_for():
    with pytest.raises(DataError, match=r"give dataset.root a local folder, or dataset.repo_id"):
        open_dataset(DatasetConfig())


@pytest.mark.parametrize("damage", ["meta", "data"])
def test_a_damaged_folder_cannot_be_opened(tmp_path, damage):
    root = write(tmp_path / "data", [random_columns(4, STATE_ONLY)], STATE_ONLY)
    if damage == "meta":
        (root / "meta" / "info.json").write_text("{")
    else:
        next(Path(root / "data").rglob("*.parquet")).write_bytes(b"not parquet")
    with pytest.raises(DataError, match=f"the dataset {root} cannot be opened: "):
        open_dataset(config_of(root))


def test_a_dataset_of_another_format_version_cannot_be_opened(tmp_path):
    root = write(tmp_path / "data", [random_columns(4, STATE_ONLY)], STATE_ONLY)
    info = json.loads((root / "meta" / "info.json").read_text())
    (root / "meta" / "info.json").write_text(json.dumps(info | {"codebase_version": "v2.1"}))
    with pytest.raises(DataError, match="cannot be opened"):
        open_dataset(config_of(root))


def rewarded(root, rewards, **options):
    """Success of one episode that records these rewards and no success."""
    features = STATE_ONLY | {"next.reward": SIGNALS["next.reward"]}
    columns = random_columns(len(rewards), features) | {"next.reward": np.array(rewards, np.float32)[:, None]}
    (episode,) = read(write(root, [columns], features), **options)
    return episode.success.tolist()


@pytest.mark.parametrize("rewards", [[0, 0, 1], [-1, -1, 0]])
def test_success_is_told_from_a_sparse_reward(rewards, tmp_path):
    assert rewarded(tmp_path / "data", rewards) == [False, False, True]


def test_a_dense_reward_needs_a_threshold(tmp_path):
    with pytest.raises(DataError, match="success_reward"):
        rewarded(tmp_path / "data", [0.1, 0.4, 0.95])
    assert rewarded(tmp_path / "again", [0.1, 0.4, 0.95], success_reward=0.9) == [False, False, True]


def test_a_file_that_the_metadata_does_not_count_yet_is_not_read(plain, tmp_path):
    """Somebody adds an episode to a growing dataset: its file is there before the metadata say so."""
    root, columns = plain
    shutil.copytree(root, tmp_path / "data")
    folder = tmp_path / "data" / "data" / "chunk-000"
    shutil.copy(folder / "file-000.parquet", folder / "file-001.parquet")
    episodes = read(tmp_path / "data")
    assert len(episodes) == len(LENGTHS)
    np.testing.assert_array_equal(episodes[-1].action, columns[-1]["action"])


@pytest.mark.parametrize("noted", ["policy_version", "interventions"])
def test_what_was_noted_at_each_step_is_read_by_its_own_column(tmp_path, noted):
    names = {
        "policy_version": "complementary_info.policy_version",
        "interventions": "complementary_info.is_intervention",
    }
    dtype = {"policy_version": "int64", "interventions": "bool"}[noted]
    features = STATE_ONLY | {names[noted]: {"dtype": dtype, "shape": (1,), "names": None}}
    columns = random_columns(4, STATE_ONLY) | {names[noted]: np.array([[0], [1], [1], [0]], dtype)}
    (episode,) = read(write(tmp_path / "data", [columns], features))
    found = {name: getattr(episode, name) for name in names}
    np.testing.assert_array_equal(found.pop(noted), columns[names[noted]][:, 0])
    assert list(found.values()) == [None]
