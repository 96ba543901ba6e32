"""Environments stepped a chunk at a time: seeds, ends, worker processes, and running episodes brought back."""

import gymnasium as gym
import numpy as np
import pytest
import tiny_gym
from tiny_env import assert_same_episode, homing_chunks, point_spec

from poco_vla.config import EnvSpec
from poco_vla.errors import ConfigError
from poco_vla.rollout import EnvPool
from poco_vla.rollout.chunk_env import ChunkEnv
from poco_vla.simulators.observations import lerobot_key

HORIZON = 5


def play(pool, rounds=None):
    """Episodes that end within `rounds` rounds (None: until all environments idle), in the order they end."""
    episodes = []
    while not pool.idle.all() if rounds is None else rounds > 0:
        ended, _ = pool.step(homing_chunks(pool.obs, pool.horizon))
        episodes += ended
        rounds = rounds if rounds is None else rounds - 1
    return episodes


def test_every_seed_of_the_plan_is_played_once_by_its_environment():
    """Environment i of 3 plays 100 + i, 103 + i, ...: 7 episodes are seeds 100 to 106."""
    with EnvPool(point_spec(3), HORIZON) as pool:
        pool.reset(100, 7)
        seeds = [e.seed for e in play(pool)]
    assert sorted(seeds) == list(range(100, 107))
    for i in range(3):
        own = [seed for seed in seeds if (seed - 100) % 3 == i]
        assert own == sorted(own)


def test_an_episode_is_what_the_bare_environment_gives_for_its_seed_and_actions():
    """Row k holds the observation before action k; the episode ends where the environment says so, within a chunk or
    not. Success, failure and time limits all occur among these seeds."""
    with EnvPool(point_spec(4, episode_length=7), HORIZON) as pool:
        pool.reset(0, 60)
        episodes = play(pool)
    kinds = set()
    for episode in episodes:
        env = tiny_gym.PointEnv(episode_length=7)
        observation, _ = env.reset(seed=episode.seed)
        for k in range(len(episode)):
            np.testing.assert_array_equal(episode.obs["observation.state"][k], observation["agent_pos"])
            observation, reward, terminated, truncated, info = env.step(episode.action[k])
            assert episode.reward[k] == np.float32(reward)
            assert episode.success[k] == info["is_success"]
            assert episode.terminal[k] == terminated
            assert (terminated or truncated) == (k == len(episode) - 1)
        kinds.add((bool(episode.success[-1]), bool(episode.terminal[-1])))
        assert episode.task == "reach the origin"
    assert kinds >= {(True, True), (False, False)}
    assert len({len(e) % HORIZON for e in episodes}) > 1


def test_a_failure_is_terminal_without_success():
    """Pushed outwards, the point leaves the field."""
    with EnvPool(point_spec(1), HORIZON) as pool:
        pool.reset(0, 1)
        episodes = []
        while not pool.idle.all():
            episodes += pool.step(-homing_chunks(pool.obs, HORIZON))[0]
    (episode,) = episodes
    assert episode.terminal[-1]
    assert not episode.succeeded


def test_after_the_last_episode_environments_idle():
    with EnvPool(point_spec(3), HORIZON) as pool:
        pool.reset(0, 2)
        assert pool.idle.tolist() == [False, False, True]
        assert len(play(pool)) == 2
        assert pool.step(homing_chunks(pool.obs, HORIZON)) == ([], 0)
        assert pool.steps_in_flight == 0


def test_steps_are_counted_as_they_are_taken():
    """Steps of finished episodes plus those in flight are all steps."""
    with EnvPool(point_spec(3), HORIZON) as pool:
        pool.reset(0)
        finished = total = 0
        for _ in range(10):
            episodes, steps = pool.step(homing_chunks(pool.obs, HORIZON))
            finished += sum(map(len, episodes))
            total += steps
            assert total == finished + pool.steps_in_flight
    assert finished > 0


def test_without_a_count_episodes_go_on():
    with EnvPool(point_spec(2), HORIZON) as pool:
        pool.reset(10)
        seeds = [e.seed for e in play(pool, rounds=30)]
        assert not pool.idle.any()
    assert sorted(seeds)[:12] == list(range(10, 22))


def test_a_reset_abandons_what_is_running():
    with EnvPool(point_spec(2), HORIZON) as pool:
        pool.reset(0, 4)
        fresh = play(pool)
        pool.reset(50)
        play(pool, rounds=1)
        pool.reset(0, 4)
        for a, b in zip(fresh, play(pool), strict=True):
            assert_same_episode(a, b)


def test_observations_stand_still_until_received():
    with EnvPool(point_spec(2), HORIZON) as pool:
        pool.reset(0)
        before = {key: column.copy() for key, column in pool.obs.items()}
        pool.send(homing_chunks(pool.obs, HORIZON))
        for key, column in before.items():
            np.testing.assert_array_equal(pool.obs[key], column)
        pool.receive()
        assert (pool.obs["observation.state"] != before["observation.state"]).any()


def test_finished_episodes_do_not_change_afterwards():
    """Vector environments reuse their buffers."""
    with EnvPool(point_spec(2, in_process=False), HORIZON) as pool:
        pool.reset(0)
        (first, *_) = play(pool, rounds=6)
        kept = first.obs["observation.state"].copy(), first.action.copy(), first.reward.copy()
        play(pool, rounds=6)
    for column, copy in zip((first.obs["observation.state"], first.action, first.reward), kept, strict=True):
        np.testing.assert_array_equal(column, copy)


@pytest.mark.parametrize("pixels", [False, True])
def test_worker_processes_play_the_episodes_that_this_process_plays(pixels):
    played = []
    for in_process in (True, False):
        with EnvPool(point_spec(3, in_process=in_process, pixels=pixels), HORIZON) as pool:
            pool.reset(5, 9)
            played.append(play(pool))
    assert len(played[0]) == 9
    for a, b in zip(*played, strict=True):
        assert_same_episode(a, b)


def test_images_come_under_lerobots_names():
    with EnvPool(point_spec(2, pixels=True), HORIZON) as pool:
        pool.reset(0, 2)
        assert pool.obs["observation.images.top"].shape == (2, 64, 64, 3)
        (episode, _) = play(pool)
    assert episode.obs["observation.images.top"].dtype == np.uint8
    distance = np.linalg.norm(episode.obs["observation.state"][:, :2], axis=1)
    np.testing.assert_allclose(episode.obs["observation.images.top"][:, 0, 0, 0], 120 * distance, atol=1.01)


def test_observation_names_are_those_of_lerobots_own_evaluation():
    """lerobot-eval must show a policy the keys that it was trained on here."""
    from lerobot.envs.utils import preprocess_observation

    state = np.zeros((1, 3), np.float32)
    image = np.zeros((1, 4, 4, 3), np.uint8)
    for raw in (
        {"agent_pos": state, "environment_state": state, "pixels": image},
        {"agent_pos": state, "pixels": {"top": image, "wrist": image}},
    ):
        flat = (
            {f"pixels.{k}": v for k, v in raw["pixels"].items()}
            if isinstance(raw["pixels"], dict)
            else {"pixels": image}
        )
        names = [name for name in raw if name != "pixels"] + list(flat)
        assert {lerobot_key(name) for name in names} == set(preprocess_observation(raw))


def brought_back(spec, rounds_before, rounds_after, chunks):
    """What followed in the pool that went on, and in the one that was brought back."""
    out = []
    with EnvPool(spec, HORIZON) as pool:
        pool.reset(40)
        for _ in range(rounds_before):
            pool.step(chunks(pool.obs))
        state = pool.state()
        out.append(follow(pool, rounds_after, chunks))
    with EnvPool(spec, HORIZON) as pool:
        pool.restore(state)
        out.append(follow(pool, rounds_after, chunks))
    return out


def follow(pool, rounds, chunks):
    obs = {key: column.copy() for key, column in pool.obs.items()}
    flying = pool.steps_in_flight
    episodes = []
    for _ in range(rounds):
        episodes += pool.step(chunks(pool.obs))[0]
    return obs, flying, episodes, pool.state()


def assert_same_future(a, b):
    for key in a[0]:
        np.testing.assert_array_equal(a[0][key], b[0][key])
    assert a[1] == b[1]
    assert len(a[2]) == len(b[2])
    for x, y in zip(a[2], b[2], strict=True):
        assert_same_episode(x, y)
    assert a[3]["seeds"] == b[3]["seeds"]
    for x, y in zip(a[3]["chunks"], b[3]["chunks"], strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("rounds_before", [0, 1, 2, 7, 11])
def test_running_episodes_are_brought_back_exactly(rounds_before):
    """At the start, in the middle and after some episodes of different lengths have ended."""
    a, b = brought_back(
        point_spec(3, episode_length=20), rounds_before, 15, lambda obs: homing_chunks(obs, HORIZON) / 4
    )
    assert len(a[2]) > 3
    assert_same_future(a, b)


def test_running_episodes_are_brought_back_in_worker_processes():
    spec = point_spec(3, in_process=False)
    a, b = brought_back(spec, 4, 8, lambda obs: homing_chunks(obs, HORIZON) / 2)
    assert_same_future(a, b)


def test_running_ogbench_episodes_are_brought_back_exactly():
    """MuJoCo's state beyond the observation (contacts, solver warm start) comes back as well."""
    spec = EnvSpec(options={"episode_length": 30}, num_envs=2, in_process=True)

    def chunks(obs):
        seeds = (np.abs(obs["observation.state"]).sum(axis=1) * 1e4).astype(int)
        return np.stack([np.random.default_rng(s).uniform(-1, 1, (HORIZON, 5)) for s in seeds])

    a, b = brought_back(spec, 8, 6, chunks)
    assert len(a[2]) == 2
    assert_same_future(a, b)


def test_a_chunk_of_nan_leaves_the_environment_as_it_is():
    env = ChunkEnv(tiny_gym.PointEnv(), HORIZON, 0, 1)
    before, _ = env.reset(options={"first": 3})
    after, *_ = env.step(np.full((HORIZON, 2), np.nan, np.float32))
    assert after["length"] == 0
    np.testing.assert_array_equal(before["now"]["observation.state"], after["now"]["observation.state"])


def test_a_chunk_that_meets_the_end_is_cut_there():
    """A time limit of 3 inside a chunk of 5: 3 steps count, the rest is not played into the next episode."""
    env = ChunkEnv(tiny_gym.PointEnv(episode_length=3), HORIZON, 0, 1)
    env.reset(options={"first": 3})
    result, *_ = env.step(np.zeros((HORIZON, 2), np.float32))
    assert (int(result["length"][0]), int(result["ended"][0])) == (3, 1)
    fresh, _ = tiny_gym.PointEnv().reset(seed=4)
    np.testing.assert_array_equal(result["now"]["observation.state"], fresh["agent_pos"])


def test_a_simulator_that_is_not_installed_is_named():
    with pytest.raises(ConfigError, match='"absent/Nothing-v0" needs the package a_simulator_that_nobody_installed'):
        EnvPool(point_spec(1, type="tiny_absent"), HORIZON)


def test_observations_without_names_are_refused():
    with pytest.raises(ConfigError, match=r"expected a Dict with LeRobot's names \(agent_pos"):
        EnvPool(point_spec(1, kind="List"), HORIZON)


def test_results_fit_the_declared_space():
    env = ChunkEnv(tiny_gym.PointEnv(pixels=True), HORIZON, 0, 2)
    result, _ = env.reset(options={"first": 0, "count": 2})
    assert isinstance(env.observation_space, gym.spaces.Dict)
    assert env.observation_space.contains(result)
    assert env.observation_space.contains(env.step(np.zeros((HORIZON, 2), np.float32))[0])


class DoubleEnv(tiny_gym.PointEnv):
    """Observes in float64 and, on request, forgets to say whether it succeeded."""

    def __init__(self, silent=False):
        super().__init__(episode_length=3)
        self.silent = silent
        self.observation_space = gym.spaces.Dict(agent_pos=gym.spaces.Box(-np.inf, np.inf, (4,), dtype=np.float64))

    def _observation(self):
        return {"agent_pos": super()._observation()["agent_pos"].astype(np.float64)}

    def step(self, action):
        *result, info = super().step(action)
        return *result, {} if self.silent else info


def test_observations_are_float32_whatever_the_environment_gives():
    env = ChunkEnv(DoubleEnv(), 2, 0, 1)
    result, _ = env.reset()
    assert result["now"]["observation.state"].dtype == np.float32
    assert env.observation_space.contains(result)


def test_an_environment_that_does_not_tell_success_is_refused():
    env = ChunkEnv(DoubleEnv(silent=True), 5, 0, 1)
    env.reset()
    with pytest.raises(ConfigError, match="is_success"):
        env.step(np.zeros((5, 2), np.float32))
