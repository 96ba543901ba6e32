"""QC, QC-FQL and FQL: whose values choose, whose gradient goes where, and that they learn. Their numbers are those of
tests/golden/baselines."""

import pytest
import torch
from toy_policies import ToyPolicy, toy_batch

from poco_vla import EnvSpec, TrainConfig, propose
from poco_vla.algorithms import load_algorithm
from poco_vla.algorithms.best_of_n import BestOfN, BestOfNConfig
from poco_vla.algorithms.one_step import Fql, OneStepConfig, QcFql
from poco_vla.errors import ConfigError, UnknownNameError
from poco_vla.noise import GlobalBatchRNG

ENV = EnvSpec(type="ogbench", task="cube-single-singletask-task1-v0")


def rng():
    return GlobalBatchRNG(torch.Generator().manual_seed(0))


def best_of_n(policy, **options):
    return BestOfN(policy, BestOfNConfig(**({"num_candidates": 6, "critic_hidden": (8,)} | options)), rng())


def one_step(policy, **options):
    return QcFql(policy, OneStepConfig(**({"critic_hidden": (8,), "hidden": (8,)} | options)), rng())


def test_the_best_of_n_acts():
    """The sample with the largest value by the online critic, of the candidates that the same generator gives."""
    policy = ToyPolicy()
    algorithm = best_of_n(policy)
    prefix = policy.encode(toy_batch(policy).obs)
    x = propose(policy, prefix, 6, generator=torch.Generator().manual_seed(3))
    best = algorithm.critic(prefix.features, x).mean(dim=0).argmax(dim=1)
    assert best.unique().numel() > 1
    chunk = algorithm.act(prefix, generator=torch.Generator().manual_seed(3))
    assert torch.equal(chunk, torch.stack([x[b, j] for b, j in enumerate(best)]))
    assert torch.equal(algorithm.act_untrained(prefix, torch.Generator().manual_seed(3)),
                       propose(policy, prefix, 1, generator=torch.Generator().manual_seed(3))[:, 0])  # fmt: skip


def test_the_online_critic_chooses_and_the_target_critic_values():
    """With a target critic that is constant 7, y = returns + 0.9 * 7, and what is chosen does not change."""
    policy = ToyPolicy()
    algorithm, batch = best_of_n(policy), toy_batch(policy)
    noise = algorithm.draw_noise(batch, "online").next_noise
    prefix = policy.encode(batch.next_obs)
    before = algorithm.next_chunk(prefix, noise)
    for p in algorithm.target_critic.network.weights:
        p.data.zero_()
    algorithm.target_critic.network.biases[-1].data.fill_(7.0)
    assert torch.equal(algorithm.next_chunk(prefix, noise), before)
    torch.testing.assert_close(algorithm.target(batch, noise), batch.returns + 0.9 * 7)


@pytest.mark.parametrize("make", [best_of_n, one_step])
def test_no_gradient_of_q_reaches_the_flow_and_none_of_the_actor_the_critic(make):
    """Gradients of the whole loss: the flow's are those of SFT, the critics' those of the critic loss alone."""
    policy = ToyPolicy()
    algorithm, batch = make(policy), toy_batch(policy)
    noise = algorithm.draw_noise(batch, "online")

    def grads(loss, module):
        return torch.autograd.grad(loss, list(module.parameters()))

    torch.testing.assert_close(
        grads(algorithm.online_loss(batch, noise)[0], policy.head),
        grads(algorithm.sft_loss(batch, noise)[0], policy.head),
    )
    critic_loss = algorithm.critic_loss(policy.encode(batch.obs), batch, noise)[0]
    torch.testing.assert_close(
        grads(algorithm.online_loss(batch, noise)[0], algorithm.critic), grads(critic_loss, algorithm.critic)
    )


def test_padding_is_never_read_and_never_acted():
    policy = ToyPolicy(width=4, action_dim=2)
    algorithm, batch = one_step(policy), toy_batch(policy)
    noise = algorithm.draw_noise(batch, "online")
    loss = algorithm.online_loss(batch, noise)[0]
    noise.distill_noise[..., 2:] = (
        9.0  # padding of z enters the flow, where the policy reads it, not the one-step policy
    )
    prefix = policy.encode(batch.obs)
    assert torch.equal(algorithm.one_step(prefix.features, noise.distill_noise[:, 0])[..., 2:], torch.zeros(5, 3, 2))
    assert torch.isfinite(loss)
    chunk = algorithm.act(prefix, generator=torch.Generator().manual_seed(0))
    assert chunk.shape == (5, 3, 4)
    assert not chunk[..., 2:].any()
    assert chunk.abs().max() <= 1


def test_what_the_critic_judges_is_clipped_and_has_a_gradient_inside_alone():
    policy = ToyPolicy()
    algorithm = one_step(policy)
    prefix = policy.encode(toy_batch(policy, 2).obs)
    inside = torch.full((2, 3, 2), 0.5).requires_grad_()
    outside = torch.full((2, 3, 2), 1.5).requires_grad_()
    algorithm.values(prefix, inside).sum().backward()
    assert inside.grad.abs().min() > 0
    assert all(p.grad is None for p in algorithm.critic.parameters())
    q = algorithm.values(prefix, outside)
    assert torch.equal(q, algorithm.values(prefix, torch.ones(2, 3, 2)))
    q.sum().backward()
    assert not outside.grad.any()


def test_a_collapse_strengthens_the_distillation():
    algorithm = one_step(ToyPolicy(), alpha=300.0)
    assert algorithm.weaken(0.5) == "alpha 600"
    assert "alpha" in dict(algorithm.named_buffers())


def bandit(make, updates):
    """Train on uniform actions a in [-1, 1] of one step, return -4 (a - 0.5)^2; return the algorithm and 200 states."""
    policy = ToyPolicy(state_dim=1, horizon=1, width=1, hidden=(32, 32))
    algorithm = make(policy)
    optimizer = torch.optim.Adam(algorithm.parameter_groups(3e-3, 3e-3))
    generator = torch.Generator().manual_seed(1)
    for _ in range(updates):
        actions = torch.rand((128, 1, 1), generator=generator) * 2 - 1
        batch = toy_batch(policy, 128, actions=actions, returns=-4 * (actions[:, 0, 0] - 0.5).square(),
                          discount=torch.zeros(128))  # fmt: skip
        loss, _ = algorithm(batch, "online")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        algorithm.after_step("online")
    return algorithm, policy.encode({"state": torch.zeros(200, 1)})


@pytest.mark.parametrize(
    "make",
    [
        lambda policy: best_of_n(policy, num_candidates=16, critic_hidden=(32, 32)),
        lambda policy: one_step(policy, alpha=0.1, critic_hidden=(32, 32), hidden=(32, 32)),
    ],
)
def test_it_acts_better_than_what_it_imitates(make):
    """The flow imitates a uniform distribution (mean squared distance to 0.5: 7/12 = 0.58); what acts is near 0.5. The
    largest of 16 uniform values is 1/16 from it on average."""
    algorithm, prefix = bandit(make, 400)
    imitated = algorithm.act_untrained(prefix, torch.Generator().manual_seed(0))
    assert (imitated - 0.5).square().mean() > 0.35
    acted = algorithm.act(prefix, generator=torch.Generator().manual_seed(0))
    assert (acted - 0.5).square().mean() < 0.05


# -- configuration -----------------------------------------------------------------------------------------------------


def test_fql_takes_chunks_of_one_step_alone():
    config = TrainConfig(algorithm="fql", horizon=5, env=ENV)
    with pytest.raises(
        ConfigError, match='acts one step at a time, and horizon is 5: give --horizon 1, or take "qc_fql"'
    ):
        Fql.fit(config)
    assert Fql.fit(TrainConfig(algorithm="fql", horizon=1, env=ENV)).horizon == 1
    with pytest.raises(ConfigError, match='best_of_n is 4, but algorithm "fql" has no critic to rank by'):
        Fql.fit(TrainConfig(algorithm="fql", horizon=1, env=ENV, best_of_n=4))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qc", {"num_candidates": 0}, "num_candidates is 0; at least 1"),
        ("qc", {"gamma": 0.0}, r"gamma is 0.0; it must lie in \(0, 1\]"),
        ("qc", {"tau": 1.5}, r"tau is 1.5; it must lie in \(0, 1\]"),
        ("qc", {"flow_steps": 0}, "flow_steps is 0; at least 1"),
        ("qc", {"critic_members": 0}, "critic_members is 0; at least 1"),
        ("qc", {"critic_hidden": ()}, r"critic_hidden is \[\]; it needs one width or more"),
        ("qc_fql", {"hidden": (0,)}, r"hidden is \[0\]; it needs one width or more, all above 0"),
        ("qc_fql", {"alpha": -1.0}, r"alpha is -1.0; it must not be negative"),
    ],
)
def test_an_option_that_cannot_work_is_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        load_algorithm(name).config_class(**options)


@pytest.mark.parametrize(("field", "value"), [("aggregation", "median"), ("anchor", "demo")])
def test_a_choice_that_is_none_is_refused(field, value):
    """Set afterwards: the machine-checked signatures of the test run would refuse it before the option does."""
    config = BestOfNConfig()
    object.__setattr__(config, field, value)
    with pytest.raises(UnknownNameError, match=f'no {field} named "{value}"'):
        config.__post_init__()
