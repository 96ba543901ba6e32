"""The feature table that policies are built from: a dataset's own, with what it leaves unsaid filled in."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from poco_vla.data.numbers import PICTURES, is_vector
from poco_vla.errors import DataError, UnknownNameError

logger = logging.getLogger(__name__)

AXES = ["height", "width", "channels"]
"""LeRobot's names of a picture's axes, in the order in which pictures are read."""
CHANNELS = (1, 3, 4)
"""Numbers of channels by which the channel axis is known where the axes have no names: grey, RGB, RGBA."""
OPENPI = {
    "actions": "action",
    "state": "observation.state",
    "image": "observation.images.image",
    "wrist_image": "observation.images.wrist_image",
}
"""Names of openpi's datasets -> LeRobot's."""


def feature_table(dataset: Any, name: str, cameras: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the features of an open dataset as they are read.

    Numbers that policies read are float32, pictures [height, width, 3] with named axes, names of dimensions one flat
    list. Depth cameras are left out, as are columns of text; a warning names them.

    Args:
        dataset: an open LeRobotDataset.
        name: of it, for messages.
        cameras: keys of the cameras to use, in the order in which a policy is to see them; None takes all.

    Raises:
        DataError: no action, a state or action that is no number, a picture of unknown axes.
        UnknownNameError: a camera that the dataset does not have.
    """
    features = dataset.meta.features
    check_columns(features, ("action",), name)
    known = {key for key, feature in features.items() if is_picture(key, feature)}
    depth = known & set(dataset.meta.depth_keys)
    for key in cameras or ():
        if key not in known:
            raise UnknownNameError("camera", key, known - depth)
        if key in depth:
            raise DataError(f'"{key}" of {name} is a depth camera, which no policy here reads: take others')
    table = {}
    for key, feature in features.items():
        if key in depth or (key in known and cameras is not None and key not in cameras):
            continue
        if key in known:
            table[key] = _picture(key, feature, name)
        elif is_vector(key) and not _is_number(feature):
            _leave_out(key, feature, name)
        else:
            table[key] = _numbers(feature) if is_vector(key) else dict(feature)
    if depth and cameras is None:
        logger.warning(
            "%s: left out the depth camera %s, which no policy here reads; dataset.cameras names those to use",
            name,
            ", ".join(sorted(depth)),
        )
    return table if cameras is None else {key: table[key] for key in (*cameras, *(k for k in table if k not in known))}


def is_picture(key: str, feature: Mapping[str, Any]) -> bool:
    """True for cameras: pictures, videos, and columns of a camera's name that hold pixels as numbers."""
    if feature["dtype"] in PICTURES:
        return True
    shape = tuple(feature["shape"])
    pixels = (
        len(shape) == 3 and _channels(shape) is not None and min(shape[:2] if _channels(shape) == 2 else shape[1:]) > 4
    )
    return key.startswith("observation.image") and _is_number(feature) and pixels


def pixel_axes(key: str, feature: Mapping[str, Any]) -> int:
    """Return which axis of a camera's pictures holds the channels."""
    place = _channels(tuple(feature["shape"]))
    assert place is not None, f"{key} is a camera"
    return place


def _channels(shape: tuple[int, ...]) -> int | None:
    return next((i for i in (2, 0) if shape[i] in CHANNELS), None)


def check_columns(features: Mapping[str, Any], wanted: Sequence[str], name: str) -> None:
    """Raise DataError unless a dataset has these columns."""
    missing = [key for key in wanted if key not in features]
    if missing:
        theirs = {old: new for old, new in OPENPI.items() if old in features and new not in features}
        hint = ""
        if theirs:
            hint = f" These are openpi's names: give rename_map, such as --rename-map '{json.dumps(theirs)}'"
        raise DataError(f"{name} has no column {', '.join(missing)}. Its columns: {', '.join(sorted(features))}.{hint}")


def _is_number(feature: Mapping[str, Any]) -> bool:
    kind = str(feature["dtype"])
    return kind == "bool" or kind.rstrip("0123456789") in ("int", "uint", "float")


def _leave_out(key: str, feature: Mapping[str, Any], name: str) -> None:
    if key in ("action", "observation.state", "observation.environment_state"):
        raise DataError(
            f'"{key}" of {name} is of dtype {feature["dtype"]}, which cannot become float32: record numbers'
        )
    logger.warning('%s: left out "%s", which is of dtype %s and no number', name, key, feature["dtype"])


def _numbers(feature: Mapping[str, Any]) -> dict[str, Any]:
    shape = tuple(feature["shape"]) or (1,)
    return {**feature, "dtype": "float32", "shape": shape, "names": _flat_names(feature.get("names"), shape)}


def _flat_names(names: Any, shape: tuple[int, ...]) -> Any:
    """Flatten names of a vector's dimensions out of one nested list or one named list; return others as they are."""
    flat = names
    if isinstance(flat, Mapping) and len(flat) == 1:
        flat = next(iter(flat.values()))
    if isinstance(flat, list | tuple) and len(flat) == 1 and isinstance(flat[0], list | tuple):
        flat = flat[0]
    fits = isinstance(flat, list | tuple) and all(isinstance(one, str) for one in flat) and (len(flat),) == shape
    return list(flat) if fits else names


def _picture(key: str, feature: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Describe a camera as [height, width, 3], from its axes' names or, where they say nothing, its shape."""
    shape, names = tuple(feature["shape"]), feature.get("names")
    if len(shape) == 2:
        shape, names = (*shape, 1), None
    if len(shape) != 3:
        raise DataError(f'camera "{key}" of {name} has shape {shape}; expected height, width and channels')
    axes = [str(axis).lower() for axis in names] if isinstance(names, list | tuple) and len(names) == 3 else []
    place = next((i for i, axis in enumerate(axes) if axis.startswith(("channel", "rgb")) or axis == "c"), None)
    if place is None or shape[place] not in CHANNELS:
        place = _channels(shape)
    if place is None:
        raise DataError(
            f'camera "{key}" of {name} has shape {shape}, in which no axis is one of 1, 3 or 4 channels: leave it out '
            "with dataset.cameras, or correct meta/info.json"
        )
    height, width = (size for i, size in enumerate(shape) if i != place)
    if [axis[:1] for i, axis in enumerate(axes) if i != place] == ["w", "h"]:
        height, width = width, height
    kind = feature["dtype"] if feature["dtype"] in PICTURES else "image"
    return {**feature, "dtype": kind, "shape": (height, width, 3), "names": list(AXES)}
