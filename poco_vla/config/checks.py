"""Conditions that a record holds when it is built."""

from poco_vla.errors import ConfigError


def require(holds: bool, message: str) -> None:
    """Raise ConfigError unless a condition holds."""
    if not holds:
        raise ConfigError(message)


def require_seed(name: str, seed: int) -> None:
    """Raise ConfigError for a seed that a generator does not take."""
    require(0 <= seed < 2**31, f"{name} is {seed}; a seed is a number from 0 to {2**31 - 1}")
