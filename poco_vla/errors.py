"""Errors for users. Every message says what was found, what was expected, and what to do.

All derive from :class:`PocoError`, which is a ``ValueError``: a caller who catches ``ValueError`` catches them.
``assert`` is kept for this library's own invariants.
"""

from collections.abc import Iterable
from difflib import get_close_matches

_UNSAFE = (
    *(code for code in range(0x20) if chr(code) not in "\n\t"),
    *range(0x7F, 0xA0),  # delete, and the C1 controls: 0x9B alone begins a terminal's command
    *(0x061C, 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),  # direction, line ends
    *range(0xD800, 0xE000),  # lone surrogates: no terminal takes them
)
_ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _UNSAFE}
_LINE_ESCAPES = _ESCAPES | {ord("\n"): "\\n", ord("\t"): "\\t"}


def printable(text: str, *, lines: bool = True) -> str:
    """Return a text with control characters written as escapes, so that a terminal shows them and obeys none.

    Names in files and messages are somebody else's: one may hold codes that retitle a window or overwrite a line.

    Args:
        text: any text.
        lines: keep line feeds and tabs; False writes them as escapes, too, for a name within a line.
    """
    return text.translate(_ESCAPES if lines else _LINE_ESCAPES)


class PocoError(ValueError):
    """Base of every error that a user can cause and mend. Its text holds no control characters."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(PocoError):
    """A configuration value that cannot work, found before any long work starts."""


NEAREST = 5
"""Names shown of a long list."""


class UnknownNameError(PocoError):
    """A name that is not among those on offer.

    Args:
        kind: of thing that has the name.
        name: the unknown name.
        known: all names on offer.
        listing: command that lists them; given, only the nearest names are shown.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], listing: str = "") -> None:
        known, name = sorted(known), printable(name, lines=False)
        close = get_close_matches(name, known, n=1)
        guess = f' Did you mean "{close[0]}"?' if close else ""
        if listing and len(known) > NEAREST:
            nearest = ", ".join(get_close_matches(name, known, n=NEAREST, cutoff=0.0))
            offer = f"Nearest of {len(known)}: {nearest}. List all: {listing}."
        else:
            offer = f"Known: {', '.join(known) or 'none'}."
        super().__init__(f'no {kind} named "{name}". {offer}{guess}')


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


class AlgorithmError(PocoError):
    """An algorithm that breaks the contract of :class:`poco_vla.algorithms.Algorithm`."""


class NotWrittenError(PolicyError, NotImplementedError):
    """A method of :class:`poco_vla.policy.FlowPolicy` that an adapter has not written, and that is needed now."""


class HubError(PocoError):
    """Something that cannot go to the Hub, or come from it."""


class NonFiniteError(PocoError):
    """A loss or an observation that is NaN or infinite."""


class SimulatorError(PocoError):
    """A simulator that fails again and again: it raises, hangs, dies, or returns numbers that are not finite."""


class OtherProcessError(PocoError):
    """Another process of this run has failed.

    Attributes:
        summary: that process's error (:func:`poco_vla.bugs.summary_of`), None where it could not say.
    """

    def __init__(self, message: str, summary: str | None = None) -> None:
        super().__init__(message)
        self.summary = summary
