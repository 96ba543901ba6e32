"""Which of LeRobot's environment types can be used here, and what an absent simulator needs."""

import re
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from typing import Any

from poco_vla.errors import ConfigError


def check_supported(config: Any) -> None:
    """Raise ConfigError unless an environment type can be made by a Gymnasium id.

    Args:
        config: LeRobot EnvConfig.
    """
    from lerobot.envs.configs import EnvConfig, HubEnvConfig

    kind = type(config)
    if isinstance(config, HubEnvConfig):
        raise ConfigError(
            f'the environment type "{config.type}" runs code of the Hub repository {config.hub_path} and registers no '
            f"Gymnasium id: it is not supported here. {ADVICE}"
        )
    own_factory = kind.create_envs is not EnvConfig.create_envs
    if kind.__module__.startswith("lerobot.") and (own_factory or not _can_be_imported(config)):
        raise ConfigError(
            f'the environment type "{config.type}" registers no Gymnasium id (LeRobot makes its environments by a '
            f"function of its own): it is not supported here{_missing(config.type)}. {ADVICE}"
        )


ADVICE = (
    "Register a Gymnasium environment that wraps it and an EnvConfig of your own with its gym_id (guide: simulators), "
    "or train on its dataset without an environment (--no-env)."
)


def install_command(kind: str) -> str:
    """Name the pip command for the simulator of one of LeRobot's types, "" where LeRobot has no extra for it."""
    return f'pip install "lerobot[{kind}]"' if kind in _extras() else ""


def _can_be_imported(config: Any) -> bool:
    """Return True for a package that is installed, or that one of LeRobot's extras would install."""
    package = config.package_name
    return bool(install_command(config.type)) or find_spec(package.split(".")[0]) is not None


def _missing(kind: str) -> str:
    """Name the packages of LeRobot's extra for this type that are not installed."""
    if kind not in _extras():
        return ""
    absent = [name for name in _extras()[kind] if not _installed(name)]
    return f"; {', '.join(absent)} is not installed either ({install_command(kind)})" if absent else ""


def _extras() -> dict[str, list[str]]:
    """Packages that each extra of the installed LeRobot asks for by itself."""
    try:
        lerobot = distribution("lerobot")
    except PackageNotFoundError:
        return {}
    out: dict[str, list[str]] = {name: [] for name in lerobot.metadata.get_all("Provides-Extra") or ()}
    for line in lerobot.requires or ():
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        name = re.match(r"[\w.-]+", line)
        if extra and name and name[0] != "lerobot":
            out.setdefault(extra[1], []).append(name[0])
    return out


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
