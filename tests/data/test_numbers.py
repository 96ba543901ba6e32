"""Columns of any kind of number are float32 when they are read, or refused by name and dtype."""

import logging

import numpy as np
import pytest
from lerobot_on_disk import SIGNALS, STATE_ONLY, write

from poco_vla.config import DatasetConfig
from poco_vla.data import open_dataset, read_episodes
from poco_vla.data.dataset import describe_dataset
from poco_vla.errors import DataError

STATE, ACTION = "observation.state", "action"


def vector(dtype, width):
    return {"dtype": dtype, "shape": (width,), "names": None}


def opened(root, **options):
    config = DatasetConfig("local/test", root, **options)
    return open_dataset(config), config


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "float16", "float64", "int16"])
@pytest.mark.parametrize("width", [1, 3])
def test_any_kind_of_number_becomes_float32(tmp_path, dtype, width):
    values = np.arange(4 * width).reshape(4, width) % (2 if dtype == "bool" else 200)
    columns = {STATE: values.astype(dtype), ACTION: values.astype(dtype)}
    root = write(tmp_path / "d", [columns], {STATE: vector(dtype, width), ACTION: vector(dtype, width)})
    dataset, config = opened(root)
    (episode,) = read_episodes(dataset, config, (STATE,))
    for column in (episode.obs[STATE], episode.action):
        assert column.dtype == np.float32
        np.testing.assert_array_equal(column, values)
    info = describe_dataset(dataset)
    for key in (STATE, ACTION):
        assert info.features[key]["dtype"] == "float32"
        np.testing.assert_allclose(info.stats[key]["max"], values.max(axis=0))
        np.testing.assert_allclose(info.stats[key]["mean"], values.mean(axis=0), rtol=1e-6)


def test_text_among_the_observations_is_left_out_with_a_warning_and_refused_where_it_is_asked_for(tmp_path, caplog):
    features = STATE_ONLY | {"observation.note": {"dtype": "string", "shape": (1,), "names": None}}
    columns = {STATE: np.zeros((3, 3), "f4"), ACTION: np.zeros((3, 2), "f4"), "observation.note": ["a", "b", "c"]}
    dataset, config = opened(write(tmp_path / "d", [columns], features))
    with caplog.at_level(logging.WARNING):
        assert "observation.note" not in describe_dataset(dataset).features
    assert 'left out "observation.note", which is of dtype string' in caplog.text
    with pytest.raises(DataError, match=r'"observation.note" is of dtype string, which cannot become float32'):
        read_episodes(dataset, config, (STATE, "observation.note"))


def test_an_action_of_text_is_refused_by_name_and_dtype(tmp_path):
    features = {STATE: vector("float32", 3), ACTION: {"dtype": "string", "shape": (1,), "names": None}}
    dataset, _ = opened(write(tmp_path / "d", [{STATE: np.zeros((3, 3), "f4"), ACTION: ["a", "b", "c"]}], features))
    with pytest.raises(DataError, match=r'"action" of .* is of dtype string, which cannot become float32'):
        describe_dataset(dataset)


@pytest.mark.parametrize("name", ["next.reward", "next.success"])
def test_a_signal_of_text_is_refused_instead_of_overlooked(tmp_path, name):
    features = STATE_ONLY | {name: {"dtype": "string", "shape": (1,), "names": None}}
    columns = {STATE: np.zeros((2, 3), "f4"), ACTION: np.zeros((2, 2), "f4"), name: ["no", "yes"]}
    dataset, config = opened(write(tmp_path / "d", [columns], features))
    with pytest.raises(DataError, match=f'"{name}" is of dtype string'):
        read_episodes(dataset, config, (STATE,))


def test_whole_numbers_that_float32_cannot_tell_apart_are_refused(tmp_path):
    """At 2^40 float32 steps by 131,072: a counter's ticks are all one number."""
    ticks = 2**40 + np.arange(8).reshape(4, 2)
    columns = {STATE: np.zeros((4, 3), "f4"), ACTION: ticks}
    dataset, config = opened(write(tmp_path / "d", [columns], STATE_ONLY | {ACTION: vector("int64", 2)}))
    with pytest.raises(DataError, match=r'"action" is int64 with numbers about 1.1e\+12 that differ by 6'):
        read_episodes(dataset, config, (STATE,))


def test_large_whole_numbers_that_vary_as_much_are_read(tmp_path):
    ticks = 2**30 * np.arange(8).reshape(4, 2)
    columns = {STATE: np.zeros((4, 3), "f4"), ACTION: ticks}
    dataset, config = opened(write(tmp_path / "d", [columns], STATE_ONLY | {ACTION: vector("int64", 2)}))
    np.testing.assert_allclose(read_episodes(dataset, config, (STATE,))[0].action, ticks, rtol=1e-6)


def test_each_frame_has_its_own_instruction(tmp_path):
    """LeRobot stores the instruction of each frame: two of them in one episode, as its own reader gives them."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path / "d"
    dataset = LeRobotDataset.create("local/test", fps=10, features=STATE_ONLY, root=root)
    for task in ("pick", "pick", "place"):
        dataset.add_frame({STATE: np.zeros(3, "f4"), ACTION: np.zeros(2, "f4"), "task": task})
    dataset.save_episode()
    dataset.add_frame({STATE: np.zeros(3, "f4"), ACTION: np.zeros(2, "f4"), "task": "place"})
    dataset.save_episode()
    dataset.finalize()
    dataset, config = opened(root)
    mixed, whole = read_episodes(dataset, config, (STATE,))
    assert (mixed.task, mixed.step_tasks, mixed.tasks) == ("pick", ("pick", "pick", "place"), {"pick": 0, "place": 2})
    assert (whole.task, whole.step_tasks) == ("place", None)
    assert [mixed.task_at(i) for i in range(3)] + [whole.task_at(0)] == [dataset[i]["task"] for i in range(4)]


def test_a_task_index_without_an_instruction_is_refused(tmp_path):
    import pandas as pd

    root = write(tmp_path / "d", [{STATE: np.zeros((2, 3), "f4"), ACTION: np.zeros((2, 2), "f4")}], STATE_ONLY)
    tasks = pd.read_parquet(root / "meta/tasks.parquet")
    tasks["task_index"] = 7
    tasks.to_parquet(root / "meta/tasks.parquet")
    dataset, config = opened(root)
    with pytest.raises(DataError, match=r"episode 0: frame 0 has task_index 0, of which meta/tasks.parquet has no"):
        read_episodes(dataset, config, (STATE,))


def test_rows_out_of_order_are_refused(tmp_path):
    import pyarrow.parquet as pq

    root = write(tmp_path / "d", [{STATE: np.zeros((4, 3), "f4"), ACTION: np.zeros((4, 2), "f4")}], STATE_ONLY)
    (file,) = root.glob("data/*/*.parquet")
    pq.write_table(pq.read_table(file).take([0, 2, 1, 3]), file)
    dataset, config = opened(root)
    with pytest.raises(DataError, match=r"rows of episode 0 are not one behind the other"):
        read_episodes(dataset, config, (STATE,))


def test_how_success_is_told_is_said_with_how_many_succeed(tmp_path):
    features = STATE_ONLY | {"next.reward": SIGNALS["next.reward"]}
    episodes = [
        {STATE: np.zeros((2, 3), "f4"), ACTION: np.zeros((2, 2), "f4"), "next.reward": np.array([[-1], [end]], "f4")}
        for end in (0, -1)
    ]
    dataset, config = opened(write(tmp_path / "d", episodes, features))
    said = []
    read_episodes(dataset, config, (STATE,), say=said.append)
    assert said == ["1 of 2 episodes succeed (next.reward of -1/0, 0 is success)"]
    dataset, config = opened(config.root, episodes=(0,))
    (only,) = read_episodes(dataset, config, (STATE,))
    assert only.success.tolist() == [False, True]
