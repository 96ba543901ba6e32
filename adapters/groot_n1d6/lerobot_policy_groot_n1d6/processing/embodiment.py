"""An embodiment: which numbers of a dataset the network sees, in which order, and how they are written down.

Section numbers in this folder are those of the specification of GR00T N1.6 that this package was written from.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_policy_groot_n1d6.processing.errors import ProcessingError

SLOTS = {
    "oxe_google": 0,
    "oxe_widowx": 1,
    "libero_panda": 2,
    "unitree_g1": 8,
    "new_embodiment": 10,
    "robocasa_panda_omron": 13,
    "oxe_droid": 16,
    "gr1": 20,
    "behavior_r1_pro": 24,
}
"""Rows of the embodiment networks that the published checkpoints use (sections 1 and 7.1)."""
NUM_SLOTS = 32
NEW = "new_embodiment"


class Encoding(StrEnum):
    """How a key is normalised (section 7.2)."""

    MIN_MAX = "MIN_MAX"
    MEAN_STD = "MEAN_STD"
    SIN_COS = "SIN_COS"


class Representation(StrEnum):
    """Whether the network sees an action as it is stored, or relative to the state that the chunk starts from."""

    ABSOLUTE = "ABSOLUTE"
    RELATIVE = "RELATIVE"


class Kind(StrEnum):
    """Whether a relative action is a difference (joints) or a rigid motion (end effector)."""

    EEF = "EEF"
    NON_EEF = "NON_EEF"


class Format(StrEnum):
    """How a pose is written: a row-major 4x4 matrix, or x y z and the first two rows, or a rotation vector."""

    DEFAULT = "DEFAULT"
    XYZ_ROT6D = "XYZ_ROT6D"
    XYZ_ROTVEC = "XYZ_ROTVEC"


POSE_DIMS = {Format.DEFAULT: 16, Format.XYZ_ROT6D: 9, Format.XYZ_ROTVEC: 6}


@dataclass(frozen=True)
class View:
    """A camera: the checkpoint's name, and the LeRobot image key that holds it."""

    name: str
    column: str


@dataclass(frozen=True)
class StateKey:
    """Columns [start, stop) of one observation vector."""

    name: str
    start: int
    stop: int
    column: str = OBS_STATE
    encoding: Encoding = Encoding.MIN_MAX

    def __post_init__(self) -> None:
        _check_slice("state", self.name, self.start, self.stop)
        if not self.column.startswith("observation."):
            raise ProcessingError(
                f'state key "{self.name}" reads column "{self.column}": LeRobot hands a policy only columns whose '
                'name begins with "observation."'
            )

    @property
    def dim(self) -> int:
        return self.stop - self.start

    @property
    def width(self) -> int:
        """Numbers that the network sees."""
        return 2 * self.dim if self.encoding is Encoding.SIN_COS else self.dim


@dataclass(frozen=True)
class ActionKey:
    """Columns [start, stop) of ``action``.

    Attributes:
        state_key: the state that a relative action refers to; None is the one of the same name.
    """

    name: str
    start: int
    stop: int
    representation: Representation = Representation.ABSOLUTE
    kind: Kind = Kind.NON_EEF
    format: Format = Format.DEFAULT
    state_key: str | None = None
    encoding: Encoding = Encoding.MIN_MAX

    def __post_init__(self) -> None:
        _check_slice("action", self.name, self.start, self.stop)
        if self.encoding is Encoding.SIN_COS:
            raise ProcessingError(
                f'action key "{self.name}" is SIN_COS: only states can be. Expected MIN_MAX, MEAN_STD'
            )
        if self.is_pose and self.dim != POSE_DIMS[self.format]:
            raise ProcessingError(
                f'action key "{self.name}" is a relative end-effector pose in format {self.format} with {self.dim} '
                f"columns: expected {POSE_DIMS[self.format]}"
            )

    @property
    def dim(self) -> int:
        return self.stop - self.start

    @property
    def is_relative(self) -> bool:
        return self.representation is Representation.RELATIVE

    @property
    def is_pose(self) -> bool:
        """Whether the reference enters by a rigid motion instead of a difference."""
        return self.is_relative and self.kind is Kind.EEF

    @property
    def reference(self) -> str:
        return self.state_key or self.name


@dataclass(frozen=True)
class Embodiment:
    """One robot as the network knows it. The keys' order is that of the network's inputs and outputs.

    Attributes:
        tag: its name in a checkpoint.
        slot: its row of the embodiment networks.
        horizon: control steps of a chunk. The statistics of relative actions are per step, hence hold for this one.
    """

    tag: str
    slot: int
    views: tuple[View, ...]
    state: tuple[StateKey, ...]
    action: tuple[ActionKey, ...]
    horizon: int

    def __post_init__(self) -> None:
        if not 0 <= self.slot < NUM_SLOTS:
            raise ProcessingError(f'embodiment "{self.tag}" has slot {self.slot}: expected 0 to {NUM_SLOTS - 1}')
        if self.horizon < 1:
            raise ProcessingError(f'embodiment "{self.tag}" has horizon {self.horizon}: expected at least 1 step')
        for group, keys in (("view", self.views), ("state", self.state), ("action", self.action)):
            names = [key.name for key in keys]
            if len(set(names)) < len(names):
                raise ProcessingError(f'embodiment "{self.tag}" names a {group} key twice: {names}')
        self._check_tiling()
        self._check_references()

    @property
    def action_dim(self) -> int:
        return sum(key.dim for key in self.action)

    @property
    def state_dim(self) -> int:
        """Numbers of state that the network sees, before padding."""
        return sum(key.width for key in self.state)

    @property
    def references(self) -> tuple[StateKey, ...]:
        """States that relative actions refer to, in state order."""
        names = {key.reference for key in self.action if key.is_relative}
        return tuple(key for key in self.state if key.name in names)

    @property
    def reference_dim(self) -> int:
        return sum(key.dim for key in self.references)

    @property
    def order(self) -> list[int]:
        """The dataset's column of each of the network's action dimensions."""
        return [column for key in self.action for column in range(key.start, key.stop)]

    @classmethod
    def parse(
        cls, source: "Embodiment | Mapping[str, Any] | str | Path", *, horizon: int | None = None
    ) -> "Embodiment":
        """From its description: a mapping, or a JSON file of one.

        Keys are ``tag`` (new_embodiment), ``slot`` (known from the tag), ``horizon`` (the argument), ``views`` {name:
        image key}, ``state`` and ``action`` {name: [start, stop] or {"slice": [start, stop], ...}}, the dots being
        the other fields of StateKey and ActionKey.

        Raises:
            ProcessingError: something is missing, unknown, or does not fit together.
        """
        if isinstance(source, Embodiment):
            return source
        table = read_table(source)
        unknown = set(table) - {"tag", "slot", "horizon", "views", "state", "action"}
        if unknown:
            raise ProcessingError(
                f"the embodiment's description has {sorted(unknown)}: expected tag, slot, horizon, views, state, action"
            )
        if not table.get("action"):
            raise ProcessingError(
                'the embodiment\'s description has no "action". Name the parts of the action and their columns, as in '
                '{"action": {"arm": [0, 6], "gripper": [6, 7]}}'
            )
        steps = table.get("horizon", horizon)
        if steps is None:
            raise ProcessingError('the embodiment\'s description has no "horizon" (control steps of a chunk)')
        tag = table.get("tag", NEW)
        return cls(
            tag=tag,
            slot=_slot(tag, table.get("slot")),
            views=tuple(View(name, column) for name, column in table.get("views", {}).items()),
            state=tuple(parse_state_key(name, entry) for name, entry in table.get("state", {}).items()),
            action=tuple(parse_action_key(name, entry) for name, entry in table["action"].items()),
            horizon=int(steps),
        )

    @classmethod
    def plain(
        cls, inputs: Mapping[str, PolicyFeature], outputs: Mapping[str, PolicyFeature], *, horizon: int, tag: str = NEW
    ) -> Self:
        """A LeRobot dataset without a mapping: all of the state, all of the action as stored, all cameras in order."""
        if ACTION not in outputs:
            raise ProcessingError(f'no "action" among the output features: {sorted(outputs)}')
        cameras = [key for key, feature in inputs.items() if feature.type is FeatureType.VISUAL]
        names = [key.removeprefix("observation.images.").removeprefix("observation.") for key in cameras]
        state = (StateKey("state", 0, inputs[OBS_STATE].shape[0]),) if OBS_STATE in inputs else ()
        action = (ActionKey("action", 0, outputs[ACTION].shape[0]),)
        views = tuple(map(View, names, cameras))
        return cls(tag, _slot(tag, None), views, state, action, horizon)

    def to_dict(self) -> dict[str, Any]:
        """What `parse` reads; JSON can hold it."""
        return {
            "tag": self.tag,
            "slot": self.slot,
            "horizon": self.horizon,
            "views": {view.name: view.column for view in self.views},
            "state": {
                key.name: {"slice": [key.start, key.stop], "column": key.column, "encoding": str(key.encoding)}
                for key in self.state
            },
            "action": {
                key.name: {
                    "slice": [key.start, key.stop],
                    "representation": str(key.representation),
                    "kind": str(key.kind),
                    "format": str(key.format),
                    "state_key": key.state_key,
                    "encoding": str(key.encoding),
                }
                for key in self.action
            },
        }

    def check_columns(self, sizes: Mapping[str, int | None]) -> None:
        """Raise ProcessingError unless a dataset has the columns that this embodiment reads.

        Args:
            sizes: the dataset's columns, and how many numbers the vectors among them have.
        """
        needed = [view.column for view in self.views] + [key.column for key in self.state] + [ACTION]
        missing = sorted(set(needed) - set(sizes))
        if missing:
            raise ProcessingError(
                f'embodiment "{self.tag}" reads {", ".join(missing)}, which the data lack; they have '
                f"{', '.join(sorted(sizes))}. Map the embodiment's keys to these columns."
            )
        for key in self.state:
            size = sizes[key.column]
            if size is not None and key.stop > size:
                raise ProcessingError(
                    f'state key "{key.name}" is columns {key.start} to {key.stop} of {key.column}, which has {size}'
                )
        size = sizes[ACTION]
        if size is not None and size != self.action_dim:
            raise ProcessingError(
                f'the action keys of embodiment "{self.tag}" ({_listed(self.action)}) cover {self.action_dim} columns, '
                f'"action" has {size}: each column needs exactly one key'
            )

    def _check_tiling(self) -> None:
        end = 0
        for key in sorted(self.action, key=lambda key: key.start):
            if key.start != end:
                what = "two keys" if key.start < end else "no key"
                raise ProcessingError(
                    f'column {min(key.start, end)} of "action" belongs to {what} of embodiment "{self.tag}": '
                    f"{_listed(self.action)}. Each column needs exactly one."
                )
            end = key.stop

    def _check_references(self) -> None:
        known = {key.name: key for key in self.state}
        for key in self.action:
            if not key.is_relative:
                continue
            if key.reference not in known:
                raise ProcessingError(
                    f'action key "{key.name}" is relative to state "{key.reference}", which is not among '
                    f'{sorted(known)}. Give it a "state_key", or make it ABSOLUTE.'
                )
            if known[key.reference].dim != key.dim:
                raise ProcessingError(
                    f'action key "{key.name}" has {key.dim} columns, the state "{key.reference}" that it is relative '
                    f"to has {known[key.reference].dim}: expected as many, in the same format"
                )


def parse_state_key(name: str, entry: Sequence[int] | Mapping[str, Any]) -> StateKey:
    start, stop, rest = _entry("state", name, entry, {"column", "encoding"})
    if "encoding" in rest:
        rest["encoding"] = choice(Encoding, rest["encoding"], f'encoding of state key "{name}"')
    return StateKey(name, start, stop, **rest)


def parse_action_key(name: str, entry: Sequence[int] | Mapping[str, Any]) -> ActionKey:
    kinds = {"representation": Representation, "kind": Kind, "format": Format, "encoding": Encoding}
    start, stop, rest = _entry("action", name, entry, {*kinds, "state_key"})
    for field, kind in kinds.items():
        if field in rest:
            rest[field] = choice(kind, rest[field], f'{field} of action key "{name}"')
    return ActionKey(name, start, stop, **rest)


def choice[T: StrEnum](kind: type[T], value: Any, what: str) -> T:
    """A member by name, in any of the spellings that checkpoints use ("xyz+rot6d", "ActionFormat.XYZ_ROT6D")."""
    text = str(value).rsplit(".", 1)[-1].upper().replace("+", "_").replace("-", "_")
    if text not in kind.__members__:
        raise ProcessingError(f"{what} is {value!r}: expected one of {', '.join(kind.__members__)}")
    return kind[text]


MAX_TABLE_BYTES = 64 * 1024**2
"""Longest JSON file that is read: statistics of the base checkpoint's 30 robots are some megabytes."""


def read_table(source: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """A mapping, or the one in a JSON file.

    Raises:
        ProcessingError: the file is not there, or holds no JSON object.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source).expanduser()
    if not path.is_file():
        raise ProcessingError(f"no file {path}")
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise ProcessingError(f"{path} is larger than {MAX_TABLE_BYTES / 1024**2:g} MB, and is not read")
    try:
        table = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ProcessingError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ProcessingError(f"{path} holds {type(table).__name__}: expected an object")
    return table


def _slot(tag: str, slot: int | None) -> int:
    if slot is not None:
        return int(slot)
    if tag not in SLOTS:
        raise ProcessingError(
            f'unknown embodiment "{tag}". Known: {", ".join(sorted(SLOTS))}. For another robot, take "{NEW}", or give '
            f"a slot (0 to {NUM_SLOTS - 1})."
        )
    return SLOTS[tag]


def _entry(
    group: str, name: str, entry: Sequence[int] | Mapping[str, Any], fields: set[str]
) -> tuple[int, int, dict[str, Any]]:
    table = dict(entry) if isinstance(entry, Mapping) else {"slice": entry}
    bounds = table.pop("slice", None)
    unknown = set(table) - fields
    if unknown:
        raise ProcessingError(
            f'{group} key "{name}" has {sorted(unknown)}: expected slice, {", ".join(sorted(fields))}'
        )
    if not isinstance(bounds, Sequence) or len(bounds) != 2 or not all(isinstance(bound, int) for bound in bounds):
        raise ProcessingError(f'{group} key "{name}" has slice {bounds!r}: expected [start, stop]')
    return bounds[0], bounds[1], table


def _check_slice(group: str, name: str, start: int, stop: int) -> None:
    if not 0 <= start < stop:
        raise ProcessingError(f'{group} key "{name}" is columns [{start}, {stop}): expected 0 <= start < stop')


def _listed(keys: Iterable[ActionKey]) -> str:
    return ", ".join(f"{key.name} [{key.start}, {key.stop})" for key in keys)
