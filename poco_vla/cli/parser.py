"""Parse a command line into a record, and show its `--help`."""

import json
from argparse import ArgumentParser
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from poco_vla.cli.errors import shown_once
from poco_vla.cli.option_values import flag_of
from poco_vla.cli.options import Option, docs_of, text_of
from poco_vla.config import ALGORITHM_SECTIONS, TrainConfig
from poco_vla.errors import ConfigError
from poco_vla.hints import fits, metavar_of

OPEN = ("policy_options", "algorithm_options", "env.options")
"""Fields of a configuration whose names an adapter, an algorithm or an environment declares; the parser leaves them."""

type Listed = Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Option]]]
"""Field of :data:`OPEN` -> its name on the command line, its values, and the options that `--help` lists for it."""


class Parser(ArgumentParser):
    """A parser of a few options, which leaves the other words to the next one."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def parse(
    kind: type[Any],
    args: Sequence[str],
    *,
    default: Any = None,
    about: str | None = None,
    prog: str | None = None,
    shown: Collection[str] | None = None,
    hidden: Collection[str] = (),
    listed: Listed | None = None,
    others: Collection[str] = (),
) -> Any:
    """Return a record with the words of a command line in it. `--help` shows the options and ends the program.

    Args:
        kind: the record's class.
        args: words of a command line.
        default: a record whose values hold where the command line gives none.
        about: what `--help` says first; the class's docstring when None.
        prog: name of the program; that of the script when None.
        shown: fields of a configuration that `--help` lists; None is all.
        hidden: fields of a configuration that it never lists.
        listed: options of adapter, algorithm and environment that it lists.
        others: options that have been read already, for "did you mean".

    Raises:
        ConfigError: an option does not exist.
    """
    given = {} if default is None else {"default": default}
    with shown_once():
        parsed, unknown = tyro.cli(
            kind,
            prog=prog,
            description=about,
            args=list(args),
            return_unknown_args=True,
            config=(tyro.conf.AvoidSubcommands,),
            registry=_registry(shown, hidden, listed or {}),
            **given,
        )
    if unknown:
        raise ConfigError(_unknown(unknown[0], [*_flags(kind), *others]))
    return _expanded(parsed)


def _unknown(word: str, known: Sequence[str]) -> str:
    if not word.startswith("-"):
        return f'"{word}" belongs to no option'
    flag = flag_of(word)
    if "." in flag and (algorithm := _algorithm_of(flag)):
        return f'"{flag}" is an option of algorithm "{algorithm}": choose it with --algorithm {algorithm}'
    close = get_close_matches(flag, known, n=1)
    return f'no option named "{flag}".' + (f' Did you mean "{close[0]}"?' if close else " --help lists them.")


def _algorithm_of(flag: str) -> str | None:
    """Return the algorithm below whose name a flag stands, unless the configuration has a section for it."""
    from poco_vla.algorithms import available_algorithms  # loads torch

    first = flag.removeprefix("--").partition(".")[0]
    others = [name for name in available_algorithms() if name not in ALGORITHM_SECTIONS]
    return next((name for name in others if name.replace("_", "-") == first), None)


def _flags(kind: type[Any], prefix: str = "") -> Iterator[str]:
    """Yield the options of a record; those of a record in it with its name before them and without."""
    for one in fields(kind):
        records = _records_in(get_type_hints(kind)[one.name])
        for record in records:
            yield from _flags(record, f"{prefix}{one.name}.")
            if kind is not TrainConfig:
                yield from _flags(record, prefix)
        if not records:
            yield f"--{prefix}{one.name}".replace("_", "-")


def _records_in(hint: Any) -> list[type[Any]]:
    return [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind)]


def _expanded(command: Any) -> Any:
    """Return a command or configuration whose paths may begin with ~, the user's home folder."""
    if isinstance(command, Path):
        return command.expanduser()
    if isinstance(command, tuple):
        return tuple(_expanded(value) for value in command)
    if not is_dataclass(command) or isinstance(command, type):
        return command
    return replace(command, **{f.name: _expanded(getattr(command, f.name)) for f in fields(command)})


@cache
def _prefixes() -> Mapping[type[Any], str]:
    """Return the records of a configuration and what stands before the names of their fields."""

    def below(kind: type[Any], prefix: str) -> Iterator[tuple[type[Any], str]]:
        yield kind, prefix
        for name, hint in get_type_hints(kind).items():
            for record in _records_in(hint):
                yield from below(record, f"{prefix}{name}.")

    return dict(below(TrainConfig, ""))


def _registry(shown: Collection[str] | None, hidden: Collection[str], listed: Listed) -> ConstructorRegistry:
    """Return what tells tyro which fields of a configuration `--help` lists, and what it says of them."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type != dict[str, str]:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=lambda words: _names(words[0]),
            is_instance=lambda value: fits(dict[str, str], value),
            str_from_instance=lambda value: [json.dumps(value)],
        )

    @registry.struct_rule
    def _(info: StructTypeInfo) -> StructConstructorSpec | None:
        prefix = _prefixes().get(info.type) if isinstance(info.type, type) else None
        if prefix is None:
            return None
        default = info.default if isinstance(info.default, info.type) else info.type()
        hints, docs = get_type_hints(info.type, include_extras=True), docs_of(info.type)
        specs = []
        for one in fields(info.type):
            name, hint, value = f"{prefix}{one.name}", hints[one.name], getattr(default, one.name)
            if name in OPEN:
                if name not in listed:
                    continue
                flag, *of_group = listed[name]
                value = _group(*of_group)
                specs.append(StructFieldSpec(flag, type(value), value, docs.get(one.name)))
                continue
            if is_dataclass(value):
                hint = type(value)
            if name in hidden or not _is_shown(name, shown):
                hint = tyro.conf.Suppress[hint]
            specs.append(StructFieldSpec(one.name, hint, value, docs.get(one.name)))

        def instantiate(**values: Any) -> Any:
            own = {one.name for one in fields(info.type) if f"{prefix}{one.name}" not in OPEN}
            return replace(default, **{name: v for name, v in values.items() if name in own})

        return StructConstructorSpec(instantiate, tuple(specs))

    return registry


def _names(word: str) -> dict[str, str]:
    """Return the JSON object of names that a word is. Raises ConfigError, which tyro shows with the flag."""
    try:
        value = json.loads(word)
    except (json.JSONDecodeError, RecursionError):
        value = None
    if not isinstance(value, dict) or not fits(dict[str, str], value):
        raise ConfigError(f'takes one JSON object of names, such as \'{{"actions": "action"}}\', not {word}')
    return value


def _is_shown(name: str, shown: Collection[str] | None) -> bool:
    """Return True for a field that `--help` lists, and for a record that holds one."""
    return shown is None or any(one == name or one.startswith(f"{name}.") for one in shown)


def _group(values: Mapping[str, Any], options: Mapping[str, Option]) -> Any:
    """Return a record that `--help` shows in the place of an open field; its values are read elsewhere."""
    group = make_dataclass(
        "Options",
        [
            (
                name,
                Annotated[
                    Any,
                    PrimitiveConstructorSpec(
                        nargs="*",
                        metavar=metavar_of(option.hint),
                        instance_from_str=lambda words: words,
                        is_instance=lambda value: True,
                        str_from_instance=lambda value: [text_of(value)],
                    ),
                    tyro.conf.arg(help=option.about),
                ],
                field(default=None),
            )
            for name, option in options.items()
        ],
    )
    return group(
        **{
            name: values.get(name, None if option.default is MISSING else option.default)
            for name, option in options.items()
        }
    )
