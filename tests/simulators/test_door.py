"""Environments through LeRobot's own door: nested observations, processors, success, limits, what is not installed."""

from dataclasses import dataclass, field
from importlib.util import find_spec

import gymnasium as gym
import numpy as np
import pytest
import tiny_env  # noqa: F401 (registers the environments)
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.env_processor import LiberoProcessorStep

from poco_vla.config import EnvSpec
from poco_vla.errors import ConfigError
from poco_vla.rollout import EnvPool
from poco_vla.simulators import env_source, environment
from poco_vla.simulators.supported import SIMULATORS

HORIZON = 2


class NestedEnv(gym.Env):
    """Observations three deep as LIBERO's, starts from a list as LIBERO's, no truncation as LIBERO's."""

    _max_episode_steps = 5

    def __init__(self, task, wide=False):
        self.task, self.task_description = task, f"do {task}"
        self.init_state_id, self.starts = 0, []
        inner = {"pos": (3,), "quat": (4,)}
        box = {key: gym.spaces.Box(-np.inf, np.inf, shape, np.float64) for key, shape in inner.items()}
        state = {"eef": gym.spaces.Dict(box), "gripper": gym.spaces.Dict({"qpos": gym.spaces.Box(-1, 1, (2,))})}
        pixels = {"image": gym.spaces.Box(0, 255, (32, 32, 3), np.uint8)}
        self.observation_space = gym.spaces.Dict(
            {"pixels": gym.spaces.Dict(pixels), "robot_state": gym.spaces.Dict(state)}
        )
        self.action_space = gym.spaces.Box(-1, 1, (3 if wide and task == "b" else 2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start = self.init_state_id
        return self._observation(), {}

    def step(self, action):
        return self._observation(), 0.0, False, False, {"succeed": bool(action[0] > 0)}

    def _observation(self):
        picture = np.zeros((32, 32, 3), np.uint8)
        picture[0, 0] = 201
        eef = {"pos": np.full(3, self.start, np.float64), "quat": np.array([0.0, 0.0, 0.0, 1.0])}
        return {"pixels": {"image": picture}, "robot_state": {"eef": eef, "gripper": {"qpos": np.ones(2)}}}


@EnvConfig.register_subclass("tiny_nested")
@dataclass
class NestedConfig(EnvConfig):
    task: str = "a,b"
    fps: int = 10
    processed: bool = True
    wide: bool = False
    features: dict = field(default_factory=lambda: {"action": PolicyFeature(FeatureType.ACTION, (2,))})
    features_map: dict = field(default_factory=lambda: {"action": "action"})
    gym_kwargs = {}  # noqa: RUF012

    def create_envs(self, n_envs, use_async_envs=False):
        print("a line per task")
        tasks = self.task.split(",")
        return {
            "nested": {
                k: gym.vector.SyncVectorEnv([lambda t=t: NestedEnv(t, self.wide)] * n_envs) for k, t in enumerate(tasks)
            }
        }

    def get_env_processors(self):
        steps = [LiberoProcessorStep()] if self.processed else []
        return PolicyProcessorPipeline(steps=steps), PolicyProcessorPipeline(steps=[])


def nested(task, num_envs=1, **options):
    return EnvSpec("tiny_nested", task, options, num_envs, in_process=True)


def played(pool, first, count):
    pool.reset(first, count)
    episodes = []
    while not pool.idle.all():
        episodes += pool.step(np.ones((pool.num_envs, HORIZON, pool.action_dim)))[0]
    return sorted(episodes, key=lambda episode: episode.seed)


def test_observations_come_through_lerobots_processors_under_its_keys(capsys):
    """LIBERO's: position 3, axis-angle 3 and gripper 2 are one state; pictures turn by 180 degrees, bit for bit."""
    with EnvPool(nested("a"), HORIZON) as pool:
        pool.reset(7)
        assert set(pool.obs) == {"observation.state", "observation.images.image"}
        np.testing.assert_array_equal(pool.obs["observation.state"], [[7, 7, 7, 0, 0, 0, 1, 1]])
        picture = pool.obs["observation.images.image"][0]
        assert picture.dtype == np.uint8
        assert picture[-1, -1].tolist() == [201] * 3
        assert picture.sum() == 3 * 201
    assert capsys.readouterr().out == ""


def test_without_processors_every_depth_has_a_name():
    with EnvPool(nested("a", processed=False), HORIZON) as pool:
        pool.reset(0)
        assert {"observation.robot_state.eef.pos", "observation.robot_state.gripper.qpos"} < set(pool.obs)


def test_a_suite_cycles_over_its_tasks_by_seed_with_instruction_start_and_limit_of_each():
    """Seeds 4..9 of two tasks: a b a b a b, the starts that of LIBERO's list are 2 2 3 3 4 4; success is gym-hil's
    `succeed`. Each is cut off at the environment's own 5 steps, which it declares and does not keep."""
    said = []
    with EnvPool(nested("a,b", num_envs=3), HORIZON, say=said.append) as pool:
        assert (pool.suite, pool.instructions) == (["a", "b"], ["do a", "do b"])
        episodes = played(pool, 4, 6)
    assert [episode.seed for episode in episodes] == [4, 5, 6, 7, 8, 9]
    assert [episode.task for episode in episodes] == ["do a", "do b"] * 3
    assert [episode.obs["observation.state"][0, 0] for episode in episodes] == [2, 2, 3, 3, 4, 4]
    assert [len(episode) for episode in episodes] == [5] * 6
    assert all(episode.succeeded and not episode.terminal.any() for episode in episodes)
    for k, episode in enumerate(episodes):
        np.testing.assert_array_equal(episode.obs["observation.environment_state"], [np.eye(2)[k % 2]] * 5)
    assert said == []


def test_tasks_of_different_action_sizes_are_no_suite():
    with pytest.raises(ConfigError, match=r'tasks of a suite must be alike: "b" has the action space .*\(3,\).*"a"'):
        EnvPool(nested("a,b", wide=True), HORIZON)


def test_several_tasks_of_a_type_with_gymnasium_ids_are_a_suite_too():
    spec = EnvSpec("tiny_point", "reach, wander", num_envs=1, in_process=True)
    assert environment(spec).features["environment_state"].shape == (2,)
    with EnvPool(spec, HORIZON) as pool:
        assert pool.suite == ["reach", "wander"]
        pool.reset(3)
        np.testing.assert_array_equal(pool.obs["observation.environment_state"], [[0, 1]])


LEROBOTS = sorted(kind for kind, cls in EnvConfig.get_known_choices().items() if cls.__module__.startswith("lerobot"))
TASKS = {"gym_manipulator": ("PandaPickCube-v0", {"name": "gym_hil"}), "metaworld": ("reach-v3", {})}


def test_every_type_of_lerobot_has_an_entry():
    assert set(LEROBOTS) <= SIMULATORS.keys()


@pytest.mark.parametrize("kind", LEROBOTS)
def test_a_type_whose_simulator_is_missing_says_in_one_sentence_what_to_install(kind):
    needed = SIMULATORS[kind]
    if find_spec(needed.module):
        pytest.skip("it is installed")
    spec = EnvSpec(type=kind, trust_remote_code=True)
    with pytest.raises(ConfigError) as caught:
        EnvPool(spec, HORIZON)
    assert str(caught.value) == (
        f'the environment type "{kind}" needs the package {needed.package}, which is not installed: {needed.install}'
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", LEROBOTS)
def test_a_type_whose_simulator_is_installed_plays_an_episode(kind):
    if not find_spec(SIMULATORS[kind].module):
        pytest.skip("it is not installed")
    task, options = TASKS.get(kind, ("", {}))
    with EnvPool(EnvSpec(kind, task, options, num_envs=1, max_episode_steps=4), HORIZON) as pool:
        (episode,) = played(pool, 0, 1)
    assert len(episode) == 4
    assert any(key.startswith("observation.") for key in episode.obs)


def test_code_of_the_hub_runs_with_consent_alone():
    with pytest.raises(ConfigError, match=r"runs code of the Hub repository nvidia/.*--env\.trust-remote-code"):
        env_source(EnvSpec("isaaclab_arena"))


def test_a_suite_declares_the_longest_limit_of_its_tasks():
    spec = EnvSpec("tiny_point", "reach,wander", {"episode_length": 9}, num_envs=1, in_process=True)
    with EnvPool(spec, HORIZON) as pool:
        assert pool.time_limit == 9
