"""Driving a robot: chunks open loop at a fixed rate, and what happens when something does not go to plan."""

import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
from lerobot.utils.errors import DeviceNotConnectedError
from lerobot_policy_flow_mlp.adapter import FlowMlp
from point_robot import JOINTS, Hand, PointRobot
from scripted_signals import ScriptedSignals

from poco_vla.errors import ConfigError, DataError, NonFiniteError
from poco_vla.robots import ActionError, ActionLimits, AnySignals, RobotInteraction, Signal, Signals, StoppedError
from poco_vla.robots.episode import NOBODY, Ending
from poco_vla.robots.pace import Pace
from poco_vla.rollout import Actor

H = 4
WIDE = ActionLimits(-100.0, 100.0)


class Ramp:
    """A policy whose n-th answer is joints at n.00, n.01, n.02, ...; notes what it was asked."""

    def __init__(self, steps=H):
        self.steps, self.asked = steps, []

    def __call__(self, obs, task):
        self.asked.append(obs)
        return len(self.asked) + np.arange(self.steps)[:, None] / 100 + np.zeros((1, 3))


class After(Signals):
    """A signal once so much time has passed."""

    def __init__(self, seconds, signal):
        self.seconds, self.signal = seconds, signal

    def begin(self):
        self.at = time.monotonic() + self.seconds

    def poll(self):
        return self.signal if time.monotonic() > self.at else None


@dataclass(frozen=True)
class Reply:
    actions: np.ndarray
    weights_version: int


@pytest.fixture
def robot(tmp_path):
    return PointRobot(tmp_path)


def interaction(robot, policy, signals=None, **changes):
    options = {"horizon": H, "task": "point there", "limits": WIDE, "max_steps": 10, "reset": robot.reset, "fps": None}
    return RobotInteraction(robot, policy, signals=ScriptedSignals(signals or {}), **(options | changes))


def test_chunks_are_sent_open_loop_and_recorded_with_what_the_robot_saw_before(robot):
    policy = Ramp()
    found = interaction(robot, policy, max_steps=6).run_episode()
    expected = np.repeat([[1.0], [1.01], [1.02], [1.03], [2.0], [2.01]], 3, axis=1)
    np.testing.assert_allclose(robot.sent, expected, rtol=1e-6)
    np.testing.assert_allclose(found.episode.action, expected, rtol=1e-6)
    np.testing.assert_allclose(found.episode.obs["observation.state"][1:, :3], expected[:-1], rtol=1e-6)
    assert [set(obs) for obs in policy.asked] == [{"observation.state"}] * 2
    assert policy.asked[1]["observation.state"].shape == (1, 6)
    np.testing.assert_allclose(policy.asked[1]["observation.state"][0, :3], 1.03, rtol=1e-6)
    assert found.episode.task == "point there"
    assert found.stats.ending is Ending.TIME_LIMIT
    assert found.weights_version.tolist() == [0] * 6


def test_pictures_are_recorded_under_lerobots_names_and_not_overwritten(tmp_path):
    robot = PointRobot(tmp_path, pictures=True)
    episode = interaction(robot, Ramp(), max_steps=3).run_episode().episode
    assert episode.obs["observation.images.front"].shape == (3, 4, 6, 3)
    assert episode.obs["observation.images.front"].dtype == np.uint8
    assert episode.obs["observation.images.front"][:, 0, 0, 0].tolist() == [0, 1, 2]


def test_a_real_policy_drives(robot):
    actor = Actor(FlowMlp.tiny(), seed=0)
    drive = interaction(robot, lambda obs, task: actor.chunks(obs, [task])[0], horizon=actor.policy.spec.horizon)
    episode = drive.run_episode().episode
    assert len(episode) == 10
    assert len(np.unique(episode.action, axis=0)) == 10
    episode.check("robot")


@pytest.mark.parametrize(
    ("signal", "failure_is_terminal", "success", "terminal"),
    [
        (Signal.SUCCESS, True, True, True),
        (Signal.FAILURE, True, False, True),
        (Signal.FAILURE, False, False, False),
        (None, True, False, False),
    ],
)
def test_how_it_ended_is_written_at_the_last_step(robot, signal, failure_is_terminal, success, terminal):
    drive = interaction(
        robot, Ramp(), {5: signal} if signal else {}, max_steps=5, failure_is_terminal=failure_is_terminal
    )
    episode = drive.run_episode().episode
    rest = [False] * 4
    assert episode.success.tolist() == [*rest, success]
    assert episode.terminal.tolist() == [*rest, terminal]
    assert episode.reward.tolist() == [0, 0, 0, 0, float(success)]
    assert episode.reward.dtype == np.float32


def test_a_discarded_episode_is_none_and_the_next_one_begins_anew(robot):
    drive = interaction(robot, Ramp(), {3: Signal.DISCARD})
    assert drive.run_episode() is None
    assert drive.stats.ending is Ending.DISCARDED
    assert drive.stats.steps == 3
    drive.signals = ScriptedSignals({})
    found = drive.run_episode()
    assert len(found.episode) == 10
    np.testing.assert_array_equal(found.episode.obs["observation.state"][0], np.zeros(6))


def test_an_episode_without_a_step_is_none(robot):
    assert interaction(robot, Ramp(), {0: Signal.SUCCESS}).run_episode() is None
    assert robot.sent == []


# The rate


def test_fifteen_hertz_are_kept_for_a_second(robot):
    drive = interaction(robot, Ramp(), fps=15, max_steps=100)
    drive.signals = After(1.0, Signal.FAILURE)
    for _ in range(10):  # a machine that is busy with other things loses steps
        found = drive.run_episode()
        assert len(found.episode) <= 16
        if len(found.episode) >= 13:
            break
    assert len(found.episode) >= 13
    stats = found.stats
    assert 0 <= stats.period_error_p50 <= stats.period_error_p95 <= stats.period_error_max < 1


def test_a_robot_that_is_too_slow_is_seen_as_overruns(robot):
    def slow(observation):
        time.sleep(0.06 if len(robot.sent) == 3 else 0)
        return observation

    robot.broken = slow
    stats = interaction(robot, Ramp(), fps=50, max_steps=10).run_episode().stats
    assert stats.overruns >= 1
    assert stats.period_error_max > 0.03


def test_what_is_lost_is_not_made_up_for_by_a_burst_of_actions():
    pace = Pace(20)
    pace.wait(lambda: None)
    time.sleep(0.25)
    pace.wait(lambda: None)
    began = time.monotonic()
    pace.wait(lambda: None)
    assert time.monotonic() - began > 0.02  # a burst would not wait at all
    assert pace.overruns >= 1


def test_a_pause_on_purpose_is_no_jitter():
    pace = Pace(100)
    pace.wait(lambda: None)
    time.sleep(0.05)
    pace.pause()
    pace.wait(lambda: None)
    assert pace.errors == []
    pace.wait(lambda: None)
    assert len(pace.errors) == 1


# Asking early


def test_asked_early_the_answer_goes_on_where_the_old_chunk_ended(robot):
    """Asked 2 steps before the end: the answer's first 2 actions are for the time that the old chunk filled."""
    policy = Ramp(steps=H + 2)
    drive = interaction(robot, policy, lead=2, fps=20, max_steps=12)
    found = drive.run_episode()
    assert found.stats.missed == 0
    expected = [1.0, 1.01, 1.02, 1.03, 2.02, 2.03, 2.04, 2.05, 3.02, 3.03, 3.04, 3.05]
    np.testing.assert_allclose(found.episode.action[:, 0], expected, rtol=1e-6)
    # What the policy saw: the state 2 steps before the chunk's end.
    np.testing.assert_allclose([obs["observation.state"][0, 0] for obs in policy.asked[1:3]], [1.01, 2.03], rtol=1e-6)


def test_a_late_answer_finds_the_robot_holding(robot):
    """The second answer comes only once the robot has held three times."""
    held = threading.Event()
    ramp = Ramp(steps=H)

    def policy(obs, task):
        answer = ramp(obs, task)
        if len(ramp.asked) == 2:
            assert held.wait(10)
        return answer

    def watch(observation):
        if robot.sent.count(robot.sent[-1] if robot.sent else None) > 3:
            held.set()
        return observation

    robot.broken = watch
    found = interaction(robot, policy, lead=1, fps=50, max_steps=12).run_episode()
    missed = found.stats.missed
    assert missed >= 3
    np.testing.assert_allclose(found.episode.action[: 4 + missed, 0], [1.0, 1.01, 1.02, *[1.03] * (missed + 1)])
    np.testing.assert_allclose(found.episode.action[4 + missed, 0], 2.01)  # one step had passed when it was asked
    assert found.weights_version.tolist()[3 : 5 + missed] == [0, *[NOBODY] * missed, 0]


def test_the_version_of_the_weights_goes_with_each_step(robot):
    ramp = Ramp()

    def policy(obs, task):
        return Reply(ramp(obs, task), 7 + len(ramp.asked))

    assert interaction(robot, policy, max_steps=6).run_episode().weights_version.tolist() == [8] * 4 + [9] * 2


# The emergency stop


def test_after_an_emergency_stop_only_the_present_position_is_sent_once(robot):
    drive = interaction(robot, Ramp(), {3: Signal.STOP})
    robot.broken = lambda observation: observation | ({"elbow.pos": 0.7} if len(robot.sent) == 3 else {})
    assert drive.run_episode() is None
    assert len(robot.sent) == 4
    np.testing.assert_allclose(robot.sent[3], [1.02, 0.7, 1.02], rtol=1e-6)  # where it is, not where it was going
    assert drive.stats.ending is Ending.STOPPED
    assert robot.is_connected


def test_on_stop_replaces_it_and_nothing_more_is_sent(robot):
    seen = []
    drive = interaction(robot, Ramp(), {3: Signal.STOP}, on_stop=seen.append)
    assert drive.run_episode() is None
    assert len(robot.sent) == 3
    assert [list(observation)[:3] for observation in seen] == [list(JOINTS)]


def test_a_stopped_robot_stays_stopped_until_it_is_released(robot):
    drive = interaction(robot, Ramp(), {0: Signal.STOP}, on_stop=lambda _: None)
    drive.run_episode()
    drive.signals = ScriptedSignals({})
    resets = []
    drive.reset = lambda: resets.append(1)
    with pytest.raises(StoppedError, match="release"):
        drive.run_episode()
    assert resets == []
    assert robot.sent == []
    drive.release()
    assert drive.run_episode() is not None


def test_a_stop_beats_a_success_of_the_same_moment_and_is_heard_between_episodes(robot):
    drive = interaction(robot, Ramp(), max_steps=3)
    drive.signals = AnySignals([ScriptedSignals({2: Signal.SUCCESS}), ScriptedSignals({2: Signal.STOP})])
    assert drive.run_episode() is None
    assert drive.stats.ending is Ending.STOPPED

    class Pressed(Signals):
        def poll(self):
            pressed, self.pressed = self.pressed, None
            return pressed

    drive.release()
    drive.signals = Pressed()
    drive.signals.pressed = Signal.STOP
    with pytest.raises(StoppedError):
        drive.run_episode()


def test_a_stop_is_heard_while_the_policy_thinks(robot):
    thinks = threading.Event()
    drive = interaction(robot, lambda obs, task: thinks.wait(10) and np.zeros((H, 3)), on_stop=lambda _: None)
    drive.signals = After(0.1, Signal.STOP)
    began = time.monotonic()
    assert drive.run_episode() is None
    assert time.monotonic() - began < 5
    thinks.set()
    assert robot.sent == []


def test_a_release_forgets_a_stop_key_that_was_pressed_twice(robot):
    class Twice(Signals):
        waiting = 2

        def poll(self):
            self.waiting -= 1
            return Signal.STOP if self.waiting >= 0 else None

    drive = interaction(robot, Ramp())
    drive.signals = Twice()
    with pytest.raises(StoppedError):
        drive.run_episode()
    drive.signals.waiting = 1
    drive.release()
    assert drive.run_episode() is not None


def test_a_stop_during_the_reset_lets_no_episode_begin(robot):
    drive = interaction(robot, Ramp(), {0: Signal.STOP}, on_stop=lambda _: None)
    assert drive.run_episode() is None
    assert robot.sent == []


def test_a_sensor_that_fails_moves_nothing_when_the_robot_is_stopped(robot, caplog):
    robot.broken = lambda observation: observation | ({"elbow.pos": float("nan")} if robot.sent else {})
    with pytest.raises(NonFiniteError):
        interaction(robot, Ramp()).run_episode()
    assert len(robot.sent) == 1
    assert "cut its power" in caplog.text


def test_an_error_and_ctrl_c_stop_the_robot_too(robot):
    class Pressed(ScriptedSignals):
        def poll(self):
            if self._step == 2:
                raise KeyboardInterrupt

    drive = interaction(robot, Ramp())
    drive.signals = Pressed({})
    with pytest.raises(KeyboardInterrupt):
        drive.run_episode()
    assert len(robot.sent) == 3  # two steps, then the present position
    assert drive.stopped


# Takeover


def test_a_takeover_is_driven_by_the_person_recorded_and_clipped(robot, tmp_path):
    limits = ActionLimits(-10.0, 10.0, max_step={"elbow.pos": 0.5})
    drive = interaction(
        *(robot, lambda obs, task: obs["observation.state"][:, :3] + np.full((H, 3), 0.01), {}),
        **{"teleoperator": Hand(tmp_path, target=2.0), "limits": limits, "max_steps": 9},
    )
    drive.signals = ScriptedSignals({3: Signal.TAKEOVER, 6: Signal.RELEASE})
    found = drive.run_episode()
    assert found.interventions.tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert found.weights_version.tolist() == [0] * 3 + [NOBODY] * 3 + [0] * 3
    np.testing.assert_allclose(found.episode.action[3:6], [[2, 0.51, 2], [2, 1.01, 2], [2, 1.51, 2]], rtol=1e-5)
    np.testing.assert_allclose(found.episode.action[6], [2.01, 1.52, 2.01], rtol=1e-5)  # asked anew, from where it is
    assert found.stats.interventions == 3
    assert found.stats.clipped == 3


def test_a_takeover_without_a_teleoperator_is_said_and_changes_nothing(robot, caplog):
    found = interaction(robot, Ramp(), {2: Signal.TAKEOVER}).run_episode()
    assert not found.interventions.any()
    assert "no teleoperator" in caplog.text


def test_a_teleoperator_for_another_robot_is_refused(robot, tmp_path):
    with pytest.raises(ConfigError, match=r"gripper\.pos"):
        interaction(robot, Ramp(), teleoperator=Hand(tmp_path, names=JOINTS[:2]))


# A policy that cannot be reached


def failing(ramp, failures, error):
    left = list(range(failures))

    def policy(obs, task):
        if len(ramp.asked) == 1 and left:
            left.pop()
            raise error
        return ramp(obs, task)

    return policy


def test_a_lost_connection_holds_the_robot_and_is_tried_again(robot):
    policy = failing(Ramp(), 3, ConnectionResetError("gone"))
    found = interaction(robot, policy, max_steps=8, retry_every=0.01).run_episode()
    assert found.stats.retries == 3
    np.testing.assert_allclose(found.episode.action[:, 0], [1, 1.01, 1.02, 1.03, 2, 2.01, 2.02, 2.03], rtol=1e-6)


def test_a_policy_that_stays_away_ends_the_episode(robot, caplog):
    policy = failing(Ramp(), 10_000, ConnectionRefusedError("nobody there"))
    drive = interaction(robot, policy, patience=0.1, retry_every=0.02)
    assert drive.run_episode() is None
    assert drive.stats.ending is Ending.POLICY_LOST
    assert "nobody there" in caplog.text
    assert "discarded after 4 steps" in drive.stats.message
    assert not drive.stopped
    assert len(robot.sent) == 4


@pytest.mark.parametrize("lead", [0, 1])
def test_a_policy_that_never_answers_ends_the_episode(robot, lead):
    thinks, ramp = threading.Event(), Ramp()

    def policy(obs, task):
        answer = ramp(obs, task)
        assert len(ramp.asked) == 1 or thinks.wait(10)
        return answer

    drive = interaction(robot, policy, patience=0.2, fps=50, lead=lead, max_steps=1000)
    assert drive.run_episode() is None
    thinks.set()
    assert drive.stats.ending is Ending.POLICY_LOST
    assert {tuple(action) for action in robot.sent[4:]} <= {tuple(robot.sent[3])}


def test_other_errors_of_the_policy_end_the_run_with_the_robot_held(robot):
    drive = interaction(robot, failing(Ramp(), 1, ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        drive.run_episode()
    assert len(robot.sent) == 5
    assert robot.sent[4] == robot.sent[3]


# Refusals


@pytest.mark.parametrize(
    ("chunk", "said"),
    [
        (np.zeros((H - 1, 3)), "at least 4 steps"),
        (np.zeros((H, 2)), r"3 actions \(shoulder\.pos"),
        (np.zeros((1, H, 3)), "expected"),
        (np.full((H, 3), np.nan), r"shoulder\.pos.* is nan at step 0"),
        (np.array([[0, 0, 0], [0, 0, 0], [0, 200, 0], [0, 0, 0]]), r"elbow\.pos.* is 200 at step 2"),
    ],
)
def test_a_chunk_that_must_not_be_sent_is_refused_before_its_first_action(robot, chunk, said):
    drive = interaction(robot, lambda obs, task: chunk, on_stop=lambda _: None)
    with pytest.raises(ActionError, match=said):
        drive.run_episode()
    assert robot.sent == []


@pytest.mark.parametrize(
    ("broken", "error", "said"),
    [
        (lambda o: {k: v for k, v in o.items() if k != "front"}, DataError, "front"),
        (lambda o: o | {"front": np.zeros((4, 5, 3), np.uint8)}, DataError, "promises uint8"),
        (lambda o: o | {"front": np.zeros((4, 6, 3), np.float32)}, DataError, "float32"),
        (lambda o: o | {"elbow.pos": float("nan")}, NonFiniteError, r"observation\.state"),
    ],
)
def test_an_observation_that_is_not_what_the_robot_promised_stops_it(tmp_path, broken, error, said):
    robot = PointRobot(tmp_path, pictures=True)
    robot.broken = broken
    drive = interaction(robot, Ramp(), on_stop=lambda _: None)
    with pytest.raises(error, match=said):
        drive.run_episode()
    assert robot.sent == []
    assert drive.stopped


def test_the_robots_own_connection_errors_are_not_taken_for_the_policys(robot):
    """LeRobot's DeviceNotConnectedError is a ConnectionError."""
    robot.disconnect()
    with pytest.raises(DeviceNotConnectedError):
        interaction(robot, Ramp()).run_episode()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lead": H}, "0 to 3"),
        ({"lead": -1}, "0 to 3"),
        ({"horizon": 0}, "horizon is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"fps": 0}, "fps is 0"),
        ({"limits": ActionLimits({"wrist.pos": 0.0}, 1.0)}, "wrist"),
    ],
)
def test_numbers_that_cannot_work_are_refused_at_once(robot, changes, said):
    with pytest.raises(ConfigError, match=said):
        interaction(robot, Ramp(), **changes)


def test_a_robot_that_nobody_knows_how_to_hold_needs_a_hold(robot):
    robot.action_features = {"torque": float}
    with pytest.raises(ConfigError, match="torque"):
        interaction(robot, Ramp())
    interaction(robot, Ramp(), hold=lambda observation, last: {"torque": 0.0})


def test_features_that_are_no_numbers_or_no_pictures_are_refused(robot):
    robot.observation_features["depth"] = (4, 6, 1)
    with pytest.raises(ConfigError, match="depth"):
        interaction(robot, Ramp())
    robot.action_features = {"goal": (3,)}
    with pytest.raises(ConfigError, match="goal"):
        interaction(robot, Ramp())
