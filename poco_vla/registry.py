"""Adapters by name: entry points of group ``poco_vla.adapters``. Nothing is imported before it is asked for."""

from importlib.metadata import EntryPoint, entry_points

from poco_vla.errors import PolicyError, UnknownAdapterError
from poco_vla.policy import FlowPolicy

GROUP = "poco_vla.adapters"


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


def _points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}
