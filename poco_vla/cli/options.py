"""Options that an adapter or an environment declares: their types, and what `--help` says of them."""

import ast
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import cache
from inspect import Parameter, getdoc, signature
from itertools import pairwise
from textwrap import dedent
from typing import Any, get_args, get_type_hints

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


def plain(value: Any) -> str:
    """Return what stands for a value in JSON that JSON does not know."""
    return value.name if isinstance(value, Enum) else str(value)


def text_of(value: Any) -> str:
    """Return a default as `--help` shows it."""
    return value if isinstance(value, str) else json.dumps(value, default=plain)
