"""From raw observations to chunks: plain samples, the critic's favourite, and nothing that is not finite."""

import numpy as np
import pytest
import torch
from lerobot_policy_flow_mlp.adapter import FlowMlp

from poco_vla import Poco, PocoConfig, propose
from poco_vla.data import preprocess_obs
from poco_vla.errors import NonFiniteError
from poco_vla.rollout import Actor

TASKS = [""] * 3


def observations(seed=0):
    return {"observation.state": np.random.default_rng(seed).normal(size=(3, 6)).astype(np.float32)}


@pytest.fixture
def policy():
    """Actions of 3 dimensions in [-2, 2], chunks of 4."""
    return FlowMlp.tiny()


def poco_of(policy):
    torch.manual_seed(1)
    return Poco(policy, PocoConfig(critic_hidden=(16,), critic_members=2))


def candidates(policy, n, seed):
    """The n candidates that an actor of this seed draws first, as the policy sees them."""
    prefix = policy.encode(preprocess_obs(policy, observations(), TASKS))
    return prefix, propose(policy, prefix, n, generator=torch.Generator().manual_seed(seed))


def test_a_chunk_is_one_plain_sample_in_the_robots_units(policy):
    """tiny() normalises actions from [-2, 2] to [-1, 1]: the robot's action is twice the network's."""
    chunks = Actor(policy, seed=5).chunks(observations(), TASKS)
    assert chunks.shape == (3, 4, 3)
    assert chunks.dtype == np.float32
    _, x = candidates(policy, 1, 5)
    np.testing.assert_allclose(chunks, 2 * x[:, 0], rtol=1e-5, atol=1e-6)


def test_an_actor_repeats_under_its_seed_and_goes_on_from_its_generators_state(policy):
    actor = Actor(policy, seed=5)
    first, state = actor.chunks(observations(), TASKS), actor.generator.get_state()
    second = actor.chunks(observations(), TASKS)
    assert (first != second).any()
    np.testing.assert_array_equal(Actor(policy, seed=5).chunks(observations(), TASKS), first)
    resumed = Actor(policy, seed=99)
    resumed.generator.set_state(state)
    np.testing.assert_array_equal(resumed.chunks(observations(), TASKS), second)


def test_the_global_generator_is_left_alone(policy):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Actor(policy, seed=5).chunks(observations(), TASKS)
    assert torch.equal(torch.rand(3), expected)


def test_best_of_n_takes_the_candidate_of_highest_mean_value(policy):
    poco = poco_of(policy)
    actor = Actor(poco, seed=5, best_of_n=8)
    chunks = actor.chunks(observations(), TASKS)
    prefix, x = candidates(policy, 8, 5)
    q = poco.target_critic(prefix.features, x).mean(dim=0)
    favourites = [int(row.argmax()) for row in q]
    for i, j in enumerate(favourites):
        np.testing.assert_allclose(chunks[i], 2 * x[i, j], rtol=1e-5, atol=1e-6)
    assert favourites != [0, 0, 0]


def test_best_of_n_without_a_critic_cannot_be_asked_for(policy):
    with pytest.raises(AssertionError, match="needs a critic"):
        Actor(policy, seed=0, best_of_n=4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_observation_that_is_not_finite_is_refused_by_name(policy, bad):
    obs = observations()
    obs["observation.state"][1, 2] = bad
    with pytest.raises(NonFiniteError, match=r'non-finite "observation.state": nothing was sent'):
        Actor(policy, seed=0).chunks(obs, TASKS)


def test_images_are_not_mistaken_for_numbers_that_could_be_nan(policy):
    obs = observations() | {"observation.image": np.zeros((3, 4, 4, 3), np.uint8)}
    assert Actor(policy, seed=0).chunks(obs, TASKS).shape == (3, 4, 3)


def test_an_action_that_is_not_finite_is_not_sent(policy):
    with torch.no_grad():
        policy.head.layers[-1].bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match="sampled a non-finite action: nothing was sent"):
        Actor(policy, seed=0).chunks(observations(), TASKS)


def test_acting_needs_and_leaves_no_gradient(policy):
    chunks = Actor(poco_of(policy), seed=0, best_of_n=2).chunks(observations(), TASKS)
    assert isinstance(chunks, np.ndarray)
    assert all(p.grad is None for p in policy.parameters())
