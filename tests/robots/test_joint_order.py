"""A robot and a policy whose joints stand in another order: each number reaches its own joint, or nothing moves."""

import numpy as np
import pytest
from point_robot import JOINTS, PointRobot

from poco_vla.data.episode import Episode
from poco_vla.errors import ConfigError
from poco_vla.robots.joint_order import JointOrder, joint_order
from poco_vla.robots.matching import action_limits, check_match

STATE = "observation.state"


def metadata(robot, **names):
    state = [name for name, kind in robot.observation_features.items() if kind is float]
    told = {"action": list(JOINTS), STATE: state} | {STATE if key == "state" else key: n for key, n in names.items()}
    return {
        "observation": {STATE: {"shape": [len(state)], "dtype": "float32"}},
        "action_dim": 3,
        "action_low": [0.0, -2.0, 5.0],
        "action_high": [1.0, 2.0, 6.0],
        "names": told,
    }


def test_a_robot_in_the_policys_order_is_taken_as_it_is(tmp_path):
    robot = PointRobot(tmp_path)
    assert joint_order(robot, metadata(robot)) == JointOrder()
    assert joint_order(robot, metadata(robot) | {"names": {}}) == JointOrder()


def test_actions_reach_their_joint_and_come_back_in_the_policys_order(tmp_path):
    robot = PointRobot(tmp_path)
    order = joint_order(robot, metadata(robot, action=[JOINTS[1], JOINTS[2], JOINTS[0]]))
    chunk = np.array([[1.0, 2.0, 0.0]])  # of joints 1, 2, 0
    assert order.to_robot(chunk).tolist() == [[0, 1, 2]]
    none = np.zeros(1, dtype=bool)
    episode = Episode({STATE: np.zeros((1, 6))}, order.to_robot(chunk), np.zeros(1), none, none)
    assert order.episode(episode).action.tolist() == chunk.tolist()


def test_states_come_into_the_policys_order(tmp_path):
    robot = PointRobot(tmp_path)
    state = [name for name, kind in robot.observation_features.items() if kind is float]
    order = joint_order(robot, metadata(robot, state=state[::-1]))
    assert order.observation({STATE: np.arange(6.0)})[STATE].tolist() == [5, 4, 3, 2, 1, 0]


def test_the_demonstrations_range_goes_with_its_joint(tmp_path):
    robot = PointRobot(tmp_path)
    names = list(robot.action_features)
    told = metadata(robot, action=names[::-1])
    low, high, _ = action_limits(told, names).vectors(names)
    np.testing.assert_allclose(low, [4.95, -2.2, -0.05], rtol=1e-4)
    np.testing.assert_allclose(high, [6.05, 2.2, 1.05], rtol=1e-4)


def test_other_joints_are_refused_with_both_lists_and_the_way_out(tmp_path):
    robot = PointRobot(tmp_path)
    told = metadata(robot, action=["hip", "knee", "ankle"])
    words = rf"{JOINTS[0]}.* and \[hip, knee, ankle\] in the policy.*--joints positional"
    with pytest.raises(ConfigError, match=words):
        check_match(robot, told)
    assert check_match(robot, told, joints="positional") == []
