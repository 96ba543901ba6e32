"""The conformance kit: does a policy keep the contract of :class:`poco_vla.policy.FlowPolicy`?

Every adapter passes it, ours and a third party's::

    from poco_vla import check_policy

    def test_my_adapter_keeps_the_contract():
        check_policy(MyAdapter.tiny())

Each point that is broken is reported in words: what was found, what was expected, the likely cause and its mend.
"""

import copy
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from poco_vla.bugs import place_of
from poco_vla.conformance.interface import left_out, missing_parts
from poco_vla.distill import flow_errors
from poco_vla.errors import PolicyError
from poco_vla.flow import integrate
from poco_vla.policy import FlowPolicy, Prefix, propose
from poco_vla.types import ActionSpec

logger = logging.getLogger(__name__)

NUM_CANDIDATES = 3
OTHER_STEP_COUNTS = (1, 2, 4, 5, 8, 10, 16, 20, 50)
"""Euler step counts tried when `integrate` and the model's own sampler disagree."""


def check_policy(
    policy: FlowPolicy, obs: Mapping[str, Any] | None = None, *, seed: int = 0, atol: float = 1e-4
) -> None:
    """Raise one PolicyError that lists every point of the contract the policy breaks; return None if it keeps all.

    Leaves parameters, gradients, train/eval modes and torch's random state as they were.

    Args:
        policy: the adapter, usually ``MyAdapter.tiny()``.
        obs: processed observations of at least 2 states; ``policy.example_obs(3)`` when None.
        seed: of the noise and times that the policy is probed with.
        atol: largest difference that counts as equal, relative to the larger of 1 and the values compared. The default
            suits float32; a bfloat16 network needs about 0.05.
    """
    modes = {module: module.training for module in policy.modules()}
    devices = {p.device for p in policy.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        try:
            broken = _broken_points(policy, obs, atol)
        finally:
            for module, mode in modes.items():
                module.training = mode
    if broken:
        listed = "\n".join(f"{i}. {point}" for i, point in enumerate(broken, 1))
        count = "1 point" if len(broken) == 1 else f"{len(broken)} points"
        raise PolicyError(f"{type(policy).__name__} breaks the contract of poco_vla.FlowPolicy in {count}:\n{listed}")
    if optional := left_out(policy):
        logger.info("%s keeps the contract; optional and not written: %s", type(policy).__name__, "; ".join(optional))


@dataclass(frozen=True)
class _Probe:
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
        """A fresh prefix at every call, so that a policy that spoils one is found by the check made for it only."""
        return self.policy.encode(_rows(self.obs, rows))

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


class _CannotGoOnError(Exception):
    """A point so basic that the checks after it would only repeat it."""


def _broken_points(policy: FlowPolicy, obs: Mapping[str, Any] | None, atol: float) -> list[str]:
    broken: list[str] = []
    policy.eval()

    def run(title: str, check: Callable[..., Iterator[str]], *args: Any) -> bool:
        try:
            broken.extend(f"{title}: {point}" for point in check(*args))
        except _CannotGoOnError as error:
            broken.append(f"{title}: {error}")
            return False
        # Whatever a stranger's adapter raises is a finding; the remaining points are still worth knowing.
        except Exception as error:
            broken.append(f"{title}: raised {type(error).__name__}: {error}{place_of(error)}")
            return False
        return True

    copies: list[FlowPolicy] = []
    run("copy", _make_copy, policy, copies)
    run("sample_time", _check_sample_time, policy)
    run("interface", missing_parts, policy)
    probes: list[_Probe] = []
    basics = run("spec", _check_spec, policy) and run("encode", _make_probe, policy, copies, obs, atol, probes)
    if not (basics and run("velocity", _check_velocity, probes[0]) and run("memory", _check_memory, probes[0])):
        return [*broken, "nothing else could be checked before these points are mended"]
    for title, check in _CHECKS:
        run(title, check, probes[0])
    return broken


def _check_spec(policy: FlowPolicy) -> Iterator[str]:
    if not isinstance(getattr(policy, "spec", None), ActionSpec):
        raise _CannotGoOnError(
            f"policy.spec is {getattr(policy, 'spec', 'missing')!r}, expected a poco_vla.ActionSpec; set it in __init__"
        )
    if not isinstance(getattr(policy, "feature_dim", None), int):
        raise _CannotGoOnError(
            f"policy.feature_dim is {getattr(policy, 'feature_dim', 'missing')!r}, expected the int D of "
            "prefix.features [B, D]"
        )
    head = getattr(policy, "head", None)
    if not isinstance(head, torch.nn.Module):
        raise _CannotGoOnError(f"policy.head is {head!r}, expected the torch module whose parameters are trained")
    if not any(module is head for module in policy.modules()):
        yield "policy.head is not a submodule of the policy, so its weights would neither move to a device nor be saved"


def _copy(policy: FlowPolicy) -> FlowPolicy:
    """A copy on the same parameters and buffers: what it remembers from now on is its own."""
    return copy.deepcopy(policy, {id(tensor): tensor for tensor in (*policy.parameters(), *policy.buffers())})


def _make_copy(policy: FlowPolicy, copies: list[FlowPolicy]) -> Iterator[str]:
    try:
        copies.append(_copy(policy))
    except Exception as error:  # whatever it holds that cannot be copied raises its own
        yield (
            f"copy.deepcopy(policy) raises {type(error).__name__}: {error}. Acting beside learning has a copy of the "
            "policy: keep locks, files and tensors with a gradient history out of it"
        )


def _make_probe(
    policy: FlowPolicy,
    copies: list[FlowPolicy],
    obs: Mapping[str, Any] | None,
    atol: float,
    probes: list[_Probe],
) -> Iterator[str]:
    """Encodes once, to learn B, and checks that what comes out can be worked with at all."""
    device = next((p.device for p in policy.head.parameters()), torch.device("cpu"))
    obs = policy.example_obs(3) if obs is None else obs
    obs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in obs.items()}
    features = getattr(policy.encode(obs), "features", None)
    if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[1] != policy.feature_dim:
        found = list(features.shape) if isinstance(features, Tensor) else repr(features)
        raise _CannotGoOnError(
            f"prefix.features is {found}, expected a tensor [B, feature_dim={policy.feature_dim}]; pool tokens into "
            "one vector per state, or correct policy.feature_dim"
        )
    batch = features.shape[0]
    if batch < 2:
        raise _CannotGoOnError(f"the observations hold {batch} state, the checks need at least 2")
    spec = policy.spec
    x = torch.randn(batch, NUM_CANDIDATES, spec.horizon, spec.width).to(device)
    t = torch.linspace(0.05, 0.95, batch * NUM_CANDIDATES).reshape(batch, NUM_CANDIDATES).to(device)
    probes.append(_Probe(policy, copies[0] if copies else None, obs, x, t, atol))
    if not features.isfinite().all():
        yield f"{(~features.isfinite()).sum().item()} of {features.numel()} features are NaN or infinite"


def _check_velocity(probe: _Probe) -> Iterator[str]:
    """Shape, dtype, finiteness."""
    x, t = probe.x, probe.t
    v = probe.velocity(x, t)
    if not isinstance(v, Tensor) or v.shape != x.shape:
        raise _CannotGoOnError(
            f"returns {list(v.shape) if isinstance(v, Tensor) else repr(v)}, expected [B, N, H, A] = {list(x.shape)}, "
            "the shape of x; unfold the candidates that were folded into another axis"
        )
    if not v.isfinite().all():
        raise _CannotGoOnError(f"{(~v.isfinite()).sum().item()} of {v.numel()} numbers are NaN or infinite")
    if v.dtype != x.dtype:
        yield (
            f"returns {v.dtype} for x of {x.dtype}; cast the result to x.dtype, so that Euler steps and flow errors "
            "are computed in it"
        )


def _check_memory(probe: _Probe) -> Iterator[str]:
    """An answer depends on the prefix and on what is asked now, never on what was asked before."""
    if probe.untouched is None:
        return  # another check's finding
    x, t = probe.x, probe.t
    early, late = (t.new_full((1, 1), time).expand(t.shape) for time in (0.1, 0.9))  # as `integrate` gives them
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
            raise _CannotGoOnError(point)  # every other answer may be one to an earlier question
        yield point


_IN_PREFIX = "the prefix, whose next user finds it there"
_IN_POLICY = "the policy, where a call on any prefix finds it"
_BY_PREFIX = "the policy, under the prefix it belongs to"


@torch.no_grad()
def _remembered(
    probe: _Probe, untouched: FlowPolicy, before: tuple[Tensor, Tensor], now: tuple[Tensor, Tensor]
) -> Iterator[str]:
    """Return where the request of `before` is kept, if it changes the answer to `now`."""

    def ask(policy: FlowPolicy, prefix: Prefix, question: tuple[Tensor, Tensor]) -> Tensor:
        # A time that is expanded from one number stays so; a policy that writes into its input is another's finding.
        x, t = question
        return policy.velocity(prefix, x.clone(), t if t.stride() == (0, 0) else t.clone()).clone()

    def alone() -> Tensor:
        policy = _copy(untouched)
        return ask(policy, policy.encode(probe.obs), now)

    expected, asked = alone(), _copy(untouched)
    prefix = asked.encode(probe.obs)
    ask(asked, prefix, before)
    if not probe.gap(ask(asked, prefix, now), expected) or probe.gap(alone(), expected):
        return  # all well, or random: another check's finding
    twice = _copy(untouched)
    same = twice.encode(probe.obs)
    if probe.gap(*(ask(twice, same, now) for _ in range(2))):
        return  # the same question changes the prefix, too: another check's finding
    if probe.gap(ask(asked, asked.encode(probe.obs), now), expected):
        yield _IN_POLICY
    else:
        yield _IN_PREFIX if probe.gap(ask(_copy(untouched), prefix, now), expected) else _BY_PREFIX


def _check_dependence(probe: _Probe) -> Iterator[str]:
    """The answer depends on what it is asked: else no other check could fail."""
    x, t = probe.x, probe.t
    early, late = torch.full_like(t, 0.1), torch.full_like(t, 0.9)
    if torch.equal(probe.velocity(x, early), probe.velocity(x, late)):
        yield "is the same at t = 0.1 and at t = 0.9: the flow time does not reach the network"
    if torch.equal(probe.velocity(x, early), probe.velocity(-x, early)):
        yield (
            "is the same for x and for -x: the noisy chunk does not reach the output (a last layer that starts at "
            "zero? then give it small random weights in tiny())"
        )


def _check_encode(probe: _Probe) -> Iterator[str]:
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
            f"changes the buffer {_some(changed)} in training mode, expected frozen statistics; put the backbone in "
            "eval mode inside encode"
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


def _check_stored_prefix(probe: _Probe) -> Iterator[str]:
    """A prefix may be kept while the head trains: it holds nothing that changes, and no gradient goes through it.

    Keys and values that the head makes may lie in it for sampling, if they are made anew where gradients are recorded.
    """
    policy = probe.policy
    head = {name: p for name, p in policy.head.named_parameters() if p.requires_grad}
    if names := _stale(probe, head, used=False):
        in_features = _stale(probe, head, used=False, features=True)
        yield (
            f"a prefix that was encoded before the head's {_some(names)} changed is not one that is encoded after: "
            f"{'its features differ' if in_features else 'the velocity on it differs'}, where gradients are recorded. "
            "encode uses what trains: move that into velocity, or freeze it and take it out of policy.head"
        )
    elif (names := _stale(probe, head, used=True)) and not any(_check_memory(probe)):
        yield (
            f"velocity keeps what the head's {_some(names)} made at its first call on a prefix, and goes on with it "
            "after they have changed, where gradients are recorded; make it anew at every call"
        )
    elif _carries_gradient(probe) and not _outside_head(policy) and not probe.encode().features.requires_grad:
        yield (
            "the prefix carries gradient beside its features: a velocity requires grad while every parameter is "
            "frozen. Run all of encode under torch.no_grad(), and keep no tensor that requires grad outside parameters"
        )


def _check_packing(probe: _Probe) -> Iterator[str]:
    """Check that a packed state serves as its prefix in any batch, and holds nothing that trains."""
    policy = probe.policy
    if not policy.can_pack or any(_check_stored_prefix(probe)) or any(_check_pure(probe)) or any(_check_memory(probe)):
        return  # no store, or another check's finding
    batch, fresh = len(probe.x), probe.encode()
    packed = policy.pack(fresh)
    if len(packed) != batch or not all(isinstance(t, Tensor) for state in packed for t in state.values()):
        raise _CannotGoOnError(f"pack gives {len(packed)} states, expected a mapping of tensors for each of {batch}")
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
                f"pack stores what the head makes: {_some(changed)} differs once the head's parameters have changed. "
                "Store what the frozen part gives, and let unpack make the rest anew"
            )
        elif wrong := _unlike(probe, policy.unpack(packed), slice(None)):
            yield (
                f"a stored state is not what encode gives once the head's parameters have changed: {wrong}. unpack "
                "must make what they make by those of now"
            )


@torch.no_grad()
def _unlike(probe: _Probe, found: Prefix, rows: Any) -> str:
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


def _stale(probe: _Probe, head: Mapping[str, Tensor], *, used: bool, features: bool = False) -> list[str]:
    """Trained parameters whose change a prefix from before does not notice; empty when there is none.

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
    """Parameters a training step away; back where they were afterwards."""
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


def _carries_gradient(probe: _Probe) -> bool:
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


def _outside_head(policy: FlowPolicy) -> dict[str, Tensor]:
    """Parameters that require grad and are none of the head's."""
    ids = {id(p) for p in policy.head.parameters()}
    return {name: p for name, p in policy.named_parameters() if p.requires_grad and id(p) not in ids}


def _check_pure(probe: _Probe) -> Iterator[str]:
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


def _check_candidates(probe: _Probe) -> Iterator[str]:
    x, t = probe.x, torch.full_like(probe.t, 0.5)
    together = probe.velocity(x, t)
    if gap := probe.gap(together, _each_alone(probe, x, t)):
        yield (
            f"a candidate's velocity depends on the candidates beside it (N = {NUM_CANDIDATES} at once against each "
            f"alone): {gap}. They must not see each other: mask attention between candidates, or fold N into the batch"
        )


def _check_times(probe: _Probe) -> Iterator[str]:
    x, t = probe.x, probe.t
    together = probe.velocity(x, t)
    if not probe.gap(together, _each_alone(probe, x, t)) or probe.gap(
        probe.velocity(x, t.new_full(t.shape, 0.5)), _each_alone(probe, x, t.new_full(t.shape, 0.5))
    ):
        return  # all well, or candidates mix even at equal times: another check's finding
    shared = {
        "the time of candidate 0 is used for all candidates of a state": t[:, :1].expand_as(t),
        "the time of the last candidate is used for all candidates of a state": t[:, -1:].expand_as(t),
        "the first time of the batch is used for all": t[:1, :1].expand_as(t),
        "the mean time of a state is used for all its candidates": t.mean(dim=1, keepdim=True).expand_as(t),
    }
    cause = next(
        (words for words, times in shared.items() if not probe.gap(together, _each_alone(probe, x, times))),
        "times and candidates are likely put in different orders when N is folded",
    )
    gap = probe.gap(together, _each_alone(probe, x, t))
    yield f"each candidate must be conditioned on its own t[b, j], but {cause}: {gap}. Embed t [B, N], not t[:, 0]"


def _check_select(probe: _Probe) -> Iterator[str]:
    policy, x, t = probe.policy, probe.x[1:2], probe.t[1:2]
    whole, alone = probe.encode(), probe.encode(slice(1, 2))
    index = torch.tensor([1], device=whole.features.device)
    for words, selected in {
        "select([1])": whole.select([1]),
        "select(torch.tensor([1]))": whole.select(index),
        "select(slice(1, 2))": whole.select(slice(1, 2)),
        "select([1]).to(its device)": whole.select([1]).to(whole.features.device),
    }.items():
        gap = probe.gap(selected.features, alone.features)
        with torch.no_grad():
            gap = gap or probe.gap(policy.velocity(selected, x, t), probe.velocity(x, t, slice(1, 2)))
        if gap:
            yield (
                f"prefix.{words} is not what encoding that state alone gives: {gap}. Either select does not index "
                "every tensor of the prefix (cache, masks, positions, state) on its batch axis, or states see each "
                "other in encode (padding, batch norm)"
            )
            return
    if gap := probe.gap(probe.velocity(probe.x, probe.t)[1:2], probe.velocity(x, t, slice(1, 2))):
        yield f"a state's velocity depends on the other states of the batch: {gap}. Are B and N folded in one order?"
    if not probe.gap(probe.velocity(x, t, slice(0, 1)), probe.velocity(x, t, slice(1, 2))) and probe.gap(
        probe.encode(slice(0, 1)).features, alone.features
    ):
        yield "the velocity is the same in two different states: the prefix does not reach the network"


def _check_time_convention(probe: _Probe) -> Iterator[str]:
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
            "action; pass it 1 - t": lambda: disagreement(_Field(lambda p, x, t: policy.velocity(p, x, 1 - t))),
            "the velocity has the wrong sign: agreement returns with -velocity. The model predicts noise - action; "
            "negate its output": lambda: disagreement(_Field(lambda p, x, t: -policy.velocity(p, x, t))),
            "time is mirrored and the sign is wrong: agreement returns with -velocity at 1 - t. The model has t = 1 as "
            "noise and predicts noise - action; pass it 1 - t and negate its output": lambda: disagreement(
                _Field(lambda p, x, t: -policy.velocity(p, x, 1 - t))
            ),
            _FRESH_HELPS: lambda: disagreement(_Field(fresh)),
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
    if cause == _FRESH_HELPS and (any(_check_pure(probe)) or any(_check_memory(probe))):
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


@dataclass(frozen=True)
class _Field:
    """A velocity field out of a function, with what else a flow error reads of a policy."""

    velocity: Callable[[Any, Tensor, Tensor], Tensor]
    spec: ActionSpec | None = None
    sample_time: Callable[..., Tensor] = FlowPolicy.sample_time


def _check_gradients(probe: _Probe) -> Iterator[str]:
    policy = probe.policy
    head = {name: p for name, p in policy.head.named_parameters() if p.requires_grad}
    outside = _outside_head(policy)
    if not head:
        yield "no parameter of policy.head requires grad, so nothing would train; call head.requires_grad_(True)"
        return
    with torch.enable_grad():
        recorded = policy.velocity(probe.encode(), probe.x, probe.t)
        error = flow_errors(policy, probe.encode(), probe.x.clamp(-1, 1), _all_valid(probe), noise=probe.x, t=probe.t)
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
            f"a flow error's gradient does not reach the head parameter {_some(missed)}; a parameter without a use "
            "must not require grad (data-parallel training waits for its gradient): freeze it, or mend the graph"
        )
    if bad := [name for name, g in zip(head, grads, strict=False) if g is not None and not g.isfinite().all()]:
        yield f"the gradient of the head parameter {_some(bad)} is NaN or infinite"
    if outside:
        leaks = [name for name, g in zip(outside, grads[len(head) :], strict=False) if g is not None]
        yield (
            f"outside policy.head nothing may require grad, but {_some(list(outside))} does"
            + (f", and a flow error's gradient flows into {_some(leaks)}" if leaks else "")
            + "; freeze the backbone with requires_grad_(False) in __init__"
        )


def _check_masks(probe: _Probe) -> Iterator[str]:
    """Padded dimensions and invalid steps count for nothing in a flow error."""
    spec, chunk, noise = probe.policy.spec, probe.x.clamp(-1, 1), torch.randn_like(probe.x)
    valid = _all_valid(probe)
    valid[:, spec.horizon // 2 + 1 :] = False
    outputs: list[Tensor] = []

    def tapped(prefix: Prefix, x: Tensor, t: Tensor) -> Tensor:
        outputs.append(probe.velocity(x, t).requires_grad_())
        return outputs[-1]

    def errors(policy: Any, chunk: Tensor) -> Tensor:
        return flow_errors(policy, probe.encode(), chunk, valid, noise=noise, t=probe.t)

    with torch.enable_grad():
        (grad,) = torch.autograd.grad(errors(_Field(tapped, spec), chunk).sum(), outputs)
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


def _check_padding(probe: _Probe) -> Iterator[str]:
    """A VLA may read the noise in its padded dimensions, as it did in pre-training. Then its own sampler does, too."""
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


def _padding_read(probe: _Probe) -> tuple[bool, bool]:
    """Return two flags: velocity reads padded dimensions, the model's own sampler does."""
    policy, real = probe.policy, probe.policy.spec.action_dim
    if real == policy.spec.width:
        return False, False
    other = torch.cat([probe.x[..., :real], 2 - probe.x[..., real:]], dim=-1)
    velocities = [probe.velocity(x, probe.t)[..., :real] for x in (probe.x, other)]
    with torch.no_grad():
        samples = [policy.native_sample(probe.obs, x[:, 0].clone())[..., :real] for x in (probe.x, other)]
    return bool(probe.gap(*velocities)), bool(probe.gap(*samples))


def _padding_zeroed(probe: _Probe) -> bool:
    """Return True if velocity reads padded dimensions of x and gives zeros there."""
    return _padding_read(probe)[0] and not probe.velocity(probe.x, probe.t)[..., probe.policy.spec.action_dim :].any()


def _postprocesses(probe: _Probe, dims: int) -> bool:
    """Return True if actions of that many dimensions go through the post-processor."""
    actions = probe.x[:, 0, :, :dims].clamp(-1, 1)
    try:
        return probe.policy.postprocess(actions).shape == actions.shape
    except Exception:  # LeRobot's steps raise their own; one that needs an observation first refuses any
        return False


def _check_proposals(probe: _Probe) -> Iterator[str]:
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


def _check_sample_time(policy: FlowPolicy) -> Iterator[str]:
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


def _check_save_and_load(probe: _Probe) -> Iterator[str]:
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


_CHECKS: tuple[tuple[str, Callable[[_Probe], Iterator[str]]], ...] = (
    ("velocity", _check_dependence),
    ("encode", _check_encode),
    ("stored prefix", _check_stored_prefix),
    ("packing", _check_packing),
    ("purity", _check_pure),
    ("candidates", _check_candidates),
    ("candidate times", _check_times),
    ("prefix.select", _check_select),
    ("time convention", _check_time_convention),
    ("gradients", _check_gradients),
    ("masks", _check_masks),
    ("padding", _check_padding),
    ("proposals", _check_proposals),
    ("save and load", _check_save_and_load),
)


def _each_alone(probe: _Probe, x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([probe.velocity(x[:, [j]], t[:, [j]]) for j in range(x.shape[1])], dim=1)


def _all_valid(probe: _Probe) -> Tensor:
    return torch.ones(len(probe.x), probe.policy.spec.horizon, dtype=torch.bool, device=probe.x.device)


def _rows(obs: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """Some states of processed observations: tensors, arrays and lists by their first axis, mappings within."""
    return {
        key: _rows(value, rows) if isinstance(value, Mapping) else value[rows] if _has_rows(value) else value
        for key, value in obs.items()
    }


def _has_rows(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str) and getattr(value, "ndim", 1) > 0


def _some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
