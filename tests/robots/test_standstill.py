"""Test that a chunk planned before a standstill is not sent after it."""

import time

import numpy as np
import pytest
from point_robot import PointRobot
from test_robot_interaction import H, Ramp, interaction

from poco_vla.robots import control as module
from poco_vla.robots import standstill
from poco_vla.robots.episode import NOBODY


class Clock:
    """Time as it passes, and what a suspension adds to it."""

    def __init__(self):
        self.slept = 0.0

    def __call__(self):
        return time.monotonic() + self.slept


@pytest.fixture
def robot(tmp_path):
    return PointRobot(tmp_path)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(standstill, "time_since_boot", clock)
    monkeypatch.setattr(module, "time_since_boot", clock)
    return clock


def suspended_at(robot, clock, step, seconds=60.0):
    send = robot.send_action

    def action(wanted):
        if len(robot.sent) == step:
            clock.slept += seconds
        return send(wanted)

    robot.send_action = action


@pytest.mark.parametrize("lead", [0, 2])
def test_after_a_minutes_suspension_the_policy_is_asked_anew_and_nothing_old_is_sent(robot, clock, lead, caplog):
    """Suspended while the second action of the first chunk is sent: 1.02 and 1.03 would follow."""
    policy = Ramp()
    suspended_at(robot, clock, step=1)
    drive = interaction(robot, policy, max_steps=8, fps=200, lead=lead)
    found = drive.run_episode()
    drive.close()
    chosen = found.episode.action[found.weights_version != NOBODY][:, 0]
    np.testing.assert_allclose(chosen[:2], [1.0, 1.01])
    assert not np.isclose(chosen, 1.02).any()
    assert not np.isclose(chosen, 1.03).any()
    assert len(policy.asked) >= 3
    assert "stood still for 60" in caplog.text


def test_an_answer_that_comes_after_a_suspension_is_not_used(robot, clock):
    """The robot waits for its second chunk when the machine sleeps: that answer is to a question of before."""
    policy = Ramp()

    def slow(obs, task):
        answer = policy(obs, task)
        if len(policy.asked) == 2:
            clock.slept += 60.0
            time.sleep(0.1)
        return answer

    drive = interaction(robot, slow, max_steps=10, fps=200)
    actions = drive.run_episode().episode.action[:, 0]
    drive.close()
    assert not ((actions >= 2) & (actions < 3)).any()
    assert (actions >= 3).any()


def test_a_chunk_that_lasts_far_too_long_is_not_sent_to_its_end(robot, clock):
    """No step stands still for a second, but each takes 0.9: four of them are beyond 2 * 4 / 200 + 1 s."""
    policy = Ramp()
    send = robot.send_action

    def slow(wanted):
        clock.slept += 0.9
        return send(wanted)

    robot.send_action = slow
    drive = interaction(robot, policy, max_steps=6, fps=200)
    drive.run_episode()
    drive.close()
    assert len(policy.asked) >= 3


def test_a_loop_without_a_rate_and_one_that_keeps_its_pace_are_left_alone(robot, clock):
    policy = Ramp()
    suspended_at(robot, clock, step=1, seconds=5.0)
    drive = interaction(robot, policy, max_steps=2 * H)
    drive.run_episode()
    drive.close()
    assert len(policy.asked) == 2


def test_the_clock_goes_on_while_the_machine_sleeps_and_nobody_sets_it():
    before = standstill.time_since_boot()
    time.sleep(0.02)
    assert 0.01 < standstill.time_since_boot() - before < 60
