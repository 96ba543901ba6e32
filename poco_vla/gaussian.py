"""Diagonal Gaussians over chunks, squashed by tanh or not, the network that gives them, and the temperature of
maximum-entropy methods (SAC, arXiv 1812.05905)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from poco_vla.critic import ACTIVATIONS, Activation
from poco_vla.dense import linear

SQUASH_LIMIT = 1 - 1e-5
"""Largest magnitude of an action whose log-probability under a squashed Gaussian is asked for: atanh(1) is infinite."""


@dataclass(frozen=True)
class Gaussian:
    """N(mean, diag(std^2)) over chunks, one for each state.

    Attributes:
        mean: of each number of a chunk.
        std: its standard deviation.
    """

    mean: Float[Tensor, "*batch H A"]
    std: Float[Tensor, "*batch H A"]

    def log_prob(self, chunk: Float[Tensor, "*batch H A"]) -> Float[Tensor, "*batch"]:
        """Return log N(chunk), summed over steps and dimensions, in nats."""
        z = (chunk - self.mean) / self.std
        return (-0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)).flatten(-2).sum(dim=-1)

    def sample(self, noise: Float[Tensor, "*batch H A"]) -> Float[Tensor, "*batch H A"]:
        """Return mean + std * noise; gradients reach mean and std."""
        return self.mean + self.std * noise


@dataclass(frozen=True)
class SquashedGaussian:
    """Distribution of tanh(u), u ~ N(mean, diag(std^2)), over chunks in (-1, 1).

    Attributes:
        base: distribution of u.
        epsilon: of log(1 - tanh(u)^2 + epsilon), by which Stable-Baselines3 computes the log-determinant; 0 is exact.
    """

    base: Gaussian
    epsilon: float = 0.0

    @property
    def mode(self) -> Float[Tensor, "*batch H A"]:
        """Return tanh(mean)."""
        return self.base.mean.tanh()

    def sample(self, noise: Float[Tensor, "*batch H A"]) -> tuple[Float[Tensor, "*batch H A"], Float[Tensor, "*batch"]]:
        """Return tanh(mean + std * noise) and its log-probability; gradients reach mean and std through both."""
        u = self.base.sample(noise)
        return u.tanh(), self._log_prob(u)

    def log_prob(self, chunk: Float[Tensor, "*batch H A"]) -> Float[Tensor, "*batch"]:
        """Return the log-probability of chunks, which are clipped to +-`SQUASH_LIMIT`."""
        return self._log_prob(chunk.clamp(-SQUASH_LIMIT, SQUASH_LIMIT).atanh())

    def _log_prob(self, u: Float[Tensor, "*batch H A"]) -> Float[Tensor, "*batch"]:
        if self.epsilon:
            log_det = (1 - u.tanh().square() + self.epsilon).log()
        else:
            log_det = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return self.base.log_prob(u) - log_det.flatten(-2).sum(dim=-1)


class GaussianNetwork(nn.Module):
    """MLP from features to a diagonal Gaussian over a chunk: mean and log standard deviation are linear in the last
    hidden layer.

    Args:
        feature_dim: D, of the input.
        horizon: H.
        width: A, numbers per step of the chunk.
        hidden: widths of the hidden layers.
        activation: of the hidden layers.
        layer_norm_eps: epsilon of a LayerNorm before each activation; None is no LayerNorm.
        log_std: range that the log standard deviation is clipped to.
    """

    def __init__(
        self,
        feature_dim: int,
        horizon: int,
        width: int,
        *,
        hidden: Sequence[int],
        activation: Activation = "relu",
        layer_norm_eps: float | None = None,
        log_std: tuple[float, float] = (-20.0, 2.0),
    ) -> None:
        super().__init__()
        self.horizon, self.width, self.log_std_range = horizon, width, log_std
        self.activation = ACTIVATIONS[activation]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise((feature_dim, *hidden)))
        norms = () if layer_norm_eps is None else (nn.LayerNorm(o, eps=layer_norm_eps) for o in hidden)
        self.norms = nn.ModuleList(norms)
        self.mean = nn.Linear(hidden[-1], horizon * width)
        self.log_std = nn.Linear(hidden[-1], horizon * width)

    def forward(self, features: Float[Tensor, "B D"]) -> Gaussian:
        """Return the Gaussian of each state, always in the precision of the weights."""
        with torch.autocast(features.device.type, enabled=False):
            h = features.to(self.mean.weight.dtype)
            for i, layer in enumerate(self.layers):
                h = _linear(h, layer)
                h = self.activation(self.norms[i](h) if len(self.norms) else h)
            shape = (len(h), self.horizon, self.width)
            log_std = _linear(h, self.log_std).clamp(*self.log_std_range)
            return Gaussian(_linear(h, self.mean).view(shape), log_std.exp().view(shape))


def _linear(x: Float[Tensor, "B I"], layer: nn.Module) -> Float[Tensor, "B O"]:
    layer = cast("nn.Linear", layer)
    return linear(x, layer.weight, layer.bias)


class Temperature(nn.Module):
    """Weight alpha = exp(log_alpha) of the entropy, learned so that a policy keeps a given one (SAC, section 5).

    Args:
        initial: alpha at first, above 0.
    """

    def __init__(self, initial: float = 1.0) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor([math.log(initial)]))  # [1]: FSDP2 cuts no scalars

    def forward(self) -> Float[Tensor, ""]:
        """Return alpha; no gradient reaches log_alpha."""
        return self.log_alpha.detach().exp()[0]

    def loss(self, entropy: Float[Tensor, ""], target: float, *, log: bool = False) -> Float[Tensor, ""]:
        """Return alpha * (entropy - target), which lowers alpha where the entropy is above its target.

        Args:
            entropy: of the policy, in nats; no gradient reaches it.
            target: entropy that is to be kept, in nats.
            log: take log_alpha in the place of alpha, as Stable-Baselines3 does.
        """
        weight = self.log_alpha if log else self.log_alpha.exp()
        return weight[0] * (entropy.detach() - target)
