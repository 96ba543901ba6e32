"""Options that an adapter or an environment declares: their types, and what `--help` says of them."""

import ast
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import cache
from inspect import Parameter, getdoc, signature
from itertools import pairwise
from os import PathLike
from textwrap import dedent
from types import UnionType
from typing import Any, Literal, TypeAliasType, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring


@dataclass(frozen=True)
class Option:
    """An option that an adapter or an environment declares.

    Attributes:
        hint: its type.
        default: its value where nobody sets it.
        about: what `--help` says of it.
        listed: True if `--help` lists it; others are accepted all the same.
    """

    hint: Any = Any
    default: Any = None
    about: str = ""
    listed: bool = True


def options_of_adapter(name: str, *, pretrained: bool) -> dict[str, Option] | None:
    """Return the options of an adapter; None where only loading can tell.

    They are the arguments of its `from_pretrained` and `from_dataset` and the fields of its `option_record`, as far as
    its `option_names` has them.

    Raises:
        UnknownAdapterError: nothing installed offers it.
    """
    from poco_vla.registry import PASSED, load_adapter  # loads torch, for which no --help of a recipe waits

    adapter = load_adapter(name)
    names = adapter.option_names(pretrained=pretrained)
    if names is None:
        return None
    record = adapter.option_record
    declared = (options_of_record(record) if record else {}) | _of_arguments(adapter.from_dataset)
    declared |= _of_arguments(adapter.from_pretrained)
    explained = _explanations(adapter)
    return {
        option: Option(found.hint, found.default, found.about or explained.get(option, ""), found.listed)
        for option in sorted(names - PASSED)
        for found in [declared.get(option, Option())]
    }


def options_of_algorithm(name: str) -> dict[str, Option]:
    """Return the options of an algorithm.

    Raises:
        UnknownNameError: nothing installed offers it.
    """
    from poco_vla.algorithms import load_algorithm  # loads torch

    record = load_algorithm(name).config_class
    about: dict[str, str] = {}
    for base in reversed(record.__mro__):
        about |= docs_of(base) if is_dataclass(base) else {}
    # Options that a record inherits are the algorithm's own as much as the others.
    found = options_of_record(record)
    return {name: replace(one, about=about.get(name, one.about), listed=True) for name, one in found.items()}


def options_of_env(kind: str) -> dict[str, Option] | None:
    """Return the options of an environment type; None where it takes any.

    Raises:
        UnknownNameError: no such type.
    """
    from poco_vla.simulators import config_class  # loads LeRobot

    found = config_class(kind)
    if any(p.kind is Parameter.VAR_KEYWORD for p in signature(found).parameters.values()):
        return None
    return {name: option for name, option in options_of_record(found).items() if name != "task"}


def options_of_record(record: type[Any]) -> dict[str, Option]:
    """Return the fields of a dataclass as options; `--help` lists those that the class itself declares."""
    hints, about = _hints(record), {**_explanations(record), **docs_of(record)}
    return {
        one.name: Option(
            hints.get(one.name, Any),
            one.default_factory() if one.default_factory is not MISSING else one.default,
            about.get(one.name, ""),
            one.name in record.__annotations__ and not _has_records(hints.get(one.name, Any)),
        )
        for one in fields(record)
        if one.init
    }


@cache
def docs_of(kind: type[Any]) -> Mapping[str, str]:
    """Return the docstrings that stand below the fields of a class."""
    try:
        body = ast.parse(dedent(inspect.getsource(kind))).body[0]
    except (OSError, SyntaxError):  # installed without sources
        return {}
    assert isinstance(body, ast.ClassDef)
    return {
        one.target.id: " ".join(str(doc.value.value).split())
        for one, doc in pairwise(body.body)
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    }


def _of_arguments(function: Callable[..., Any]) -> dict[str, Option]:
    """Return the keyword arguments of a function as options."""
    hints, about = _hints(function), _explanations(function)
    return {
        p.name: Option(hints.get(p.name, Any), p.default, about.get(p.name, ""))
        for p in signature(function).parameters.values()
        if p.kind is Parameter.KEYWORD_ONLY and p.default is not Parameter.empty
    }


def _hints(thing: Any) -> dict[str, Any]:
    try:
        return get_type_hints(thing)
    except (NameError, TypeError):  # a name that is only there for type checkers
        return {}


def _explanations(thing: Any) -> dict[str, str]:
    """Return what a docstring says of arguments or attributes."""
    found = parse_docstring(getdoc(thing) or "").params
    told = {p.arg_name: " ".join((p.description or "").split()) for p in found}
    return {name: text for name, text in told.items() if text != "see the class."}


def _has_records(hint: Any) -> bool:
    """Return True for a type that no word of a command line can stand for."""
    kinds = (hint, *get_args(hint), *(inner for arg in get_args(hint) for inner in get_args(arg)))
    return any(hasattr(kind, "__dataclass_fields__") for kind in kinds)


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
    """Return True if a value of JSON can stand for the type."""
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
        return isinstance(value, str)
    if _is_a(kind, Mapping):
        return isinstance(value, Mapping) and all(fits(args[1], inner) for inner in value.values() if len(args) == 2)
    if _is_a(kind, Sequence):
        return isinstance(value, list) and all(fits(args[0], item) for item in value if args)
    return True


def _members(kind: Any) -> list[Enum]:
    return list(kind)


def _is_a(kind: Any, *bases: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, bases)


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


def plain(value: Any) -> str:
    """Return what stands for a value in JSON that JSON does not know."""
    return value.name if isinstance(value, Enum) else str(value)


def text_of(value: Any) -> str:
    """Return a default as `--help` shows it."""
    return value if isinstance(value, str) else json.dumps(value, default=plain)
