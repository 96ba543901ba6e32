"""What is installed: adapters by name, entry points of group ``poco_vla.adapters``, and versions of distributions.
Nothing is imported before it is asked for."""

from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version

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


def installed_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of those of these distributions that are installed."""
    found = {}
    for name in distributions:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}
