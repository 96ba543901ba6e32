"""What may be sent: finite, within bounds, no further than a step, and errors that name the joint."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from poco_vla.errors import ConfigError
from poco_vla.robots import ActionError, ActionLimits

NAMES = ["elbow.pos", "gripper.pos"]
LIMITS = {"low": {"elbow.pos": -1.0, "gripper.pos": 0.0}, "high": {"elbow.pos": 1.0, "gripper.pos": 50.0}}
REST = np.zeros(2, dtype=np.float32)


def chunk(*rows):
    return np.array(rows, dtype=np.float32)


def test_a_chunk_within_the_limits_is_given_back_as_it_is():
    limits = ActionLimits(**LIMITS, max_step={"elbow.pos": 0.5})
    good = chunk([0.5, 50], [1, 0], [0.5, 50])  # the gripper may jump, and bounds and steps may be met exactly
    np.testing.assert_array_equal(limits.apply(good, NAMES, REST), good)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (chunk([0, 0], [0, 50.1]), r'"gripper\.pos" is 50\.1 at step 1 of the chunk, above its limits \[0, 50\]'),
        (chunk([-1.5, 0]), r'"elbow\.pos" is -1\.5 at step 0 of the chunk, below its limits \[-1, 1\]'),
        (chunk([0.6, 0]), r'"elbow\.pos" moves by 0\.6 at step 0 of the chunk, at most 0\.5'),
        (chunk([0.4, 0], [-0.4, 0]), r'"elbow\.pos" moves by -0\.8 at step 1'),
        (chunk([0, 0], [np.nan, 0]), r'"elbow\.pos" is nan at step 1'),
        (chunk([0, np.inf]), r'"gripper\.pos" is inf at step 0'),
    ],
)
def test_a_chunk_beyond_them_is_refused_by_joint_and_step(bad, said):
    with pytest.raises(ActionError, match=said):
        ActionLimits(**LIMITS, max_step={"elbow.pos": 0.5}).apply(bad, NAMES, REST)


def test_clipped_each_action_starts_from_the_one_that_is_really_sent():
    """0 -> 3 in steps of 0.4 is 0.4, 0.8 and the bound 1; back to -3 from there."""
    limits = ActionLimits(**LIMITS, max_step={"elbow.pos": 0.4}, mode="clip")
    found = limits.apply(chunk([3, 60], [3, -5], [3, 7], [-3, 7]), NAMES, REST)
    np.testing.assert_allclose(found, [[0.4, 50], [0.8, 0], [1.0, 7], [0.6, 7]], rtol=1e-6)


def test_from_outside_the_bounds_the_robot_comes_back_step_by_step():
    limits = ActionLimits(**LIMITS, max_step=0.5, mode="clip")
    found = limits.apply(chunk([0, 0], [0, 0], [0, 0]), NAMES, chunk([2, 0])[0])
    np.testing.assert_allclose(found[:, 0], [1.5, 1.0, 0.5])


def test_what_is_not_finite_is_never_clipped():
    with pytest.raises(ActionError, match="nan"):
        ActionLimits(**LIMITS, mode="clip").apply(chunk([np.nan, 0]), NAMES, REST)


@given(arrays(np.float32, (5, 2), elements=st.floats(-1e3, 1e3, width=32)))
def test_what_is_clipped_is_within_the_limits_and_clipping_twice_changes_nothing(wild):
    limits = ActionLimits(**LIMITS, max_step={"elbow.pos": 0.25, "gripper.pos": 10.0})
    tame = limits.clip(wild, NAMES, REST)
    np.testing.assert_array_equal(limits.check(tame, NAMES, REST), tame)
    np.testing.assert_array_equal(limits.clip(tame, NAMES, REST), tame)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"low": 1.0, "high": 1.0}, "low is 1.0, high is 1.0"),
        ({"low": float("nan"), "high": 1.0}, "low is nan"),
        ({"low": {"elbow.pos": 2.0}, "high": 1.0}, r'"elbow\.pos": low is 2\.0'),
        ({"low": -1.0, "high": 1.0, "max_step": 0.0}, "max_step is 0"),
        ({"low": -1.0, "high": 1.0, "max_step": {"elbow.pos": -1.0}}, "max_step is -1"),
    ],
)
def test_limits_that_allow_nothing_are_refused(limits, said):
    with pytest.raises(ConfigError, match=said):
        ActionLimits(**limits)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"low": {"elbow.pos": -1.0}, "high": 1.0}, r"no low for \['gripper\.pos'\]"),
        ({"low": -1.0, "high": 1.0, "max_step": {"wrist.pos": 1.0}}, r"\['wrist\.pos'\], but the robot's actions are"),
    ],
)
def test_limits_for_other_joints_are_refused(limits, said):
    with pytest.raises(ConfigError, match=said):
        ActionLimits(**limits).vectors(NAMES)
