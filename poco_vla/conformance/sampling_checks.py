"""Check sampled chunks: time convention, padded dimensions, proposals."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from poco_vla.conformance.memory_checks import check_memory, check_pure
from poco_vla.conformance.probe import NUM_CANDIDATES, Probe, VelocityField
from poco_vla.flow import integrate
from poco_vla.policy import Prefix, propose

OTHER_STEP_COUNTS = (1, 2, 4, 5, 8, 10, 16, 20, 50)
"""Euler step counts tried when `integrate` and the model's own sampler disagree."""


def check_time_convention(probe: Probe) -> Iterator[str]:
    policy, steps = probe.policy, probe.policy.spec.flow_steps
    real = slice(None, policy.spec.action_dim)
    noise = probe.x[:, 0]
    with torch.no_grad():
        native = policy.native_sample(probe.obs, noise.clone())
        if native.shape != noise.shape:
            yield f"native_sample returns {list(native.shape)}, expected [B, H, A] = {list(noise.shape)}"
            return
        native = native[..., real]

        def disagreement(field: Any, steps: int = steps, noise: Tensor = noise) -> str:
            return probe.gap(integrate(field, probe.encode(), noise[:, None], steps)[:, 0, ..., real], native)

        gap = disagreement(policy)
        if not gap:
            return
        sample = integrate(policy, probe.encode(), noise[:, None], steps)[:, 0, ..., real]
        bare = torch.cat([noise[..., real], torch.zeros_like(noise[..., policy.spec.action_dim :])], dim=-1)
        clip = policy.spec.clip or (-1.0, 1.0)

        def fresh(prefix: Prefix, x: Tensor, t: Tensor) -> Tensor:
            return policy.velocity(probe.encode(), x, t)

        causes = {
            "the time is mirrored: agreement returns when velocity is asked at 1 - t. The model counts time from the "
            "action; pass it 1 - t": lambda: disagreement(VelocityField(lambda p, x, t: policy.velocity(p, x, 1 - t))),
            "the velocity has the wrong sign: agreement returns with -velocity. The model predicts noise - action; "
            "negate its output": lambda: disagreement(VelocityField(lambda p, x, t: -policy.velocity(p, x, t))),
            "time is mirrored and the sign is wrong: agreement returns with -velocity at 1 - t. The model has t = 1 as "
            "noise and predicts noise - action; pass it 1 - t and negate its output": lambda: disagreement(
                VelocityField(lambda p, x, t: -policy.velocity(p, x, 1 - t))
            ),
            _FRESH_HELPS: lambda: disagreement(VelocityField(fresh)),
            "native_sample clips; it must return the chunk as it is": lambda: probe.gap(sample.clamp(*clip), native),
            "velocity reads the padded dimensions of x, which the model's own sampler does not: agreement returns when "
            "their noise is zero. Cut x to action_dim in velocity": lambda: disagreement(policy, noise=bare),
            "velocity leaves out the padded dimensions of x, which the model's own sampler reads. Pass x whole to the "
            "network": lambda: "" if _padding_read(probe) == (False, True) else gap,
        }
        causes |= {
            f"the step counts differ: agreement returns with {k} steps. Set spec.flow_steps = {k}": (
                lambda k=k: disagreement(policy, steps=k)
            )
            for k in OTHER_STEP_COUNTS
            if k != steps
        }
        causes |= {
            "velocity is zero in the padded dimensions of its result and reads those of x, which the model's own "
            "sampler integrates. Return the network's whole output": lambda: "" if _padding_zeroed(probe) else gap,
        }
        cause = next((words for words, still_apart in causes.items() if not still_apart()), None)
    if cause == _FRESH_HELPS and (any(check_pure(probe)) or any(check_memory(probe))):
        return  # another check's finding
    yield (
        f"integrate(policy, prefix, noise, {steps}) and native_sample(obs, noise) must be one chunk (t = 0 is noise, "
        f"t = 1 is the action, v = action - noise), but {gap}. "
        + (
            f"Likely cause: {cause}"
            if cause
            else "Neither mirrored time nor the sign nor another step count explains it; compare one velocity with the "
            "model's own at t = 0"
        )
    )


_FRESH_HELPS = "velocity changes the prefix: agreement returns when every Euler step gets a fresh one"


def check_padding(probe: Probe) -> Iterator[str]:
    """Check that velocity and the model's own sampler agree on padded dimensions: both read their noise, or neither."""
    real = probe.policy.spec.action_dim
    for narrower in range(real - 1, 0, -1):
        if not _postprocesses(probe, real) and _postprocesses(probe, narrower):
            yield (
                f"spec.action_dim is {real}, but postprocess takes actions of {narrower} dimensions: the others are "
                f"padding, which would count in every loss and reach the critic. Set spec.action_dim = {narrower}"
            )
            return
    reads = _padding_read(probe)
    if reads == (True, False):
        yield (
            f"velocity reads the padded dimensions of x (index >= action_dim = {real}), which native_sample does not: "
            "it differs when only they change. Cut x to action_dim in velocity"
        )
    elif reads == (False, True):
        yield (
            f"native_sample reads the padded dimensions of the noise (index >= action_dim = {real}), and velocity "
            "leaves out those of x: the model was trained with noise there. Pass x whole to the network"
        )


def _padding_read(probe: Probe) -> tuple[bool, bool]:
    """Return two flags: velocity reads padded dimensions, the model's own sampler does."""
    policy, real = probe.policy, probe.policy.spec.action_dim
    if real == policy.spec.width:
        return False, False
    other = torch.cat([probe.x[..., :real], 2 - probe.x[..., real:]], dim=-1)
    velocities = [probe.velocity(x, probe.t)[..., :real] for x in (probe.x, other)]
    with torch.no_grad():
        samples = [policy.native_sample(probe.obs, x[:, 0].clone())[..., :real] for x in (probe.x, other)]
    return bool(probe.gap(*velocities)), bool(probe.gap(*samples))


def _padding_zeroed(probe: Probe) -> bool:
    """Return True if velocity reads padded dimensions of x and gives zeros there."""
    return _padding_read(probe)[0] and not probe.velocity(probe.x, probe.t)[..., probe.policy.spec.action_dim :].any()


def _postprocesses(probe: Probe, dims: int) -> bool:
    """Return True if actions of that many dimensions go through the post-processor."""
    actions = probe.x[:, 0, :, :dims].clamp(-1, 1)
    try:
        return probe.policy.postprocess(actions).shape == actions.shape
    except Exception:  # LeRobot's steps raise their own; one that needs an observation first refuses any
        return False


def check_proposals(probe: Probe) -> Iterator[str]:
    spec = probe.policy.spec
    chunks = propose(probe.policy, probe.encode(), NUM_CANDIDATES, noise=3 * probe.x)
    if chunks.requires_grad:
        yield "proposed chunks require grad, expected none"
    if not chunks.isfinite().all():
        yield "proposed chunks are NaN or infinite in places"
    elif spec.clip is not None and (chunks.min() < spec.clip[0] or chunks.max() > spec.clip[1]):
        yield f"proposed chunks reach {chunks.min():.3g} to {chunks.max():.3g}, outside spec.clip {spec.clip}"
    if chunks[..., spec.action_dim :].any():
        yield f"proposed chunks are not zero in padded dimensions (index >= action_dim = {spec.action_dim})"
