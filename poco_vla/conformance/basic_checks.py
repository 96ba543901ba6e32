"""Checks that come first: shapes, types, copies and times, without which no other check can run."""

import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from poco_vla.conformance.probe import NUM_CANDIDATES, CannotGoOnError, Probe
from poco_vla.policy import FlowPolicy, copy_policy
from poco_vla.types import ActionSpec


def check_spec(policy: FlowPolicy) -> Iterator[str]:
    if not isinstance(getattr(policy, "spec", None), ActionSpec):
        raise CannotGoOnError(
            f"policy.spec is {getattr(policy, 'spec', 'missing')!r}, expected a poco_vla.ActionSpec; set it in __init__"
        )
    if not isinstance(getattr(policy, "feature_dim", None), int):
        raise CannotGoOnError(
            f"policy.feature_dim is {getattr(policy, 'feature_dim', 'missing')!r}, expected the int D of "
            "prefix.features [B, D]"
        )
    head = getattr(policy, "head", None)
    if not isinstance(head, torch.nn.Module):
        raise CannotGoOnError(f"policy.head is {head!r}, expected the torch module whose parameters are trained")
    if not any(module is head for module in policy.modules()):
        yield "policy.head is not a submodule of the policy, so its weights would neither move to a device nor be saved"


def make_copy(policy: FlowPolicy, copies: list[FlowPolicy]) -> Iterator[str]:
    try:
        copies.append(copy_policy(policy))
    except Exception as error:  # whatever it holds that cannot be copied raises its own
        yield (
            f"copy.deepcopy(policy) raises {type(error).__name__}: {error}. Acting beside learning has a copy of the "
            "policy: keep locks, files and tensors with a gradient history out of it"
        )


def make_probe(
    policy: FlowPolicy,
    copies: list[FlowPolicy],
    obs: Mapping[str, Any] | None,
    atol: float,
    probes: list[Probe],
) -> Iterator[str]:
    """Encode once, to learn B, and check that the prefix has features that the other checks can use."""
    device = next((p.device for p in policy.head.parameters()), torch.device("cpu"))
    obs = policy.example_obs(3) if obs is None else obs
    obs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in obs.items()}
    features = getattr(policy.encode(obs), "features", None)
    if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[1] != policy.feature_dim:
        found = list(features.shape) if isinstance(features, Tensor) else repr(features)
        raise CannotGoOnError(
            f"prefix.features is {found}, expected a tensor [B, feature_dim={policy.feature_dim}]; pool tokens into "
            "one vector per state, or correct policy.feature_dim"
        )
    batch = features.shape[0]
    if batch < 2:
        raise CannotGoOnError(f"the observations hold {batch} state, the checks need at least 2")
    spec = policy.spec
    x = torch.randn(batch, NUM_CANDIDATES, spec.horizon, spec.width).to(device)
    t = torch.linspace(0.05, 0.95, batch * NUM_CANDIDATES).reshape(batch, NUM_CANDIDATES).to(device)
    probes.append(Probe(policy, copies[0] if copies else None, obs, x, t, atol))
    if not features.isfinite().all():
        yield f"{(~features.isfinite()).sum().item()} of {features.numel()} features are NaN or infinite"


def check_velocity(probe: Probe) -> Iterator[str]:
    """Check shape, dtype and finiteness."""
    x, t = probe.x, probe.t
    v = probe.velocity(x, t)
    if not isinstance(v, Tensor) or v.shape != x.shape:
        raise CannotGoOnError(
            f"returns {list(v.shape) if isinstance(v, Tensor) else repr(v)}, expected [B, N, H, A] = {list(x.shape)}, "
            "the shape of x; unfold the candidates that were folded into another axis"
        )
    if not v.isfinite().all():
        raise CannotGoOnError(f"{(~v.isfinite()).sum().item()} of {v.numel()} numbers are NaN or infinite")
    if v.dtype != x.dtype:
        yield (
            f"returns {v.dtype} for x of {x.dtype}; cast the result to x.dtype, so that Euler steps and flow errors "
            "are computed in it"
        )


def check_dependence(probe: Probe) -> Iterator[str]:
    """Check that a velocity depends on x and t: else no other check could fail."""
    x, t = probe.x, probe.t
    early, late = torch.full_like(t, 0.1), torch.full_like(t, 0.9)
    if torch.equal(probe.velocity(x, early), probe.velocity(x, late)):
        yield "is the same at t = 0.1 and at t = 0.9: the flow time does not reach the network"
    if torch.equal(probe.velocity(x, early), probe.velocity(-x, early)):
        yield (
            "is the same for x and for -x: the noisy chunk does not reach the output (a last layer that starts at "
            "zero? then give it small random weights in tiny())"
        )


def check_sample_time(policy: FlowPolicy) -> Iterator[str]:
    shape = (64, 4)
    first, second = (policy.sample_time(shape, torch.Generator().manual_seed(5)) for _ in range(2))
    if tuple(first.shape) != shape:
        yield f"sample_time({shape}) returns shape {tuple(first.shape)}, expected one time per element"
        return
    if not ((first >= 0) & (first <= 1)).all():
        yield f"times reach {first.min():.3g} to {first.max():.3g}, expected [0, 1] (t = 1 is the action)"
    if not torch.equal(first, second):
        yield (
            "two generators of one seed give different times; draw from the generator that is passed, else runs are "
            "not reproducible and processes disagree"
        )
    if torch.equal(first, first[:1, :1].expand_as(first)):
        yield f"all {first.numel()} times are {first[0, 0]:.3g}; one is drawn for every element"


def check_save_and_load(probe: Probe) -> Iterator[str]:
    policy, x, t = probe.policy, probe.x, probe.t
    with tempfile.TemporaryDirectory(prefix="check_policy_") as folder:
        policy.save_pretrained(folder)
        loaded = type(policy).from_pretrained(folder, horizon=policy.spec.horizon)
    if loaded.spec != policy.spec:
        yield f"the loaded policy has {loaded.spec}, the saved one {policy.spec}; write every size into the config"
        return
    loaded = loaded.to(x.device).eval()
    with torch.no_grad():
        found = loaded.velocity(loaded.encode(probe.obs), x, t)
    if gap := probe.gap(found, probe.velocity(x, t)):
        yield (
            f"from_pretrained(save_pretrained(...)) gives another velocity: {gap}. Weights are missing from the file, "
            "or are loaded without strict key checks"
        )
