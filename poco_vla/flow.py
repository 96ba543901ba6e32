"""The flow: one time convention, its path, its velocity, its solver.

**t = 0 is noise, t = 1 is the action, v = action - noise**, here and everywhere in the library. A model with another
convention converts inside its adapter.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable  # for the test run's machine-checked signatures
class VelocityField(Protocol):
    """Anything with a velocity: a policy, or a closed form in a test."""

    def velocity(
        self, prefix: Any, x: Float[Tensor, "B N H A"], t: Float[Tensor, "#B #N"]
    ) -> Float[Tensor, "B N H A"]: ...


def interpolate(
    noise: Float[Tensor, "*batch H A"], action: Float[Tensor, "*batch H A"], t: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch H A"]:
    """Point at time t on the straight path from noise to action: (1 - t) a_0 + t a_1 (POCO section 3, flow path)."""
    t = t[..., None, None]
    return (1 - t) * noise + t * action


def target_velocity(
    noise: Float[Tensor, "*batch H A"], action: Float[Tensor, "*batch H A"]
) -> Float[Tensor, "*batch H A"]:
    """Velocity of that path, constant in t: u = a_1 - a_0 (Eq. 24)."""
    return action - noise


def integrate(
    policy: VelocityField, prefix: Any, noise: Float[Tensor, "B N H A"], steps: int
) -> Float[Tensor, "B N H A"]:
    """Euler's method from t = 0 to t = 1 in `steps` equal steps. Neither clips nor stops gradients.

    All chunks share each step's time: see `shared_time`.
    """
    x = noise
    for k in range(steps):
        x = x + policy.velocity(prefix, x, shared_time(policy, x, k / steps)) / steps
    return x


def shared_time(policy: VelocityField, x: Float[Tensor, "B N H A"], time: float) -> Float[Tensor, "#B #N"]:
    """Return one time of all chunks: [1, 1] for a policy that `takes_shared_time` and embeds it once, else [B, N]."""
    t = x.new_full((1, 1), time)
    return t if getattr(policy, "takes_shared_time", False) else t.expand(x.shape[:2])


def uniform_time(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """t ~ U(0, 1): what the MLP policy trains with."""
    return torch.rand(tuple(shape), generator=generator, device=generator.device if generator else None)
