"""Simulated environments as LeRobot environment types.

``lerobot-eval --env.discover_packages_path=poco_vla.rollout.environments --env.type=ogbench`` runs them too.
"""

from importlib import import_module
from typing import Any

from poco_vla.config import EnvSpec
from poco_vla.errors import ConfigError, UnknownNameError


def environment(spec: EnvSpec) -> Any:
    """The LeRobot EnvConfig that a spec names.

    Raises:
        UnknownNameError: no such type, or an option names what there is not; the message lists what there is.
        ConfigError: an option that the type does not have, or its simulator is not installed.
    """
    from lerobot.envs.configs import EnvConfig
    from lerobot.utils.import_utils import register_third_party_plugins

    import_module("poco_vla.rollout.environments.ogbench")
    import_module("poco_vla.rollout.environments.robosuite")
    known = EnvConfig.get_known_choices()
    if spec.type not in known:
        register_third_party_plugins()
    if spec.type not in known:
        raise UnknownNameError("environment type", spec.type, known)
    try:
        return known[spec.type](task=spec.task, **spec.options)
    except UnknownNameError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f'environment "{spec.type}": {error}') from error
