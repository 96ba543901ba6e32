"""The conformance kit: does a policy keep the contract of :class:`poco_vla.policy.FlowPolicy`?

Every adapter passes it, ours and a third party's::

    from poco_vla import check_policy

    def test_my_adapter_keeps_the_contract():
        check_policy(MyAdapter.tiny())

Each point that is broken is reported in words: what was found, what was expected, the likely cause and its mend.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from poco_vla.bugs import place_of
from poco_vla.conformance.basic_checks import (
    check_dependence,
    check_sample_time,
    check_save_and_load,
    check_spec,
    check_velocity,
    make_copy,
    make_probe,
)
from poco_vla.conformance.batch_checks import check_candidates, check_select, check_times
from poco_vla.conformance.interface import left_out, missing_parts
from poco_vla.conformance.memory_checks import check_memory, check_pure
from poco_vla.conformance.message import broken_contract
from poco_vla.conformance.prefix_checks import check_encode, check_packing, check_stored_prefix
from poco_vla.conformance.probe import CannotGoOnError, Probe
from poco_vla.conformance.sampling_checks import check_padding, check_proposals, check_time_convention
from poco_vla.conformance.training_checks import check_gradients, check_masks
from poco_vla.errors import PolicyError
from poco_vla.policy import FlowPolicy

logger = logging.getLogger(__name__)


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
        raise PolicyError(broken_contract(type(policy).__name__, "FlowPolicy", broken))
    if optional := left_out(policy):
        logger.info("%s keeps the contract; optional and not written: %s", type(policy).__name__, "; ".join(optional))


def _broken_points(policy: FlowPolicy, obs: Mapping[str, Any] | None, atol: float) -> list[str]:
    broken: list[str] = []
    policy.eval()

    def run(title: str, check: Callable[..., Iterator[str]], *args: Any) -> bool:
        try:
            broken.extend(f"{title}: {point}" for point in check(*args))
        except CannotGoOnError as error:
            broken.append(f"{title}: {error}")
            return False
        # Whatever a stranger's adapter raises is a finding; the remaining points are still worth knowing.
        except Exception as error:
            broken.append(f"{title}: raised {type(error).__name__}: {error}{place_of(error)}")
            return False
        return True

    copies: list[FlowPolicy] = []
    run("copy", make_copy, policy, copies)
    run("sample_time", check_sample_time, policy)
    run("interface", missing_parts, policy)
    probes: list[Probe] = []
    basics = run("spec", check_spec, policy) and run("encode", make_probe, policy, copies, obs, atol, probes)
    if not (basics and run("velocity", check_velocity, probes[0]) and run("memory", check_memory, probes[0])):
        return [*broken, "nothing else could be checked before these points are mended"]
    for title, check in _CHECKS:
        run(title, check, probes[0])
    return broken


_CHECKS: tuple[tuple[str, Callable[[Probe], Iterator[str]]], ...] = (
    ("velocity", check_dependence),
    ("encode", check_encode),
    ("stored prefix", check_stored_prefix),
    ("packing", check_packing),
    ("purity", check_pure),
    ("candidates", check_candidates),
    ("candidate times", check_times),
    ("prefix.select", check_select),
    ("time convention", check_time_convention),
    ("gradients", check_gradients),
    ("masks", check_masks),
    ("padding", check_padding),
    ("proposals", check_proposals),
    ("save and load", check_save_and_load),
)
