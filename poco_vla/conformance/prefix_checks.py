"""Check that a prefix is frozen, and may be stored while the head trains."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from poco_vla.conformance.memory_checks import check_memory, check_pure
from poco_vla.conformance.probe import CannotGoOnError, Probe, list_some, trained_outside_head
from poco_vla.policy import Prefix


def check_encode(probe: Probe) -> Iterator[str]:
    policy, x, t = probe.policy, probe.x, probe.t
    with torch.enable_grad():
        prefix = probe.encode()
    if prefix.features.requires_grad:
        yield (
            "prefix.features requires grad, expected none: the backbone is frozen and its prefix may be stored; "
            "run encode under torch.no_grad()"
        )
    # Features do not show all of a prefix (a KV cache is hidden): the velocity on it does.
    buffers = {name: b.clone() for name, b in policy.named_buffers()}
    policy.train()
    in_train, again = probe.encode(), probe.encode()
    policy.eval()
    # Copies, since a velocity that spoils its prefix is another check's finding.
    features, features_train, features_again = (p.features.clone() for p in (prefix, in_train, again))
    if changed := [name for name, b in policy.named_buffers() if not torch.equal(b, buffers[name])]:
        yield (
            f"changes the buffer {list_some(changed)} in training mode, expected frozen statistics; put the backbone "
            "in eval mode inside encode"
        )
        for name, b in policy.named_buffers():
            b.copy_(buffers[name])
    with torch.no_grad():
        v, v_train, v_again = (policy.velocity(p, x, t) for p in (probe.encode(), in_train, again))
    if gap := probe.gap(features_again, features_train) or probe.gap(v_again, v_train):
        yield (
            f"two prefixes of the same observations are not equal: {gap}. Dropout or augmentation is at work; put the "
            "backbone in eval mode inside encode, whatever mode the policy is in"
        )
    elif gap := probe.gap(features_train, features) or probe.gap(v_train, v):
        yield (
            f"policy.train() changes the prefix: {gap}. The backbone must run in eval mode: call "
            "self.backbone.eval() inside encode"
        )


def check_stored_prefix(probe: Probe) -> Iterator[str]:
    """Check that a prefix may be kept while the head trains: no part of it changes, and it carries no gradient.

    Keys and values that the head makes may lie in it for sampling, if they are made anew where gradients are recorded.
    """
    policy = probe.policy
    head = {name: p for name, p in policy.head.named_parameters() if p.requires_grad}
    if names := _stale(probe, head, used=False):
        in_features = _stale(probe, head, used=False, features=True)
        yield (
            f"a prefix that was encoded before the head's {list_some(names)} changed is not one that is encoded after: "
            f"{'its features differ' if in_features else 'the velocity on it differs'}, where gradients are recorded. "
            "encode uses what trains: move that into velocity, or freeze it and take it out of policy.head"
        )
    elif (names := _stale(probe, head, used=True)) and not any(check_memory(probe)):
        yield (
            f"velocity keeps what the head's {list_some(names)} made at its first call on a prefix, and goes on with "
            "it after they have changed, where gradients are recorded; make it anew at every call"
        )
    elif _carries_gradient(probe) and not trained_outside_head(policy) and not probe.encode().features.requires_grad:
        yield (
            "the prefix carries gradient beside its features: a velocity requires grad while every parameter is "
            "frozen. Run all of encode under torch.no_grad(), and keep no tensor that requires grad outside parameters"
        )


def check_packing(probe: Probe) -> Iterator[str]:
    """Check that a packed state serves as its prefix in any batch, and holds nothing that trains."""
    policy = probe.policy
    if not policy.can_pack or any(check_stored_prefix(probe)) or any(check_pure(probe)) or any(check_memory(probe)):
        return  # no store, or another check's finding
    batch, fresh = len(probe.x), probe.encode()
    packed = policy.pack(fresh)
    if len(packed) != batch or not all(isinstance(t, Tensor) for state in packed for t in state.values()):
        raise CannotGoOnError(f"pack gives {len(packed)} states, expected a mapping of tensors for each of {batch}")
    head = [p for p in policy.head.parameters() if p.requires_grad]
    if wrong := _unlike(probe, policy.unpack(packed), slice(None)):
        yield f"unpack(pack(prefix)) is not the prefix: {wrong}"
        return
    order = [*range(1, batch), 0]
    alone = [_unlike(probe, policy.unpack([state]), slice(i, i + 1)) for i, state in enumerate(packed)]
    turned = policy.unpack([packed[i] for i in order])
    if wrong := next(filter(None, [_unlike(probe, turned, order), *alone]), ""):
        yield (
            f"a stored state is another in other company: {wrong}. Store each state's valid tokens without padding, "
            "and pad to those that are unpacked together"
        )
    for i, state in enumerate(packed):
        (mine,) = policy.pack(probe.encode(slice(i, i + 1)))
        if {k: t.shape for k, t in mine.items()} != {k: t.shape for k, t in state.items()}:
            yield (
                f"pack stores state {i} in other shapes with its batch mates than alone: their padding is in it. "
                "Store valid tokens only"
            )
            break
    with _moved(head):
        again = policy.pack(probe.encode())
        changed = [k for k in packed[0] if any(probe.gap(a[k], b[k]) for a, b in zip(packed, again, strict=True))]
        if changed:
            yield (
                f"pack stores what the head makes: {list_some(changed)} differs once the head's parameters have "
                "changed. Store what the frozen part gives, and let unpack make the rest anew"
            )
        elif wrong := _unlike(probe, policy.unpack(packed), slice(None)):
            yield (
                f"a stored state is not what encode gives once the head's parameters have changed: {wrong}. unpack "
                "must make what they make by those of now"
            )


@torch.no_grad()
def _unlike(probe: Probe, found: Prefix, rows: Any) -> str:
    """Say how a prefix of some of the states differs from a fresh one: by its features, or the velocity on it, without
    and with gradients."""
    expected, x, t = probe.encode().select(rows), probe.x[rows], probe.t[rows]
    if gap := probe.gap(found.features, expected.features):
        return f"features, {gap}"
    for recorded in (False, True):
        with torch.set_grad_enabled(recorded):
            if gap := probe.gap(probe.policy.velocity(found, x, t), probe.policy.velocity(expected, x, t)):
                return f"the velocity{' where gradients are recorded' if recorded else ''}, {gap}"
    return ""


def _stale(probe: Probe, head: Mapping[str, Tensor], *, used: bool, features: bool = False) -> list[str]:
    """Return the trained parameters whose change a prefix from before does not notice.

    Args:
        probe: of the policy.
        head: the trained parameters.
        used: a velocity is asked of the prefix before they change, so that what is made at first use is made.
        features: look at the features alone.
    """
    policy = probe.policy

    @torch.enable_grad()
    def is_stale(parameters: list[Tensor]) -> bool:
        stored = probe.encode()
        if used:
            policy.velocity(stored, probe.x, probe.t)
        with _moved(parameters):
            fresh = probe.encode()
            gap = probe.gap(stored.features, fresh.features)
            if gap or features:
                return bool(gap)
            return bool(probe.gap(*(policy.velocity(prefix, probe.x, probe.t) for prefix in (stored, fresh))))

    if is_stale([]) or not is_stale(list(head.values())):
        return []  # random, or changed by its use: another check's finding; or all well
    return [name for name, p in head.items() if is_stale([p])] or ["parameters"]


@contextmanager
def _moved(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Move parameters by about a training step within this context."""
    before = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in parameters:
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
        yield
    finally:
        with torch.no_grad():
            for p, kept in zip(parameters, before, strict=True):
                p.copy_(kept)


def _carries_gradient(probe: Probe) -> bool:
    """Return True if a velocity requires grad because of the prefix."""
    with torch.enable_grad():
        prefix = probe.encode()
    trained = [p for p in probe.policy.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        with torch.enable_grad():
            return probe.policy.velocity(prefix, probe.x, probe.t).requires_grad
    finally:
        for p in trained:
            p.requires_grad_(True)
