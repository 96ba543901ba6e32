"""Errors for users. Every message says what was found, what was expected, and what to do.

All derive from :class:`PocoError`, which is a ``ValueError``: a caller who catches ``ValueError`` catches them.
``assert`` is kept for this library's own invariants.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class PocoError(ValueError):
    """Base of every error that a user can cause and mend."""


class ConfigError(PocoError):
    """A configuration value that cannot work, found before any long work starts."""


class UnknownNameError(PocoError):
    """A name that is not among those on offer."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        close = get_close_matches(name, known, n=1)
        listed = ", ".join(known) or "none"
        guess = f' Did you mean "{close[0]}"?' if close else ""
        super().__init__(f'no {kind} named "{name}". Known: {listed}.{guess}')


class UnknownAdapterError(UnknownNameError):
    """An adapter name that no installed distribution offers."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__("adapter", name, known)


class DataError(PocoError):
    """A dataset or a batch that does not hold what training needs."""


class CheckpointError(PocoError):
    """A checkpoint that is missing, damaged, or of another configuration."""


class PolicyError(PocoError):
    """A policy that breaks the contract of :class:`poco_vla.policy.FlowPolicy`."""


class HubError(PocoError):
    """Something that cannot go to the Hub, or come from it."""


class NonFiniteError(PocoError):
    """A loss or an observation that is NaN or infinite."""
