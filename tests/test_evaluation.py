"""Success rates: the interval by hand, every start once, repeatable under a seed."""

import numpy as np
import pytest
import tiny_env  # noqa: F401 (registers the environments)
from lerobot_policy_flow_mlp.adapter import FlowMlp
from pointmass import pointmass

from poco_vla.config import EnvSpec
from poco_vla.data import Episode
from poco_vla.evaluation import EvalResult, SuccessRate, evaluate, wilson_interval
from poco_vla.rollout import EnvPool


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # z = 2 makes round numbers: centre (p + 2/n) / (1 + 4/n), half-width 2 / (1 + 4/n) sqrt(p(1-p)/n + 1/n^2).
        (5, 10, 0.5 - 2 / 1.4 * 0.035**0.5, 0.5 + 2 / 1.4 * 0.035**0.5),  # .025 + .01 under the root
        (0, 4, 0.0, 0.5),  # centre .25, half-width 1 * sqrt(1/16)
        (4, 4, 0.5, 1.0),
        (12, 16, 0.7 - 1.6 * (0.75 * 0.25 / 16 + 1 / 256) ** 0.5, 0.7 + 1.6 * (0.75 * 0.25 / 16 + 1 / 256) ** 0.5),
    ],
)
def test_wilson_interval_by_hand(successes, trials, low, high):
    assert wilson_interval(successes, trials, z=2.0) == pytest.approx((low, high), abs=1e-12)


def test_wilson_interval_at_95_percent():
    """8 of 10, z = 1.96, z^2 = 3.8416: centre (.8 + .19208) / 1.38416 = .716738, half-width
    1.96 / 1.38416 * sqrt(.016 + .009604) = 1.416021 * .160012 = .226581."""
    assert wilson_interval(8, 10) == pytest.approx((0.490157, 0.943319), abs=2e-5)


def test_the_interval_always_holds_the_rate_and_stays_in_range():
    """Rounding must not put the rate outside by 1e-16: an error bar of negative length cannot be drawn."""
    for n in range(1, 300):
        for k in {0, 1, n // 3, n - 1, n}:
            low, high = wilson_interval(k, n)
            assert 0 <= low <= k / n <= high <= 1


def test_no_trials_say_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_a_rate_shows_itself_with_its_interval():
    rate = SuccessRate(8, 10, mean_length=12.5)
    assert str(rate) == "80% [49%, 94%]"
    assert rate.figures() == {
        "successes": 8,
        "episodes": 10,
        "mean_length": 12.5,
        "success_rate": 0.8,
        "interval_95": list(rate.interval),
    }


@pytest.fixture(scope="module")
def policy():
    """An untrained policy of the point mass's sizes."""
    features = {
        "observation.state": {"dtype": "float32", "shape": (4,), "names": None},
        "action": {"dtype": "float32", "shape": (2,), "names": None},
    }
    unit = {
        "observation.state": {"mean": np.zeros(4, np.float32), "std": np.ones(4, np.float32)},
        "action": {"min": -np.ones(2, np.float32), "max": np.ones(2, np.float32)},
    }
    return FlowMlp.from_dataset(features, unit, horizon=4, hidden_dims=[8], num_inference_steps=2)


def actions(result: EvalResult):
    return np.concatenate([episode.action for episode in result.episodes])


def test_an_evaluation_repeats_under_its_seed_and_not_under_another(policy):
    spec = pointmass(num_envs=3)
    first, again, other = (evaluate(policy, spec, episodes=5, seed=seed) for seed in (7, 7, 8))
    assert np.array_equal(actions(first), actions(again))
    assert not np.array_equal(first.episodes[0].action, other.episodes[0].action)


@pytest.mark.parametrize("num_envs", [1, 3, 7])
def test_every_start_is_played_once_whatever_the_number_of_environments(num_envs, policy):
    result = evaluate(policy, pointmass(num_envs=num_envs), episodes=5, seed=40)
    assert [episode.seed for episode in result.episodes] == [40, 41, 42, 43, 44]
    starts = np.stack([episode.obs["observation.state"][0] for episode in result.episodes])
    same = evaluate(policy, pointmass(num_envs=2), episodes=5, seed=40)
    assert np.array_equal(starts, [episode.obs["observation.state"][0] for episode in same.episodes])
    assert len({tuple(start) for start in starts}) == 5


def test_a_running_pool_is_reused_and_left_open(policy):
    with EnvPool(pointmass(num_envs=2, options={"episode_length": 9}), policy.spec.horizon) as pool:
        done = []
        first = evaluate(policy, pool, episodes=3, seed=1, on_episode=done.append)
        second = evaluate(policy, pool, episodes=3, seed=1)
    assert done[-1] == 3
    assert np.array_equal(actions(first), actions(second))


def test_the_figures_of_an_evaluation_count_its_episodes(policy):
    """An untrained policy never docks within 9 steps: three episodes of the full length, none a success."""
    result = evaluate(policy, pointmass(num_envs=2, options={"episode_length": 9}), episodes=3, seed=1)
    assert result.success == SuccessRate(0, 3, mean_length=9.0)
    assert not any(episode.terminal.any() for episode in result.episodes)


def test_a_suite_is_as_good_as_its_tasks_on_average_whatever_their_episodes():
    """Tasks a and b take the even and odd seeds. 1 of 4 and, two episodes of it lost, 1 of 2: the mean over tasks is
    (.25 + .5) / 2, not 2 of 6."""

    def played(seed, success):
        rows = np.zeros(10)
        signals = {"reward": rows, "success": rows + success > 0, "terminal": rows > 0}
        return Episode(obs={}, action=np.zeros((10, 2)), **signals, task="", seed=seed)

    episodes = [played(seed, seed in (0, 5)) for seed in (0, 2, 4, 6, 5, 7)]
    rate = SuccessRate.of(episodes, ["a", "b"])
    assert rate.rate == 0.375
    assert rate.interval == wilson_interval(0.375 * 6, 6)
    figures = rate.figures()
    assert {name: (one["successes"], one["episodes"]) for name, one in figures["tasks"].items()} == {
        "a": (1, 4),
        "b": (1, 2),
    }
    assert figures["tasks"]["b"]["interval_95"] == list(wilson_interval(1, 2))
    assert SuccessRate.from_figures(figures) == rate
    assert "tasks" not in SuccessRate.of(episodes, ["a"]).figures()


def test_each_task_of_a_suite_is_evaluated_from_as_many_starts(policy):
    """Two tasks by three environments side by side; the time limit is three steps."""
    spec = EnvSpec("tiny_point", "reach,wander", {"episode_length": 3}, num_envs=3, in_process=True)
    done = []
    result = evaluate(policy, spec, episodes=4, seed=11, on_episode=done.append)
    assert (len(result.episodes), done[-1]) == (8, 8)
    assert {name: one.episodes for name, one in result.success.tasks} == {"reach": 4, "wander": 4}
    for episode in result.episodes:
        assert episode.obs["observation.environment_state"][0].argmax() == episode.seed % 2
