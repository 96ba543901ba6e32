"""RLPD, RLPD-AC, DSRL and EXPO: the contract, their updates, that they learn, and bad input. Their losses are held to
the official code's numbers in tests/golden."""

import pytest
import torch
from toy_policies import ToyPolicy, toy_batch

from poco_vla import GlobalBatchRNG, TrainConfig, check_algorithm
from poco_vla.algorithms.edit import Expo, ExpoConfig
from poco_vla.algorithms.noise_steering import Dsrl, DsrlConfig
from poco_vla.algorithms.rlpd import Rlpd, RlpdAc, RlpdAcConfig, RlpdConfig
from poco_vla.config import EnvSpec, ReplayConfig
from poco_vla.errors import ConfigError, UnknownNameError

SMALL = {"hidden": (16, 16)}
KINDS = [
    (Rlpd, RlpdConfig(**SMALL, critic_members=3, actor_every=2, bc_weight=0.1)),
    (RlpdAc, RlpdAcConfig(**SMALL, critic_members=3, target_mixes="before", drop_crossing=True)),
    (Dsrl, DsrlConfig(**SMALL)),
    (Dsrl, DsrlConfig(**SMALL, action="noise")),
    (Expo, ExpoConfig(**SMALL, critic_members=3, num_candidates=2)),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("action_dim", [2, 1])
def test_the_contract_is_kept(kind, options, action_dim):
    """With a padded action too."""
    check_algorithm(kind, options, ToyPolicy(action_dim=action_dim), {"state": torch.randn(6, 2)})


# -- updates ----------------------------------------------------------------------------------------------------------


def test_rlpds_actor_is_updated_every_so_many_updates_of_the_critics():
    rlpd = Rlpd(ToyPolicy(), RlpdConfig(**SMALL, actor_every=3))
    assert [rlpd.phases("online", i) for i in range(4)] == [
        ("critic",), ("critic",), ("critic", "actor"), ("critic",)
    ]  # fmt: skip


def test_dsrls_noise_critic_is_distilled_every_so_many_updates():
    dsrl = Dsrl(ToyPolicy(), DsrlConfig(**SMALL, distill_every=2))
    assert [dsrl.phases("online", i) for i in range(3)] == [
        ("critic", "actor"), ("critic", "actor", "distill"), ("critic", "actor")
    ]  # fmt: skip
    assert dsrl.phases("sft", 1) == ("sft",)


def test_a_collapse_makes_expos_edits_smaller():
    expo = Expo(ToyPolicy(), ExpoConfig(**SMALL, edit_scale=0.2, num_candidates=2))
    assert expo.weaken(0.5) == "edits of at most 0.1"
    prefix = expo.policy.encode(toy_batch(expo.policy).obs)
    chunk = torch.zeros(5, 2, 3, 2)
    edited, _ = expo.edit(prefix, chunk, torch.full((5, 2, 3, 2), 1e4))
    assert edited.abs().max().item() == pytest.approx(0.1, rel=1e-3)


def test_rlpd_acts_uniformly_at_random_before_it_has_learned():
    """Mean 0 and variance 1/3 of 6,000 numbers: standard errors 0.0075 and 0.0039."""
    rlpd = Rlpd(ToyPolicy(), RlpdConfig(**SMALL))
    prefix = rlpd.policy.encode({"state": torch.randn(1000, 2)})
    chunk = rlpd.act_untrained(prefix, torch.Generator().manual_seed(0))
    assert chunk.mean().item() == pytest.approx(0, abs=0.03)
    assert chunk.var().item() == pytest.approx(1 / 3, abs=0.016)


# -- learning ---------------------------------------------------------------------------------------------------------


def bandit(policy, size, seed):
    """Random chunks whose reward is the mean of their numbers, nothing behind them."""
    generator = torch.Generator().manual_seed(seed)
    actions = torch.rand(size, policy.spec.horizon, policy.spec.width, generator=generator) * 2 - 1
    end = {"returns": actions.mean(dim=(1, 2)), "discount": torch.zeros(size)}
    return toy_batch(policy, size, seed=seed, actions=actions, **end)


@pytest.mark.parametrize(
    ("kind", "options", "gain"),
    [
        (Rlpd, RlpdConfig(**SMALL, critic_members=3, initial_temperature=0.01), 0.5),
        (RlpdAc, RlpdAcConfig(**SMALL, critic_members=3, initial_temperature=0.01), 0.5),
        (Dsrl, DsrlConfig(**SMALL, initial_temperature=0.01, noise_bound=1.5), 0.2),
        (Expo, ExpoConfig(**SMALL, critic_members=3, num_candidates=2, initial_temperature=0.01), 0.2),
    ],
)
def test_a_bandit_is_learned(kind, options, gain):
    """Reward is the mean of a chunk's numbers, 0 for a random one: acting gains on acting untrained."""
    torch.manual_seed(0)
    policy = ToyPolicy(hidden=(16,))
    algorithm = kind(policy, options, GlobalBatchRNG(torch.Generator().manual_seed(0)))
    optimizer = torch.optim.Adam(algorithm.parameter_groups(3e-3, 3e-3))
    for update in range(150):
        batch = bandit(policy, 64, update)
        for phase in algorithm.phases("online", update):
            optimizer.zero_grad()
            algorithm(batch, phase)[0].backward()
            optimizer.step()
            algorithm.after_step(phase)
    prefix = policy.encode({"state": torch.randn(500, 2)})
    after, before = (
        act(prefix, generator=torch.Generator().manual_seed(1)).mean().item()
        for act in (algorithm.act, algorithm.act_untrained)
    )
    assert after - before > gain
    if isinstance(algorithm, Dsrl):
        w = torch.randn(500, 3, 2)
        of_noise = algorithm.noise_critic(prefix.features, w[:, None] / 1.5).mean(dim=0)[:, 0]
        of_chunk = algorithm.critic(prefix.features, algorithm.steered(prefix, w / 1.5)[:, None]).mean(dim=0)[:, 0]
        assert torch.corrcoef(torch.stack([of_noise, of_chunk]))[0, 1] > 0.8


# -- a run, and bad input ---------------------------------------------------------------------------------------------


def config(**changes):
    return TrainConfig(**({"env": EnvSpec(), "sft_steps": 10} | changes))


def test_rlpd_fits_a_run():
    fitted = Rlpd.fit(config(algorithm="rlpd", updates_per_step=20.0))
    assert (fitted.sft_steps, fitted.warmup_steps, fitted.replay.demo_fraction) == (0, 5000, 0.5)
    assert fitted.algorithm_options == {"actor_every": 20}
    given = config(algorithm="rlpd", algorithm_options={"actor_every": 2}, replay=ReplayConfig(demo_fraction=0.25))
    assert Rlpd.fit(given).algorithm_options == {"actor_every": 2}
    assert Rlpd.fit(given).replay.demo_fraction == 0.25
    assert Rlpd.fit(fitted) == fitted


@pytest.mark.parametrize(("kind", "name"), [(Dsrl, "dsrl"), (Expo, "expo")])
def test_steering_and_editing_need_a_base_policy(kind, name):
    with pytest.raises(ConfigError, match=f'"{name}" leaves the flow policy as SFT made it, and this run has none'):
        kind.fit(config(algorithm=name, sft_steps=0))
    assert kind.fit(config(algorithm=name, sft_steps=0, policy="somebody/base")).sft_steps == 0
    assert kind.fit(config(algorithm=name)).sft_steps == 10


def test_steering_noise_from_stored_chunks_is_refused():
    with pytest.raises(ConfigError, match="hold executed chunks and not the noise"):
        Dsrl.fit(config(algorithm="dsrl", algorithm_options={"action": "noise"}))


@pytest.mark.parametrize("kind", [Rlpd, Dsrl, Expo])
def test_ranking_by_best_of_n_is_refused(kind):
    with pytest.raises(ConfigError, match="best_of_n is 4"):
        kind.fit(config(algorithm="any", best_of_n=4))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (RlpdConfig, {"gamma": 0.0}, "gamma is 0.0; it must lie in"),
        (RlpdConfig, {"tau": 2.0}, "tau is 2.0; it must lie in"),
        (RlpdConfig, {"target_members": 11}, "target_members is 11; it must lie in 1 to critic_members"),
        (RlpdConfig, {"actor_every": 0}, "actor_every is 0; at least 1"),
        (RlpdConfig, {"hidden": ()}, "hidden is"),
        (RlpdConfig, {"bc_weight": -1.0}, "bc_weight is -1.0"),
        (RlpdAcConfig, {"critic_members": 0}, "critic_members is 0; at least 1"),
        (RlpdAcConfig, {"initial_temperature": 0.0}, "initial_temperature is 0.0; it must be above 0"),
        (DsrlConfig, {"noise_bound": 0.0}, "noise_bound is 0.0; it must be above 0"),
        (DsrlConfig, {"distill_every": 0}, "distill_every is 0; at least 1"),
        (ExpoConfig, {"num_candidates": 0}, "num_candidates is 0; at least 1"),
        (ExpoConfig, {"edit_scale": -0.1}, "edit_scale is -0.1; it must be above 0"),
    ],
)
def test_an_option_that_cannot_work_is_refused(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        kind(**options)


@pytest.mark.parametrize(
    ("kind", "field"), [(RlpdConfig, "aggregation"), (RlpdConfig, "target_mixes"), (DsrlConfig, "action")]
)
def test_an_option_that_is_none_of_its_choices_is_refused(kind, field):
    """Set afterwards: the machine-checked signatures of the test run would refuse it before the option does."""
    options = kind()
    object.__setattr__(options, field, "some")
    with pytest.raises(UnknownNameError, match=f'no {field} named "some"'):
        options.__post_init__()
