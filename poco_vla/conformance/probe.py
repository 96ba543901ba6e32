"""A policy with the observations and numbers that every check probes it with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from poco_vla.policy import FlowPolicy, Prefix
from poco_vla.types import ActionSpec

NUM_CANDIDATES = 3


@dataclass(frozen=True)
class Probe:
    """A policy, the observations and the numbers it is probed with.

    `untouched` is a copy of the policy from before its first call, on the same weights; None where it has no copies.
    """

    policy: FlowPolicy
    untouched: FlowPolicy | None
    obs: Mapping[str, Any]
    x: Float[Tensor, "B N H A"]
    t: Float[Tensor, "B N"]
    atol: float

    def encode(self, rows: slice = slice(None)) -> Prefix:
        """Encode anew at every call, so that a policy that spoils a prefix is found by the check for that alone."""
        return self.policy.encode(take_rows(self.obs, rows))

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Tensor, rows: slice = slice(None)) -> Tensor:
        return self.policy.velocity(self.encode(rows), x, t)

    def gap(self, found: Tensor, expected: Tensor) -> str:
        """Say how far two tensors are apart; empty when they are equal within the tolerance."""
        if found.shape != expected.shape:
            return f"shape {list(found.shape)} instead of {list(expected.shape)}"
        found, expected = found.detach().double(), expected.detach().double()
        largest = (found - expected).abs().max().item() if found.numel() else 0.0
        allowed = self.atol * max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
        return "" if largest <= allowed else f"they differ by up to {largest:.3g} (allowed {allowed:.1g})"


class CannotGoOnError(Exception):
    """Raised for a point so basic that the checks after it would only repeat it."""


def trained_outside_head(policy: FlowPolicy) -> dict[str, Tensor]:
    """Return the parameters that require grad and are none of the head's, by name."""
    ids = {id(p) for p in policy.head.parameters()}
    return {name: p for name, p in policy.named_parameters() if p.requires_grad and id(p) not in ids}


@dataclass(frozen=True)
class VelocityField:
    """A velocity field out of a function, with what else a flow error reads of a policy."""

    velocity: Callable[[Any, Tensor, Tensor], Tensor]
    spec: ActionSpec | None = None
    sample_time: Callable[..., Tensor] = FlowPolicy.sample_time


def all_valid(probe: Probe) -> Tensor:
    return torch.ones(len(probe.x), probe.policy.spec.horizon, dtype=torch.bool, device=probe.x.device)


def take_rows(obs: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """Return some states of processed observations: tensors, arrays and lists by their first axis, mappings within."""
    return {
        key: take_rows(value, rows) if isinstance(value, Mapping) else value[rows] if _has_rows(value) else value
        for key, value in obs.items()
    }


def _has_rows(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str) and getattr(value, "ndim", 1) > 0


def list_some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
