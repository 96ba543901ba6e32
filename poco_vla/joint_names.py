"""Names of the numbers in states and actions: read from LeRobot's features, and compared. Needs no torch."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

from poco_vla.errors import CheckpointError, PolicyError

ACTION, STATE = "action", "observation.state"
VECTORS = (STATE, ACTION)
"""Columns whose numbers have names and an order."""
LISTED = 64
"""Names that a message lists at most."""

type Joints = Mapping[str, str] | Literal["positional"] | None
"""Option of adapters: {name in the data: name in the checkpoint}, or "positional" to compare no names."""

_PLACEHOLDER = re.compile(
    r"(none|null|nan|actions?|states?)|"
    r"(actions?|states?|obs(ervation)?s?|motors?|joints?|dim(ension)?s?|axis|axes|features?|values?|elements?|channels?|"
    r"index|[a-z])?[\s._-]*\d+([._-]?(pos|position))?",
    re.IGNORECASE,
)


def names_of(feature: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """Return the names of a vector's numbers, in order; None where the feature does not name each of them once.

    LeRobot's datasets hold a flat list, a list in a list, {"motors": [...]} (or "axes"), or {name: index}.

    Args:
        feature: an entry of a dataset's features.
    """
    if feature is None:
        return None
    shape = tuple(feature.get("shape") or ())
    return checked_names(feature.get("names"), shape[0] if len(shape) == 1 else None)


def checked_names(names: Any, size: int | None) -> tuple[str, ...] | None:
    """Return `names` as a flat tuple, None unless they are `size` different texts.

    Args:
        names: in any of the forms that :func:`names_of` lists.
        size: how many numbers there are; None accepts any.
    """
    if isinstance(names, Mapping):
        if names and all(isinstance(index, int) for index in names.values()):
            names = sorted(names, key=lambda name: names[name])
        else:
            names = list(names.values())
    flat = list(_flat(names)) if isinstance(names, list | tuple) else []
    whole = bool(flat) and all(isinstance(name, str) and name for name in flat) and len(set(flat)) == len(flat)
    return tuple(flat) if whole and size in (None, len(flat)) else None


def is_placeholder(names: Iterable[str]) -> bool:
    """Return True if names say no more than a position: "motor_0", "action_1", "3"."""
    return all(_PLACEHOLDER.fullmatch(name.strip()) for name in names)


def match_names(
    given: Sequence[str],
    own: Sequence[str],
    *,
    key: str,
    where: tuple[str, str],
    joints: Joints = None,
    option: str = 'policy_options {"joints": {"name there": "name here"}} or {"joints": "positional"}',
) -> tuple[int, ...]:
    """Return the position in `given` of each of `own`; empty where they stand in one order, or positions count.

    Args:
        given: names on one side.
        own: names on the other.
        key: the column, for messages.
        where: both sides, for messages.
        joints: see :data:`Joints`.
        option: how to say that names merely differ, for messages.

    Raises:
        PolicyError: they are other names.
    """
    if joints == "positional":
        return ()
    renamed = [(joints or {}).get(name, name) for name in given]
    for spelled in (lambda name: name, _spelling):
        ours, theirs = [spelled(name) for name in own], [spelled(name) for name in renamed]
        if len(set(theirs)) == len(theirs) and sorted(ours) == sorted(theirs):
            return indices(theirs, ours)
    if is_placeholder(given) or is_placeholder(own):
        return ()
    raise PolicyError(
        f'"{key}" is {listed(given)} in {where[0]} and {listed(own)} in {where[1]}: other names, so that a number '
        f"could reach another joint. If only the names differ, give {option}."
    )


def check_same_names(before: Any, now: Mapping[str, Sequence[str]], where: str) -> None:
    """Raise CheckpointError if a run's states or actions have other names, or another order, than when it was saved.

    Args:
        before: names by column in the checkpoint; None where it has none.
        now: names by column of the policy on the present data.
        where: the checkpoint, for the message.
    """
    for key in VECTORS:
        old, new = (before or {}).get(key), now.get(key)
        if old and new and list(old) != list(new):
            raise CheckpointError(
                f'"{key}" was {listed(old)} when {where} was written, and is {listed(new)} in the dataset now: resume '
                "on the data in its former order, or begin a new run"
            )


def listed(names: Iterable[str]) -> str:
    """Return names in brackets, for a message; control characters are escaped."""
    names = list(names)
    shown = [ascii(name)[1:-1] for name in names[:LISTED]]
    return f"[{', '.join(shown)}{', ...' if len(names) > LISTED else ''}]"


def indices(given: Sequence[str], own: Sequence[str]) -> tuple[int, ...]:
    """Return the position in `given` of each of `own`; empty where that is its own."""
    index = tuple(given.index(name) for name in own)
    return () if index == tuple(range(len(given))) else index


def _flat(names: Any) -> Iterable[Any]:
    return chain.from_iterable(_flat(name) if isinstance(name, list | tuple) else [name] for name in names)


def _spelling(name: str) -> str:
    """Return a joint's name without what LeRobot's versions spell otherwise: "main_x", "x.pos"."""
    return re.sub(r"[\s._-]+", "_", name.casefold().removesuffix(".pos").removeprefix("main_"))
