"""RoboMimic's tasks on robosuite: current and reproducible states, LeRobot's semantics, and experts that recover."""

import hashlib
import inspect
import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env, make_env_config
from lerobot.envs.utils import check_env_attributes_and_types, env_to_policy_features, preprocess_observation

from poco_vla.demonstrations.scripted import demonstrate
from poco_vla.errors import ConfigError, UnknownNameError
from poco_vla.simulators.robosuite import RobosuiteConfig
from poco_vla.simulators.robosuite_gym import CAMERAS, TASKS, RobosuiteEnv

pytest.importorskip("robosuite")

STATE_DIM = {"Lift": 19, "Can": 23, "Square": 23}
STILL = np.zeros(7, np.float32)


@pytest.fixture(scope="module")
def envs():
    """Task -> one environment, made when first asked for."""

    class Envs(dict):
        def __missing__(self, task):
            self[task] = RobosuiteEnv(task)
            return self[task]

    made = Envs()
    yield made
    for env in made.values():
        env.close()


@pytest.fixture(scope="module")
def lift(envs):
    return envs["Lift"]


def act(**parts):
    """An action: `move`, `turn` and `grip` as given, zero where they are not."""
    zero = np.zeros(3)
    return np.array([*parts.get("move", zero), *parts.get("turn", zero), parts.get("grip", -1.0)], np.float32)


def digest(env, seed, steps=25):
    """Everything that an episode of random actions shows, as one hash."""
    rng = np.random.default_rng(seed)
    found = hashlib.sha256()
    observation, _ = env.reset(seed=seed)
    for _ in range(steps):
        found.update(observation["agent_pos"].tobytes())
        for picture in observation.get("pixels", {}).values():
            found.update(picture.tobytes())
        observation, reward, *flags, info = env.step(rng.uniform(-1, 1, 7).astype(np.float32))
        found.update(repr((reward, flags, info["is_success"])).encode())
    found.update(observation["agent_pos"].tobytes())
    return found.hexdigest()


def matrix(xyzw):
    """Rotation matrix [3, 3] of a quaternion xyzw."""
    x, y, z, w = xyzw
    skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + 2 * w * skew + 2 * skew @ skew


def opening(env):
    return float(env._state()[7] - env._state()[8])


# -- the state ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_spaces_hold_what_comes_and_goes(envs, task):
    observation, info = envs[task].reset(seed=0)
    assert envs[task].observation_space.contains(observation)
    assert observation["agent_pos"].shape == (STATE_DIM[task],)
    assert envs[task].action_space.contains(STILL)
    assert info == {"is_success": False}


def test_lifts_state_is_what_the_simulator_has_now(lift):
    """In RoboMimic's order, and on the way: robosuite's own sensors lag behind by a substep or more."""
    lift.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(8):
        state, *_ = lift.step(rng.uniform(-1, 1, 7).astype(np.float32))
        joints = lift.data.qpos[[7, 8]]
        hand, cube = lift.data.site("gripper0_right_grip_site").xpos, lift.data.joint("cube_joint0").qpos
        found = state["agent_pos"]
        np.testing.assert_allclose(found[:3], hand, atol=1e-6)
        np.testing.assert_allclose(found[7:9], joints, atol=1e-6)
        np.testing.assert_allclose(found[9:12], cube[:3], atol=1e-6)
        np.testing.assert_allclose(found[12:16], cube[[4, 5, 6, 3]], atol=1e-6)  # MuJoCo: wxyz, RoboMimic: xyzw
        np.testing.assert_allclose(found[16:], cube[:3] - hand, atol=1e-6)


@pytest.mark.parametrize(("task", "joint"), [("Can", "Can_joint0"), ("Square", "SquareNut_joint0")])
def test_relative_poses_are_those_of_the_same_moment(envs, task, joint):
    """The object in the hand's frame, from the two poses in the world: R_hand^T (x_object - x_hand)."""
    env = envs[task]
    env.reset(seed=1)
    for _ in range(6):
        env.data.joint(joint).qpos[0] += 0.01  # so that a sensor that reads the last pose is found out
        found = env.step(act(move=(1, 1, 0)))[0]["agent_pos"].astype(np.float64)
        hand, seen, in_hand = found[:3], found[16:19], found[9:12]
        np.testing.assert_allclose(seen, env.data.joint(joint).qpos[:3], atol=1e-6)
        np.testing.assert_allclose(in_hand, matrix(found[3:7]).T @ (seen - hand), atol=1e-5)


def test_the_state_of_a_reset_has_nothing_of_the_episode_before(envs):
    env = envs["Can"]
    before = env.reset(seed=5)[0]["agent_pos"]
    for _ in range(20):
        env.step(act(move=(1, 0, -1), grip=1))
    np.testing.assert_array_equal(env.reset(seed=5)[0]["agent_pos"], before)


# -- seeds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_repeats_bit_for_bit_after_another_episode_and_in_another_instance(envs, task):
    first = digest(envs[task], 3)
    assert digest(envs[task], 4) != first
    assert digest(envs[task], 3) == first
    assert digest(RobosuiteEnv(task), 3) == first


@pytest.fixture(scope="module")
def fresh():
    """A process that has imported nothing but the Gymnasium side, and plays one episode."""
    program = (
        "import hashlib, os, numpy as np\n"
        "from poco_vla.simulators.robosuite_gym import RobosuiteEnv\n"
        f"{inspect.getsource(digest)}\n"
        "print(digest(RobosuiteEnv('Lift'), 3), os.environ.get('MUJOCO_GL'))"
    )
    environ = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environ, check=False)


def test_a_seed_repeats_bit_for_bit_in_a_fresh_process(fresh, lift):
    assert fresh.stdout.split()[0] == digest(lift, 3), fresh.stderr


def test_nothing_is_printed_and_the_choice_of_opengl_stays_the_users(fresh):
    """robosuite warns of optional parts at import, and sets MUJOCO_GL for the whole process."""
    assert (fresh.returncode, fresh.stderr) == (0, "")
    assert fresh.stdout.split()[1:] == ["None"]


def test_resets_without_a_seed_go_on_from_the_seeded_one(lift):
    lift.reset(seed=9)
    second, third = (lift.reset()[0]["agent_pos"] for _ in range(2))
    assert (second != third).any()
    lift.reset(seed=9)
    np.testing.assert_array_equal(lift.reset()[0]["agent_pos"], second)


def test_the_callers_global_generator_is_left_as_it_was(lift):
    np.random.seed(7)
    expected = np.random.rand()
    np.random.seed(7)
    lift.reset(seed=0)
    assert np.random.rand() == expected


# -- actions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", range(3))
def test_actions_displace_the_hand_along_the_worlds_axes(lift, axis):
    """RoboMimic's delta actions: 1 asks for 5 cm from where the hand is; in 50 ms it gets about a fifth of the way, so
    that ten steps bring 5 to 15 cm, along this axis and no other."""
    start = lift.reset(seed=0)[0]["agent_pos"][:3]
    move = np.zeros(3)
    move[axis] = 1
    for _ in range(10):
        end = lift.step(act(move=move))[0]["agent_pos"][:3]
    moved = end - start
    assert 0.05 < moved[axis] < 0.15
    assert np.abs(np.delete(moved, axis)).max() < 0.02


def test_a_turn_about_the_vertical_turns_the_hand_anticlockwise(lift):
    """Half a radian asked for at every step, and about a fifth of it turned."""
    start = matrix(lift.reset(seed=0)[0]["agent_pos"][3:7])
    for _ in range(8):
        end = matrix(lift.step(act(turn=(0, 0, 1)))[0]["agent_pos"][3:7])
    between = end @ start.T
    assert 0.4 < np.arctan2(between[1, 0], between[0, 0]) < 1.5


def test_minus_one_opens_and_one_closes(lift):
    lift.reset(seed=0)
    for _ in range(15):
        lift.step(act(grip=-1))
    assert opening(lift) > 0.07
    for _ in range(15):
        lift.step(act(grip=1))
    assert opening(lift) < 0.01


def test_actions_beyond_the_range_are_clipped(lift):
    lift.reset(seed=0)
    beyond = lift.step(np.full(7, 3.0, np.float32))[0]["agent_pos"]
    lift.reset(seed=0)
    np.testing.assert_array_equal(beyond, lift.step(np.ones(7, np.float32))[0]["agent_pos"])


# -- how episodes end -----------------------------------------------------------------------------------------------


def lifted(env):
    """The step after the cube was put into the air."""
    env.reset(seed=0)
    env.data.joint("cube_joint0").qpos[2] += 0.2
    return env.step(STILL)


def test_success_is_the_reward_and_terminates(lift):
    assert lift.simulator.reward() == 0
    _, reward, terminated, truncated, info = lifted(lift)
    assert (reward, terminated, truncated, info) == (1.0, True, False, {"is_success": True})
    assert lift.simulator.reward() == 1


def test_episodes_may_go_on_after_success():
    env = RobosuiteEnv("Lift", terminate_at_success=False, episode_length=2)
    _, reward, terminated, truncated, info = lifted(env)
    assert (reward, terminated, truncated, info["is_success"]) == (1.0, False, False, True)
    assert env.step(STILL)[2:4] == (False, True)


def test_the_time_limit_truncates_and_does_not_terminate(lift):
    """RoboMimic's own limit is 400 steps."""
    env = RobosuiteEnv("Lift", episode_length=7)
    env.reset(seed=0)
    ends = [env.step(STILL)[2:4] for _ in range(7)]
    assert ends == [(False, False)] * 6 + [(False, True)]
    assert lift._max_episode_steps == 400


# -- experts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "episodes", "noise"), [("Lift", 5, 0.0), ("Lift", 5, 0.1), ("Can", 2, 0.1), ("Square", 2, 0.1)]
)
def test_the_expert_succeeds(envs, task, episodes, noise):
    rng = np.random.default_rng(0)
    made = [demonstrate(envs[task], noise, rng, seed=seed) for seed in range(episodes)]
    assert [episode.succeeded for episode in made] == [True] * episodes
    assert {episode.task for episode in made} == {TASKS[task].sentence}
    assert len({len(episode.reward) for episode in made}) > 1
    assert np.abs(np.concatenate([episode.action for episode in made])).max() <= 1


@pytest.mark.parametrize(("task", "seeds", "after"), [("Lift", 3, 15), ("Can", 1, 50), ("Square", 1, 45)])
def test_the_expert_recovers_from_random_actions_on_the_way(envs, task, seeds, after):
    """Ten of them while it reaches for the object or carries it, which makes it drop it."""
    env = envs[task]
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        env.reset(seed=seed)
        expert, ended, steps = env.expert(0.0, rng), False, 0
        while not ended:
            disturbed = after <= steps < after + 10
            action = act(move=rng.uniform(-1, 1, 3)) if disturbed else expert.action()
            _, _, terminated, truncated, info = env.step(action)
            ended, steps = terminated or truncated, steps + 1
        assert info["is_success"], f"seed {seed}"


def test_demonstrations_repeat_with_their_generator_and_differ_between_draws(lift):
    one, same, other = (demonstrate(lift, 0.1, np.random.default_rng(s), seed=0) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.action, same.action)
    assert one.action.shape != other.action.shape or (one.action != other.action).any()


def test_noise_leaves_the_gripper_alone_and_pushes_rather_than_shakes(lift):
    """Differences from what is asked for without noise, in one state: their steps' correlation is 0.8."""
    lift.reset(seed=0)
    plain = lift.expert(0.0, np.random.default_rng(0)).action()
    noisy = lift.expert(0.05, np.random.default_rng(0))
    drift = np.array([noisy.action() for _ in range(400)])
    assert set(drift[:, 6]) == {plain[6]}
    calm = drift[50:, 3] - drift[50:, 3].mean()  # an axis along which little is asked for, so that nothing is clipped
    assert 0.03 < calm.std() < 0.07
    assert 0.6 < (calm[1:] * calm[:-1]).mean() / calm.var() < 0.95


# -- cameras --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing():
    return RobosuiteEnv("Lift", cameras=("front", "wrist"), image_size=64)


def is_red(picture):
    red, green, blue = np.moveaxis(picture.astype(int), -1, 0)
    return (red > 60) & (red > 2 * green) & (red > 2 * blue)


def test_pictures_come_beside_what_the_robot_knows_of_itself(seeing, lift):
    observation, _ = seeing.reset(seed=0)
    assert seeing.observation_space.contains(observation)
    assert {name: p.shape for name, p in observation["pixels"].items()} == dict.fromkeys(CAMERAS, (64, 64, 3))
    np.testing.assert_array_equal(observation["agent_pos"], lift.reset(seed=0)[0]["agent_pos"][:9])


def test_the_cube_is_in_the_pictures(seeing):
    """And nothing else is red: robosuite's collision shapes, which cover the cube in another colour, are not drawn."""
    seeing.reset(seed=0)
    before = seeing._observation()["pixels"]
    seeing.data.joint("cube_joint0").qpos[:3] = 10
    after = seeing._observation()["pixels"]
    for name in CAMERAS:
        assert is_red(before[name]).sum() > 10, name
        assert not is_red(after[name]).any(), name


def test_a_seed_repeats_its_pictures_too(seeing):
    first = digest(seeing, 3, steps=3)
    assert digest(seeing, 4, steps=3) != first
    assert digest(seeing, 3, steps=3) == first


def test_render_shows_the_front_camera(seeing):
    seeing.reset(seed=0)
    assert is_red(seeing.render()).any()


# -- names and LeRobot's door ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [RobosuiteEnv, RobosuiteConfig])
def test_unknown_names_are_answered_with_those_there_are(make):
    with pytest.raises(UnknownNameError, match=r'no RoboMimic task named "Squere". Known: Can, Lift, Square. Did you'):
        make(task="Squere")
    with pytest.raises(UnknownNameError, match=r'no camera named "wirst". Known: front, wrist. Did you mean "wrist"'):
        make(task="Lift", cameras=["wirst"])


@pytest.mark.parametrize("make", [RobosuiteEnv, RobosuiteConfig])
def test_a_missing_robosuite_is_told_with_what_to_install(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(ConfigError, match=r'robosuite is not installed: pip install "poco-vla\[robomimic\]"'):
        make(task="Lift")


@pytest.mark.parametrize("size", [16, 65])
def test_a_picture_that_no_video_can_hold_is_refused(size):
    with pytest.raises(ConfigError, match=f"image_size is {size}; .* even one of at least 32"):
        RobosuiteConfig(cameras=["front"], image_size=size)


@pytest.mark.parametrize("task", TASKS)
def test_lerobots_registry_knows_the_tasks_in_either_case(task):
    assert EnvConfig.get_choice_class("robosuite") is RobosuiteConfig
    config = make_env_config("robosuite", task=task.lower())
    assert (config.task, config.fps) == (task, 20)
    assert config.features["agent_pos"].shape == (STATE_DIM[task],)
    assert config.features["action"].shape == (7,)


def test_lerobots_factory_makes_environments_that_its_own_check_accepts(recwarn):
    """Its check warns of what is missing; then its evaluation asks for the time limit and the instruction."""
    config = make_env_config("robosuite", task="lift", episode_length=3, cameras=["wrist"], image_size=32)
    vector = make_env(config, n_envs=2)["robosuite"][0]
    assert isinstance(vector, gym.vector.VectorEnv)
    check_env_attributes_and_types(vector)
    assert not [w for w in recwarn if "task_description" in str(w.message)]
    assert list(vector.call("_max_episode_steps")) == [3, 3]
    assert set(vector.call("task_description")) == {"lift the red cube"}
    observation = preprocess_observation(vector.reset(seed=[0, 1])[0])
    declared = {key: f.shape for key, f in env_to_policy_features(config).items() if key != "action"}
    assert declared == {"observation.state": (9,), "observation.images.wrist": (3, 32, 32)}
    assert {key: tuple(column.shape[1:]) for key, column in observation.items()} == declared
    for _ in range(3):
        *_, info = vector.step(np.zeros((2, 7), np.float32))
    assert info["final_info"]["is_success"].tolist() == [False, False]
    vector.close()
