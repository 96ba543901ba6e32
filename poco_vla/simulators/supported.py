"""Simulators of LeRobot's environment types: which package each needs, and how that is installed."""

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from poco_vla.errors import ConfigError


@dataclass(frozen=True)
class Simulator:
    """What an environment type needs beside LeRobot.

    Attributes:
        package: its name for a person.
        module: what is imported.
        install: how it is installed.
    """

    package: str
    module: str
    install: str


GUIDE = "see LeRobot's page on it, https://huggingface.co/docs/lerobot"
SIMULATORS = {
    "aloha": Simulator("gym-aloha", "gym_aloha", 'pip install "lerobot[aloha]"'),
    "pusht": Simulator("gym-pusht", "gym_pusht", 'pip install "lerobot[pusht]"'),
    "libero": Simulator(
        "hf-libero",
        "libero",
        'pip install "lerobot[libero]", in an environment without poco-vla[robomimic]: it needs robosuite 1.4.0',
    ),
    "libero_plus": Simulator("LIBERO-plus", "libero", f"clone github.com/sylvestf/LIBERO-plus; {GUIDE}/libero_plus"),
    "metaworld": Simulator("metaworld", "metaworld", 'pip install "poco-vla[metaworld]"'),
    "metaworld_mt": Simulator("metaworld", "metaworld", 'pip install "poco-vla[metaworld]"'),
    "gym_manipulator": Simulator("gym-hil", "gym_hil", 'pip install "lerobot[hilserl]"'),
    "robocasa": Simulator("robocasa", "robocasa", f"clone github.com/robocasa/robocasa; {GUIDE}/robocasa"),
    "vlabench": Simulator("VLABench", "VLABench", f"clone github.com/OpenMOSS/VLABench; {GUIDE}/vlabench"),
    "robotwin": Simulator("RoboTwin 2.0", "sapien", f"clone github.com/RoboTwin-Platform/RoboTwin; {GUIDE}/robotwin"),
    "robomme": Simulator("robomme", "robomme", f"clone github.com/RoboMME/robomme_benchmark; {GUIDE}/robomme"),
    "isaaclab_arena": Simulator("Isaac Lab Arena", "isaaclab", f"{GUIDE}/envhub_isaaclab_arena"),
}
"""Of each type that does not come with an installed simulator."""


def check_installed(config: Any) -> None:
    """Raise ConfigError where the simulator of a LeRobot EnvConfig is not installed."""
    needed = SIMULATORS.get(config.type)
    if needed is not None and find_spec(needed.module) is None:
        raise ConfigError(
            f'the environment type "{config.type}" needs the package {needed.package}, which is not installed: '
            f"{needed.install}"
        )


def import_package(package: str, gym_id: str) -> None:
    """Import the package that registers a Gymnasium id.

    Raises:
        ConfigError: it is not installed, or imports another that is not.
    """
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = error.name or package
        through = "" if missing.split(".")[0] == package.split(".")[0] else f", which imports {missing}"
        raise ConfigError(
            f'the environment "{gym_id}" needs the package {package}{through}, which is not installed'
        ) from error
