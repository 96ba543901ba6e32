"""M-step: flow errors of chunks and the clipped distillation of weighed candidates (POCO section 4.2)."""

from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from poco_vla.flow import VelocityField, interpolate, target_velocity
from poco_vla.types import ActionSpec, ChunkBatch, Metrics

type Anchor = Literal["all", "demos", "demos_and_successes"]


@runtime_checkable  # for the test run's machine-checked signatures
class FlowModel(VelocityField, Protocol):
    """What a flow error needs of a policy."""

    spec: ActionSpec

    def sample_time(self, shape: Any, generator: torch.Generator | None = None) -> Tensor: ...


def flow_errors(
    policy: FlowModel,
    prefix: Any,
    chunk: Float[Tensor, "B N H A"],
    valid: Bool[Tensor, "B H"],
    *,
    noise: Float[Tensor, "B N H A"] | None = None,
    t: Float[Tensor, "B N"] | None = None,
    mean_over: Literal["valid", "all"] = "valid",
) -> Float[Tensor, "B N"]:
    """Flow-matching error of each chunk: mean of (v(x_t, t) - (a_1 - a_0))^2 over its valid entries (Eq. 24).

    Invalid steps and padded action dimensions count for nothing, neither in the numerator nor in the denominator, so
    that the clip threshold zeta means the same for every chunk.

    Args:
        policy: gives the velocity, the time distribution and which dimensions are real.
        prefix: B encoded states.
        chunk: normalised chunks; `chunk[:, j]` are the j-th chunks of the B states.
        valid: steps that count, shared by the N chunks of a state.
        noise: a_0, one draw per chunk; drawn here when None.
        t: flow time per chunk; drawn from the policy's training distribution when None.
        mean_over: "all" divides by H instead of the number of valid steps, as the authors' code does.
    """
    generator = torch.default_generator
    padding = policy.spec.width - policy.spec.action_dim
    if padding:  # a network may read its padded inputs: what a chunk holds there must not reach it
        chunk = F.pad(chunk[..., :-padding], (0, padding))
    noise = torch.randn(chunk.shape, generator=generator, device="cpu").to(chunk) if noise is None else noise
    t = policy.sample_time(chunk.shape[:2], generator).to(chunk) if t is None else t
    velocity = policy.velocity(prefix, interpolate(noise, chunk, t), t)
    error = (velocity - target_velocity(noise, chunk))[..., : policy.spec.action_dim].square().mean(dim=-1)
    mask = valid[:, None].to(error.dtype)
    # Deviation 4: over the entries that count; the authors' code divides by all.
    steps = mask.sum(dim=-1).clamp_min(1) if mean_over == "valid" else float(chunk.shape[2])
    return (error * mask).sum(dim=-1) / steps


def clipped_distillation(
    errors: Float[Tensor, "B N"], weights: Float[Tensor, "B N"], *, zeta: float | Tensor
) -> tuple[Float[Tensor, ""], Metrics]:
    """Posterior loss: mean over states of sum_j w_j min(error_j, zeta) (Eq. 23, second term).

    The clip is hard: a candidate whose error is above zeta has no gradient. No gradient reaches `weights`.

    Returns:
        The loss, and ``posterior_loss`` (the same), ``candidate_loss`` (mean error before the clip),
        ``clipped_fraction`` (share of the B*N candidates above zeta) and ``surviving_weight`` (mean over states of
        the posterior weight on candidates at or below zeta).
    """
    weights = weights.detach()
    loss = (weights * errors.clamp(max=zeta)).sum(dim=-1).mean()
    kept = (errors <= zeta).to(weights.dtype)
    metrics = {
        "posterior_loss": loss.detach(),
        "candidate_loss": errors.detach().mean(),
        "clipped_fraction": 1 - kept.mean(),
        "surviving_weight": (weights * kept).sum(dim=-1).mean(),
    }
    return loss, metrics


def anchor_rows(batch: ChunkBatch, anchor: Anchor) -> Bool[Tensor, " B"]:
    """Return the transitions whose chunks the BC term imitates (Eq. 23, first term)."""
    every = torch.ones_like(batch.is_demo)
    return {"all": every, "demos": batch.is_demo, "demos_and_successes": batch.is_demo | batch.is_success}[anchor]
