"""Check the gradients of a flow error: they reach the head, and count no padding."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from poco_vla.conformance.prefix_checks import _stale
from poco_vla.conformance.probe import Probe, VelocityField, all_valid, list_some, trained_outside_head
from poco_vla.distill import flow_errors
from poco_vla.policy import Prefix


def check_gradients(probe: Probe) -> Iterator[str]:
    policy = probe.policy
    head = {name: p for name, p in policy.head.named_parameters() if p.requires_grad}
    outside = trained_outside_head(policy)
    if not head:
        yield "no parameter of policy.head requires grad, so nothing would train; call head.requires_grad_(True)"
        return
    with torch.enable_grad():
        recorded = policy.velocity(probe.encode(), probe.x, probe.t)
        error = flow_errors(policy, probe.encode(), probe.x.clamp(-1, 1), all_valid(probe), noise=probe.x, t=probe.t)
        reached = error.requires_grad
        grads = (
            torch.autograd.grad(error.sum(), [*head.values(), *outside.values()], allow_unused=True) if reached else ()
        )
    plain = probe.velocity(probe.x, probe.t)
    if (gap := probe.gap(recorded, plain)) and not probe.gap(probe.velocity(probe.x, probe.t), plain):
        yield (
            f"velocity is not the same function where gradients are recorded: {gap}. Candidates are sampled without "
            "and flow errors trained with gradients; both must give the same numbers"
        )
    if not reached or all(g is None for g in grads[: len(head)]):
        yield (
            f"a flow error's gradient reaches none of the head's {len(head)} trainable parameters; is velocity run "
            "under no_grad, or policy.head another module than the one that computes it?"
        )
    elif missed := [name for name, g in zip(head, grads, strict=False) if g is None]:
        if set(missed) <= set(_stale(probe, head, used=False)):
            return  # encode uses them: another check's finding
        yield (
            f"a flow error's gradient does not reach the head parameter {list_some(missed)}; a parameter without a use "
            "must not require grad (data-parallel training waits for its gradient): freeze it, or mend the graph"
        )
    if bad := [name for name, g in zip(head, grads, strict=False) if g is not None and not g.isfinite().all()]:
        yield f"the gradient of the head parameter {list_some(bad)} is NaN or infinite"
    if outside:
        leaks = [name for name, g in zip(outside, grads[len(head) :], strict=False) if g is not None]
        yield (
            f"outside policy.head nothing may require grad, but {list_some(list(outside))} does"
            + (f", and a flow error's gradient flows into {list_some(leaks)}" if leaks else "")
            + "; freeze the backbone with requires_grad_(False) in __init__"
        )


def check_masks(probe: Probe) -> Iterator[str]:
    """Check that padded dimensions and invalid steps count for nothing in a flow error."""
    spec, chunk, noise = probe.policy.spec, probe.x.clamp(-1, 1), torch.randn_like(probe.x)
    valid = all_valid(probe)
    valid[:, spec.horizon // 2 + 1 :] = False
    outputs: list[Tensor] = []

    def tapped(prefix: Prefix, x: Tensor, t: Tensor) -> Tensor:
        outputs.append(probe.velocity(x, t).requires_grad_())
        return outputs[-1]

    def errors(policy: Any, chunk: Tensor) -> Tensor:
        return flow_errors(policy, probe.encode(), chunk, valid, noise=noise, t=probe.t)

    with torch.enable_grad():
        (grad,) = torch.autograd.grad(errors(VelocityField(tapped, spec), chunk).sum(), outputs)
    if grad.masked_select(~valid[:, None, :, None]).any():
        yield "the velocity at steps that are not valid receives gradient from the flow error, expected exactly zero"
    if grad[..., spec.action_dim :].any():
        yield (
            f"the velocity in padded dimensions (index >= action_dim = {spec.action_dim}) receives gradient from the "
            "flow error, expected exactly zero"
        )
    if spec.action_dim < spec.width:
        scrawled = torch.cat([chunk[..., : spec.action_dim], 9 + 0 * chunk[..., spec.action_dim :]], dim=-1)
        with torch.no_grad():
            gap = probe.gap(errors(probe.policy, scrawled), errors(probe.policy, chunk))
        if gap:
            yield f"what a chunk holds in padded dimensions (index >= {spec.action_dim}) changes its flow error: {gap}"
