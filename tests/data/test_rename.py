"""Columns of a dataset that does not use LeRobot's names are given them when it is read; its files stay as they are."""

import json
import shutil

import numpy as np
import pytest
from lerobot_on_disk import SIGNALS, STATE_ONLY, random_columns, write

from poco_vla.cli.configuration import parse_config
from poco_vla.config import DatasetConfig, EnvSpec, TrainConfig, from_json, to_json
from poco_vla.data import open_dataset, read_episodes
from poco_vla.data.dataset import describe_dataset
from poco_vla.errors import ConfigError, DataError, UnknownNameError
from poco_vla.training import train

VIDEO = {"dtype": "video", "shape": (32, 48, 3), "names": ["height", "width", "channels"]}
THEIRS = {
    "state": STATE_ONLY["observation.state"],
    "actions": STATE_ONLY["action"],
    "image": VIDEO,
    "reward": SIGNALS["next.reward"],
}
NAMES = {
    "state": "observation.state",
    "actions": "action",
    "image": "observation.images.image",
    "reward": "next.reward",
}
KEYS = ("observation.state", "observation.images.image")


@pytest.fixture(scope="module")
def episodes():
    made = [random_columns(6, THEIRS, seed) for seed in range(2)]
    for one in made:
        one["reward"] = np.eye(6, dtype=np.float32)[:, -1:]
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory, episodes):
    """Columns with openpi's names, a video file for each episode."""
    return write(tmp_path_factory.mktemp("theirs") / "data", episodes, THEIRS)


def read(root, names=NAMES, **options):
    config = DatasetConfig("local/test", root, **options)
    return read_episodes(open_dataset(config, names), config, KEYS)


def test_renamed_columns_are_read_from_the_files_that_have_the_old_names(root, episodes):
    before = sorted(path.read_bytes() for path in root.rglob("*.*"))
    found = read(root)
    for one, expected in zip(found, episodes, strict=True):
        np.testing.assert_array_equal(one.obs["observation.state"], expected["state"])
        np.testing.assert_array_equal(one.action, expected["actions"])
        assert one.obs["observation.images.image"].shape == (6, 32, 48, 3)
        assert one.success.tolist() == [False] * 5 + [True]
    assert sorted(path.read_bytes() for path in root.rglob("*.*")) == before


def test_a_choice_of_episodes_looks_at_the_reward_of_all(root, episodes):
    (found,) = read(root, episodes=(1,))
    np.testing.assert_array_equal(found.action, episodes[1]["actions"])
    assert found.succeeded


def test_features_and_statistics_have_the_new_names(root, episodes):
    info = describe_dataset(open_dataset(DatasetConfig("local/test", root), NAMES))
    assert {*NAMES.values()} <= info.features.keys()
    assert not THEIRS.keys() & (info.features.keys() | info.stats.keys())
    actions = np.concatenate([one["actions"] for one in episodes])
    np.testing.assert_allclose(info.stats["action"]["max"], actions.max(axis=0), rtol=1e-6)
    assert "mean" in info.stats["observation.images.image"]


def test_without_new_names_the_message_gives_the_words_that_rename(root):
    with pytest.raises(DataError, match="no column action") as caught:
        read(root, {})
    words = str(caught.value).partition("--rename-map ")[2].strip("'")
    assert json.loads(words) == {name: NAMES[name] for name in ("actions", "state", "image")}


def test_a_missing_video_is_named_by_its_file(tmp_path, episodes):
    root = write(tmp_path / "data", episodes, THEIRS)
    (file,) = (root / "videos").rglob("*.mp4")
    file.unlink()
    with pytest.raises(DataError, match=rf'camera "observation.images.image" is missing \({file}\)'):
        read(root)


def test_a_missing_video_is_named_before_a_policy_is_built(tmp_path, episodes, fresh_accelerate):
    """A policy that starts from nothing sees all cameras; its image encoder may be a long download."""
    root = write(tmp_path / "data", episodes, THEIRS)
    shutil.rmtree(root / "videos")
    config = TrainConfig(
        dataset=DatasetConfig("local/test", root),
        rename_map=NAMES,
        policy_options={"vision_encoder": str(tmp_path / "nowhere")},
        online_steps=0,
        output_dir=tmp_path / "run",
    )
    with pytest.raises(DataError, match=r'the video of camera "observation.images.image" is missing'):
        train(config)


@pytest.mark.parametrize(
    ("names", "error", "said"),
    [
        ({"action": "act"}, UnknownNameError, 'no column named "action".*Did you mean "actions"'),
        ({"state": "x", "image": "x"}, ConfigError, 'the columns "state" and "image" one name, "x"'),
        ({"state": "actions"}, ConfigError, '"state" and "actions" one name, "actions"'),
    ],
)
def test_names_that_cannot_be_are_refused(root, names, error, said):
    with pytest.raises(error, match=said):
        read(root, names)


@pytest.mark.parametrize("flag", ["--rename-map", "--rename_map"])
def test_the_command_line_takes_lerobots_option(flag):
    names = {"actions": "action", "cam-high": "observation.images.cam-high"}
    config = parse_config(TrainConfig(env=EnvSpec()), [flag, json.dumps(names)])
    assert config.rename_map == names
    assert from_json(TrainConfig, to_json(config)) == config


@pytest.mark.parametrize("word", ["actions=action", '{"actions": 1}', "[1]"])
def test_anything_but_an_object_of_names_is_refused(word, capsys):
    with pytest.raises(SystemExit):
        parse_config(TrainConfig(env=EnvSpec()), ["--rename-map", word])
    assert "takes one JSON object of names" in " ".join(capsys.readouterr().err.replace("│", " ").split())
