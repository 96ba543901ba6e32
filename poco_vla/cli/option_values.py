"""Read the options of adapters and environments from a command line.

Forms, all alike in meaning:

    --policy-options.hidden-dims 64 64                            words
    --policy-options.hidden-dims [64,64]                          JSON
    --policy-options.normalization-mapping.STATE MEAN_STD         a name within an option
    --policy-options.normalization-mapping '{"STATE": "MEAN_STD"}'
    --policy-options '{"normalization_mapping": {"STATE": "MEAN_STD"}}'
    --policy-options.no-recompute                                 false

Names may be written with - or _ and in any case. Names that a JSON object leaves out keep their values;
`--policy-options null` takes all of a recipe's options out.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from poco_vla.cli.options import Option, plain
from poco_vla.errors import ConfigError, UnknownNameError
from poco_vla.hints import fits, kind_of

UPPER = "normalization_mapping"
"""LeRobot's option whose names and values (kinds of features, normalization modes) are upper case."""
WORDS = {"None": None, "none": None, "True": True, "False": False}
"""Words of Python that stand for JSON's null, true and false."""


def read_options(
    args: Sequence[str],
    prefix: str,
    values: Mapping[str, Any],
    offered: Callable[[], Mapping[str, Option] | None] = lambda: None,
) -> tuple[dict[str, Any], list[str]]:
    """Read the options below `prefix` from a command line.

    Args:
        args: words of a command line.
        prefix: "policy-options" or "env.options".
        values: values that hold where the command line names none.
        offered: declared options, asked for if the command line has any; None where any name may be given.

    Returns:
        `values` with the given ones in them, and the other words.

    Raises:
        UnknownNameError: an option that is not offered.
        ConfigError: a value is missing, or of another kind than the option's.
    """
    found, rest = _copied(values), []
    groups = [(_path(group[0], prefix), group) for group in groups_of(args)]
    declared = offered() if any(path is not None for path, _ in groups) else None
    for path, group in groups:
        if path is None:
            rest += group
            continue
        flag, equals, first = group[0].partition("=")
        words = [*([first] if equals else []), *group[1:]]
        if path:
            _put(found, path, words, flag, declared)
        elif words in (["null"], ["None"]):
            found.clear()
        else:
            for name, value in _object(words, flag).items():
                key = _known(name, found, declared)
                new = _merged(found.get(key), value, key)
                found[key] = _checked(new, _option(key, found, declared), f"{flag}.{key}", [json.dumps(value)])
    return found, rest


def groups_of(args: Sequence[str]) -> Iterator[list[str]]:
    """Yield each flag of a command line with the words that follow it; words before the first flag come first."""
    begin = 0
    for end in range(1, len(args) + 1):
        if end == len(args) or re.match(r"--?[A-Za-z]", args[end]):
            yield list(args[begin:end])
            begin = end


def flag_of(word: str) -> str:
    """Return the flag that a word of a command line is, as `--help` spells it and without its value."""
    return word.partition("=")[0].replace("_", "-")


def _path(word: str, prefix: str) -> list[str] | None:
    """Return the names that a flag gives below `prefix`; None for any other word."""
    flag = word.partition("=")[0]
    head, tail = flag[: len(prefix) + 2], flag[len(prefix) + 2 :]
    if head.lower().replace("_", "-") != f"--{prefix}" or tail[:1] not in ("", "."):
        return None
    return tail[1:].split(".") if tail else []


def _put(
    found: dict[str, Any], path: list[str], words: list[str], flag: str, declared: Mapping[str, Option] | None
) -> None:
    """Set the value at `path`, below mappings that are made where there are none."""
    negated = path[0][3:] if len(path) == 1 and path[0].lower().startswith("no-") else None
    if negated and (key := _same(negated, {**found, **(declared or {})})) is not None:
        if words:
            raise ConfigError(f"{flag} takes no value, not {' '.join(words)}")
        found[key] = _checked(False, _option(key, found, declared), flag, ["false"])
        return
    key = _known(path[0], found, declared)
    option = _option(key, found, declared)
    if len(path) == 1:
        found[key] = _merged(found.get(key), _value(words, option, flag, key), key)
        return
    if not isinstance(found.get(key) or {}, dict):
        raise ConfigError(f"{flag}: {key} is {json.dumps(found[key], default=str)}, which has no names in it")
    value: dict[str, Any] = {}
    inner = value
    for name in path[1:-1]:
        inner[_inner(name, found.get(key) or {}, key)] = inner = {}
    inner[_inner(path[-1], found.get(key) or {}, key)] = _value(words, Option(), flag, key)
    found[key] = _checked(_merged(found.get(key), value, key), option, flag, words)


def _known(name: str, found: Mapping[str, Any], declared: Mapping[str, Option] | None) -> str:
    """Return the option that is meant: - and _ are alike, and so are upper and lower case."""
    plain = name.replace("-", "_")
    if (key := _same(plain, {**found, **(declared or {})})) is not None:
        return key
    if declared is not None:
        raise UnknownNameError("option", plain, declared)
    return plain


def _same(name: str, known: Iterable[str]) -> str | None:
    return next((key for key in known if key.lower() == name.replace("-", "_").lower()), None)


def _inner(name: str, known: Iterable[str], option: str) -> str:
    """Return the name within an option that is meant."""
    plain = name.replace("-", "_")
    return _same(name, known) or (plain.upper() if option == UPPER else plain)


def _option(key: str, found: Mapping[str, Any], declared: Mapping[str, Option] | None) -> Option:
    """Return an option; where nobody declares it, its type is that of the value which it has."""
    value = found.get(key)
    if declared is not None and key in declared:
        own = declared[key]
        return own if value is None else Option(own.hint, value)
    return Option(Any if value is None else list if isinstance(value, tuple) else type(value), value)


def _value(words: list[str], option: Option, flag: str, key: str) -> Any:
    """Return what words mean for an option: the first reading that has its type."""
    if not words:
        if option.hint is not Any and fits(option.hint, True):
            return True
        raise ConfigError(f"{flag} needs a value")
    parsed = [_json_or_word(word) for word in words]
    if parsed == [None]:
        return None
    readings = [parsed[0], words[0], parsed, words] if len(words) == 1 else [parsed, words]
    if key == UPPER:
        readings = [_upper(reading) for reading in readings]
    return _checked(next((one for one in readings if fits(option.hint, one)), readings[0]), option, flag, words)


def _checked(value: Any, option: Option, flag: str, words: Sequence[str]) -> Any:
    """Return `value` if it has the option's type."""
    if value is None or fits(option.hint, value):
        return value
    like = "" if option.default is None else f", such as {json.dumps(option.default, default=plain)}"
    raise ConfigError(f"{flag} takes {kind_of(option.hint)}{like}, not {' '.join(words)}")


def _merged(old: Any, new: Any, option: str) -> Any:
    """Return `new`; of two mappings `old` with the values of `new` in it."""
    if option == UPPER:
        new = _upper(new)
    if not isinstance(new, Mapping):
        return new
    out = _copied(old) if isinstance(old, Mapping) else {}
    for name, value in new.items():
        key = name if name in out else _same(name, old if isinstance(old, Mapping) else ()) or name
        out[key] = _merged(out.get(key), value, "")
    return out


def _upper(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name).upper(): _upper(inner) for name, inner in value.items()}
    return value.upper() if isinstance(value, str) else value


def _object(words: list[str], flag: str) -> Mapping[str, Any]:
    value = _json_or_word(words[0]) if len(words) == 1 else None
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{flag} takes one JSON object, such as '{{\"NAME\": VALUE}}', not {' '.join(words) or 'nothing'}; one "
            f"option alone is {flag}.NAME VALUE"
        )
    return value


def _json_or_word(word: str) -> Any:
    if word in WORDS:
        return WORDS[word]
    try:
        return json.loads(word)
    except (json.JSONDecodeError, RecursionError):
        return word


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copied(value) if isinstance(value, Mapping) else value for name, value in values.items()}
