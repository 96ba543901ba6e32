"""One convention of success for a whole dataset: told, asked for, never guessed episode by episode."""

import numpy as np
import pytest

from poco_vla.config import DatasetConfig, RewardConfig
from poco_vla.data.signals import check_reward, read_signals
from poco_vla.errors import DataError

CONFIG = DatasetConfig(repo_id="local/test")


def told(columns, lengths, *, config=CONFIG, whole=None):
    """Signals of episodes of these lengths."""
    last = np.concatenate([np.arange(n) == n - 1 for n in lengths])
    columns = {name: np.asarray(column) for name, column in columns.items()}
    return read_signals(columns, last, config, "the dataset", None if whole is None else lambda: np.array(whole))


def success_of_rewards(rewards, lengths, **options):
    return told({"next.reward": np.array(rewards, np.float32)}, lengths, **options).success.tolist()


def test_in_a_dataset_of_minus_one_and_zero_every_zero_is_success():
    assert success_of_rewards([-1, -1, 0, 0, 0, 0], (3, 1, 2)) == [False, False, True, True, True, True]


def test_an_episode_of_zeros_in_a_dataset_of_zero_and_one_has_no_success():
    assert success_of_rewards([0, 1, 0, 0], (2, 2)) == [False, True, False, False]


@pytest.mark.parametrize(
    "rewards", [[0, 0, 1, 0, 0, -1], [0, 0, 1, -1, -1, -1], [0, 0.5, 1, 0, 0, 0], [0, 10, 0, 0, 0, 0]]
)
def test_rewards_of_no_known_convention_ask_for_the_threshold(rewards):
    with pytest.raises(DataError, match=r"neither 0/1 nor -1/0. Give dataset.success_reward"):
        success_of_rewards(rewards, (3, 3))
    config = DatasetConfig(success_reward=0.75)
    assert success_of_rewards(rewards, (3, 3), config=config) == [r >= 0.75 for r in rewards]


def test_episodes_in_use_are_told_by_the_rewards_of_the_whole_dataset():
    """Use one episode of a -1/0 dataset that succeeds at once: its only reward is 0."""
    assert success_of_rewards([0], (1,), whole=[0, -1, -1, 0]) == [True]
    assert success_of_rewards([0], (1,), whole=[0, 0, 1]) == [False]


def test_rewards_that_are_all_zero_are_no_success_and_the_rule_says_what_else_they_may_be():
    signals = told({"next.reward": np.zeros(3, np.float32)}, (3,))
    assert not signals.success.any()
    assert "dataset.success_reward 0" in signals.rule


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint8, np.float32, np.float64])
def test_recorded_success_of_any_kind_of_number_is_read_where_it_is_zero_or_one(dtype):
    assert told({"next.success": np.array([[0], [1], [0]], dtype)}, (3,)).success.tolist() == [False, True, False]


def test_a_success_that_is_not_a_number_is_none():
    columns = {"next.success": [np.nan, 1.0, np.nan], "next.done": [0, 0, np.nan]}
    signals = told(columns, (3,))
    assert signals.success.tolist() == signals.terminal.tolist() == [False, True, False]


@pytest.mark.parametrize("values", [[0.1, 0.4, 0.9], [0, 1, 2], [-1, 0, 0]])
def test_a_graded_success_needs_a_threshold(values):
    with pytest.raises(DataError, match=r"next.success of the dataset is .*Give dataset.success_threshold"):
        told({"next.success": values}, (3,))
    config = DatasetConfig(success_threshold=0.9)
    assert told({"next.success": values}, (3,), config=config).success.tolist() == [v >= 0.9 for v in values]


def test_a_threshold_takes_no_nan_for_success():
    config = DatasetConfig(success_threshold=0.5)
    assert told({"next.success": [np.nan, 0.6]}, (2,), config=config).success.tolist() == [False, True]


@pytest.mark.parametrize(
    ("option", "column"), [("success_threshold", "next.success"), ("success_reward", "next.reward")]
)
def test_an_option_about_a_column_that_is_not_there_is_refused(option, column):
    with pytest.raises(DataError, match=f"dataset.{option} is 0.5, but the dataset has no column {column}"):
        told({}, (3,), config=DatasetConfig(**{option: 0.5}))


def test_an_end_that_is_neither_zero_nor_one_is_refused():
    with pytest.raises(DataError, match=r"next.done of the dataset is .* expected true/false"):
        told({"next.done": [0, 0, 2]}, (3,))


def test_a_signal_of_two_numbers_per_step_is_refused_with_its_shape():
    with pytest.raises(DataError, match=r"next.success of the dataset has shape \(2,\) per step"):
        told({"next.success": np.zeros((3, 2))}, (3,))


def test_the_rule_is_said():
    assert told({}, (3,)).rule.startswith("neither success nor reward is recorded: each episode succeeds")
    assert "0 is success" in told({"next.reward": np.array([-1, 0])}, (2,)).rule
    unused = told({"next.success": [0, 1]}, (2,), config=DatasetConfig(success_reward=1.0)).rule
    assert "dataset.success_reward is not used" in unused


def test_a_recorded_reward_is_needed_where_it_is_to_be_learned():
    check_reward({"action": {}}, RewardConfig())
    check_reward({"next.reward": {}}, RewardConfig(source="recorded"))
    with pytest.raises(DataError, match=r'reward.source is "recorded", but .* no column next.reward'):
        check_reward({"action": {}}, RewardConfig(source="recorded"))
