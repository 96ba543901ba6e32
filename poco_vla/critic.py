"""The chunk critic: an ensemble of Q functions of a state's features and a whole action chunk (POCO Eq. 14)."""

import math
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from poco_vla.dense import batched_linear, ensemble_norm, gelu, layer_norm, row_blocks, suits_onednn
from poco_vla.types import Metrics

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": gelu,  # flax's nn.gelu, which the authors' code uses
    "relu": F.relu,
    "tanh": torch.tanh,
}
"""Activations by configuration name."""

type Activation = Literal["silu", "gelu", "relu", "tanh"]


class ChunkCritic(nn.Module):
    """E independent MLPs Q_e(features, chunk), computed together as batched matrix products.

    Each hidden layer is Linear -> activation -> LayerNorm (the order of POCO's and QC's authors), or Linear ->
    LayerNorm -> activation (RLPD, DSRL). The first layer's share of the state is computed once per state and added to
    every candidate's.

    Args:
        feature_dim: D.
        horizon: H.
        action_dim: real action dimensions; padded ones are never read.
        hidden: widths of the hidden layers.
        members: E.
        activation: "silu" (paper) or "gelu" (the authors' code, tanh approximation).
        layer_norm_eps: the authors' code has 1e-6.
        norm_first: LayerNorm comes before the activation.
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
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.action_dim = action_dim
        self.activation = ACTIVATIONS[activation]
        self.layer_norm_eps = layer_norm_eps
        self.norm_first = norm_first
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

    def forward(
        self,
        features: Float[Tensor, "B D"],
        chunk: Float[Tensor, "B N H A"],
        members: Int[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "E B N"]:
        """Value of N chunks in each of B states, in units of discounted reward, one per ensemble member.

        Always in the precision of its own weights: eta is finer than what bfloat16 keeps of a value.

        Args:
            features: of the states.
            chunk: N chunks for each.
            members: numbers of the members that are asked, in place of all E.
        """
        dtype = self.weights[0].dtype
        features, actions = features.to(dtype), chunk[..., : self.action_dim].flatten(2).to(dtype)
        with torch.autocast(features.device.type, enabled=False):
            parts = [self._of_members(features[rows], actions[rows], members) for rows in row_blocks(actions)]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _of_members(
        self, features: Float[Tensor, "B D"], actions: Float[Tensor, "B N HA"], members: Int[Tensor, " M"] | None
    ) -> Float[Tensor, "E B N"]:
        groups = [list(group) for group in (self.weights, self.biases, self.gains, self.shifts)]
        if members is not None:
            groups = [[p[members] for p in group] for group in groups]
        if not suits_onednn(actions):
            return self._values(features, actions, groups)
        # One after another, so that nothing is stacked but the values.
        parts = [[p.split(1) for p in group] for group in groups]
        each = range(len(groups[0][0]))
        return torch.cat([self._values(features, actions, [[p[e] for p in group] for group in parts]) for e in each])

    def _values(
        self, features: Float[Tensor, "B D"], actions: Float[Tensor, "B N HA"], groups: Sequence[Sequence[Tensor]]
    ) -> Float[Tensor, "E B N"]:
        batch, num, chunk_dim = actions.shape
        weights, biases, gains, shifts = groups
        members = len(weights[0])
        state_weight, action_weight = weights[0].split([self.feature_dim, chunk_dim], dim=1)
        of_state = batched_linear(features.expand(members, -1, -1), state_weight, biases[0])
        of_action = batched_linear(actions.flatten(0, 1).expand(members, -1, -1), action_weight)
        add = torch.add if torch.is_grad_enabled() else Tensor.add_
        h = add(of_action.unflatten(1, (batch, num)), of_state.unsqueeze(2)).flatten(1, 2)
        for weight, bias, gain, shift in zip(weights[1:], biases[1:], gains, shifts, strict=True):
            if self.norm_first:
                h = self.activation(ensemble_norm(h, gain, shift, self.layer_norm_eps))
            else:
                h = layer_norm(self.activation(h), self.layer_norm_eps)
                h = torch.addcmul(shift, h, gain, out=None if torch.is_grad_enabled() else h)
            h = batched_linear(h, weight, bias)
        return h.reshape(members, batch, num)


def values_for_actor(
    critic: nn.Module, features: Float[Tensor, "B D"], chunk: Float[Tensor, "B N H A"]
) -> Float[Tensor, "E B N"]:
    """Return what a critic makes of chunks, with a gradient for the chunks and none for its own weights."""
    frozen = {name: p.detach() for name, p in critic.named_parameters()}
    return torch.func.functional_call(critic, frozen, (features, chunk))


type Aggregation = Literal["mean", "min", "mean_minus_std"]
"""How an ensemble's values become one."""


def aggregate(q: Float[Tensor, "E B N"], how: Aggregation = "mean", std_weight: float = 1.0) -> Float[Tensor, "B N"]:
    """Return one value per chunk out of the ensemble's E: their mean (paper), the pessimistic minimum, or the mean less
    `std_weight` of their standard deviations (that of the E values, not of a population that they are drawn from)."""
    if how == "min":
        return q.amin(dim=0)
    mean = q.mean(dim=0)
    return mean if how == "mean" else mean - std_weight * q.std(dim=0, correction=0)


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


def td_loss(
    critic: nn.Module,
    features: Float[Tensor, "B D"],
    actions: Float[Tensor, "B H A"],
    target: Float[Tensor, " B"],
    weights: Float[Tensor, " B"],
) -> tuple[Float[Tensor, ""], Metrics]:
    """Return the mean over critics and batch of (Q_e(s, a) - y)^2 (Eq. 14), and ``critic_loss``, ``q``, ``target``.

    Args:
        critic: Q_e.
        features: of the states.
        actions: chunks that were executed.
        target: y, constants.
        weights: of each transition; their mean is 1.
    """
    q = critic(features, actions[:, None])[..., 0]
    loss = ((q - target).square().mean(dim=0) * weights).mean()
    return loss, {"critic_loss": loss.detach(), "q": q.detach().mean(), "target": target.mean()}


def best_of(x: Float[Tensor, "B N H A"], q: Float[Tensor, "B N"]) -> Float[Tensor, "B H A"]:
    """Return of N chunks of each state the one of the largest value."""
    return x[torch.arange(len(x), device=x.device), q.argmax(dim=1)]


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau online, parameter by parameter, in place."""
    # One call for all parameters; torch exports no public name for it.
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)  # pyright: ignore[reportPrivateImportUsage]


class TargetNetwork[N: nn.Module](nn.Module):
    """A network whose parameters are an exponential mean of another's, called as that one.

    Args:
        online: the network that it follows, and starts from.
        tau: share of the online network that is mixed in at every step.
        mixes: parameters of the online network that are mixed in: those from "after" the optimizer step, or those from
            "before" it, which takes a second copy of the network.
    """

    def __init__(self, online: N, tau: float, mixes: Literal["after", "before"] = "after") -> None:
        super().__init__()
        self.tau = tau
        self.network = deepcopy(online).requires_grad_(False)
        self.before = deepcopy(online).requires_grad_(False) if mixes == "before" else None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the network returns."""
        return self.network(*args, **kwargs)

    def follow(self, online: nn.Module) -> None:
        """Mix the online network in, after its optimizer step."""
        polyak_update(self.network, online if self.before is None else self.before, self.tau)
        if self.before is not None:
            polyak_update(self.before, online, 1.0)
