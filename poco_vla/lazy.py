"""A package's names, loaded when they are first asked for (PEP 562)."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def load_on_demand(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package that loads none of its modules by itself.

    A robot's PC needs one small module out of a package that also holds the policy, and not the seconds and the memory
    that torch takes. Type checkers do not see these names: the package imports them under ``TYPE_CHECKING`` as well.

    Args:
        package: its ``__name__``.
        names: module below the package -> what it gives to the package.
    """
    home = {name: module for module, given in names.items() for name in given}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home[name]}"), name)

    return get, lambda: sorted(home)
