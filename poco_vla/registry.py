"""Adapters by name: entry points of group ``poco_vla.adapters``. Nothing is imported before it is asked for."""

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from poco_vla.errors import PolicyError, UnknownAdapterError, UnknownNameError
from poco_vla.policy import FlowPolicy

GROUP = "poco_vla.adapters"
PASSED = frozenset({"repo_or_path", "horizon", "device", "features", "stats", "statistics", "dataset_meta"})
"""Arguments of an adapter that the library itself passes."""
KINDS = ("ACTION", "ENV", "LANGUAGE", "REWARD", "STATE", "VISUAL")
"""LeRobot's kinds of features."""
MODES = ("IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILE10", "QUANTILES")
"""LeRobot's normalization modes."""


def available_adapters() -> dict[str, str]:
    """Installed adapters: name -> where its class lives ("module:Class")."""
    return {name: point.value for name, point in sorted(_points().items())}


def load_adapter(name: str) -> type[FlowPolicy]:
    """The adapter class of that name.

    Raises:
        UnknownAdapterError: nothing installed offers it; the message lists what is.
        PolicyError: what is registered under the name is no FlowPolicy.
    """
    points = _points()
    if name not in points:
        raise UnknownAdapterError(name, points)
    loaded = points[name].load()
    if not (isinstance(loaded, type) and issubclass(loaded, FlowPolicy)):
        raise PolicyError(f'adapter "{name}" is {points[name].value}, which is not a subclass of poco_vla.FlowPolicy')
    return loaded


def check_options(adapter: type[FlowPolicy], options: Mapping[str, Any], *, pretrained: bool) -> None:
    """Raise UnknownNameError if an adapter has no option of a name, before anything is loaded.

    Args:
        adapter: the adapter's class.
        options: `TrainConfig.policy_options`.
        pretrained: True if the policy starts from a checkpoint.
    """
    known = adapter.option_names(pretrained=pretrained)
    for name in options:
        if known is not None and name not in known - PASSED:
            raise UnknownNameError("option of this adapter (policy_options)", name, known - PASSED)
    mapping = options.get("normalization_mapping")
    for kind, mode in mapping.items() if isinstance(mapping, Mapping) else ():
        if kind not in KINDS:
            raise UnknownNameError("kind of feature in normalization_mapping", kind, KINDS)
        if getattr(mode, "value", mode) not in MODES:
            raise UnknownNameError(f"normalization of {kind}", str(mode), MODES)


def _points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}
