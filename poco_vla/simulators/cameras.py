"""What simulated cameras can be asked for."""

from collections.abc import Iterable, Sequence

from poco_vla.errors import ConfigError, UnknownNameError

SMALLEST = 32
"""Pixels along a side that video encoders need."""


def checked_cameras(names: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple. Raises UnknownNameError for one that is not known."""
    for name in names:
        if name not in known:
            raise UnknownNameError("camera", name, known)
    return tuple(names)


def check_image_size(pixels: int) -> None:
    """Raises ConfigError for pictures that no video can hold."""
    if pixels < SMALLEST or pixels % 2:
        raise ConfigError(f"image_size is {pixels}; video encoders need an even one of at least {SMALLEST} pixels")
