"""Simulated environments as LeRobot environment types.

``lerobot-eval --env.discover_packages_path=poco_vla.simulators --env.type=ogbench`` runs them too.

An environment of one's own is a module ``lerobot_env_NAME`` outside of this package (recipes/guides/simulators.md). One
that belongs here is a file with an `EnvConfig` that is registered under its type, beside a file that registers its
Gymnasium id (:mod:`ogbench` and :mod:`ogbench_gym`), and :func:`config_class` imports it.
"""

from importlib import import_module
from inspect import Parameter, signature
from typing import Any

from poco_vla.config import EnvSpec
from poco_vla.errors import ConfigError, UnknownNameError
from poco_vla.simulators.supported import check_supported


def name_of(spec: EnvSpec) -> str:
    """Name an environment in messages."""
    return f'the environment "{spec.type}" (task {spec.task or default_task(spec.type)})'


def environment(spec: EnvSpec) -> Any:
    """The LeRobot EnvConfig that a spec names.

    Raises:
        UnknownNameError: no such type, or an option names what there is not; the message lists what there is.
        ConfigError: an option that the type does not have, its simulator is not installed, or it has no Gymnasium id.
    """
    kind = config_class(spec.type)
    _check_options(spec, kind)
    try:
        config = kind(**({"task": spec.task} if spec.task else {}), **spec.options)
    except UnknownNameError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f'environment "{spec.type}": {error}') from error
    check_supported(config)
    return config


def default_task(kind: str) -> str:
    """Return the task that an environment type has by itself; empty where it has none.

    Raises:
        UnknownNameError: no such type.
    """
    found = signature(config_class(kind)).parameters.get("task")
    return found.default if found is not None and isinstance(found.default, str) else ""


def config_class(kind: str) -> Any:
    """Return the class of LeRobot's EnvConfig that is registered under a name."""
    from lerobot.envs.configs import EnvConfig
    from lerobot.utils.import_utils import register_third_party_plugins

    import_module("poco_vla.simulators.ogbench")
    import_module("poco_vla.simulators.robosuite")
    known = EnvConfig.get_known_choices()
    if kind not in known:
        register_third_party_plugins()
    if kind not in known:
        raise UnknownNameError("environment type", kind, known)
    return known[kind]


def _check_options(spec: EnvSpec, kind: Any) -> None:
    parameters = signature(kind).parameters.values()
    known = {p.name for p in parameters} - {"task"}
    unknown = [name for name in spec.options if name not in known]
    if unknown and not any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
        raise ConfigError(f'environment "{spec.type}": {UnknownNameError("option", unknown[0], known)}')
