"""Names of settings: the fields in which they differ, and their values."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from poco_vla.report.commands import shown

MOST_FIELDS = 4
"""Fields that a name spells out; it counts the others."""
MOST_LETTERS = 28
"""Letters of a value in a name."""
FOLLOWS = ("env.type", "env.task", "dataset.", "demonstrations.", "eval.")
"""Fields that are named last: what a setting is about comes first."""


def labels_of(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one name for each of some settings of the same task; an empty one where there is only one setting.

    A name holds every field whose value is not the same in all of them, at most :data:`MOST_FIELDS` of them spelled
    out, those first that tell most settings apart.
    """
    every = sorted({name for table in tables for name in table}, key=_rank)
    differing = [name for name in every if _kinds(tables, [name]) > 1]
    leading = _telling(tables, differing)
    fields = [*leading, *(name for name in differing if name not in leading)]
    spelled = fields[: max(MOST_FIELDS, len(leading))]
    rest = len(fields) - len(spelled)
    return [
        ", ".join(f"{name} {_short(table.get(name, 'not set'))}" for name in spelled)
        + (f" and {rest} more difference{'s' if rest > 1 else ''}" if rest else "")
        for table in tables
    ]


def _telling(tables: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> list[str]:
    """Return the fewest fields that tell all settings apart, the adapter and the algorithm's own first."""
    told: list[str] = []
    while fields and _kinds(tables, told) < len(tables):
        told.append(max(fields, key=lambda name: _kinds(tables, [*told, name])))
    return told


def _kinds(tables: Sequence[Mapping[str, Any]], names: Iterable[str]) -> int:
    names = list(names)
    return len({json.dumps([table.get(name, "not set") for name in names], default=str) for table in tables})


def _rank(name: str) -> tuple[bool, bool, bool, str]:
    return name != "adapter", not name.startswith("poco."), name.startswith(FOLLOWS), name


def _short(value: object) -> str:
    text = shown(value)
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 3]}..."
