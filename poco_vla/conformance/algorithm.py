"""Does an algorithm keep the contract of :class:`poco_vla.algorithms.Algorithm`?

Every algorithm passes, ours and a third party's::

    from poco_vla import check_algorithm, load_adapter

    def test_my_algorithm_keeps_the_contract():
        check_algorithm(MyAlgorithm, MyConfig(), load_adapter("flow_mlp").tiny())
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from poco_vla.algorithms import Algorithm, Phase
from poco_vla.algorithms.on_policy.contract import OnPolicy
from poco_vla.bugs import place_of
from poco_vla.conformance.message import broken_contract
from poco_vla.errors import AlgorithmError
from poco_vla.noise import GlobalBatchRNG, micro_batches
from poco_vla.policy import FlowPolicy
from poco_vla.types import ChunkBatch, RolloutBatch

ROWS, UPDATES = 6, 24
"""Transitions of the batch, and updates of a stage over which its phases are looked up."""


def check_algorithm(
    kind: type[Algorithm],
    options: Any,
    policy: FlowPolicy,
    obs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    atol: float = 1e-4,
) -> None:
    """Raise one AlgorithmError that lists every point of the contract an algorithm breaks; return None if it keeps all.

    Args:
        kind: the class.
        options: its options, a `config_class`.
        policy: on which it is tried, usually an adapter's ``tiny()``; it is copied, not changed.
        obs: processed observations of 6 states; ``policy.example_obs(6)`` when None.
        seed: of weights, batch and noise.
        atol: largest difference that counts as equal, relative to the larger of 1 and the values compared.
    """
    broken: list[str] = []
    devices = {p.device for p in policy.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        probe = _Probe(kind, options, policy, _batch(policy, policy.example_obs(ROWS) if obs is None else obs), atol)
        for title, check in _CHECKS:
            try:
                broken += [f"{title}: {point}" for point in check(probe)]
            # Whatever a stranger's algorithm raises is a finding; the remaining points are still worth knowing.
            except Exception as error:
                broken.append(f"{title}: raised {type(error).__name__}: {error}{place_of(error)}")
    if broken:
        raise AlgorithmError(broken_contract(kind.__name__, "Algorithm", broken))


def _batch(policy: FlowPolicy, obs: Mapping[str, Any]) -> ChunkBatch:
    """Return a batch with every kind of transition: demonstrations, a success, an episode's end, a time limit."""
    spec, like = policy.spec, next(p for p in policy.parameters() if p.requires_grad)
    rows = len(next(value for value in obs.values() if isinstance(value, Tensor)))
    actions = torch.randn(rows, spec.horizon, spec.width).clamp(-1, 1)
    actions[..., spec.action_dim :] = 0
    valid, discount = torch.ones(rows, spec.horizon, dtype=torch.bool), torch.full((rows,), 0.9)
    valid[1, 1:], discount[1] = False, 0.0
    first = torch.arange(rows)
    return ChunkBatch(
        obs=obs,
        next_obs={k: v.roll(1, 0) if isinstance(v, Tensor) else v for k, v in obs.items()},
        actions=actions.to(like.device),
        valid=valid.to(like.device),
        returns=torch.randn(rows, device=like.device),
        discount=discount.to(like.device),
        is_demo=(first % 2 == 0).to(like.device),
        is_success=(first % 3 < 2).to(like.device),
    )


def rollout_of(algorithm: OnPolicy, batch: ChunkBatch, generator: torch.Generator) -> RolloutBatch:
    """Return a rollout's batch on the states of another, of chunks that the algorithm chooses to learn from; the values
    are to become the batch's returns."""
    prefix = algorithm.encode(batch)
    chunk, acted = algorithm.explore(prefix, generator)
    values, log_prob = algorithm.look_back(prefix, acted)
    returns = batch.returns.to(values)
    fields: dict[str, Any] = {**vars(batch), "actions": chunk, "acted": acted, "log_prob": log_prob}
    return RolloutBatch(**fields, values=values, advantages=returns - values, value_targets=returns)


@dataclass(frozen=True)
class _Probe:
    """An algorithm's class and what it is tried on."""

    kind: type[Algorithm]
    options: Any
    policy: FlowPolicy
    batch: ChunkBatch
    atol: float

    def made(self, seed: int = 0) -> Algorithm:
        """Return the algorithm, with weights and random numbers of a seed."""
        torch.manual_seed(seed)
        like = next(self.policy.parameters())
        rng = GlobalBatchRNG(torch.Generator().manual_seed(seed))
        made = self.kind(deepcopy(self.policy), self.options, rng).to(like.device)
        made.prepare_online([self.batch], GlobalBatchRNG(torch.Generator().manual_seed(seed)))
        return made

    def batch_of(self, algorithm: Algorithm, phase: Phase) -> ChunkBatch:
        """Return the batch of a phase: of an algorithm that learns from its latest rollouts one of its own chunks."""
        if not isinstance(algorithm, OnPolicy) or phase == "sft":
            return self.batch
        return rollout_of(algorithm, self.batch, torch.Generator().manual_seed(3))

    def phases(self, algorithm: Algorithm) -> list[Phase]:
        """Return every phase that a run has, each once."""
        stages, updates = algorithm.stages(), range(UPDATES)
        found = [phase for stage in stages for update in updates for phase in algorithm.phases(stage, update)]
        return list(dict.fromkeys(found))

    def gap(self, found: Tensor, expected: Tensor) -> float:
        """Return by how much two tensors differ, 0 when they are equal within the tolerance."""
        found, expected = found.detach().double(), expected.detach().double()
        if found.shape != expected.shape or not torch.isfinite(found).all():
            return float("inf")
        largest = (found - expected).abs().max().item()
        return largest if largest > self.atol * max(1.0, expected.abs().max().item()) else 0.0


def _check_losses(probe: _Probe) -> Iterator[str]:
    algorithm = probe.made()
    for phase in probe.phases(algorithm):
        if not callable(getattr(algorithm, f"{phase}_loss", None)):
            yield f'there is no method {phase}_loss, which phase "{phase}" needs'
            continue
        loss, metrics = algorithm(probe.batch_of(algorithm, phase), phase)
        if loss.ndim or not torch.isfinite(loss):
            yield f"{phase}_loss returned {loss}, expected a finite scalar"
        if wrong := [name for name, value in metrics.items() if value.ndim or value.requires_grad]:
            yield f"metrics of {phase}_loss that are no detached scalars: {', '.join(wrong)}"


def _check_groups(probe: _Probe) -> Iterator[str]:
    algorithm = probe.made()
    groups = {group["name"]: group["params"] for group in algorithm.parameter_groups()}
    if next(iter(groups), None) != "actor":
        yield f'the first parameter group is "{next(iter(groups), None)}", expected "actor", the policy\'s'
    grouped = [id(p) for params in groups.values() for p in params]
    names = {id(p): name for name, p in algorithm.named_parameters() if p.requires_grad}
    if left := [name for key, name in names.items() if key not in grouped]:
        yield f"in no parameter group, so that it never trains: {', '.join(left)} (a target network is frozen)"
    if extra := set(grouped) - set(names):
        yield f"{len(extra)} parameters of the groups do not require grad, or are not the algorithm's own"
    if len(set(grouped)) != len(grouped):
        yield "a parameter is in two groups"
    for phase in probe.phases(algorithm):
        algorithm.zero_grad(set_to_none=True)
        algorithm(probe.batch_of(algorithm, phase), phase)[0].backward()
        reached = {name for name, params in groups.items() if any(p.grad is not None for p in params)}
        said = algorithm.trained_groups(phase)
        for name in sorted(reached - said):
            yield (
                f'in phase "{phase}" the gradient reaches group "{name}", which trained_groups does not name: detach '
                "what that network gives, or compute its output under no_grad"
            )
        for name in sorted(said - reached):
            yield f'in phase "{phase}" trained_groups names "{name}", but no gradient reaches that group'
        for name in sorted(reached & said):
            if missing := sum(p.grad is None for p in groups[name]):
                yield f'in phase "{phase}" {missing} of {len(groups[name])} parameters of "{name}" have no gradient'


def _check_noise(probe: _Probe) -> Iterator[str]:
    """A loss is a function of batch, noise and weights: micro-batches and processes compute the same one."""
    algorithm = probe.made()
    for phase in probe.phases(algorithm):
        batch, outside = probe.batch_of(algorithm, phase), torch.get_rng_state()
        noise = algorithm.draw_noise(batch, phase)
        if not torch.equal(outside, torch.get_rng_state()):
            yield f'draw_noise of phase "{phase}" draws from torch\'s own generator; take self.rng'
        drawn = algorithm.rng.generator.get_state()
        whole = algorithm(batch, phase, noise)[0]
        if not (
            torch.equal(outside, torch.get_rng_state()) and torch.equal(drawn, algorithm.rng.generator.get_state())
        ):
            yield f"{phase}_loss draws random numbers itself; draw them in draw_noise, for the global batch"
            continue
        parts = [algorithm(rows, phase, its)[0] * share for rows, its, share in micro_batches(batch, noise, 2)]
        if gap := probe.gap(torch.stack(parts).sum(), whole):
            yield (
                f"the micro-batches of {phase}_loss do not add up to that of the batch (they differ by {gap:.3g}): "
                "what is counted or averaged over the batch belongs into draw_noise"
            )


def _check_reads(probe: _Probe) -> Iterator[str]:
    algorithm = probe.made()
    blank = {k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in probe.batch.next_obs.items()}
    for phase in probe.phases(algorithm):
        if algorithm.reads_next(phase):
            continue
        whole = probe.batch_of(algorithm, phase)
        noise = algorithm.draw_noise(whole, phase)
        one, two = (algorithm(batch, phase, noise)[0] for batch in (whole, replace(whole, next_obs=blank)))
        if probe.gap(two, one):
            yield f'{phase}_loss reads the next observations, but reads_next("{phase}") is False'


def _check_acting(probe: _Probe) -> Iterator[str]:
    algorithm, spec = probe.made().eval(), probe.policy.spec
    prefix = algorithm.encode(probe.batch)

    def chunk(of: Algorithm, name: str) -> Tensor:
        return getattr(of, name)(prefix, generator=torch.Generator().manual_seed(3))

    for name in ("act", "act_untrained"):
        outside = torch.get_rng_state()
        found = chunk(algorithm, name)
        if not torch.equal(outside, torch.get_rng_state()):
            yield f"{name} draws from torch's own generator, not from the one that it is given"
        if tuple(found.shape) != (len(probe.batch), spec.horizon, spec.width):
            yield f"{name} returned shape {list(found.shape)}, expected {[len(probe.batch), spec.horizon, spec.width]}"
            continue
        if found.requires_grad:
            yield f"{name} returned a chunk with gradient; decorate it with torch.no_grad()"
        if spec.clip and not bool(((found >= spec.clip[0]) & (found <= spec.clip[1])).all()):
            yield f"{name} returned actions outside {spec.clip}, or NaN; clip them"
        if spec.action_dim < spec.width and found[..., spec.action_dim :].any():
            yield f"{name} returned padded action dimensions that are not 0"
        if probe.gap(chunk(algorithm, name), found):
            yield f"{name} gives another chunk when it is called again with the same generator"
        algorithm.train().policy.eval()
        if probe.gap(chunk(algorithm, name), found):
            yield f"{name} gives another chunk in train mode: training would act otherwise than evaluations do"
        algorithm.eval()
        for view in (algorithm.for_acting(), deepcopy(algorithm.for_acting())):
            if probe.gap(chunk(view, name), found):
                yield f"{name} of for_acting() gives another chunk than the whole algorithm's"


def _check_options(probe: _Probe) -> Iterator[str]:
    """Compare what a run asks the class, beside its losses, with the options."""
    option, used = getattr(probe.options, "gamma", None), probe.kind.gamma(probe.options)
    if option is not None and option != used:
        yield f"gamma(config) is {used}, the option is {option}: returns would be discounted otherwise than it says"
    if probe.kind.ranks_candidates:
        algorithm = probe.made().eval()
        found = algorithm.for_acting(3).act(algorithm.encode(probe.batch), 3, torch.Generator().manual_seed(3))
        if tuple(found.shape) != (len(probe.batch), probe.policy.spec.horizon, probe.policy.spec.width):
            yield f"ranks_candidates is True, and act of the best of 3 returned shape {list(found.shape)}"


def _check_state(probe: _Probe) -> Iterator[str]:
    """After some updates, state_dict and random numbers make an algorithm of other weights the same one."""
    algorithm, other = probe.made(), probe.made(seed=1)
    stage = "online"
    optimizer = torch.optim.SGD([{"params": g["params"], "lr": 0.01} for g in algorithm.parameter_groups()])
    for update in range(3):
        for phase in algorithm.phases(stage, update):
            optimizer.zero_grad()
            algorithm(probe.batch_of(algorithm, phase), phase)[0].backward()
            optimizer.step()
            algorithm.after_step(phase)
    other.load_state_dict(deepcopy(algorithm.state_dict()))
    other.rng.generator.set_state(algorithm.rng.generator.get_state())
    for phase in algorithm.phases(stage, 3):
        batch = probe.batch_of(algorithm, phase)
        if gap := probe.gap(other(batch, phase)[0], algorithm(batch, phase)[0]):
            yield (
                f"after load_state_dict of another one's state_dict {phase}_loss differs by {gap:.3g}: what updates "
                "change belongs into parameters or buffers"
            )
    prefix = algorithm.encode(probe.batch)
    chunks = [one.act(prefix, generator=torch.Generator().manual_seed(3)) for one in (other, algorithm)]
    if probe.gap(*chunks):
        yield "after load_state_dict of another one's state_dict act gives another chunk"


_CHECKS: tuple[tuple[str, Callable[[_Probe], Iterator[str]]], ...] = (
    ("losses", _check_losses),
    ("groups", _check_groups),
    ("noise", _check_noise),
    ("reads_next", _check_reads),
    ("acting", _check_acting),
    ("options", _check_options),
    ("state", _check_state),
)
