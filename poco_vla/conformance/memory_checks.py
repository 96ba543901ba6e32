"""Check that a velocity depends on its arguments alone, never on an earlier call."""

from collections.abc import Iterator

import torch
from torch import Tensor

from poco_vla.conformance.probe import CannotGoOnError, Probe
from poco_vla.flow import shared_time
from poco_vla.policy import FlowPolicy, Prefix, copy_policy


def check_memory(probe: Probe) -> Iterator[str]:
    """Check that a velocity depends on its prefix, x and t, never on those of an earlier call."""
    if probe.untouched is None:
        return  # another check's finding
    x, t = probe.x, probe.t
    early, late = (shared_time(probe.untouched, x, time) for time in (0.1, 0.9))  # as `integrate` gives them
    pairs = {"time": ((x, t), (x, 1 - t)), "shared time": ((x, early), (x, late)), "chunk": ((x, t), (-x, t))}
    found: dict[str, list[str]] = {}
    for what, (before, now) in pairs.items():
        for where in _remembered(probe, probe.untouched, before, now):
            found.setdefault(where, []).append(what)
    for where, remembered in found.items():
        whats = [what for what in remembered if what != "shared time"] or ["time"]
        point = (
            f"velocity remembers the {' and the '.join(whats)} of an earlier call: asked for another, it answers "
            f"otherwise than a policy on a fresh prefix that was asked nothing before. It is kept in {where}. A prefix "
            "is encoded once and serves all candidates and Euler steps: keep in it what comes from the observation "
            "alone, and compute what x or t enter at every call"
        )
        if where != _IN_PREFIX:
            raise CannotGoOnError(point)  # every other answer may be one to an earlier question
        yield point


_IN_PREFIX = "the prefix, whose next user finds it there"
_IN_POLICY = "the policy, where a call on any prefix finds it"
_BY_PREFIX = "the policy, under the prefix it belongs to"


@torch.no_grad()
def _remembered(
    probe: Probe, untouched: FlowPolicy, before: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]
) -> Iterator[str]:
    """Return where the request of `before` is kept, if it changes the answer to `now`."""

    def ask(policy: FlowPolicy, prefix: Prefix, question: tuple[Tensor, Tensor]) -> Tensor:
        # Copies: a policy that writes into its input is another's finding.
        x, t = question
        return policy.velocity(prefix, x.clone(), t.clone()).clone()

    def alone() -> Tensor:
        policy = copy_policy(untouched)
        return ask(policy, policy.encode(probe.obs), now)

    expected, asked = alone(), copy_policy(untouched)
    prefix = asked.encode(probe.obs)
    ask(asked, prefix, before)
    if not probe.gap(ask(asked, prefix, now), expected) or probe.gap(alone(), expected):
        return  # all well, or random: another check's finding
    twice = copy_policy(untouched)
    same = twice.encode(probe.obs)
    if probe.gap(*(ask(twice, same, now) for _ in range(2))):
        return  # the same question changes the prefix, too: another check's finding
    if probe.gap(ask(asked, asked.encode(probe.obs), now), expected):
        yield _IN_POLICY
    else:
        yield _IN_PREFIX if probe.gap(ask(copy_policy(untouched), prefix, now), expected) else _BY_PREFIX


def check_pure(probe: Probe) -> Iterator[str]:
    policy, prefix = probe.policy, probe.encode()
    x, t, features = probe.x.clone(), probe.t.clone(), prefix.features.clone()
    with torch.no_grad():
        first = policy.velocity(prefix, x, t).clone()
        second = policy.velocity(prefix, x, t)
    if not (torch.equal(x, probe.x) and torch.equal(t, probe.t)):
        yield "velocity changes its inputs x or t in place, expected them untouched; work on a new tensor"
        return
    if not torch.equal(features, prefix.features):
        yield (
            "velocity changes prefix.features in place, expected the prefix untouched, since all candidates and all "
            "Euler steps share it; work on a copy"
        )
    elif gap := probe.gap(second, first):
        if probe.gap(probe.velocity(probe.x, probe.t), first):
            yield f"velocity is random: two calls with the same inputs are not equal, {gap}. Dropout in eval mode?"
        else:
            yield (
                f"velocity changes the prefix: a second call with the same inputs is not equal to the first, {gap}, "
                "while a fresh prefix gives the first answer again. Likely the KV cache grows at each call; crop it "
                "afterwards or attend to it without updating it"
            )
