"""Configurations as plain values and back: JSON, flat tables, differences, amounts of memory."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from poco_vla.errors import ConfigError, UnknownNameError
from poco_vla.hints import fits, kind_of


def num_bytes(text: str) -> int:
    """Bytes that a text such as "24GB", "22.5 GiB" or "500 MB" stands for. Raises ConfigError for any other."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in units or float(found[1]) == 0:
        raise ConfigError(f'"{text}" is no amount of memory; write it like 24GB, 22.5GiB or 500MB')
    return int(float(found[1]) * units[found[2].upper()])


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    return json.loads(json.dumps(asdict(config), default=str))


def to_scalars(config: Any) -> dict[str, int | float | str]:
    """A configuration as one flat table of plain values, as trackers show it; what is neither is its text."""
    table = flat(to_json(config))
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in table.items()}


def from_json(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """Rebuild a configuration from :func:`to_json`.

    Raises:
        UnknownNameError: `cls` does not have a field.
        ConfigError: a value is not of its field's type.
    """
    known = {f.name for f in fields(cls)}
    for name in values:
        if name not in known:
            raise UnknownNameError(f"field of {cls.__name__}", name, known)
    hints = get_type_hints(cls)
    for name, value in values.items():
        if not fits(hints[name], value):
            raise ConfigError(f"{name} of {cls.__name__} is {value!r}; expected {kind_of(hints[name])}")
    return cls(**{name: _revive(hints[name], value) for name, value in values.items()})


def _revive(hint: Any, value: Any) -> Any:
    options = getattr(hint, "__args__", ()) if not isinstance(hint, type) or hasattr(hint, "__origin__") else ()
    kinds = [hint, *options]
    if isinstance(value, dict):
        nested = next((kind for kind in kinds if is_dataclass(kind)), None)
        return from_json(nested, value) if isinstance(nested, type) else value
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    return value


def differences(old: Any, new: Any) -> list[str]:
    """Fields in which two configurations differ, as "name: old -> new" lines."""
    a, b = flat(to_json(old)), flat(to_json(new))
    return [f"{name}: {a.get(name)!r} -> {b.get(name)!r}" for name in sorted(a | b) if a.get(name) != b.get(name)]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as one table with dotted names: {"poco": {"eta": 0.1}} -> {"poco.eta": 0.1}."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return out
