"""Dual variables of MPO: a learned temperature, and trust regions of Gaussians split into mean and spread.

MPO is Abdolmaleki et al. (2018b, "Relative Entropy Regularized Policy Iteration"), V-MPO is Song et al. (2020).
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-8
"""Least value of a dual variable that is the softplus of a parameter (acme)."""


def dual_of(log_dual: Float[Tensor, "*d"]) -> Float[Tensor, "*d"]:
    """Return the dual variable of its parameter: softplus, above 0."""
    return F.softplus(log_dual) + EPSILON


def parameter_of(dual: float) -> float:
    """Return the parameter whose `dual_of` is `dual`, above 0."""
    return dual + math.log(-math.expm1(-dual))


def temperature_loss(q: Float[Tensor, "B N"], eta: Float[Tensor, ""], *, epsilon: float) -> Float[Tensor, " B"]:
    """Dual of the E-step's bound KL(weights || uniform) <= epsilon, for each state: eta epsilon + eta log mean_j
    exp(Q_j / eta) (MPO Eq. 8). Its minimum over eta is the temperature of that bound; no gradient reaches `q`.

    Args:
        q: values of N samples of the policy.
        eta: the temperature, with a gradient.
        epsilon: the bound, in nats.
    """
    return eta * (epsilon + torch.logsumexp(q.detach() / eta, dim=-1) - math.log(q.shape[-1]))


def gaussian_kl(
    mean: Float[Tensor, "*b D"],
    std: Float[Tensor, "*b D"],
    other_mean: Float[Tensor, "*b D"],
    other_std: Float[Tensor, "*b D"],
) -> Float[Tensor, "*b D"]:
    """Return KL(N(mean, std) || N(other_mean, other_std)) of each dimension, in nats."""
    ratio = (std / other_std).square()
    return 0.5 * (ratio + ((mean - other_mean) / other_std).square() - 1 - ratio.log())


def trust_region_loss(
    kl: Float[Tensor, "B D"], alpha: Float[Tensor, " D"], *, epsilon: float
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Return the penalty sum_d alpha_d KL_d of each state, with a gradient of the policy alone, and the dual's loss
    sum_d alpha_d (epsilon - KL_d), with one of alpha alone (MPO Eq. 11). Their means over states are what counts.

    Args:
        kl: divergence of each state's new policy from its old one, per constraint.
        alpha: multiplier of each constraint.
        epsilon: its bound, in nats.
    """
    return (alpha.detach() * kl).sum(dim=-1), (alpha * (epsilon - kl.detach())).sum(dim=-1)


def top_samples_weights(
    advantages: Float[Tensor, " M"],
    eta: Float[Tensor, ""],
    *,
    epsilon: float,
    top: float = 0.5,
    counts: Bool[Tensor, " M"] | None = None,
) -> tuple[Float[Tensor, " M"], Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the E-step of V-MPO over all samples together: weights softmax(A / eta) of the best share of them, which
    are constants (Eq. 3), the loss of the temperature (Eq. 4), and how many samples were kept.

    Args:
        advantages: of each sample; no gradient reaches them.
        eta: the temperature, with a gradient.
        epsilon: bound of KL(weights || uniform), in nats.
        top: share of the samples that is kept.
        counts: samples that may be kept; all when None. The share is of all of them nevertheless (rlax).
    """
    counts = torch.ones_like(advantages, dtype=torch.bool) if counts is None else counts
    scaled = torch.where(counts, advantages.detach() / eta, 0.0)
    lowest = torch.finfo(scaled.dtype).min
    ranked = torch.where(counts, scaled, lowest).detach()
    threshold = ranked.topk(max(1, int(top * len(ranked)))).values[-1]
    kept = (ranked >= threshold) & counts
    largest = scaled.detach().max()
    unnormalized = torch.where(kept, (scaled - largest).exp(), 0.0)
    total, number = unnormalized.sum() + 1e-10, kept.sum().to(scaled)
    loss = eta * (epsilon + total.log() + largest - (number + 1e-10).log())
    return (unnormalized / total).detach(), loss, number


class Duals(nn.Module):
    """Temperatures and multipliers of MPO: the softplus of parameters (acme), or the parameters themselves (rlax).

    Args:
        constraints: D, trust regions, each of mean and spread.
        temperature: eta at first, in units of value.
        alpha_mean: multiplier of the mean's trust regions at first.
        alpha_std: that of the spread's.
        penalty: another temperature at first, of the penalty of actions beyond their range; None where there is none.
        direct: the parameters are the duals.
    """

    def __init__(
        self,
        constraints: int,
        *,
        temperature: float,
        alpha_mean: float,
        alpha_std: float,
        penalty: float | None,
        direct: bool,
    ) -> None:
        super().__init__()
        self.direct = direct
        numbers = {"temperature": (temperature, 1), "alpha_mean": (alpha_mean, constraints)}
        numbers |= {"alpha_std": (alpha_std, constraints)}
        numbers |= {} if penalty is None else {"penalty": (penalty, 1)}
        self.raw = nn.ParameterDict(
            {
                name: nn.Parameter(torch.full((size,), dual if direct else parameter_of(dual)))
                for name, (dual, size) in numbers.items()
            }
        )

    def forward(self, name: str) -> Float[Tensor, " d"]:
        """Return the dual variables of a name."""
        return self.raw[name] if self.direct else dual_of(self.raw[name])

    @torch.no_grad()
    def project(self) -> None:
        """Keep the duals above 0, after an optimizer step."""
        for parameter in self.raw.values():
            parameter.clamp_(min=1e-10 if self.direct else -18.0)
