"""Robots and teleoperators by the words of a command line, as LeRobot's own programs take them."""

import importlib
import logging
import pkgutil
from collections.abc import Sequence
from dataclasses import make_dataclass

import draccus
import lerobot.cameras
import lerobot.robots
import lerobot.teleoperators
from draccus.utils import DraccusException
from lerobot.configs.parser import (
    PLUGIN_DISCOVERY_SUFFIX,
    PluginLoadError,
    filter_arg,
    get_type_arg,
    load_plugin,
    parse_plugin_args,
)
from lerobot.robots import Robot, RobotConfig
from lerobot.robots.utils import make_robot_from_config
from lerobot.teleoperators import Teleoperator, TeleoperatorConfig
from lerobot.teleoperators.utils import make_teleoperator_from_config
from lerobot.utils.import_utils import register_third_party_plugins

from poco_vla.errors import ConfigError, UnknownNameError

logger = logging.getLogger(__name__)


def make_devices(words: Sequence[str]) -> tuple[Robot, Teleoperator | None]:
    """Return the robot and, if one is configured, the teleoperator; neither is connected.

    Args:
        words: ``--robot.type=...`` and the like, ``--teleop.type=...`` and the like.

    Raises:
        UnknownNameError: no such type.
        ConfigError: no robot at all, or options that do not make one.
        SystemExit: an option that the type does not have; the usage says which there are.
    """
    words = _with_plugins(_joined(words))
    robot = _config(RobotConfig, "robot", words)
    if robot is None:
        raise ConfigError(f"say which robot: --robot.type=TYPE, one of {', '.join(_types(RobotConfig))}")
    teleop = _config(TeleoperatorConfig, "teleop", words)
    try:
        return make_robot_from_config(robot), teleop and make_teleoperator_from_config(teleop)
    except (ValueError, ImportError) as error:
        types = f"{robot.type} and {teleop.type}" if teleop else robot.type
        raise ConfigError(f"cannot make {types}: {error}") from error


def _with_plugins(words: list[str]) -> list[str]:
    """Import what registers types: LeRobot's own, installed third-party ones, and those that the words name."""
    for package in (lerobot.robots, lerobot.teleoperators, lerobot.cameras):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if module.ispkg:
                _import(module.name)
    register_third_party_plugins()
    for option, path in parse_plugin_args(PLUGIN_DISCOVERY_SUFFIX, words).items():
        try:
            load_plugin(path)
        except PluginLoadError as error:
            raise ConfigError(f"--{option}: {error}") from error
        words = filter_arg(option, words)
    return words


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:  # a driver that is not installed, of a robot that may not be asked for
        logger.info("%s is not on offer: %s", name, error)


def _config[T: draccus.ChoiceRegistry](base: type[T], name: str, words: Sequence[str]) -> T | None:
    """Return the options `--name.*` as the configuration class that their `type` names; None without any."""
    given = [word for word in words if word.startswith(f"--{name}.")]
    if not given:
        return None
    kind = get_type_arg(name, words)
    if kind not in _types(base):
        raise UnknownNameError(f"--{name}.type", kind or "", _types(base))
    program = make_dataclass("Program", [(name, base.get_choice_class(kind))])
    try:
        return getattr(draccus.parse(program, args=filter_arg(f"{name}.type", given), prog="poco-vla robot"), name)
    except DraccusException as error:
        because = f" ({error.__cause__})" if error.__cause__ else ""
        raise ConfigError(f"the options of --{name}.type={kind}: {error}{because}") from error


def _types(base: type[draccus.ChoiceRegistry]) -> list[str]:
    return sorted(base.get_known_choices())


def _joined(words: Sequence[str]) -> list[str]:
    """Return the arguments with each `--option value` joined to `--option=value`."""
    joined: list[str] = []
    for word in words:
        if joined and not word.startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined
