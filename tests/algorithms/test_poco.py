"""Poco: the losses of the three stages, their stop-gradients and options, and a task whose answer is known."""

import math
import sys
from copy import deepcopy
from pathlib import Path

import forked
import pytest
import torch
from torch import nn
from toy_policies import ToyPolicy, toy_batch

from poco_vla import ChunkBatch, GlobalBatchRNG, Poco, PocoConfig, flow_errors, load_adapter, propose
from poco_vla.algorithms import STAGES
from poco_vla.errors import ConfigError
from poco_vla.noise import micro_batches

SMALL = {"critic_hidden": (8, 8), "num_candidates": 4, "zeta": 10.0}


def build(seed=0, world_size=1, rank=0, **options):
    """Everything in float64, draws from a fresh generator: two calls give the same numbers."""
    policy = ToyPolicy(dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        poco = Poco(
            policy,
            PocoConfig(**(SMALL | options)),
            GlobalBatchRNG(torch.Generator().manual_seed(seed), rank, world_size),
        )
        for p in poco.target_critic.parameters():
            p.data += 0.1 * torch.randn_like(p)
    return poco.double()


def batch_of(poco, size=6, **changes):
    return toy_batch(poco.policy, size, dtype=torch.float64, **changes)


def grads(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)


def test_nothing_of_q_reaches_the_policy_and_nothing_of_the_posterior_the_critics():
    """The critic's gradient of the joint loss is that of the critic loss alone, the policy's that of the rest."""
    poco = build()
    batch = batch_of(poco)
    joint, _ = poco(batch, "online")
    alone, _ = build().critic_loss(
        poco.policy.encode(batch.obs), batch
    )  # the first draws of an update are the critic's
    reference = build()
    critic_only, _ = reference.critic_loss(reference.policy.encode(batch.obs), batch)
    torch.testing.assert_close(alone, critic_only)
    torch.testing.assert_close(grads(joint, poco.critic), grads(critic_only, reference.critic))
    assert all(g is None for g in grads(critic_only, reference.policy))
    assert not any(p.requires_grad for p in poco.target_critic.parameters())
    assert all(g is not None and g.any() for g in grads(joint, poco.policy))


def test_the_policys_gradient_does_not_depend_on_the_online_critic():
    one, two = build(), build()
    for p in two.critic.parameters():
        p.data += 1
    losses = [poco(batch_of(poco), "online")[0] for poco in (one, two)]
    torch.testing.assert_close(grads(losses[0], one.policy), grads(losses[1], two.policy))
    assert not torch.allclose(grads(losses[0], one.critic)[0], grads(losses[1], two.critic)[0])


def test_the_policys_gradient_is_that_of_fixed_candidates_and_weights():
    """Recomputed with candidates and weights as constants, from the same draws."""
    poco, script = build(beta=2.0, zeta=1.5), build()
    batch = batch_of(poco)
    loss, _ = poco(batch, "online")
    policy, spec, draws = poco.policy, poco.policy.spec, script.rng
    like = batch.actions
    draws.normal((6, 1, spec.horizon, spec.width), like)  # the critic's next chunk
    prefix = policy.encode(batch.obs)
    x = propose(policy, prefix, 4, noise=draws.normal((6, 4, spec.horizon, spec.width), like))
    w = torch.softmax(poco.target_critic(prefix.features, x).mean(0) / 0.1, dim=-1).detach()
    noise = draws.normal((6, 5, spec.horizon, spec.width), like)
    t = draws.time(policy.sample_time, (6, 5), like)
    errors = flow_errors(policy, prefix, torch.cat([batch.actions[:, None], x], 1), batch.valid, noise=noise, t=t)
    expected = errors[:, 0].mean() + 2 * (w * errors[:, 1:].clamp(max=1.5)).sum(1).mean()
    torch.testing.assert_close(grads(loss, policy), grads(expected, policy))


def test_candidates_are_weighed_by_the_target_critic():
    poco = build(eta=0.01)
    before = poco(batch_of(poco), "online")[1]
    changed = build(eta=0.01)
    for p in changed.critic.parameters():
        p.data *= -1
    torch.testing.assert_close(changed(batch_of(poco), "online")[1]["posterior_loss"], before["posterior_loss"])
    for p in changed.target_critic.parameters():
        p.data *= -1
    changed.rng = build().rng
    assert changed(batch_of(poco), "online")[1]["posterior_loss"] != pytest.approx(before["posterior_loss"].item())


@pytest.mark.parametrize(("eta", "size"), [(1e-9, 1.0), (1e9, 4.0)])
def test_effective_sample_size_goes_from_1_to_n(eta, size):
    poco = build(eta=eta)
    metrics = poco(batch_of(poco), "online")[1]
    assert metrics["effective_sample_size"].item() == pytest.approx(size, abs=1e-6)
    assert metrics["max_weight"].item() == pytest.approx(1 / size, abs=1e-6)


def test_one_candidate_is_enough():
    poco = build(num_candidates=1)
    loss, metrics = poco(batch_of(poco), "online")
    assert loss.isfinite()
    assert metrics["max_weight"].item() == 1
    assert metrics["candidate_q_std"].item() == 0


def test_every_scalar_is_detached_finite_and_0d():
    poco = build()
    for stage in ("sft", "warmup", "online"):
        for name, value in poco(batch_of(poco), stage)[1].items():
            assert value.ndim == 0, name
            assert value.isfinite(), name
            assert not value.requires_grad, name


IS_DEMO = torch.tensor([True, True, False, False, False, False])
IS_SUCCESS = torch.tensor([False, True, False, True, False, False])


@pytest.mark.parametrize(
    ("anchor", "rows"),
    [("all", [0, 1, 2, 3, 4, 5]), ("demos", [0, 1]), ("demos_and_successes", [0, 1, 3])],
)
def test_the_anchor_imitates_the_chunks_it_names(anchor, rows):
    """The BC loss is the mean error of those rows, and no other row's action has a gradient."""
    poco = build(anchor=anchor, warmup_bc=True)
    actions = batch_of(poco).actions.clone().requires_grad_()
    batch = batch_of(poco, actions=actions, is_demo=IS_DEMO, is_success=IS_SUCCESS)
    poco.critic_loss = lambda prefix, batch, noise: (torch.zeros(()), {})
    loss, metrics = poco(batch, "warmup")
    per_row = torch.autograd.grad(loss, actions)[0].flatten(1).any(dim=1)
    assert per_row.nonzero().flatten().tolist() == rows
    script = build().rng
    script.normal(actions[:, None].shape, actions)  # of the critic's bootstrap sample
    noise = script.normal(actions[:, None].shape, actions)
    t = script.time(poco.policy.sample_time, (6, 1), actions)
    errors = flow_errors(poco.policy, poco.policy.encode(batch.obs), actions[:, None], batch.valid, noise=noise, t=t)
    assert metrics["bc_loss"].item() == pytest.approx(errors[rows, 0].mean().item())


def test_a_batch_without_an_anchor_has_bc_loss_0():
    poco = build(anchor="demos")
    loss, metrics = poco(batch_of(poco, is_demo=torch.zeros(6, dtype=torch.bool)), "online")
    assert metrics["bc_loss"].item() == 0
    assert all(g.isfinite().all() for g in grads(loss, poco.policy))


def test_sft_is_the_mean_flow_error_and_leaves_the_critic_alone():
    poco = build()
    batch = batch_of(poco)
    loss, metrics = poco(batch, "sft")
    script = build().rng
    noise, t = script.normal((6, 1, 3, 2), batch.actions), script.time(poco.policy.sample_time, (6, 1), batch.actions)
    prefix = poco.policy.encode(batch.obs)
    expected = flow_errors(poco.policy, prefix, batch.actions[:, None], batch.valid, noise=noise, t=t).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["bc_loss"], expected)
    assert all(g is None for g in grads(loss, poco.critic))


@pytest.mark.parametrize("warmup_bc", [False, True])
def test_warmup_trains_the_actor_only_when_asked(warmup_bc):
    poco = build(warmup_bc=warmup_bc)
    loss, metrics = poco(batch_of(poco), "warmup")
    assert all((g is not None) == warmup_bc for g in grads(loss, poco.policy))
    assert all(g is not None for g in grads(loss, poco.critic))
    assert ("bc_loss" in metrics) == warmup_bc


def critic_numbers(poco, batch):
    """Q of each critic on the data, and next values of each target critic, from the draws of an update."""
    next_prefix, script = poco.policy.encode(batch.next_obs), build().rng
    chunk = propose(poco.policy, next_prefix, 1, noise=script.normal((len(batch), 1, 3, 2), batch.actions))
    with torch.no_grad():
        next_q = poco.target_critic(next_prefix.features, chunk)[..., 0]
        return poco.critic(poco.policy.encode(batch.obs).features, batch.actions[:, None])[..., 0], next_q


@pytest.mark.parametrize("aggregation", ["mean", "min"])
def test_critic_loss_is_the_mean_squared_td_error(aggregation):
    poco = build(aggregation=aggregation)
    batch = batch_of(poco)
    q, next_q = critic_numbers(poco, batch)
    pooled = next_q.mean(0) if aggregation == "mean" else next_q.min(0).values
    loss, metrics = poco.critic_loss(poco.policy.encode(batch.obs), batch)
    y = batch.returns + 0.9 * pooled
    assert loss.item() == pytest.approx((q - y).square().mean().item())
    assert metrics["target"].item() == pytest.approx(y.mean().item())


def test_min_aggregation_is_used_in_the_e_step_too():
    low, mean = build(aggregation="min"), build()
    q = [poco(batch_of(poco), "online")[1]["candidate_q"].item() for poco in (low, mean)]
    assert q[0] < q[1]


@pytest.mark.parametrize(
    ("options", "divisor", "rows"),
    [
        ({}, 6, [0, 1, 2, 3, 4, 5]),
        ({"drop_crossing": True}, 4, [0, 1, 2, 3]),
        ({"drop_crossing": True, "error_mean": "all"}, 6, [0, 1, 2, 3]),
    ],
)
def test_chunks_that_cross_an_episodes_end(options, divisor, rows):
    """Ours keeps them; the option drops them; the authors' code drops them and divides by the whole batch."""
    poco = build(**options)
    valid = torch.ones(6, 3, dtype=torch.bool)
    valid[4:, 1:] = False
    batch = batch_of(poco, valid=valid)
    q, next_q = critic_numbers(poco, batch)
    squared = (q - batch.returns - 0.9 * next_q.mean(0)).square().mean(0)
    loss, _ = poco.critic_loss(poco.policy.encode(batch.obs), batch)
    assert loss.item() == pytest.approx(squared[rows].sum().item() / divisor)


def test_what_stands_behind_a_terminal_does_not_matter():
    """A placeholder of NaN as the next observation, where discount is 0: same loss, same finite gradients."""
    discount = torch.full((6,), 0.9).double()
    discount[2] = 0
    one, two = build(), build()
    rubbish = batch_of(two).next_obs["state"].clone()
    rubbish[2] = math.nan
    loss, _ = one(batch_of(one, discount=discount), "online")
    same, _ = two(batch_of(two, discount=discount, next_obs={"state": rubbish}), "online")
    torch.testing.assert_close(same, loss)
    torch.testing.assert_close(grads(same, two.critic), grads(loss, one.critic))


def test_auto_zeta_must_be_calibrated_first_and_then_is_the_stated_quantile():
    """Of 0, 1, ..., 10 the 0.9 quantile is 9; it is saved and loaded with the weights."""
    poco = build(zeta="auto", zeta_quantile=0.9)
    with pytest.raises(ConfigError, match="calibrate_zeta"):
        poco(batch_of(poco), "online")
    assert poco.calibrate_zeta(torch.arange(11.0)) == pytest.approx(9)
    calibrated, fixed, loaded = poco, build(zeta=9.0), build(zeta="auto")
    loaded.load_state_dict(poco.state_dict())
    calibrated.rng = build().rng
    losses = [p(batch_of(p), "online")[0].item() for p in (calibrated, fixed, loaded)]
    assert losses[0] == pytest.approx(losses[1])
    assert losses[2] == pytest.approx(losses[1])


def test_after_a_step_the_target_critic_moves_by_tau():
    poco = build(tau=0.25)
    old = [p.clone() for p in poco.target_critic.parameters()]
    poco.after_step("online")
    for target, before, online in zip(poco.target_critic.parameters(), old, poco.critic.parameters(), strict=True):
        torch.testing.assert_close(target, 0.75 * before + 0.25 * online)


def test_two_processes_losses_average_to_one_processs():
    """Rows 0-2 and 3-5 of one batch, draws split by rank: the mean of the losses is the whole batch's."""
    whole = build()
    batch = batch_of(whole)
    loss = whole(batch, "online")[0]

    halves = []
    for rank, index in enumerate((slice(0, 3), slice(3, 6))):
        halves.append(build(world_size=2, rank=rank)(batch.rows(index), "online")[0])
    torch.testing.assert_close(sum(halves) / 2, loss)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "options",
    [{}, {"anchor": "demos", "drop_crossing": True, "warmup_bc": True}, {"error_mean": "all", "drop_crossing": True}],
)
@pytest.mark.parametrize("size", [1, 4, 5])
def test_the_micro_batches_of_an_update_add_up_to_the_whole(stage, options, size):
    """Loss, figures and gradients, to float64's rounding, whichever transitions count and however unequal the parts."""
    poco = build(**options)
    valid = torch.ones(6, 3, dtype=torch.bool)
    valid[1, 2] = valid[4, 1:] = False
    batch = batch_of(poco, is_demo=IS_DEMO, valid=valid)
    noise = poco.draw_noise(batch, stage)
    whole, figures = poco(batch, stage, noise)
    whole.backward()
    expected = [p.grad for p in poco.parameters()]
    poco.zero_grad()
    total, sums = 0, dict.fromkeys(figures, 0)
    pieces = list(micro_batches(batch, noise, size))
    assert [len(rows) for rows, _, _ in pieces] == {1: [1] * 6, 4: [3, 3], 5: [3, 3]}[size]
    for rows, its_noise, share in pieces:
        loss, its_figures = poco(rows, stage, its_noise)
        (loss * share).backward()
        total += loss.detach() * share
        sums = {name: sums[name] + value * share for name, value in its_figures.items()}
    torch.testing.assert_close(total, whole.detach())
    torch.testing.assert_close(sums, figures)
    torch.testing.assert_close([p.grad for p in poco.parameters()], expected)


@pytest.mark.parametrize(
    "stage", [pytest.param(s, marks=() if s == "online" else pytest.mark.exhaustive) for s in STAGES]
)
def test_an_update_is_one_graph(stage):
    """A process of its own: the machine-checked signatures of the test run cannot be traced."""
    script = Path(__file__).parents[1] / "compiled_update.py"
    forked.run([sys.executable, script, stage], check=True)


def test_noise_that_is_given_is_the_one_that_would_be_drawn():
    one, two = build(), build()
    batch = batch_of(one)
    assert one(batch, "online")[0].item() == two(batch, "online", two.draw_noise(batch, "online"))[0].item()


def test_candidates_in_bfloat16_are_close_and_their_errors_and_values_are_still_exact():
    """At most 0.05 from the float32 ones (bfloat16 keeps 8 bits, and ten steps add up); what is learned from them, the
    flow errors and both gradients, is float32 as before: on the same candidates it does not change by a bit."""
    policy = ToyPolicy(hidden=(64, 64), flow_steps=10)
    seen = {}
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        poco = Poco(
            policy, PocoConfig(**(SMALL | {"sampling_dtype": dtype})), GlobalBatchRNG(torch.Generator().manual_seed(0))
        )
        batch = toy_batch(policy, 32)
        proposed = []
        poco._propose = lambda prefix, noise, of=poco, kept=proposed: (
            kept.append(Poco._propose(of, prefix, noise)) or kept[-1]
        )
        loss, _ = poco(batch, "online")
        seen[dtype], bootstrap = proposed
        assert all(g.dtype == torch.float32 for g in grads(loss, policy))
        assert torch.equal(bootstrap, seen.setdefault("bootstrap", bootstrap))
    gap = (seen["float32"] - seen["bfloat16"]).abs().max().item()
    assert seen["bfloat16"].dtype == torch.float32
    assert 0 < gap < 0.05


# A two-mode bandit: one state, a chunk of one step, demonstrations half at (-1/2, 0) and half at (1/2, 0).

LEFT, RIGHT, SPREAD = torch.tensor([-0.5, 0.0]), torch.tensor([0.5, 0.0]), 0.05


def true_reward(a):
    """1 at the right mode, falling off around it."""
    return torch.exp(-(a - RIGHT).square().sum(-1) / (2 * 0.15**2))


def overestimated(a):
    """What a critic makes of that reward where it has no data: the further right, the better."""
    return a[..., 0]


def share_at(mode, a):
    return ((a - mode).norm(dim=-1) < 0.2).float().mean().item()


class Known(nn.Module):
    """A critic that is a function of the action."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, features, chunk):
        return self.function(chunk[:, :, 0])[None]


def bandit_batch(actions, is_demo):
    size = len(actions)
    return ChunkBatch(
        obs={"state": torch.zeros(size, 1)},
        next_obs={"state": torch.zeros(size, 1)},
        actions=actions[:, None],
        valid=torch.ones(size, 1, dtype=torch.bool),
        returns=torch.zeros(size),
        discount=torch.zeros(size),
        is_demo=is_demo,
        is_success=(actions - RIGHT).norm(dim=-1) < 0.2,
    )


@pytest.fixture(scope="module", params=[0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (1, 2))])
def imitator(request):
    """1,500 BC updates on 200 demonstrations."""
    generator = torch.Generator().manual_seed(request.param)
    modes = torch.cat([LEFT.expand(100, 2), RIGHT.expand(100, 2)])
    demos = modes + SPREAD * torch.randn(200, 2, generator=generator)
    policy = ToyPolicy(state_dim=1, horizon=1, flow_steps=5, hidden=(64, 64), seed=request.param)
    poco = Poco(policy, PocoConfig(critic_hidden=(4,)), GlobalBatchRNG(generator))
    optimizer = torch.optim.Adam(policy.head.parameters(), lr=6e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=1500)
    for _ in range(1500):
        rows = torch.randint(200, (128,), generator=generator)
        loss, _ = poco(bandit_batch(demos[rows], torch.ones(128, dtype=torch.bool)), "sft")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return policy, demos, request.param


def practise(imitator, critic, updates=300, **options):
    """Alternate 64 own actions, added to the pool, with one joint update; actions of the first 3 and last 75 rounds."""
    policy, pool, seed = imitator
    policy, generator = deepcopy(policy), torch.Generator().manual_seed(100 + seed)
    config = PocoConfig(**({"num_candidates": 8, "eta": 0.1, "critic_hidden": (4,)} | options))
    poco = Poco(policy, config, GlobalBatchRNG(generator))
    poco.target_critic = Known(critic)
    optimizer = torch.optim.Adam(policy.head.parameters(), lr=1e-3)
    rounds = []
    for _ in range(updates):
        rounds.append(propose(policy, policy.encode({"state": torch.zeros(64, 1)}), 1, generator=generator)[:, 0, 0])
        pool = torch.cat([pool, rounds[-1]])
        rows = torch.randint(len(pool), (128,), generator=generator)
        loss, _ = poco(bandit_batch(pool[rows], rows < 200), "online")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.cat(rounds[:3]), torch.cat(rounds[-75:])


def test_the_posterior_moves_the_mass_to_the_better_mode(imitator):
    """The paper's objective (anchor on all of D, own actions included; beta 1, zeta 0.3) and the true reward as critic.
    Measured, seeds 0 to 2: the right mode's share of the samples at a mode goes from .47/.45/.55 to above .99, samples
    at a mode from .83/.80/.89 to .71/.76/.73, mean reward from .37/.34/.46 to .69/.72/.70. Without the posterior
    (beta 0) a policy that imitates its own samples falls apart: mean reward .12/.10/.12."""
    first, last = practise(imitator, true_reward, zeta=0.3)
    right, left = share_at(RIGHT, last), share_at(LEFT, last)
    assert 0.3 < share_at(RIGHT, first) / (share_at(RIGHT, first) + share_at(LEFT, first)) < 0.7
    assert right / (right + left) > 0.9
    assert right > 0.6
    assert true_reward(last).mean() > true_reward(first).mean() + 0.15
    _, imitated = practise(imitator, true_reward, beta=0.0)
    assert true_reward(last).mean() > true_reward(imitated).mean() + 0.3


def test_the_clip_withstands_a_critic_that_overestimates_what_it_has_not_seen(imitator):
    """The critic prefers whatever lies further right, beyond the mode, too; the anchor is demonstrations and successes
    (which on its own moves the mass to the right mode, too: this test is about what the posterior term then spoils).
    Measured, seeds 0 to 2, share of samples at the right mode and mean true reward after 300 updates:
    zeta 0.1 .96/.96/.96 and .85/.86/.81; no clip .79/.87/.66 and .55/.62/.45; beta 10 .69/.64/.67 and .49/.49/.45."""
    options = {"anchor": "demos_and_successes", "zeta": 0.1}
    clipped, unclipped, heavy = (
        practise(imitator, overestimated, **(options | change))[1]
        for change in ({}, {"zeta": math.inf}, {"beta": 10.0})
    )
    assert share_at(RIGHT, clipped) > 0.9
    for degraded in (unclipped, heavy):
        assert true_reward(degraded).mean() < true_reward(clipped).mean() - 0.12
        assert share_at(RIGHT, degraded) < share_at(RIGHT, clipped) - 0.05


def test_the_actor_stays_in_eval_mode():
    """Dropout in a head would make candidates of the policy's samples something else."""
    policy = load_adapter("flow_mlp").tiny()
    policy.train()
    assert not Poco(policy, PocoConfig(critic_hidden=(8,))).policy.training


# -- options that other methods teach ---------------------------------------------------------------------------------


def test_a_learned_temperature_keeps_its_bound_and_touches_nothing_else():
    """Gradient descent on the dual alone ends at the temperature whose weights diverge from equal ones by the bound;
    policy and critic have the gradients of that temperature held fixed."""
    poco = build(eta_bound=0.3, eta=5.0)
    batch = batch_of(poco)
    plan = poco.draw_noise(batch, "online")
    optimizer = torch.optim.Adam([poco.eta_parameter], lr=0.05)
    for _ in range(400):
        loss, metrics = poco(batch, "online", plan)
        optimizer.zero_grad()
        poco.eta_parameter.grad = torch.autograd.grad(loss, poco.eta_parameter)[0]
        optimizer.step()
    q = poco.target_critic(
        poco.encode(batch).features, propose(poco.policy, poco.encode(batch), 4, noise=plan.candidate_noise)
    )
    w = torch.softmax(q.mean(dim=0) / metrics["eta"], dim=-1)
    divergence = (w * (w * 4).log()).sum(dim=-1).mean().item()
    assert divergence == pytest.approx(0.3, abs=0.01)
    fixed = build(eta=metrics["eta"].item())
    loss, _ = poco(batch, "online", plan)
    expected, _ = fixed(batch, "online", plan)
    for name in ("policy", "critic"):
        torch.testing.assert_close(grads(loss, getattr(poco, name)), grads(expected, getattr(fixed, name)))


def test_a_learned_temperature_is_a_group_of_its_own_and_comes_back():
    poco, other = build(eta_bound=0.3, eta=0.5), build(eta_bound=0.3, eta=0.1)
    groups = {group["name"]: group for group in poco.parameter_groups(1e-3, 2e-3)}
    assert groups["temperature"]["lr"] == 2e-3
    assert [poco.trained_groups(stage) for stage in STAGES] == [
        {"actor"},
        {"critic"},
        {"actor", "critic", "temperature"},
    ]
    other.load_state_dict(poco.state_dict())
    assert other(batch_of(other), "online")[1]["eta"].item() == pytest.approx(0.5)
    assert "temperature" not in {group["name"] for group in build().parameter_groups()}


@pytest.mark.parametrize("bound", [0.0, -1.0, math.log(4), math.nan])
def test_a_bound_that_no_weights_can_reach_is_refused(bound):
    with pytest.raises(ConfigError, match="eta_bound"):
        PocoConfig(num_candidates=4, eta_bound=bound)


def test_an_ensemble_of_ten_less_its_spread_makes_target_and_weights():
    poco = build(critic_members=10, aggregation="mean_minus_std", std_weight=0.5)
    batch = batch_of(poco)
    plan = poco.draw_noise(batch, "online")
    _, metrics = poco(batch, "online", plan)
    x = propose(poco.policy, poco.encode(batch), 4, noise=plan.candidate_noise)
    q = poco.target_critic(poco.encode(batch).features, x)
    torch.testing.assert_close(metrics["candidate_q"], (q.mean(0) - 0.5 * q.std(0, correction=0)).mean())
    following = propose(poco.policy, poco.encode_next(batch), 1, noise=plan.next_noise)
    q = poco.target_critic(poco.encode_next(batch).features, following)[..., 0]
    expected = batch.returns + batch.discount * (q.mean(0) - 0.5 * q.std(0, correction=0))
    torch.testing.assert_close(metrics["target"], expected.mean())
