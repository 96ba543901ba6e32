"""The chunk critic: an ensemble of Q functions of a state's features and a whole action chunk (POCO Eq. 14)."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": partial(F.gelu, approximate="tanh"),  # flax's nn.gelu, which the authors' code uses
    "relu": F.relu,
}
"""Activations by configuration name."""

type Activation = Literal["silu", "gelu", "relu"]


class ChunkCritic(nn.Module):
    """E independent MLPs Q_e(features, chunk), computed together as batched matrix products.

    Each hidden layer is Linear -> activation -> LayerNorm (the authors' order). The first layer's share of the state
    is computed once per state and added to every candidate's.

    Args:
        feature_dim: D.
        horizon: H.
        action_dim: real action dimensions; padded ones are never read.
        hidden: widths of the hidden layers.
        members: E.
        activation: "silu" (paper) or "gelu" (the authors' code, tanh approximation).
        layer_norm_eps: the authors' code has 1e-6.
    """

    def __init__(
        self,
        feature_dim: int,
        horizon: int,
        action_dim: int,
        *,
        hidden: Sequence[int] = (512, 512, 512, 512),
        members: int = 2,
        activation: Activation = "silu",
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.action_dim = action_dim
        self.activation = ACTIVATIONS[activation]
        self.layer_norm_eps = layer_norm_eps
        widths = (feature_dim + horizon * action_dim, *hidden, 1)
        sizes = list(pairwise(widths))
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(members, i, o)) for i, o in sizes)
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(members, 1, o)) for _, o in sizes)
        self.gains = nn.ParameterList(nn.Parameter(torch.ones(members, 1, o)) for o in hidden)
        self.shifts = nn.ParameterList(nn.Parameter(torch.zeros(members, 1, o)) for o in hidden)
        for (fan_in, _), weight, bias in zip(sizes, self.weights, self.biases, strict=True):
            # Deviation 6: torch.nn.Linear's initialisation; the authors' code has flax's.
            bound = 1 / math.sqrt(fan_in)
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, features: Float[Tensor, "B D"], chunk: Float[Tensor, "B N H A"]) -> Float[Tensor, "E B N"]:
        """Value of N chunks in each of B states, in units of discounted reward, one per ensemble member.

        Always in the precision of its own weights: eta is finer than what bfloat16 keeps of a value.
        """
        dtype = self.weights[0].dtype
        with torch.autocast(features.device.type, enabled=False):
            return self._values(features.to(dtype), chunk.to(dtype))

    def _values(self, features: Float[Tensor, "B D"], chunk: Float[Tensor, "B N H A"]) -> Float[Tensor, "E B N"]:
        batch, num, _, _ = chunk.shape
        members = self.weights[0].shape[0]
        actions = chunk[..., : self.action_dim].reshape(1, batch * num, -1).expand(members, -1, -1)
        state_weight, action_weight = self.weights[0].split([self.feature_dim, actions.shape[-1]], dim=1)
        of_state = torch.baddbmm(self.biases[0], features.expand(members, -1, -1), state_weight)
        of_action = torch.bmm(actions, action_weight).unflatten(1, (batch, num))
        h = self._normalise(0, (of_state.unsqueeze(2) + of_action).flatten(1, 2))
        for layer in range(1, len(self.gains)):
            h = self._normalise(layer, torch.baddbmm(self.biases[layer], h, self.weights[layer]))
        q = torch.baddbmm(self.biases[-1], h, self.weights[-1])
        return q.reshape(members, batch, num)

    def _normalise(self, layer: int, h: Float[Tensor, "E M W"]) -> Float[Tensor, "E M W"]:
        h = F.layer_norm(self.activation(h), h.shape[-1:], eps=self.layer_norm_eps)
        return torch.addcmul(self.shifts[layer], h, self.gains[layer])


def aggregate(q: Float[Tensor, "E B N"], how: Literal["mean", "min"] = "mean") -> Float[Tensor, "B N"]:
    """One value per chunk out of the ensemble's E: the mean (paper), or the pessimistic minimum."""
    return q.mean(dim=0) if how == "mean" else q.amin(dim=0)


def td_target(
    returns: Float[Tensor, " B"], discount: Float[Tensor, " B"], next_q: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Chunk TD target y = returns + discount * Q(s', a') (Eq. 14). No gradient reaches `next_q`.

    Args:
        returns: discounted reward of the executed steps.
        discount: gamma^n * not_terminal: 0 after a success or failure, gamma^n at a time limit or inside an episode.
        next_q: target value of one plain policy sample at the bootstrap state.
    """
    # where, not a product: a non-finite placeholder value behind a terminal must not leak through 0 * inf.
    return returns + torch.where(discount > 0, discount * next_q.detach(), 0)


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau online, parameter by parameter, in place."""
    # One call for all parameters; torch exports no public name for it.
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)  # pyright: ignore[reportPrivateImportUsage]
