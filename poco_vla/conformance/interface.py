"""The part of the conformance kit that is no mathematics: does an adapter offer what runs, servers and robots call?"""

from collections.abc import Iterator
from inspect import Parameter, signature
from typing import Any

from poco_vla.policy import FlowPolicy

LOADING = ("horizon", "device", "features", "stats", "statistics", "dataset_meta")
"""Keyword arguments that a run gives `from_pretrained`."""
OPTIONAL = {
    "from_dataset": "a run then needs a pretrained policy (--policy)",
    "example_obs": "check_policy then needs observations (check_policy(policy, obs))",
    "tiny": "nothing in a run needs it",
    "save_head": "a run then saves whole policies; needed where `base` is set",
    "pack": "prefixes are then not cached",
}
"""Methods that an adapter may leave out, and what follows."""


def missing_parts(policy: FlowPolicy) -> Iterator[str]:
    """Yield each part of the contract that a run would miss, in words: processors, input keys, loading."""
    for name, gives in (("preprocess", "the network's units"), ("postprocess", "the robot's units")):
        if not callable(getattr(policy, name, None)):
            yield f"policy.{name} is missing; set it in __init__ to LeRobot's pipeline that gives {gives}"
    keys: Any = getattr(policy, "input_keys", None)
    if not isinstance(keys, tuple | list) or not keys or not all(isinstance(key, str) for key in keys):
        yield f"policy.input_keys is {keys!r}, expected the raw observation keys that preprocess reads"
    if refused := _refused(type(policy).from_pretrained):
        yield (
            f"from_pretrained does not take {', '.join(refused)}, which a run gives it: add the arguments of "
            "FlowPolicy.from_pretrained, or **options"
        )
    if policy.base is not None and not is_written(policy, "save_head"):
        yield f'policy.base is "{policy.base}", and save_head is not written: a run saves heads of such a policy'


def is_written(policy: FlowPolicy, name: str) -> bool:
    """Return True if an adapter has a method of its own."""
    own, base = getattr(type(policy), name, None), getattr(FlowPolicy, name)
    return getattr(own, "__func__", own) is not getattr(base, "__func__", base)


def left_out(policy: FlowPolicy) -> list[str]:
    """Return the optional methods that an adapter has not written, each with what follows."""
    return [f"{name} ({follows})" for name, follows in OPTIONAL.items() if not is_written(policy, name)]


def _refused(function: Any) -> list[str]:
    """Return the arguments of a run that a `from_pretrained` would refuse."""
    parameters = signature(function).parameters
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []
    return [name for name in LOADING if name not in parameters]
