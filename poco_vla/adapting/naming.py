"""Names of the numbers in states and actions: read from LeRobot's features, compared, put in order.

Two robots may have the same joints in another order. A policy acts in the order that it was trained in; what it is
given and what it gives is brought from and to the order of the data, by name. For adapters of LeRobot's policies.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from poco_vla.errors import PolicyError
from poco_vla.joint_names import (
    ACTION,
    STATE,
    VECTORS,
    Joints,
    checked_names,
    indices,
    is_placeholder,
    listed,
    match_names,
    names_of,
)
from poco_vla.pretrained.heads import read_about

__all__ = [
    "ACTION",
    "STATE",
    "VECTORS",
    "Joints",
    "Reordered",
    "VectorOrder",
    "is_placeholder",
    "match_names",
    "matched_order",
    "names_of",
    "new_order",
    "saved_order",
]

logger = logging.getLogger(__name__)

NAMES = "names"
"""Entry of poco.json: {"data": {column: names}, "policy": {column: names}}."""


@dataclass(frozen=True)
class VectorOrder:
    """The order of a policy's own states and actions against that of the data it is given.

    Attributes:
        names: column -> names in the data's order; columns without names are left out.
        index: column -> the data's position of each of the policy's numbers, where the two orders differ.
        own: column -> names in the policy's order.
    """

    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    index: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    own: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def to_policy(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a raw batch with its vectors [..., D] in the policy's order."""
        given = [key for key in self.index if isinstance(batch.get(key), Tensor)]
        return dict(batch) | {key: batch[key][..., list(self.index[key])] for key in given}

    def to_data(self, actions: Tensor) -> Tensor:
        """Return actions [..., action_dim] of the policy in the data's order."""
        if ACTION not in self.index:
            return actions
        index = self.index[ACTION]
        back = sorted(range(len(index)), key=lambda i: index[i])
        return actions[..., back]

    def to_json(self) -> dict[str, Any]:
        """Return the entry of poco.json; empty where nothing is named."""
        return {"data": _lists(self.names), "policy": _lists(self.own)} if self.own or self.names else {}


@dataclass(frozen=True)
class Reordered:
    """LeRobot's two pipelines of a policy whose own order is another than the data's."""

    pipeline: Any
    order: VectorOrder
    after: bool = False

    def __call__(self, given: Any) -> Any:
        return self.order.to_data(self.pipeline(given)) if self.after else self.pipeline(self.order.to_policy(given))

    @property
    def steps(self) -> Any:
        return self.pipeline.steps

    def save_pretrained(self, *args: Any, **options: Any) -> Any:
        return self.pipeline.save_pretrained(*args, **options)


def new_order(features: Mapping[str, Any]) -> VectorOrder:
    """Return the order of a policy that takes a dataset's states and actions as they are."""
    names = {key: found for key in VECTORS if (found := names_of(features.get(key)))}
    return VectorOrder(names=names, own=names)


def saved_order(folder: Path, action_names: Any = None, sizes: Mapping[str, int] | None = None) -> VectorOrder:
    """Return the order that a policy's folder tells: poco.json, or else LeRobot's `action_feature_names`.

    Args:
        folder: of a head or a whole policy.
        action_names: the configuration's `action_feature_names`.
        sizes: numbers in each column, by the configuration.

    Raises:
        PolicyError: poco.json holds names that are none.
    """
    told = read_about(folder).get(NAMES) or {}
    sizes = sizes or {}
    if not told:
        named = checked_names(action_names, sizes.get(ACTION))
        names = {ACTION: named} if named else {}
        return VectorOrder(names=names, own=names)
    data, own = (_read_names(told, side, sizes, folder) for side in ("data", "policy"))
    index = {}
    for key in data.keys() & own.keys():
        try:
            found = indices(data[key], own[key])
        except ValueError as error:
            raise PolicyError(f'the names of "{key}" in {folder} are damaged: {data[key]}, {own[key]}') from error
        index |= {key: found} if found else {}
    return VectorOrder(names=data, index=index, own=own)


def matched_order(
    saved: VectorOrder,
    features: Mapping[str, Any],
    *,
    sizes: Mapping[str, int],
    where: str,
    joints: Joints = None,
) -> VectorOrder:
    """Return how a dataset's states and actions are brought into the order of a policy that keeps its own.

    Names that are alike in another order are reordered. Where one side has no names, or placeholders, positions count.

    Args:
        saved: :func:`saved_order` of the policy.
        features: LeRobot's features of the dataset.
        sizes: numbers in each of the policy's columns.
        where: the policy, for messages.
        joints: see :data:`Joints`.

    Raises:
        PolicyError: the names are others, or there are more or fewer.
    """
    names, index, own = dict(saved.names), {}, dict(saved.own)
    _check_joints(joints, features)
    _check_sizes(features, sizes, where)
    for key in VECTORS:
        if key not in features:
            continue
        given = names_of(features[key])
        known = saved.own.get(key) or (_as_actions(given, saved, joints) if key == STATE else None)
        names.pop(key, None)
        if given is None or known is None:
            if found := given or known:
                names[key] = found
                own.setdefault(key, found)
            continue
        names[key], own[key] = given, known
        found = match_names(given, known, key=key, where=("the dataset", where), joints=joints)
        if found:
            index[key] = found
            logger.info('"%s" is brought from the order of the dataset to that of %s by name', key, where)
    return VectorOrder(names=names, index=index, own=own)


# -- parts ------------------------------------------------------------------------------------------------------------


def _lists(names: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {key: list(value) for key, value in names.items()}


def _read_names(told: Any, side: str, sizes: Mapping[str, int], folder: Path) -> dict[str, tuple[str, ...]]:
    table = told.get(side) if isinstance(told, Mapping) else None
    if not isinstance(table, Mapping):
        raise PolicyError(f'poco.json in {folder} is damaged: "{NAMES}" has no table "{side}"')
    found = {key: checked_names(table[key], sizes.get(key)) for key in VECTORS if key in table}
    if wrong := [key for key, names in found.items() if names is None]:
        raise PolicyError(f'poco.json in {folder} does not name the {sizes.get(wrong[0])} numbers of "{wrong[0]}"')
    return {key: names for key, names in found.items() if names}


def _as_actions(given: tuple[str, ...] | None, saved: VectorOrder, joints: Joints) -> tuple[str, ...] | None:
    """Return the policy's names of actions where its states have none of their own and the data's states are of the
    same joints: LeRobot's config.json names actions only, and a robot's states and actions are recorded in one order.
    """
    known = saved.own.get(ACTION)
    if given is None or known is None:
        return None
    try:
        found = match_names(given, known, key=STATE, where=("", ""), joints=joints)
    except PolicyError:
        return None
    return known if found else None


def _check_sizes(features: Mapping[str, Any], sizes: Mapping[str, int], where: str) -> None:
    for key in sizes.keys() & features.keys():
        size = int(features[key]["shape"][0])
        if size != sizes[key]:
            raise PolicyError(
                f'"{key}" has {size} numbers in the dataset, {where} was trained with {sizes[key]}: take data of its '
                'robot, or, where the adapter can fit it to other data, give statistics "dataset"'
            )


def _check_joints(joints: Joints, features: Mapping[str, Any]) -> None:
    """Raise PolicyError for a `joints` option that cannot be meant."""
    if joints is None or joints == "positional":
        return
    if not isinstance(joints, Mapping):
        raise PolicyError(f'joints is {joints!r}; expected "positional" or {{"name in the data": "name here"}}')
    known = {name for key in VECTORS for name in names_of(features.get(key)) or ()}
    if unknown := [name for name in joints if name not in known]:
        raise PolicyError(
            f"joints names {listed(unknown)}, which the dataset does not have; it has {listed(sorted(known))}"
        )
