"""Roles of configuration fields: what a field means for a resumed run, for a report and for the Hub, said at the field.

``machine``    where and with which resources a run is computed: may change at a resume, makes no other setting in a
               report, is not published
``reporting``  what a run writes and checks: may change at a resume, makes no other setting, is published
``method``     what is learned from what: fixed at a resume, makes another setting, is published
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, get_args, get_type_hints

type Resume = Literal["fixed", "free", "same data"]
"""Change of a field when a run is resumed: refused, allowed, or allowed where the checkpoint recognises the
demonstrations by their content."""


@dataclass(frozen=True)
class Role:
    """Meaning of a configuration field.

    Attributes:
        name: "machine", "reporting" or "method".
        resume: whether a resumed run may have another value.
        setting: True if runs with different values are different settings in a report.
        published: True if the Hub is told the value.
    """

    name: Literal["machine", "reporting", "method"]
    resume: Resume
    setting: bool
    published: bool


METHOD = Role("method", resume="fixed", setting=True, published=True)


def method[T](default: T, *, resume: Resume = "fixed", setting: bool = True, published: bool = True) -> T:
    """Return a dataclass field of role `method`; the keywords are exceptions. Given a record, it holds for each field
    of the record that has no role of its own."""
    return _field(default, Role("method", resume, setting, published))


def reporting[T](default: T) -> T:
    """Return a dataclass field of role `reporting`."""
    return _field(default, Role("reporting", resume="free", setting=False, published=True))


def machine[T](default: T, *, resume: Resume = "free") -> T:
    """Return a dataclass field of role `machine`."""
    return _field(default, Role("machine", resume, setting=False, published=False))


def _field(default: Any, role: Role) -> Any:
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata={"role": role})
    return field(default=default, metadata={"role": role})


@cache
def roles_of(cls: type[Any]) -> Mapping[str, Role | None]:
    """Return the role of every field of a configuration, by its dotted name; None for a field that states none."""
    return _roles(cls, "", None)


def role_of(cls: type[Any], name: str) -> Role:
    """Return the role of a field, or of the open mapping that holds a name; `METHOD` for a name that `cls` lacks."""
    roles = roles_of(cls)
    while name not in roles and "." in name:
        name = name.rpartition(".")[0]
    return roles.get(name) or METHOD


def _roles(cls: type[Any], prefix: str, around: Role | None) -> dict[str, Role | None]:
    hints, out = get_type_hints(cls), {}
    for one in fields(cls):
        hint, name, role = hints[one.name], f"{prefix}{one.name}", one.metadata.get("role", around)
        records = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind)]
        for record in records:
            out |= _roles(record, f"{name}.", role)
        if not records:
            out[name] = role
    return out
