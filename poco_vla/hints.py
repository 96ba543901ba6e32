"""Types of options in words, and whether a value is one of them."""

from collections.abc import Mapping, Sequence
from enum import Enum
from os import PathLike
from types import UnionType
from typing import Any, Literal, TypeAliasType, Union, get_args, get_origin


def _alternatives(hint: Any) -> list[Any]:
    """Return the members of a union; a type that is none stands for itself."""
    while isinstance(hint, TypeAliasType):
        hint = hint.__value__
    if get_origin(hint) in (Union, UnionType):
        return [one for arg in get_args(hint) for one in _alternatives(arg)]
    return [hint]


def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a type without its arguments, and these."""
    kind: Any = get_origin(hint)
    return (hint if kind is None else kind), get_args(hint)


def fits(hint: Any, value: Any) -> bool:
    """Return True if a value, of JSON or Python, can stand for the type."""
    return any(_fits_one(one, value) for one in _alternatives(hint))


def _fits_one(hint: Any, value: Any) -> bool:
    kind, args = _parts(hint)
    if kind is Literal:
        return value in args
    if hint is Any or not isinstance(kind, type):
        return True
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if _is_a(kind, int, float, type(None)):
        return isinstance(value, (int, float) if kind is float else kind)
    if _is_a(kind, Enum):
        return value in {name for one in _members(kind) for name in (one.name, one.value)}
    if _is_a(kind, str, PathLike):
        return isinstance(value, (str, PathLike) if _is_a(kind, PathLike) else str)
    if _is_a(kind, Mapping):
        return isinstance(value, Mapping) and all(fits(args[1], inner) for inner in value.values() if len(args) == 2)
    if _is_a(kind, Sequence):
        return isinstance(value, list | tuple) and all(fits(args[0], item) for item in value if args)
    return True


def _members(kind: Any) -> list[Enum]:
    return list(kind)


def _is_a(kind: Any, *bases: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, bases)


def choices_of(hint: Any) -> tuple[str, ...]:
    """Return the values of a Literal type; nothing for any other, be it a union with one."""
    (alternative, *others) = _alternatives(hint)
    kind, args = _parts(alternative)
    return args if kind is Literal and not others else ()


def kind_of(hint: Any) -> str:
    """Return a type in words, such as "a whole number or null"."""
    return " or ".join(dict.fromkeys(_kind(one)[0] for one in _alternatives(hint)))


def metavar_of(hint: Any) -> str:
    """Return a type as `--help` shows it, such as "INT"."""
    return "|".join(dict.fromkeys(_kind(one)[1] for one in _alternatives(hint)))


def _kind(hint: Any) -> tuple[str, str]:
    """Return a type in words, and as `--help` shows it."""
    kind, args = _parts(hint)
    simple = {bool: ("true or false", "{true,false}"), int: ("a whole number", "INT"), float: ("a number", "FLOAT")}
    if (found := simple.get(kind)) is not None:
        return found
    if _is_a(kind, type(None)):
        return "null", "null"
    members = _members(kind) if _is_a(kind, Enum) else []
    names = [str(one) for one in args] if kind is Literal else [one.name for one in members]
    if names:
        return f"one of {', '.join(names)}", f"{{{','.join(names)}}}"
    if _is_a(kind, str, PathLike):
        return "a text", "STR"
    if _is_a(kind, Sequence):
        inner = _kind(args[0]) if args else ("a value", "JSON")
        return f"a list, each item {inner[0]}", f"{inner[1]} [{inner[1]} ...]"
    return "a JSON object" if _is_a(kind, Mapping) else "a value", "JSON"
