"""What a robot and a learner have to agree on before anything moves."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lerobot.robots import Robot

from poco_vla.errors import ConfigError
from poco_vla.joint_names import ACTION
from poco_vla.robots.features import observation_features
from poco_vla.robots.joint_order import ByName, find_positions, joint_order
from poco_vla.robots.safety import ActionLimits

MAX_FPS = 10_000.0
"""Control steps per second that no robot exceeds."""
WIDENED = 0.05
"""Of the demonstrations' range of an action: as far beyond it the robot may be sent, unless limits are given."""


def check_match(robot: Robot, metadata: Mapping[str, Any], *, joints: ByName = "by-name") -> list[str]:
    """Check that the robot fits the policy, and return the robot's observations that the policy does not read.

    Args:
        robot: need not be connected.
        metadata: what the learner said on connecting.
        joints: "positional" compares no names of states and actions.

    Raises:
        ConfigError: the policy needs a camera that the robot does not have, or of another size; states or actions are
            not as many, or have other names.
    """
    _check_announcement(metadata)
    has = {key: _seen(feature) for key, feature in observation_features(robot).items()}
    wants = {key: _shown_names(feature) for key, feature in metadata["observation"].items()}
    actions = len(robot.action_features)
    wrong = [f"{key}: the policy takes {wants[key]}, the robot has {has.get(key, 'none')}" for key in wants]
    wrong = [line for line, key in zip(wrong, wants, strict=True) if has.get(key) != wants[key]]
    if actions != metadata["action_dim"]:
        names = ", ".join(robot.action_features)
        wrong.append(f"action: the policy gives {metadata['action_dim']}, the robot takes {actions} ({names})")
    if wrong:
        listed = "\n  ".join(wrong)
        raise ConfigError(
            f"{robot.name} and the policy do not fit, nothing was moved:\n  {listed}\nThe robot has "
            f"{', '.join(f'{key} {shape}' for key, shape in has.items())}. Use cameras of the names and sizes that the "
            "policy was trained with."
        )
    joint_order(robot, metadata, joints)
    return [key for key in has if key not in wants]


def action_limits(
    metadata: Mapping[str, Any],
    names: Sequence[str],
    *,
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
    max_step: Sequence[float] | None = None,
    joints: ByName = "by-name",
) -> ActionLimits:
    """Return the action limits of mode "clip": the given bounds, else the demonstrations' range and 5 % beyond it.

    Args:
        metadata: what the learner said on connecting, with "action_low" and "action_high".
        names: the robot's actions.
        low, high, max_step: one number for all actions, or one for each, in the order of `names`.
        joints: "positional" takes the demonstrations' range in the order of `names`.

    Raises:
        ConfigError: bounds are neither given nor known.
    """
    known = _announced_range(metadata, names) if low is None or high is None else None
    if known is not None:
        least, most = known
        if order := find_positions(names, metadata, ACTION, "the robot", joints):
            least, most = (bound[np.argsort(order)] for bound in (least, most))
        # An action that never changed has no range: it gets a hair of one, because limits may not be equal.
        margin = np.maximum(WIDENED * (most - least), 1e-5 * np.maximum(1.0, np.abs(least)))
        low, high = (
            (least - margin).tolist() if low is None else low,
            (most + margin).tolist() if high is None else high,
        )
    if low is None or high is None:
        raise ConfigError(
            "the range of this robot's actions is unknown, so no action can be sent safely: give --low and --high, in "
            f"the robot's units, one number for all or one for each of {', '.join(names)}"
        )
    by_name = {"--low": low, "--high": high, "--max-step": max_step}
    bounds = {option: values and _by_name(option, values, names) for option, values in by_name.items()}
    return ActionLimits(bounds["--low"], bounds["--high"], bounds["--max-step"], mode="clip")


def _check_announcement(metadata: Mapping[str, Any]) -> None:
    """Raise ConfigError for numbers of a learner that no robot can be run by."""
    fps, seen = metadata.get("fps", 1.0), metadata.get("observation")
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps <= MAX_FPS:
        raise ConfigError(f"the learner announces {fps!r:.40} control steps per second; expected 0 to {MAX_FPS:g}")
    for name in ("horizon", "action_dim"):
        if type(metadata.get(name, 1)) is not int or metadata.get(name, 1) < 1:
            raise ConfigError(f"the learner announces a {name} of {metadata.get(name)!r:.40}; expected 1 or more")
    features = list(seen.values()) if isinstance(seen, Mapping) else [None]
    if not all(isinstance(feature, Mapping) and {"dtype", "shape"} <= feature.keys() for feature in features):
        raise ConfigError(f"the learner announces no observations with dtype and shape, but {seen!r:.100}")
    if not isinstance(metadata.get("task", ""), str):
        raise ConfigError(f"the learner announces an instruction that is no text: {metadata['task']!r:.100}")


def _announced_range(metadata: Mapping[str, Any], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the demonstrations' lowest and highest actions; None where the learner does not know them.

    Raises:
        ConfigError: they are no finite range of each of the robot's actions.
    """
    low, high = metadata.get("action_low"), metadata.get("action_high")
    if low is None or high is None:
        return None
    try:
        least, most = np.array(low, dtype=np.float64), np.array(high, dtype=np.float64)
    except (TypeError, ValueError):
        least = most = np.full(0, np.nan)
    right = least.shape == most.shape == (len(names),) and np.isfinite([least, most]).all() and (least <= most).all()
    if not right:
        raise ConfigError(
            f"the learner announces actions from {low!r:.100} to {high!r:.100}, which is no finite range for each of "
            f"{', '.join(names)}: nothing was moved. Mend the statistics that training uses, or give --low and --high"
        )
    return least, most


def _by_name(option: str, values: Sequence[float], names: Sequence[str]) -> dict[str, float]:
    if len(values) not in (1, len(names)):
        raise ConfigError(
            f"{option} has {len(values)} numbers; one for all actions, or {len(names)}: {', '.join(names)}"
        )
    each = list(values) * (len(names) if len(values) == 1 else 1)
    return dict(zip(names, each, strict=True))


def _seen(feature: Mapping[str, Any]) -> str:
    kind = "float32" if feature["dtype"] == "float32" else "uint8"
    return f"{kind} {list(feature['shape'])}"


def _shown_names(feature: Mapping[str, Any]) -> str:
    # An older learner announces its dataset's float64 or float16; the client sends what it announces.
    kind = "float32" if str(feature["dtype"]).startswith("float") else feature["dtype"]
    return f"{kind} {list(feature['shape'])}"
