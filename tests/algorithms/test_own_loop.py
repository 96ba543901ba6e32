"""A loop of the user's own: a batch built from tensors, a loss, a step, without any of the library's training."""

import pytest
import torch
from lerobot_policy_flow_mlp.adapter import FlowMlp
from toy_policies import ToyPolicy

from poco_vla import ChunkBatch, Poco, PocoConfig
from poco_vla.algorithms import STAGES
from poco_vla.algorithms.imitation import Imitation

SIZE = 64


def batch_for(policy, obs):
    """Transitions of a made-up task: the better a chunk, the nearer it is to 0.3 everywhere."""
    spec = policy.spec
    actions = torch.zeros(SIZE, spec.horizon, spec.width)
    actions[..., : spec.action_dim] = 0.3 + 0.1 * torch.randn(SIZE, spec.horizon, spec.action_dim)
    return ChunkBatch(
        obs=obs,
        next_obs=obs,
        actions=actions,
        valid=torch.ones(SIZE, spec.horizon, dtype=torch.bool),
        returns=-(actions - 0.3).square().mean(dim=(1, 2)),
        discount=torch.full((SIZE,), 0.9),
        is_demo=torch.ones(SIZE, dtype=torch.bool),
        is_success=torch.ones(SIZE, dtype=torch.bool),
    )


def toy():
    policy = ToyPolicy()
    return policy, batch_for(policy, {"state": torch.randn(SIZE, policy.feature_dim)})


def flow_mlp():
    policy = FlowMlp.tiny()
    return policy, batch_for(policy, policy.example_obs(batch_size=SIZE))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("make", [toy, flow_mlp])
def test_a_loop_of_ones_own_learns(make, stage):
    """150 Adam steps on one batch at least halve the mean loss of 10 steps, in each stage."""
    torch.manual_seed(0)
    policy, batch = make()
    algorithm = Poco(policy, PocoConfig(num_candidates=4, critic_hidden=(32, 32)))
    loss_of = {"sft": algorithm.sft_loss, "warmup": algorithm.warmup_loss, "online": algorithm.online_loss}[stage]
    optimizer = torch.optim.Adam(algorithm.parameter_groups(actor_lr=3e-3, critic_lr=3e-3))
    losses = []
    for _ in range(150):
        loss, _ = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        algorithm.after_step(stage)
        losses.append(loss.item())
    first, last = sum(losses[:10]), sum(losses[-10:])
    assert last < 0.5 * first


def test_the_same_loop_runs_an_algorithm_without_a_critic():
    torch.manual_seed(0)
    policy, batch = toy()
    algorithm = Imitation(policy)
    optimizer = torch.optim.Adam(algorithm.parameter_groups(actor_lr=3e-3))
    losses = []
    for _ in range(150):
        loss, metrics = algorithm.online_loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        algorithm.after_step("online")
        losses.append(metrics["bc_loss"].item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_a_trained_algorithm_acts():
    torch.manual_seed(0)
    policy, batch = toy()
    algorithm = Poco(policy, PocoConfig(critic_hidden=(8,)))
    prefix = policy.encode(batch.obs)
    for n in (1, 4):
        assert algorithm.act(prefix, n).shape == batch.actions.shape
