"""MPO: what it learns, what its duals and targets do, and bad options."""

from copy import deepcopy

import pytest
import torch
from toy_policies import ToyPolicy, toy_batch

from poco_vla import GlobalBatchRNG
from poco_vla.algorithms.mpo import Mpo, MpoConfig
from poco_vla.errors import ConfigError, UnknownNameError


def mpo_of(policy, **options):
    options = {"num_candidates": 16, "critic_hidden": (32,), "hidden": (32,), "target_period": 10} | options
    return Mpo(policy, MpoConfig(**options), GlobalBatchRNG(torch.Generator().manual_seed(0)))


TRUST = {"epsilon_mean": 0.1, "epsilon_std": 0.1, "alpha_mean": 0.1, "alpha_std": 0.1}
"""Trust regions that a few hundred updates can cross."""


@pytest.mark.parametrize("form", ["acme", "fixed"])
def test_it_finds_the_better_chunk_of_a_bandit(form):
    """Episodes of one chunk, worth minus its distance from 0.5: the samples' mean goes there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = ToyPolicy(horizon=1, width=1)
        algorithm = mpo_of(policy, form=form, temperature=1.0 if form == "acme" else 0.1, **TRUST)
        actions = torch.rand(64, 1, 1) * 4 - 2 if form == "acme" else torch.rand(64, 1, 1) * 2 - 1
        batch = toy_batch(
            policy, 64, discount=torch.zeros(64), actions=actions, returns=-(actions[:, 0, 0] - 0.5).abs() * 4
        )
        algorithm.prepare_online([], algorithm.rng)
        before = deepcopy(algorithm.gaussian)
        optimizer = torch.optim.Adam(algorithm.parameter_groups(5e-3, 5e-3))
        for _ in range(400):
            optimizer.zero_grad()
            algorithm.online_loss(batch)[0].backward()
            optimizer.step()
            algorithm.after_step("online")
        prefix = policy.encode(batch.obs)
        new, first = algorithm.gaussian(prefix.features), before(prefix.features)
    mean = new.mean.tanh() if algorithm.config.form == "fixed" else new.mean
    assert (mean - 0.5).abs().mean() < 0.4
    assert new.std.mean() < 0.7 * first.std.mean()


def test_targets_move_every_so_many_updates_and_in_sft_not_at_all():
    policy = ToyPolicy()
    algorithm = mpo_of(policy, target_period=2)
    with torch.no_grad():
        for p in (*algorithm.critic.parameters(), *algorithm.gaussian.parameters()):
            p.add_(1.0)
    targets = ((algorithm.critic, algorithm.target_critic.network), (algorithm.gaussian, algorithm.target_gaussian))

    def same():
        return [torch.equal(next(net.parameters()), next(target.parameters())) for net, target in targets]

    for phase, moved in (("sft", False), ("sft", False), ("warmup", False), ("online", True)):
        algorithm.after_step(phase)
        assert same() == [moved, moved]


def test_sft_trains_the_gaussian_alone_and_it_acts_from_then_on():
    policy = ToyPolicy()
    algorithm = mpo_of(policy)
    assert algorithm.trained_groups("sft") == {"gaussian"}
    prefix = policy.encode(toy_batch(policy).obs)
    untrained, trained = (
        act(prefix, generator=torch.Generator().manual_seed(0)) for act in (algorithm.act_untrained, algorithm.act)
    )
    assert torch.equal(untrained, trained)
    assert set(dict(algorithm.for_acting().named_children())) == {"policy", "gaussian"}


def test_padded_dimensions_are_zero():
    policy = ToyPolicy(width=4, action_dim=2)
    algorithm = mpo_of(policy)
    chunk = algorithm.act(policy.encode(toy_batch(policy).obs))
    assert chunk.shape == (5, 3, 4)
    assert not chunk[..., 2:].any()
    algorithm.online_loss(toy_batch(policy))[0].backward()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"num_candidates": 0}, "num_candidates is 0; at least 1"),
        ({"tau": 1.5}, "tau is 1.5; it must lie in"),
        ({"hidden": ()}, "hidden is"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, words):
    with pytest.raises(ConfigError, match=words):
        MpoConfig(**options)


def test_an_unknown_form_lists_the_known_ones():
    config = MpoConfig()
    object.__setattr__(config, "form", "softmax")
    with pytest.raises(UnknownNameError, match="acme"):
        config.__post_init__()
