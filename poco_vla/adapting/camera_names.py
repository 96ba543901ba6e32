"""Cameras by name: which of a dataset's a policy sees, and in which of its slots.

For adapters of LeRobot's policies.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from poco_vla.errors import DataError, PolicyError
from poco_vla.joint_names import listed
from poco_vla.pretrained.sources import read_object

logger = logging.getLogger(__name__)

type Cameras = Sequence[str] | Mapping[str, str] | None
"""Option of adapters: cameras of the data to use, or {camera of the data: camera of the checkpoint}."""


def is_picture(feature: Mapping[str, Any]) -> bool:
    """Return True for a column of camera pictures or videos."""
    return feature.get("dtype") in ("image", "video")


def is_depth(feature: Mapping[str, Any]) -> bool:
    """Return True for a column of depth maps, by LeRobot's mark or by its single channel."""
    for table in (feature.get("info") or {}, feature.get("video_info") or {}):
        if table.get("is_depth_map") or table.get("video.is_depth_map"):
            return True
    shape = tuple(feature.get("shape") or ())
    return is_picture(feature) and len(shape) == 3 and 3 not in (shape[0], shape[2]) and 1 in (shape[0], shape[2])


def colour_features(features: Mapping[str, Any], cameras: Cameras = None) -> dict[str, Any]:
    """Return a dataset's features without its depth cameras; one line says which were left out.

    Args:
        features: LeRobot's.
        cameras: those that were asked for.

    Raises:
        PolicyError: a depth camera was asked for.
    """
    depth = [key for key, feature in features.items() if is_picture(feature) and is_depth(feature)]
    if not depth:
        return dict(features)
    if wanted := [key for key in depth if key in (cameras or ())]:
        raise PolicyError(
            f"{', '.join(wanted)} is a depth camera (one channel), and the policy sees three colours: leave it out of "
            '"cameras"'
        )
    kept = {key: feature for key, feature in features.items() if key not in depth}
    colours = [key for key, feature in kept.items() if is_picture(feature)]
    if cameras is None:
        logger.info(
            "depth cameras are left out: %s; the policy sees %s (policy_options.cameras names others)",
            ", ".join(depth),
            ", ".join(colours) or "no camera",
        )
    return kept


def camera_slots(
    own: Sequence[str], offered: Sequence[str], cameras: Cameras = None, *, where: str = "the checkpoint"
) -> dict[str, str | None]:
    """Return the cameras of the data that a policy is to see, in the order of its slots.

    A camera that the checkpoint knows keeps its slot, in whatever order the data or `cameras` list it. Others take the
    slots that are free, in the order in which they are listed.

    Args:
        own: the checkpoint's cameras.
        offered: the dataset's.
        cameras: see :data:`Cameras`; None takes all that are offered.
        where: the checkpoint, for messages.

    Returns:
        Camera of the data -> camera of the checkpoint that `cameras` maps it to, None where it keeps its own name.

    Raises:
        PolicyError: `cameras` names one that is not there.
    """
    mapping = dict(cameras) if isinstance(cameras, Mapping) else {}
    chosen = list(offered) if cameras is None or mapping else list(dict.fromkeys(cameras))
    if unknown := [key for key in (*mapping, *chosen) if key not in offered]:
        raise PolicyError(
            f"the dataset has no camera {', '.join(unknown)}; its cameras: {', '.join(offered) or 'none'}"
        )
    if wrong := [slot for slot in mapping.values() if slot not in own]:
        raise PolicyError(f"{where} has no camera {', '.join(wrong)}; its cameras: {', '.join(own) or 'none'}")
    if len(set(mapping.values())) < len(mapping):
        raise PolicyError(f"two cameras are mapped to one of {where}: {mapping}")
    if not chosen:
        raise PolicyError("the dataset has no camera at all; its cameras: none")
    taken: dict[str, str] = {slot: key for key, slot in mapping.items()}
    for key in chosen:
        if key in own and key not in mapping and key not in taken:
            taken[key] = key
    strangers = [] if mapping else [key for key in chosen if key not in taken.values()]
    free = [slot for slot in own if slot not in taken]
    placed = dict(zip(free, strangers, strict=False))
    order = [(taken | placed)[slot] for slot in own if slot in taken or slot in placed]
    order += strangers[len(placed) :]
    if strangers and own:
        _tell_strangers(strangers, own, order, where, mixed=bool(taken))
    return {key: mapping.get(key) for key in order}


def changed_slots(chosen: Mapping[str, str | None]) -> dict[str, str]:
    """Return those of :func:`camera_slots` whose name in the policy is another than in the data."""
    return {key: slot for key, slot in chosen.items() if slot not in (None, key)}


def saved_renames(file: Path) -> dict[str, str]:
    """Return the names that a saved pre-processor changes: name in the data -> name in the policy."""
    steps = read_object(file).get("steps") if file.is_file() else None
    for step in steps if isinstance(steps, list) else ():
        told = step.get("config") if isinstance(step, dict) else None
        table = told.get("rename_map") if isinstance(told, dict) else None
        if isinstance(table, dict):
            return {str(old): str(new) for old, new in table.items()}
    return {}


def all_renames(file: Path, cameras: Mapping[str, str], pictures: Iterable[str]) -> dict[str, str]:
    """Return the renames of a saved pre-processor, with those of `cameras` in the place of its own of `pictures`."""
    pictures = set(pictures)
    return {old: new for old, new in saved_renames(file).items() if new not in pictures} | dict(cameras)


def saved_cameras(file: Path, keys: Iterable[str]) -> dict[str, str]:
    """Return a policy's cameras in the order of its slots: name in the data -> name in the policy.

    Args:
        file: its saved pre-processor, which may rename them.
        keys: its cameras.
    """
    before = {new: old for old, new in saved_renames(file).items()}
    return {before.get(key, key): key for key in keys}


def kept_renames(
    saved: Mapping[str, str], features: Mapping[str, Any] | None, cameras: Cameras, *, where: str
) -> dict[str, str] | None:
    """Return what the pre-processor of a policy that keeps its cameras renames; None where `cameras` maps none.

    Args:
        saved: :func:`saved_cameras` of the policy.
        features: the dataset's; None where there is none.
        cameras: see :data:`Cameras`. A list must hold all cameras of the policy: which it sees is its own affair.
        where: the policy, for messages.

    Raises:
        PolicyError: `cameras` does not fit.
        DataError: the dataset lacks a camera, or has depth in its place.
    """
    known = dict(saved)
    if isinstance(cameras, Mapping):
        pictures = [key for key, feature in (features or {}).items() if is_picture(feature)]
        wanted = {key: saved.get(slot, slot) for key, slot in cameras.items()}
        camera_slots(list(saved.values()), pictures if features is not None else list(cameras), wanted, where=where)
        known = {key: slot for key, slot in saved.items() if slot not in wanted.values()} | wanted
        known = {key: slot for slot in saved.values() for key, placed in known.items() if placed == slot}
    elif cameras is not None and (missing := [key for key in known if key not in cameras]):
        raise PolicyError(
            f"{where} was trained with the cameras {', '.join(known)}, and {', '.join(missing)} is not among "
            f'{listed(cameras)}: give policy_options {{"cameras": {{"camera of the data": "{missing[0]}"}}}}'
        )
    if features is not None:
        _check_kept(known, features, where)
    return {key: slot for key, slot in known.items() if key != slot} if isinstance(cameras, Mapping) else None


def _check_kept(known: Mapping[str, str], features: Mapping[str, Any], where: str) -> None:
    offered = [key for key, feature in features.items() if is_picture(feature) and not is_depth(feature)]
    if lost := [key for key in known if key not in offered]:
        depth = [key for key in lost if key in features]
        because = f" ({', '.join(depth)} is a depth camera)" if depth else ""
        raise DataError(
            f"{where} was trained with the cameras {', '.join(known)}, and the dataset has no {', '.join(lost)}"
            f"{because}; it has {', '.join(offered) or 'none'}. If one of them shows the same, give policy_options "
            f'{{"cameras": {{"camera of the data": "{known[lost[0]]}"}}}}, or, where the model can do without, '
            "--statistics dataset."
        )


def _tell_strangers(
    strangers: Sequence[str], own: Sequence[str], order: Sequence[str], where: str, mixed: bool
) -> None:
    """Say which slot a camera takes that the checkpoint does not know; a warning where others of its are known."""
    say = logger.warning if mixed else logger.info
    say(
        "%s is not among the cameras of %s (%s): the model sees them in the order %s; "
        'policy_options {"cameras": {"camera of the data": "camera of the checkpoint"}} maps them',
        ", ".join(strangers),
        where,
        ", ".join(own),
        ", ".join(order),
    )
