"""GR00T N1.6's own training loss and sampler (section 5), for any velocity field of its time convention.

t = 0 is noise, t = 1 is the action, velocity = action - noise.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lerobot_policy_groot_n1d6.model.configuration import HeadSizes

Velocity = Callable[[Float[Tensor, "*batch H A"], Float[Tensor, "*batch"]], Float[Tensor, "*batch H A"]]


def sample_time(shape: Sequence[int], sizes: HeadSizes, generator: torch.Generator | None = None) -> Tensor:
    """Training times (1 - s) * 0.999, s ~ Beta(1.5, 1): more of them near the noise. Float32.

    The original draws them in bfloat16, which tells some 250 times apart.
    """
    device = generator.device if generator else None
    uniform = torch.rand(tuple(shape), generator=generator, device=device)
    return (1 - uniform ** (1 / sizes.time_alpha)) * sizes.time_scale  # inverse of Beta(alpha, 1)'s s^alpha


def training_loss(
    velocity: Velocity,
    action: Float[Tensor, "*batch H A"],
    mask: Float[Tensor, "*batch H A"],
    noise: Float[Tensor, "*batch H A"],
    t: Float[Tensor, "*batch"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "*batch H A"]]:
    """Mean squared error over the whole batch's valid entries, and each entry's own.

    Padded entries count in no mean, but the network sees their noise, as in the original, which denoises the full
    width and masks the loss alone.

    Args:
        velocity: of noisy chunks at their times.
        action: normalised and padded chunks.
        mask: 1 where a step and a dimension are valid.
        noise: standard normal.
        t: from `sample_time`.
    """
    time = t[..., None, None]
    found = velocity((1 - time) * noise + time * action, t)
    errors = (found - (action - noise)).square() * mask
    return errors.sum() / (mask.sum() + 1e-6), errors


def rollout(velocity: Velocity, noise: Float[Tensor, "*batch H A"], steps: int) -> Float[Tensor, "*batch H A"]:
    """The model's own sampler: Euler from t = 0 to 1. All chunks share each step's time, as one expanded number."""
    x = noise
    for k in range(steps):
        t = torch.full((), k / steps, device=x.device).expand(x.shape[:-2])
        x = x + velocity(x, t) / steps
    return x
