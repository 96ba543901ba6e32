"""Conditions that a record holds when it is built."""

from typing import Any, get_type_hints

from poco_vla.errors import ConfigError, UnknownNameError
from poco_vla.hints import choices_of


def require(holds: bool, message: str) -> None:
    """Raise ConfigError unless a condition holds."""
    if not holds:
        raise ConfigError(message)


def require_seed(name: str, seed: int) -> None:
    """Raise ConfigError for a seed that a generator does not take."""
    require(0 <= seed < 2**31, f"{name} is {seed}; a seed is a number from 0 to {2**31 - 1}")


def check_choices(options: Any) -> None:
    """Raise UnknownNameError for an option of a record that is none of the choices of its Literal type."""
    for name, hint in get_type_hints(type(options)).items():
        known, value = choices_of(hint), getattr(options, name)
        if known and value not in known:
            raise UnknownNameError(name, str(value), known)


def check_positive(options: Any, *names: str) -> None:
    """Raise ConfigError for an option that is not above 0."""
    for name in names:
        require(getattr(options, name) > 0, f"{name} is {getattr(options, name)}; it must be above 0")


def check_counts(options: Any, *names: str) -> None:
    """Raise ConfigError for an option below 1."""
    for name in names:
        require(getattr(options, name) >= 1, f"{name} is {getattr(options, name)}; at least 1")


def check_shares(options: Any, *names: str) -> None:
    """Raise ConfigError for an option outside (0, 1]."""
    for name in names:
        require(0 < getattr(options, name) <= 1, f"{name} is {getattr(options, name)}; it must lie in (0, 1]")


def check_widths(options: Any, *names: str) -> None:
    """Raise ConfigError unless hidden widths are positive and there is one at least."""
    for name in names:
        widths = getattr(options, name)
        message = f"{name} is {list(widths)}; it needs one width or more, all above 0"
        require(len(widths) > 0 and min(widths) > 0, message)
