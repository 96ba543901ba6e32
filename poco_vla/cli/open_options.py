"""Options of adapters and environments on a command line: `--policy-options.NAME VALUE`, `--env.options.NAME VALUE`.

Only the adapter and the environment know which ones there are, so the parser of the other options, which takes types
from defaults, cannot read them. Forms, all alike in meaning:

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from poco_vla.config import DemonstrationConfig, EnvSpec, TrainConfig
from poco_vla.errors import ConfigError

WORDS = {"None": None, "none": None, "True": True, "False": False}
"""Words of Python that stand for JSON's null, true and false."""
UPPER = "normalization_mapping"
"""LeRobot's option whose names and values (kinds of features, normalization modes) are upper case."""


CHOICES = ("--adapter", "--algorithm", "--policy", "--env.type", "--env.task")
"""Options that decide which further options there are."""


def with_open_options(config: TrainConfig, args: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """Read the open options of a command line into a configuration.

    Another adapter than the configuration's begins without the configuration's options, and so does a pretrained policy
    where the configuration builds a new one; another environment type begins without its options, and with its own
    default task. `--env.` and `--demonstrations.` options begin from defaults where the
    configuration has none of them.

    Returns:
        The configuration, and the words that are left for the parser.
    """
    words, chosen = _split(args), chosen_names(args)
    env, demonstrations = config.env, config.demonstrations
    pretrained = config.policy is None and chosen.get("--policy", "None") != "None"
    another = pretrained or chosen.get("--adapter", config.adapter) != config.adapter
    if env is None and any(word.startswith("--env.") for word in words):
        env = EnvSpec()
    if demonstrations is None and any(word.startswith("--demonstrations.") for word in words):
        demonstrations = DemonstrationConfig()
    if env is not None and (kind := chosen.get("--env.type", env.type)) != env.type:
        env = replace(env, type=kind, task=chosen.get("--env.task") or _default_task(kind), options={})
    policy_options, words = take_options(words, "policy-options", {} if another else config.policy_options)
    chosen_algorithm = chosen.get("--algorithm", config.algorithm)
    known = config.algorithm_options if chosen_algorithm == config.algorithm else {}
    algorithm_options, words = take_options(words, "algorithm-options", known)
    if env is not None:
        options, words = take_options(words, "env.options", env.options)
        env = replace(env, options=options)
    chosen_options = {"policy_options": policy_options, "algorithm_options": algorithm_options}
    return replace(config, **chosen_options, env=env, demonstrations=demonstrations), words


def chosen_names(args: Sequence[str]) -> dict[str, str]:
    """Return the :data:`CHOICES` that a command line names."""
    named = ((flag.replace("_", "-"), value) for flag, value in pairwise(_split(args)))
    return {flag: value for flag, value in named if flag in CHOICES}


def _default_task(kind: str) -> str:
    from poco_vla.simulators import default_task  # loads LeRobot, for which no --help waits

    return default_task(kind)


def _split(args: Sequence[str]) -> list[str]:
    """Return a command line with `--flag=value` in two words."""
    return [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--") and "=" in arg else [arg])]


def take_options(args: Sequence[str], prefix: str, defaults: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Read the options below `prefix` from a command line.

    Args:
        args: words of a command line.
        prefix: "policy-options" or "env.options".
        defaults: values that hold where the command line names none; they give the kind of value that is expected.

    Returns:
        `defaults` with the given values in them, and the other words.

    Raises:
        ConfigError: a value is missing, or of another kind than the default.
    """
    options, rest = _copied(defaults), []
    begin = 0
    while begin < len(args):
        end = begin + 1
        path = _path(args[begin], prefix)
        if path is None:
            rest.append(args[begin])
        else:
            while end < len(args) and not _is_flag(args[end]):
                end += 1
            flag, _, first = args[begin].partition("=")
            _put(options, path, [*([first] if "=" in args[begin] else []), *args[begin + 1 : end]], flag)
        begin = end
    return options, rest


def _path(word: str, prefix: str) -> list[str] | None:
    """Return the names that a flag gives below `prefix`; None for any other word."""
    flag = word.partition("=")[0]
    head, tail = flag[: len(prefix) + 2], flag[len(prefix) + 2 :]
    if head.lower().replace("_", "-") != f"--{prefix}" or tail[:1] not in ("", "."):
        return None
    return tail[1:].split(".") if tail else []


def _is_flag(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None


def _put(options: dict[str, Any], path: list[str], words: list[str], flag: str) -> None:
    """Set the value at `path`, below mappings that are made where there are none."""
    within = ""
    for name in path[:-1]:
        key = _key(name, options, within)
        if not isinstance(options.setdefault(key, {}), dict):
            if options[key] is not None:
                raise ConfigError(f"{flag}: {key} is {json.dumps(options[key], default=str)}, which has no names in it")
            options[key] = {}
        options, within = options[key], key
    if not path and words in (["null"], ["None"]):
        options.clear()
        return
    if not path:
        options |= _merged(options, _object(words, flag), flag, within)
        return
    key, negated = _key(path[-1], options, within), path[-1].lower().startswith("no-")
    if key not in options and negated and isinstance(options.get(_key(path[-1][3:], options, within)), bool):
        if words:
            raise ConfigError(f"{flag} takes no value, not {' '.join(words)}")
        options[_key(path[-1][3:], options, within)] = False
        return
    options[key] = _value(words, options.get(key), flag, key if isinstance(options.get(key), dict) else within)


def _key(name: str, known: Iterable[str], within: str, *, json_name: bool = False) -> str:
    """Return the known name that is meant: - and _ are alike, and so are upper and lower case. A new name of a JSON
    object stays as it is."""
    plain = name.replace("-", "_")
    new = plain.upper() if within == UPPER else name if json_name else plain
    return name if name in known else next((key for key in known if key.lower() == plain.lower()), new)


def _value(words: list[str], default: Any, flag: str, within: str) -> Any:
    """Return what the words mean, which is of the default's kind or null."""
    if not words:
        if isinstance(default, bool):
            return True
        raise ConfigError(f"{flag} needs a value")
    if isinstance(default, str) and len(words) == 1:
        return _text(words[0], upper=within == UPPER)
    values = [_json_or_word(word) for word in words]
    value = values[0] if len(values) == 1 and not (isinstance(default, list | tuple) and _is_item(values)) else values
    return _checked(value, default, flag, within)


def _is_item(values: list[Any]) -> bool:
    return not isinstance(values[0], list) and values[0] is not None


def _text(word: str, *, upper: bool) -> Any:
    """Return a word for an option that is a text: numbers stay as they are written."""
    value = _json_or_word(word)
    value = word if isinstance(value, int | float) and value is not None else value
    return value.upper() if upper and isinstance(value, str) else value


def _checked(value: Any, default: Any, flag: str, within: str) -> Any:
    """Return `value` if it is of the default's kind."""
    if isinstance(value, Mapping):
        return _merged(default if isinstance(default, Mapping) else {}, value, flag, within)
    if within == UPPER and isinstance(value, str) and not isinstance(default, Mapping):
        return value.upper()
    kinds: dict[type, tuple[str, tuple[type, ...]]] = {
        bool: ("true or false", (bool,)),
        int: ("a whole number", (int,)),
        float: ("a number", (int, float)),
        str: ("a text", (str, list, dict)),
        list: ("a list", (list,)),
        dict: ("a JSON object", (int, float, list)),
    }
    expected = kinds.get(list if isinstance(default, tuple) else type(default))
    if value is None or expected is None:
        return value
    words, kind = expected
    if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
        raise ConfigError(f"{flag} takes {words}, such as {json.dumps(default, default=str)}, not {json.dumps(value)}")
    if isinstance(value, list) and isinstance(default, list | tuple) and default:
        like = default[0] if all(type(item) is type(default[0]) for item in default) else None
        return [_checked(item, like, flag, within) for item in value]
    return value


def _merged(old: Mapping[str, Any], new: Mapping[str, Any], flag: str, within: str) -> dict[str, Any]:
    """Return `old` with the values of `new`, mapping by mapping."""
    out = _copied(old)
    for name, value in new.items():
        key = _key(name, old, within, json_name=True)
        inner = key if isinstance(value, Mapping) else within
        out[key] = _checked(value, out.get(key), f"{flag}.{key}", inner)
    return out


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
