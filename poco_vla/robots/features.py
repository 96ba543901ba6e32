"""Names and values of a robot's observations and actions, and how it holds still by them."""

import re
from collections.abc import Callable, Mapping, Sequence

from lerobot.lerobot_types import RobotAction, RobotObservation
from lerobot.robots import Robot
from lerobot.teleoperators import Teleoperator
from lerobot.utils.constants import OBS_STR
from lerobot.utils.feature_utils import hw_to_dataset_features

from poco_vla.errors import ConfigError

Hold = Callable[[RobotObservation, RobotAction | None], RobotAction]
"""(what the robot sees, the last action sent or None) -> the action that keeps it where it is."""
_MOTION = re.compile(r"(^|\.)delta_|\.(vel|delta)$")
"""Names of actions that are a change: 0 holds."""


def hold_still(names: Sequence[str], observed: Mapping[str, object]) -> Hold:
    """Return the hold action that the names of LeRobot's robots imply.

    `*.pos` holds the last goal, or the present position when there is none; velocities and changes hold at 0.

    Raises:
        ConfigError: a name that says neither, or a position that is not observed.
    """
    for name in names:
        if not (_MOTION.search(name) or (name.endswith(".pos") and name in observed)):
            raise ConfigError(
                f'no hold action is known for "{name}": expected an observed "*.pos", a "*.vel" or a "delta_*". Give a '
                "`hold` of your own."
            )

    def hold(observation: RobotObservation, last: RobotAction | None) -> RobotAction:
        goals = observation if last is None else last
        return {name: 0.0 if _MOTION.search(name) else float(goals[name]) for name in names}

    return hold


def action_names(robot: Robot) -> list[str]:
    features = robot.action_features
    if others := {name: kind for name, kind in features.items() if kind is not float}:
        raise ConfigError(f"{robot} takes actions that are no numbers: {others}; only float features can be driven")
    return list(features)


def observation_features(robot: Robot) -> dict[str, dict]:
    """Return the robot's observations as the features of a LeRobot dataset.

    Raises:
        ConfigError: something that is neither a number nor a colour picture.
    """
    for name, shape in robot.observation_features.items():
        if isinstance(shape, tuple) and (len(shape) != 3 or shape[2] != 3):
            raise ConfigError(f'"{name}" of {robot} is {shape}; pictures are (height, width, 3). Turn depth off.')
    return hw_to_dataset_features(robot.observation_features, OBS_STR, use_video=False)


def check_teleoperator(teleoperator: Teleoperator, names: Sequence[str]) -> None:
    # LeRobot's arms list their features by name; its pads and keyboards as {"dtype", "shape", "names": {...}}.
    features = teleoperator.action_features
    features = features.get("names", features)
    if missing := [name for name in names if name not in features]:
        raise ConfigError(f"{teleoperator} gives {list(features)}, but the robot also needs {missing}")
