"""Algorithms that learn from their latest rollouts: what trains, what is cut into micro-batches, what acts."""

import pytest
import torch
from toy_policies import ToyPolicy, toy_batch

from poco_vla import GlobalBatchRNG
from poco_vla.algorithms.on_policy.dppo import Dppo, DppoConfig
from poco_vla.algorithms.on_policy.reinflow import ReinFlow, ReinFlowConfig
from poco_vla.algorithms.on_policy.vmpo import Vmpo, VmpoConfig
from poco_vla.errors import ConfigError
from poco_vla.noise import micro_batches
from poco_vla.types import RolloutBatch


def rng():
    return GlobalBatchRNG(torch.Generator().manual_seed(0))


def reinflow_of(policy, **options):
    return ReinFlow(policy, ReinFlowConfig(**({"value_hidden": (8,), "noise_hidden": (8,)} | options)), rng())


def dppo_of(policy, **options):
    return Dppo(policy, DppoConfig(**({"value_hidden": (8,)} | options)), rng())


def half_dppo_of(policy):
    return dppo_of(policy, tuned_steps=2)


def vmpo_of(policy, **options):
    return Vmpo(policy, VmpoConfig(**({"value_hidden": (8,), "hidden": (8,)} | options)), rng())


ALL = [reinflow_of, dppo_of, half_dppo_of, vmpo_of]


def rollout(algorithm, size=6, advantages=None):
    """A rollout's batch, acted and looked back at by the present weights."""
    batch = toy_batch(algorithm.policy, size)
    prefix = algorithm.policy.encode(batch.obs)
    chunk, acted = algorithm.explore(prefix, torch.Generator().manual_seed(1))
    values, log_prob = algorithm.look_back(prefix, acted)
    fields = {name: value for name, value in vars(batch).items() if name != "actions"}
    advantages = torch.linspace(-1, 1, size) if advantages is None else advantages(chunk)
    known = {"values": values, "log_prob": log_prob, "advantages": advantages, "value_targets": advantages + values}
    return RolloutBatch(**fields, actions=chunk, acted=acted, **known)


@pytest.mark.parametrize("make", ALL)
def test_the_groups_that_a_phase_trains_are_those_with_a_gradient(make):
    algorithm = make(ToyPolicy())
    groups = {group["name"]: group["params"] for group in algorithm.parameter_groups(0.1, 0.2)}
    assert next(iter(groups)) == "actor"
    assert {id(p) for ps in groups.values() for p in ps} == {id(p) for p in algorithm.parameters() if p.requires_grad}
    for phase in ("sft", "warmup", "online"):
        algorithm.zero_grad(set_to_none=True)
        batch = toy_batch(algorithm.policy) if phase == "sft" else rollout(algorithm)
        algorithm(batch, phase)[0].backward()
        moved = {name for name, ps in groups.items() if any(p.grad is not None for p in ps)}
        assert moved == algorithm.trained_groups(phase)


@pytest.mark.parametrize("make", ALL)
def test_the_noise_of_a_batch_is_cut_with_it(make):
    """Loss and gradients of micro-batches add up to those of the batch."""
    algorithm = make(ToyPolicy())
    batch = rollout(algorithm)
    noise = algorithm.draw_noise(batch, "online")
    gradients = []
    for parts in ([(batch, noise, 1.0)], list(micro_batches(batch, noise, 2))):
        algorithm.zero_grad()
        total = sum(algorithm(rows, "online", its)[0] * share for rows, its, share in parts)
        total.backward()
        gradients.append([total.detach(), *(p.grad for p in algorithm.parameters() if p.grad is not None)])
    assert len(parts) == 3
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", ALL)
def test_the_view_for_acting_explores_and_acts_as_the_whole(make):
    algorithm = make(ToyPolicy())
    view, prefix = algorithm.for_acting(), algorithm.policy.encode(toy_batch(algorithm.policy).obs)
    assert "value" not in dict(view.named_children())
    for one, other in (
        (algorithm.act(prefix, 1, rng().generator), view.act(prefix, 1, rng().generator)),
        (algorithm.explore(prefix, rng().generator)[0], view.explore(prefix, rng().generator)[0]),
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("make", [reinflow_of, dppo_of, half_dppo_of])
def test_the_ratio_is_1_before_the_first_update(make):
    algorithm = make(ToyPolicy())
    metrics = algorithm(rollout(algorithm), "online")[1]
    assert metrics["ratio"].item() == pytest.approx(1, abs=1e-5)
    assert metrics["clipped_ratios"] == 0


@pytest.mark.parametrize("make", [reinflow_of, dppo_of, vmpo_of])
def test_padded_dimensions_are_no_part_of_the_density(make):
    """Other noise there changes neither the chunk's own numbers by itself nor the log-probability's size."""
    policy = ToyPolicy(width=4, action_dim=2)
    algorithm = make(policy)
    batch = rollout(algorithm)
    assert batch.actions.shape[-1] == 4
    assert not batch.actions[..., 2:].any()
    algorithm(batch, "online")[0].backward()


@pytest.mark.parametrize("make", [reinflow_of, dppo_of, vmpo_of])
def test_it_finds_the_better_chunk_of_a_bandit(make):
    """The advantage is minus the chunk's distance from 0.5: after some rollouts, chunks lie closer to it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fast = {"epsilon_mean": 0.1, "epsilon_std": 0.1} if make is vmpo_of else {"clip": 0.2, "target_kl": None}
        algorithm = make(ToyPolicy(horizon=1, width=1, flow_steps=2), **fast)
        optimizer = torch.optim.Adam(algorithm.parameter_groups(3e-3, 3e-3))
        distances = []
        for _ in range(30):
            algorithm.begin_rollout()
            batch = rollout(algorithm, 128, lambda chunk: -(chunk[:, 0, 0] - 0.5).abs())
            distances.append(-batch.advantages.mean().item())
            for _ in range(4):
                optimizer.zero_grad()
                algorithm.online_loss(batch)[0].backward()
                optimizer.step()
                algorithm.after_step("online")
    assert distances[-1] < 0.75 * distances[0]


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (ReinFlowConfig, {"min_std": 0.2}, "min_std is 0.2 and max_std 0.14"),
        (ReinFlowConfig, {"rollout_steps": 1}, "at least 2 chunks"),
        (ReinFlowConfig, {"discount": 1.5}, "discount is 1.5; it must lie in"),
        (DppoConfig, {"clip_base": 0.5}, "clip_base is 0.5; it must lie in"),
        (DppoConfig, {"std": 0.0}, "std is 0.0; it must be above 0"),
        (VmpoConfig, {"top": 0.0}, "top is 0.0; it must lie in"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(config, options, words):
    with pytest.raises(ConfigError, match=words):
        config(**options)


def test_more_tuned_steps_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="tuned_steps is 9, but the chain has 4"):
        dppo_of(ToyPolicy(), tuned_steps=9)
