"""OGBench as a LeRobot environment: reproducible bit for bit, and LeRobot's own factory and semantics hold."""

import hashlib
import inspect
import re
import subprocess
import sys

import draccus
import gymnasium as gym
import mujoco
import numpy as np
import pytest
import tiny_gym  # noqa: F401 (registers the environments)
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env, make_env_config
from lerobot.envs.utils import check_env_attributes_and_types, env_to_policy_features, preprocess_observation
from tiny_env import point_spec

from poco_vla.config import EnvSpec
from poco_vla.errors import ConfigError, UnknownNameError
from poco_vla.rollout import EnvPool
from poco_vla.simulators import environment
from poco_vla.simulators.ogbench_gym import OGBenchEnv
from poco_vla.simulators.ogbench_tasks import make_simulator

TASK = "cube-single-singletask-task1-v0"


def digest(env, seed, steps=40):
    """Everything that an episode of random actions shows, as one hash."""
    rng = np.random.default_rng(seed)
    found = hashlib.sha256()
    observation, _ = env.reset(seed=seed)
    for _ in range(steps):
        found.update(observation["agent_pos"].tobytes())
        for picture in observation.get("pixels", {}).values():
            found.update(picture.tobytes())
        observation, reward, terminated, truncated, info = env.step(rng.uniform(-1, 1, 5).astype(np.float32))
        found.update(repr((reward, terminated, truncated, info["is_success"])).encode())
    found.update(observation["agent_pos"].tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def env():
    return OGBenchEnv(TASK)


def test_a_seed_repeats_bit_for_bit_after_another_episode_and_in_another_instance(env):
    first = digest(env, 3)
    other = digest(env, 4)
    assert first != other
    assert digest(env, 3) == first
    assert digest(OGBenchEnv(TASK), 3) == first


@pytest.fixture(scope="module")
def fresh():
    """A process that does what `lerobot-eval --env.discover_packages_path` does, and plays one episode."""
    program = (
        "import hashlib, numpy as np\n"
        "from lerobot.configs.parser import load_plugin\n"
        "from lerobot.envs.configs import EnvConfig\n"
        "load_plugin('poco_vla.simulators')\n"
        "print('ogbench' in EnvConfig.get_known_choices())\n"
        "from poco_vla.simulators.ogbench_gym import OGBenchEnv\n"
        f"{inspect.getsource(digest)}\n"
        f"print(digest(OGBenchEnv({TASK!r}), 3))"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()


def test_a_seed_repeats_bit_for_bit_in_a_fresh_process(fresh, env):
    assert fresh[-1] == digest(env, 3)


def test_spaces_hold_what_comes_and_goes(env):
    observation, info = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert observation["agent_pos"].shape == (28,)
    assert env.action_space.shape == (5,)
    assert info == {"is_success": False}


def test_actions_beyond_the_range_are_clipped(env):
    env.reset(seed=0)
    beyond = env.step(np.full(5, 3.0, np.float32))[0]["agent_pos"]
    env.reset(seed=0)
    np.testing.assert_array_equal(beyond, env.step(np.ones(5, np.float32))[0]["agent_pos"])


@pytest.mark.parametrize(("length", "limit"), [(7, 7), (None, 200)])
def test_the_time_limit_truncates_and_does_not_terminate(length, limit):
    """OGBench's own limit on cube-single is 200 steps."""
    env = OGBenchEnv(TASK, episode_length=length)
    env.reset(seed=0)
    ends = [env.step(np.zeros(5, np.float32))[2:4] for _ in range(limit)]
    assert ends == [(False, False)] * (limit - 1) + [(False, True)]


def test_unknown_tasks_are_answered_with_those_there_are():
    expected = r'no OGBench single task named "cube-singel.*List all: (python -m \S+)\. Did you mean "cube-single'
    with pytest.raises(UnknownNameError, match=expected) as caught:
        OGBenchEnv("cube-singel-singletask-task1-v0")
    assert len(str(caught.value)) < 500
    command = re.search(r"python -m (\S+)\. Did", str(caught.value))[1]
    listed = subprocess.run([sys.executable, "-m", command], capture_output=True, text=True, check=True).stdout.split()
    assert TASK in listed
    assert len(listed) > 20


def test_unknown_environment_types_are_answered_with_those_there_are():
    with pytest.raises(UnknownNameError, match=r'no environment type named "ogbensh".*ogbench.*Did you mean "ogbench"'):
        environment(EnvSpec(type="ogbensh"))


def test_options_that_a_type_does_not_have_are_named():
    with pytest.raises(ConfigError, match=r'environment "ogbench": .*epsiode_length'):
        environment(EnvSpec(options={"epsiode_length": 3}))


def test_a_third_partys_environment_is_found_by_its_type():
    """Whoever registers a LeRobot EnvConfig is found by name."""
    assert environment(point_spec(episode_length=9)).gym_kwargs["episode_length"] == 9


# -- cameras --------------------------------------------------------------------------------------------------------


CAMERAS = ("front", "wrist")


@pytest.fixture(scope="module")
def seeing():
    return OGBenchEnv(TASK, cameras=CAMERAS, image_size=64)


def is_red(picture):
    """The cube; its target, which is translucent, is darker."""
    red, green, blue = np.moveaxis(picture.astype(int), -1, 0)
    return (red > 90) & (red > 2 * green) & (red > 2 * blue)


def observed(env):
    """What the environment shows of the simulator's state as it is now."""
    mujoco.mj_forward(env.simulator.model, env.simulator.data)
    return env._observation(env.simulator.compute_observation())


def test_pictures_come_beside_what_the_robot_knows_of_itself(seeing):
    observation, _ = seeing.reset(seed=0)
    assert seeing.observation_space.contains(observation)
    assert set(observation["pixels"]) == set(CAMERAS)
    assert {p.shape for p in observation["pixels"].values()} == {(64, 64, 3)}
    assert observation["agent_pos"].shape == (19,)


def test_cameras_change_nothing_but_what_is_shown(env, seeing):
    """The state is the first 19 of the 28 numbers that are shown without cameras: the cube's 9 are left out."""
    (blind, _), (sighted, _) = env.reset(seed=2), seeing.reset(seed=2)
    rng = np.random.default_rng(0)
    for _ in range(3):
        np.testing.assert_array_equal(sighted["agent_pos"], blind["agent_pos"][:19])
        action = rng.uniform(-1, 1, 5).astype(np.float32)
        (blind, *_), (sighted, *_) = env.step(action), seeing.step(action)


def test_the_cube_is_in_the_pictures_and_not_in_the_state(seeing):
    seeing.reset(seed=0)
    before = observed(seeing)
    seeing.simulator.data.joint("object_joint_0").qpos[1] -= 0.05
    after = observed(seeing)
    np.testing.assert_array_equal(after["agent_pos"], before["agent_pos"])
    assert is_red(before["pixels"]["front"]).any()
    assert (is_red(after["pixels"]["front"]) != is_red(before["pixels"]["front"])).any()


def test_every_picture_changes_when_the_arm_moves(seeing):
    observation, _ = seeing.reset(seed=0)
    for _ in range(3):
        moved, *_ = seeing.step(np.array([0, -1, 0, 0, 0], np.float32))
    for name in CAMERAS:
        assert (moved["pixels"][name] != observation["pixels"][name]).any(axis=-1).mean() > 0.01


def test_the_wrist_camera_sees_what_is_between_the_fingertips_however_the_gripper_turns(seeing):
    for seed in range(3):
        seeing.reset(seed=seed)
        cube = seeing.simulator.data.joint("object_joint_0")
        cube.qpos[:3] = seeing.simulator.data.site("ur5e/robotiq/pinch").xpos
        rows, columns = np.nonzero(is_red(observed(seeing)["pixels"]["wrist"]))
        assert len(rows) > 100
        assert 26 < columns.mean() < 38
        assert 20 < rows.mean() < 50


def test_a_seed_repeats_its_pictures_too(seeing):
    first = digest(seeing, 3, steps=4)
    assert digest(seeing, 4, steps=4) != first
    assert digest(seeing, 3, steps=4) == first
    assert digest(OGBenchEnv(TASK, cameras=CAMERAS, image_size=64), 3, steps=4) == first


@pytest.mark.parametrize("task", ["scene-singletask-task2-v0", "puzzle-3x3-singletask-task4-v0"])
def test_other_scenes_are_seen_by_the_same_cameras(task):
    env = OGBenchEnv(task, cameras=CAMERAS, image_size=32)
    observation, _ = env.reset(seed=0)
    assert observation["agent_pos"].shape == (19,)
    for picture in observation["pixels"].values():
        assert picture.shape == (32, 32, 3)
        assert picture.std() > 5
    assert env.task_description


def test_an_ogbench_that_checks_success_at_a_fixed_time_is_told_which_one_to_install():
    class Old(gym.Env):
        def __init__(self):
            """OGBench's environments before 1.2.0 take no success_timing."""

    gym.register("cube-old-singletask-v0", entry_point=Old)
    try:
        with pytest.raises(ConfigError, match=r"has no success_timing: .* install ogbench==1.2.2"):
            make_simulator("cube-old-singletask-v0", "post")
    finally:
        del gym.registry["cube-old-singletask-v0"]


@pytest.mark.parametrize(("timing", "late"), [("post", 0), ("pre", 1)])
def test_success_is_told_at_the_step_that_brings_it_or_one_later(timing, late):
    """The expert's own actions, played under both timings: the cube is on its target when the state says so."""
    env = OGBenchEnv(TASK, success_timing=timing)
    env.reset(seed=0)
    expert, there = env.expert(0.0, np.random.default_rng(0)), []
    for _ in range(100):
        action = expert.action()
        if action is None:
            action = np.zeros(5, dtype=np.float32)
        _, reward, terminated, _, info = env.step(action)
        simulator = env.simulator
        cube = simulator._data.joint("object_joint_0").qpos[:3]
        there.append(np.linalg.norm(cube - simulator._data.mocap_pos[simulator._cube_target_mocap_ids[0]]) <= 0.04)
        if terminated:
            break
    assert info["is_success"]
    assert reward == 0
    assert len(there) - 1 - there.index(True) == late


def test_unknown_cameras_are_answered_with_those_there_are():
    with pytest.raises(UnknownNameError, match=r'no camera named "wirst". Known: front, wrist. Did you mean "wrist"'):
        environment(EnvSpec(options={"cameras": ["front", "wirst"]}))


@pytest.mark.parametrize("size", [16, 65])
def test_a_picture_that_no_video_can_hold_is_refused(size):
    with pytest.raises(ConfigError, match=f"image_size is {size}; .* even one of at least 32"):
        environment(EnvSpec(options={"cameras": ["front"], "image_size": size}))


def test_lerobots_keys_are_declared_and_shown_alike():
    config = environment(EnvSpec(options={"cameras": CAMERAS, "image_size": 32}))
    vector = make_env(config, n_envs=1)["ogbench"][0]
    observation = preprocess_observation(vector.reset(seed=[0])[0])
    vector.close()
    declared = {key: f.shape for key, f in env_to_policy_features(config).items() if key != "action"}
    assert declared == {
        "observation.state": (19,),
        "observation.images.front": (3, 32, 32),
        "observation.images.wrist": (3, 32, 32),
    }
    assert {key: tuple(column.shape[1:]) for key, column in observation.items()} == declared


def test_cameras_can_be_given_on_lerobots_command_line():
    kind = type(environment(EnvSpec()))
    config = draccus.parse(kind, args=["--cameras", '["front","wrist"]', "--image_size", "64"])
    assert config.gym_kwargs["cameras"] == CAMERAS
    assert config.gym_kwargs["image_size"] == 64


@pytest.mark.slow
def test_workers_draw_what_this_process_draws():
    seen = []
    for in_process in (True, False):
        spec = EnvSpec(options={"cameras": CAMERAS, "image_size": 32}, num_envs=2, in_process=in_process)
        with EnvPool(spec, 2) as pool:
            pool.reset(5)
            pool.step(np.full((2, 2, 5), 0.5))
            seen.append(pool.obs)
    assert set(seen[0]) == {"observation.state", "observation.images.front", "observation.images.wrist"}
    for key, column in seen[0].items():
        np.testing.assert_array_equal(column, seen[1][key])


# -- LeRobot's own door ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config():
    environment(EnvSpec())  # registers the choice, as `--env.discover_packages_path` does
    return make_env_config("ogbench", task=TASK, episode_length=120)


def test_lerobots_registry_knows_ogbench(config):
    assert EnvConfig.get_choice_class("ogbench") is type(config)
    assert config.type == "ogbench"
    assert config.features["action"].shape == (5,)
    assert config.features["agent_pos"].shape == (28,)


def test_lerobots_discovery_path_registers_the_type(fresh):
    assert fresh[-2] == "True"


@pytest.fixture(scope="module")
def vector(config):
    made = make_env(config, n_envs=2)
    assert list(made) == ["ogbench"]
    vector = made["ogbench"][0]
    yield vector
    vector.close()


def test_lerobots_factory_makes_environments_that_its_own_check_accepts(vector, recwarn):
    """Its check warns of what is missing; then its evaluation asks for the time limit and the instruction."""
    assert isinstance(vector, gym.vector.VectorEnv)
    check_env_attributes_and_types(vector)
    assert not [w for w in recwarn if "task_description" in str(w.message)]
    observation, _ = vector.reset(seed=[0, 1])
    assert preprocess_observation(observation)["observation.state"].shape == (2, 28)
    assert list(vector.call("_max_episode_steps")) == [120, 120]
    assert len(set(vector.call("task_description"))) == 1
    assert vector.call("task_description")[0]


def expert_actions(seed, rng_seed=0):
    env = OGBenchEnv(TASK, episode_length=120)
    env.reset(seed=seed)
    expert = env.expert(0.0, np.random.default_rng(rng_seed))
    actions, done = [], False
    while not done:
        actions.append(expert.action())
        _, _, terminated, truncated, info = env.step(actions[-1])
        done = terminated or truncated
    assert info["is_success"]
    return actions


def test_lerobots_evaluation_reads_success_where_an_episode_ends(vector):
    """SAME_STEP autoreset: the step that ends an episode carries final_info with one is_success per environment, which
    is all that lerobot-eval looks at. The expert solves environment 0, environment 1 stands still."""
    vector.reset(seed=[7, 8])
    actions = expert_actions(7)
    for k, action in enumerate(actions):
        _, _, terminated, truncated, info = vector.step(np.stack([action, np.zeros(5, np.float32)]))
        last = k == len(actions) - 1
        assert terminated.tolist() == [last, False]
        assert not truncated.any()
        assert ("final_info" in info) == last
    assert info["final_info"]["is_success"].tolist() == [True, False]


def test_lerobots_evaluation_reads_failure_at_the_time_limit(config):
    vector = make_env(make_env_config("ogbench", task=TASK, episode_length=3), n_envs=2)["ogbench"][0]
    vector.reset(seed=[0, 1])
    for _ in range(3):
        _, _, terminated, truncated, info = vector.step(np.zeros((2, 5), np.float32))
    assert (terminated.tolist(), truncated.tolist()) == ([False] * 2, [True] * 2)
    assert info["final_info"]["is_success"].tolist() == [False, False]
    vector.close()
