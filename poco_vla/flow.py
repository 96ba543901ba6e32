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
        self, prefix: Any, x: Float[Tensor, "B N H A"], t: Float[Tensor, "B N"]
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

    All chunks share each step's time. It comes as one number expanded to [B, N] (strides 0), so that a network can tell
    without looking at the values and embed it once.
    """
    x = noise
    for k in range(steps):
        t = x.new_full((1, 1), k / steps).expand(x.shape[:2])
        x = x + policy.velocity(prefix, x, t) / steps
    return x


def uniform_time(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """t ~ U(0, 1): what the MLP policy trains with."""
    return torch.rand(tuple(shape), generator=generator, device=generator.device if generator else None)


class Draws:
    """The random numbers of an update, the same for one process as for many.

    Each process draws for the *global* batch from the same generator and keeps its own rows, so that the loss of a
    global batch does not depend on how many processes share it.

    Args:
        generator: seeded alike on every process.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(self, generator: torch.Generator, rank: int = 0, world_size: int = 1) -> None:
        self.generator = generator
        self.rank = rank
        self.world_size = world_size

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Standard normal numbers of `shape` (its first axis is this process's batch), on `like`'s device and dtype."""
        rows, *rest = shape
        # Drawn in the generator's own precision and place: float32 on the CPU unless the caller chose otherwise.
        draw = torch.randn((rows * self.world_size, *rest), generator=self.generator, device=self.generator.device)
        return self._mine(draw, rows).to(like)

    def time(self, sampler: "TimeSampler", shape: Sequence[int], like: Tensor) -> Tensor:
        """Flow times from a policy's own distribution, likewise."""
        rows, *rest = shape
        return self._mine(sampler((rows * self.world_size, *rest), self.generator), rows).to(like)

    def _mine(self, draw: Tensor, rows: int) -> Tensor:
        return draw[self.rank * rows : (self.rank + 1) * rows]


@runtime_checkable  # for the test run's machine-checked signatures
class TimeSampler(Protocol):
    """Draws flow times of a shape from a model's training distribution."""

    def __call__(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor: ...
