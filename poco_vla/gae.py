"""Advantages and returns of rollouts, for algorithms that learn from their latest ones.

Shapes: S steps (of a chunk each) in E environments side by side, states included one more than steps.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from poco_vla.types import Metrics


def generalized_advantages(
    rewards: Float[Tensor, "S E"], values: Float[Tensor, "S1 E"], discounts: Float[Tensor, "S E"], *, lam: float
) -> Float[Tensor, "S E"]:
    """Return generalized advantage estimates A_t = delta_t + discount_t lambda A_{t+1}, with delta_t = r_t + discount_t
    V_{t+1} - V_t (Schulman et al., 2016). No gradient reaches `values`.

    Args:
        rewards: r_t of each step.
        values: V of each state, the one after the last step included.
        discounts: gamma, and 0 where the step ended in a state without a future.
        lam: lambda in [0, 1]; 0 is one-step TD, 1 the Monte-Carlo return.
    """
    values = values.detach()
    deltas = rewards + discounts * values[1:] - values[:-1]
    advantages, follows = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        follows = deltas[t] + discounts[t] * lam * follows
        advantages[t] = follows
    return advantages


def n_step_returns(
    rewards: Float[Tensor, "S E"], values: Float[Tensor, "S1 E"], discounts: Float[Tensor, "S E"], *, n: int
) -> Float[Tensor, "S E"]:
    """Return G_t = r_t + d_t (r_{t+1} + d_{t+1} (... + d_{t+n-1} V(s_{t+n}))), with fewer rewards and the last state's
    value where the rollout ends sooner. No gradient reaches `values`.

    Args:
        rewards: r_t of each step.
        values: V of each state, the one after the last step included.
        discounts: d_t: gamma, and 0 where the step ended in a state without a future.
        n: rewards in a return, at least 1.
    """
    returns = values.detach()[1:]
    steps = len(rewards)
    # returns[t] is V of the state that step t leads to; each pass puts one reward more before it, from the far end.
    returns = torch.stack([returns[min(t + n, steps) - 1] for t in range(steps)])
    for back in reversed(range(n)):
        for t in range(steps - back):
            returns[t] = rewards[t + back] + discounts[t + back] * returns[t]
    return returns


class RewardScaler(nn.Module):
    """Divide rewards by the running standard deviation of their discounted returns, as DPPO and ReinFlow do. Its
    statistics are buffers.

    Args:
        gamma: discount of these returns, per step.
        bound: largest magnitude of a scaled reward.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, gamma: float, bound: float = 10.0) -> None:
        super().__init__()
        self.gamma, self.bound = gamma, bound
        for name, start in (("mean", 0.0), ("var", 1.0), ("count", 1e-4)):
            self.register_buffer(name, torch.tensor(start, dtype=torch.float64))

    @torch.no_grad()
    def forward(
        self, rewards: Float[Tensor, "S E"], firsts: Bool[Tensor, "S E"], running: Float[Tensor, " E"]
    ) -> Float[Tensor, "S E"]:
        """Take a rollout into the statistics, and return its rewards, scaled by them.

        Args:
            rewards: of each step.
            firsts: True where a step is the first of its episode.
            running: discounted return of each environment's episode so far; updated in place.
        """
        returns = torch.empty(rewards.shape, dtype=torch.float64, device=rewards.device)
        for t, (reward, first) in enumerate(zip(rewards, firsts, strict=True)):
            returns[t] = running.copy_(reward + self.gamma * torch.where(first, 0, running))
        number, delta = returns.numel(), returns.mean() - self.mean
        total = self.count + number
        squares = self.var * self.count + returns.var(correction=0) * number
        squares = squares + delta.square() * self.count * number / total
        self.mean.add_(delta * number / total)
        self.var.copy_(squares / (total - 1))
        self.count.copy_(total)
        return (rewards / (self.var + 1e-8).sqrt()).clamp(-self.bound, self.bound).to(rewards)


def clipped_surrogate(
    log_ratio: Float[Tensor, "B M"], advantages: Float[Tensor, "B M"], clip: Float[Tensor, "*m"]
) -> tuple[Float[Tensor, ""], Metrics]:
    """Return PPO's policy loss, mean max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)) (Schulman et al., 2017, Eq. 7).

    Args:
        log_ratio: log-probability of each action less that by the weights that acted.
        advantages: of each, constants.
        clip: most by which a ratio may depart from 1, for all or for each of the M.

    Returns:
        The loss, and ``policy_loss`` (the same), ``approximate_kl`` (mean of ratio - 1 - log ratio, in nats),
        ``clipped_ratios`` (share beyond the clip) and ``ratio`` (mean).
    """
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)).mean()
    departed = ratio.detach() - 1
    return loss, {
        "policy_loss": loss.detach(),
        "approximate_kl": (departed - log_ratio.detach()).mean(),
        "clipped_ratios": (departed.abs() > clip).to(ratio).mean(),
        "ratio": ratio.detach().mean(),
    }
