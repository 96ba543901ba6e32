"""The simulated arm through LeRobot's own Robot interface, and driven: nothing here is made up but the arm."""

import time
from dataclasses import dataclass

import draccus
import numpy as np
import pytest
from lerobot.configs.parser import load_plugin
from lerobot.robots import RobotConfig
from lerobot.robots.utils import make_robot_from_config
from lerobot.utils.errors import DeviceAlreadyConnectedError, DeviceNotConnectedError
from scripted_signals import ScriptedSignals

from poco_vla.config import DatasetConfig
from poco_vla.data import open_dataset, read_episodes
from poco_vla.errors import ConfigError, UnknownNameError
from poco_vla.recording.recorder import write_dataset
from poco_vla.robots import (
    ActionError,
    ActionLimits,
    RobotInteraction,
    RobotSuccess,
    Signal,
    SimulatedArm,
    SimulatedArmConfig,
)
from poco_vla.robots.simulated import ACTION
from poco_vla.simulators.ogbench_gym import OGBenchEnv

TASK = "cube-single-singletask-task1-v0"
LIMITS = ActionLimits(-1.0, 1.0)


@dataclass
class Program:
    """Of one option, as LeRobot's programs have it."""

    robot: RobotConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("calibration")


@pytest.fixture(scope="module")
def arm(folder):
    """State only, connected, not in real time."""
    robot = SimulatedArm(SimulatedArmConfig(views=(), realtime=False, calibration_dir=folder, seed=3))
    robot.connect()
    yield robot
    robot.disconnect()


def named(vector):
    return dict(zip(ACTION, np.asarray(vector).tolist(), strict=True))


def test_lerobot_makes_it_from_the_command_line(folder):
    load_plugin("poco_vla.robots")
    options = ["--robot.type=simulated_arm", "--robot.views=[wrist]", "--robot.image_size=64", "--robot.seed=5"]
    config = draccus.parse(Program, None, [*options, f"--robot.calibration_dir={folder}"]).robot
    robot = make_robot_from_config(config)
    assert isinstance(robot, SimulatedArm)
    assert robot.config.views == ("wrist",)
    assert robot.observation_features["wrist"] == (64, 64, 3)
    assert "front" not in robot.observation_features
    assert robot.config.seed == 5
    assert not robot.is_connected


def test_it_refuses_to_act_unconnected_and_to_connect_twice(arm, folder):
    robot = SimulatedArm(SimulatedArmConfig(calibration_dir=folder))
    for call in (robot.get_observation, robot.disconnect, robot.reset, lambda: robot.send_action(named(np.zeros(5)))):
        with pytest.raises(DeviceNotConnectedError):
            call()
    with pytest.raises(DeviceAlreadyConnectedError):
        arm.connect()


def test_what_it_observes_and_sends_is_what_its_features_say(arm):
    observation = arm.get_observation()
    assert list(observation) == list(arm.observation_features)
    assert len(observation) == 28
    assert {type(value) for value in observation.values()} == {float}
    assert observation["joint_1.pos"] != 0
    sent = arm.send_action(named([2.0, -3.0, 0.5, 0.0, 0.0]))
    assert list(sent) == list(arm.action_features)
    assert list(sent.values()) == [1.0, -1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("views", [(), ("front", "wrist")])
def test_lerobots_rollout_leaves_none_of_its_numbers_out(views, folder):
    """`lerobot-rollout` 0.6.1 gives a policy the observations and actions that end in .pos or .vel, and drops the rest
    without a word."""
    robot = SimulatedArm(SimulatedArmConfig(views=views, calibration_dir=folder))
    seen = [name for name, kind in robot.observation_features.items() if kind is float]
    assert len(seen) == len(set(seen)) == (19 if views else 28)
    assert all(name.endswith((".pos", ".vel")) for name in [*seen, *robot.action_features])


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ({"x.vel": 0.0}, r"takes \['x\.vel', 'y\.vel'"),
        (named(np.zeros(5)) | {"joint_1.pos": 0.0}, r"joint_1\.pos"),
        (named([0, 0, np.nan, 0, 0]), "not finite"),
    ],
)
def test_an_action_for_another_robot_or_of_no_number_is_refused(arm, action, said):
    before = arm.get_observation()
    with pytest.raises(ActionError, match=said):
        arm.send_action(action)
    assert arm.get_observation() == before


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"views": ("top",)}, UnknownNameError, "front, wrist"),
        ({"image_size": 33}, ConfigError, "image_size is 33"),
    ],
)
def test_options_that_cannot_work_are_refused(options, error, said):
    with pytest.raises(error, match=said):
        SimulatedArmConfig(**options)


def test_a_policy_of_the_environment_sees_the_same_on_the_robot(folder):
    """State, pictures and moves, step by step, and success with them."""
    config = SimulatedArmConfig(image_size=32, realtime=False, calibration_dir=folder, seed=11)
    env = OGBenchEnv(TASK, cameras=("front", "wrist"), image_size=32)
    rng = np.random.default_rng(0)
    with SimulatedArm(config) as robot:
        for episode in range(2):
            robot.reset()
            seen, _ = env.reset(seed=11 + episode)
            for _ in range(3):
                found = robot.get_observation()
                state = [value for value in found.values() if isinstance(value, float)]
                np.testing.assert_array_equal(np.float32(state), seen["agent_pos"])
                for view in ("front", "wrist"):
                    np.testing.assert_array_equal(found[view], seen["pixels"][view])
                action = rng.uniform(-1, 1, 5).astype(np.float32)
                robot.send_action(named(action))
                seen = env.step(action)[0]


def test_without_a_seed_a_session_that_is_begun_again_meets_other_scenes(folder):
    """With one, the same; and the seed counts on from episode to episode."""

    def starts(seed):
        robot = SimulatedArm(SimulatedArmConfig(views=(), realtime=False, calibration_dir=folder, seed=seed))
        found = []
        for _ in range(2):
            with robot:
                robot.reset()
                first = robot.get_observation()
                robot.reset()
                found.append((first, robot.get_observation()))
        return found

    (a, b), (again, _) = starts(3)
    assert a == again
    assert a != b
    (a, b), (c, d) = starts(None)
    assert len({tuple(seen.values()) for seen in (a, b, c, d)}) == 4


def test_in_real_time_a_step_takes_a_twentieth_of_a_second(folder):
    with SimulatedArm(SimulatedArmConfig(views=(), calibration_dir=folder)) as robot:
        began = time.monotonic()
        for _ in range(6):
            robot.send_action(named(np.zeros(5)))
        assert time.monotonic() - began >= 5 / 20  # the last step need not be waited for


def drive(arm, policy, signals, **changes):
    options = {"horizon": 5, "task": "lift", "limits": LIMITS, "max_steps": 120, "reset": arm.reset, "fps": None}
    return RobotInteraction(arm, policy, signals=signals, **(options | changes))


def test_an_expert_drives_it_to_a_success_of_its_own_and_the_episode_is_a_lerobot_dataset(arm, tmp_path):
    """OGBench's plan oracle as the policy, one action a chunk: success ends the episode, and all is kept."""
    expert = None

    def policy(obs, task):
        nonlocal expert
        expert = expert or arm._env.expert(0.0, np.random.default_rng(0))
        return expert.action()[None].astype(np.float32)

    found = drive(arm, policy, RobotSuccess(arm), horizon=1, max_steps=200).run_episode()
    episode = found.episode
    assert episode.success.tolist() == [False] * (len(episode) - 1) + [True]
    assert episode.terminal[-1]
    assert 20 < len(episode) < 200
    root = write_dataset([episode], tmp_path / "robot", fps=15, repo_id="local/robot")
    config = DatasetConfig(repo_id="local/robot", root=root)
    (read,) = read_episodes(open_dataset(config), config, list(episode.obs))
    np.testing.assert_array_equal(read.obs["observation.state"], episode.obs["observation.state"])
    np.testing.assert_array_equal(read.action, episode.action)
    assert read.success.tolist() == episode.success.tolist()


def test_a_slow_policy_at_a_fixed_rate_leaves_it_holding_still_by_no_change(arm):
    """Its actions are changes: repeating the last one would move it on. It holds at 0, once, while it waits."""

    def policy(obs, task):
        time.sleep(0.5)
        return np.full((3, 5), 0.5, dtype=np.float32)

    found = drive(arm, policy, ScriptedSignals({}), horizon=3, fps=50, max_steps=8).run_episode()
    np.testing.assert_array_equal(found.episode.action[:, 0], [0.5, 0.5, 0.5, 0, 0.5, 0.5, 0.5, 0])
    assert found.stats.missed == 2


def test_an_emergency_stop_leaves_it_where_it_is(arm):
    drive(arm, lambda obs, task: np.full((5, 5), 0.3, np.float32), ScriptedSignals({7: Signal.STOP})).run_episode()
    before = arm.get_observation()
    for _ in range(5):
        arm.send_action(named(np.zeros(5)))
    after = arm.get_observation()
    moved = [abs(after[f"effector_{axis}.pos"] - before[f"effector_{axis}.pos"]) for axis in "xyz"]
    assert max(moved) < 0.1  # a centimetre: a control step at 0.3 alone would be 1.5
