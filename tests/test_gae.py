"""Advantages, returns, reward scaling and PPO's surrogate, by hand."""

import pytest
import torch

from poco_vla.gae import RewardScaler, clipped_surrogate, generalized_advantages, n_step_returns


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def test_advantages_by_hand():
    """d = 0.5, lambda 0.5; deltas 1 + 2 - 1 = 2, 1 + 3 - 4 = 0, 1 + 0 - 6 = -5 (the last one terminates).
    A_2 = -5, A_1 = 0 + 0.25 * -5 = -1.25, A_0 = 2 + 0.25 * -1.25."""
    values, discounts = column(1, 4, 6, 9), column(0.5, 0.5, 0)
    advantages = generalized_advantages(column(1, 1, 1), values, discounts, lam=0.5)
    torch.testing.assert_close(advantages, column(1.6875, -1.25, -5))


def test_lambda_1_is_the_monte_carlo_return_and_0_is_one_step_td():
    rewards, values, discounts = torch.rand(6, 2), torch.rand(7, 2), 0.9 * (torch.rand(6, 2) > 0.2)
    td = generalized_advantages(rewards, values, discounts, lam=0.0)
    torch.testing.assert_close(td, rewards + discounts * values[1:] - values[:-1])
    full = generalized_advantages(rewards, values, discounts, lam=1.0)
    torch.testing.assert_close(full + values[:-1], n_step_returns(rewards, values, discounts, n=6))


def test_returns_of_two_steps_by_hand():
    """d = 0.5: G_0 = 1 + 0.5 (2 + 0.5 * 40), G_1 = 2 + 0.5 (4 + 0.5 * 80); G_2 ends after one reward."""
    returns = n_step_returns(column(1, 2, 4), column(10, 20, 40, 80), column(0.5, 0.5, 0.5), n=2)
    torch.testing.assert_close(returns, column(12, 24, 44))


def test_no_gradient_reaches_the_values():
    values = torch.rand(4, 1, requires_grad=True)
    for advantages in (
        generalized_advantages(torch.rand(3, 1), values, torch.ones(3, 1), lam=0.9),
        n_step_returns(torch.rand(3, 1), values, torch.ones(3, 1), n=2),
    ):
        assert not advantages.requires_grad


def test_rewards_are_scaled_by_the_deviation_of_their_discounted_returns():
    """A long rollout in pieces: the deviation is that of all returns, which begin anew with an episode. The official
    merge of variances divides by one too few at every piece: 1/800 of the deviation each."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    firsts = torch.rand(400, 3, generator=generator) < 0.1
    returns, present = [], torch.zeros(3, dtype=torch.float64)
    for reward, first in zip(rewards, firsts, strict=True):
        present = reward + 0.9 * torch.where(first, 0, present)
        returns.append(present)
    scaler, running = RewardScaler(0.9), torch.zeros(3, dtype=torch.float64)
    for piece in range(0, 400, 100):
        rows = slice(piece, piece + 100)
        scaled = scaler(rewards[rows], firsts[rows], running)
    torch.testing.assert_close(running, returns[-1])
    deviation = torch.stack(returns).std()
    torch.testing.assert_close(scaled, (rewards[rows] / deviation).clamp(-10, 10), rtol=5e-3, atol=0)


@pytest.mark.parametrize(("log_ratio", "advantage", "loss"), [(0.5, 1.0, -1.1), (0.5, -1.0, 1.6487), (-0.5, -1.0, 0.9)])
def test_the_surrogate_takes_the_worse_of_ratio_and_clipped_ratio(log_ratio, advantage, loss):
    ratio = torch.tensor([[log_ratio]], requires_grad=True)
    got, metrics = clipped_surrogate(ratio, torch.tensor([[advantage]]), torch.tensor(0.1))
    assert got.item() == pytest.approx(loss, abs=1e-4)
    assert metrics["clipped_ratios"] == 1
    got.backward()
    assert (ratio.grad != 0).item() == (loss > 1)
