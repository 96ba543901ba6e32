"""Rewards, success and the check of one episode's columns."""

import json
from dataclasses import replace

import numpy as np
import pytest

from poco_vla.config import RewardConfig
from poco_vla.data import Episode
from poco_vla.data.episode import first_of_each_task
from poco_vla.errors import DataError, UnknownNameError
from poco_vla.learner import broadcast as sharing


def episode():
    return Episode(
        obs={"observation.state": np.zeros((3, 2), np.float32), "observation.image": np.zeros((3, 4, 4, 3), np.uint8)},
        action=np.zeros((3, 2), np.float32),
        reward=np.array([5, 6, 7], np.float32),
        success=np.array([False, False, True]),
        terminal=np.array([False, False, True]),
    )


@pytest.mark.parametrize(
    ("config", "rewards"),
    [
        (RewardConfig(), [0, 0, 1]),
        (RewardConfig(success=1.0, step=-1.0), [-1, -1, 0]),
        (RewardConfig(success=1.0, step=-0.01), [-0.01, -0.01, 0.99]),
        (RewardConfig(source="recorded", success=9.0), [5, 6, 7]),
        (RewardConfig(source="recorded", step=-1.0), [4, 5, 6]),
        (RewardConfig.named("sparse"), [0, 0, 1]),
        (RewardConfig.named("minus_one"), [-1, -1, 0]),
        (RewardConfig.named("semi_sparse"), [5, 6, 7]),
        (RewardConfig.named("step_cost"), [4.99, 5.99, 6.99]),
    ],
)
def test_reward_is_step_plus_success_or_what_was_recorded(config, rewards):
    """Success at the third of three steps: step, step, step + success."""
    found = episode().rewards(config)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, rewards, rtol=1e-6)


def test_an_unknown_reward_is_answered_with_those_there_are():
    with pytest.raises(UnknownNameError, match="minus_one, semi_sparse, sparse, step_cost"):
        RewardConfig.named("dense")


def test_success_at_any_step_is_a_success():
    assert episode().succeeded
    assert replace(episode(), success=np.array([True, False, False])).succeeded
    assert not replace(episode(), success=np.zeros(3, bool)).succeeded


def test_its_length_is_its_number_of_actions():
    assert len(episode()) == 3


def test_finite_numbers_and_images_pass_the_check():
    episode().check("here")


@pytest.mark.parametrize("name", ["action", "next.reward", "observation.state"])
def test_the_check_names_column_frame_and_extent(name):
    """Frames 1 and 2 are bad: the first is named, both are counted."""
    bad = episode()
    column = {"action": bad.action, "next.reward": bad.reward}.get(name, bad.obs.get(name))
    column[1:] = np.nan
    with pytest.raises(DataError, match=f'my data, episode 4: "{name}" is not finite at frame 1 .* 2 of 3 frames'):
        bad.check("my data, episode 4")


def test_the_recorded_reward_is_refused_where_none_was_recorded():
    bare = replace(episode(), has_reward=False)
    assert bare.rewards(RewardConfig()).tolist() == [0, 0, 1]
    with pytest.raises(DataError, match=r'reward.source is "recorded", but the demonstrations have no column next.rew'):
        bare.rewards(RewardConfig(source="recorded"))


def test_each_instruction_is_told_with_its_first_step():
    mixed = replace(episode(), task="pick", step_tasks=("pick", "place", "place"))
    assert mixed.tasks == {"pick": 0, "place": 1}
    assert [mixed.task_at(i) for i in range(3)] == ["pick", "place", "place"]
    plain = replace(episode(), task="place")
    assert plain.tasks == {"place": 0}
    assert first_of_each_task([mixed, plain]) == {"pick": (mixed, 0), "place": (mixed, 1)}


def test_instructions_reach_other_processes_as_they_are():
    """Facts travel as JSON."""
    mixed = replace(episode(), task="pick", step_tasks=("pick", "place", "place"))
    for one in (mixed, episode()):
        facts = json.loads(json.dumps({"task": one.task, "seed": one.seed, "step_tasks": one.step_tasks}))
        again = sharing._episode(sharing._columns_of(one), facts)
        assert (again.task, again.step_tasks) == (one.task, one.step_tasks)
