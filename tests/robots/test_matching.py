"""Test that a learner's announcement is checked before a robot moves."""

import numpy as np
import pytest
from point_robot import PointRobot

from poco_vla.errors import ConfigError
from poco_vla.robots.matching import action_limits, check_match
from poco_vla.robots.safety import ActionLimits

NAMES = ["a", "b"]


def announced(**changes):
    state = {"observation.state": {"shape": [6], "dtype": "float32"}}
    return {"observation": state, "action_dim": 3, "horizon": 4, "fps": 15.0, "task": "go"} | changes


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_a_learner_of_an_older_version_announces_its_datasets_floats_and_fits(tmp_path, dtype):
    check_match(PointRobot(tmp_path), announced(observation={"observation.state": {"shape": [6], "dtype": dtype}}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fps": float("nan")}, "nan control steps"),
        ({"fps": 0}, "0 control steps"),
        ({"fps": "15"}, "'15' control steps"),
        ({"fps": 1e9}, "control steps per second"),
        ({"horizon": 0}, "horizon of 0"),
        ({"action_dim": 2.5}, "action_dim of 2.5"),
        ({"observation": [1]}, "no observations"),
        ({"observation": {"observation.state": 3}}, "no observations"),
        ({"task": 3}, "no text"),
    ],
)
def test_an_announcement_that_no_robot_can_be_run_by_is_refused(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        check_match(PointRobot(tmp_path), announced(**changes))


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ([-np.inf, 0], [1, 1]),
        ([0, 0], [1, np.inf]),
        ([np.nan, 0], [1, 1]),
        ([2, 0], [1, 1]),
        ([0, 0, 0], [1, 1, 1]),
        ([[0, 0]], [[1, 1]]),
        (["x", 0], [1, 1]),
        ("all", 3),
    ],
    ids=["-inf", "inf", "nan", "reversed", "more", "nested", "text", "no list"],
)
def test_limits_of_a_learner_that_limit_nothing_are_refused_and_given_ones_are_the_way_out(low, high):
    metadata = announced(action_low=low, action_high=high)
    with pytest.raises(ConfigError, match=r"no finite range .*nothing was moved.*--low and --high"):
        action_limits(metadata, NAMES)
    with pytest.raises(ConfigError, match="no finite range"):
        action_limits(metadata, NAMES, low=[0.0])
    given = action_limits(metadata, NAMES, low=[-1.0], high=[1.0])
    assert given.vectors(NAMES)[0].tolist() == [-1, -1]


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e39])
def test_limits_are_finite_whoever_gives_them(value):
    for limits in ({"low": -1.0, "high": value}, {"low": value, "high": 1.0}, {"low": {"a": value}, "high": 1.0}):
        with pytest.raises(ConfigError, match=r"a limit is a finite number|low must be below high"):
            ActionLimits(**limits)
