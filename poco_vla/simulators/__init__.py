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
from poco_vla.simulators.sources import EnvSource, is_made_by_id, source_of
from poco_vla.simulators.suite import TASK_KEY


def name_of(spec: EnvSpec) -> str:
    """Name an environment in messages."""
    return f'the environment "{spec.type}" (task {spec.task or default_task(spec.type)})'


def environment(spec: EnvSpec) -> Any:
    """Return the LeRobot EnvConfig that a spec names; of several tasks that of the first.

    Raises:
        UnknownNameError: no such type, or an option names what there is not; the message lists what there is.
        ConfigError: an option that the type does not have.
    """
    return _configs(spec)[0]


def env_source(spec: EnvSpec) -> EnvSource:
    """Return how the environments of a spec are made.

    Raises:
        UnknownNameError, ConfigError: as :func:`environment`; its simulator is not installed, or it runs code of the
            Hub without consent.
    """
    return source_of(spec, _configs(spec))


def num_tasks(spec: EnvSpec) -> int:
    """Return the number of tasks that a spec names, as far as its configuration tells."""
    configs = _configs(spec)
    return max(len(configs), len(getattr(configs[0], "tasks", ())))


def _configs(spec: EnvSpec) -> list[Any]:
    """Return the LeRobot EnvConfig of each task that a spec names. A type that makes its environments itself reads a
    list of tasks itself."""
    from lerobot.envs.configs import EnvConfig

    kind = config_class(spec.type)
    _check_options(spec, kind)
    several = "," in spec.task and kind.create_envs is EnvConfig.create_envs
    tasks = [task.strip() for task in spec.task.split(",") if task.strip()] if several else [spec.task]
    try:
        configs = [kind(**({"task": task} if task else {}), **spec.options) for task in tasks]
    except UnknownNameError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f'environment "{spec.type}": {error}') from error
    if several:
        _declare_tasks(configs[0], len(configs))
    return configs


def _declare_tasks(config: Any, tasks: int) -> None:
    """Add to a configuration's features what a suite of tasks adds to the observations."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.utils.constants import OBS_ENV_STATE

    own = config.features.get(TASK_KEY)
    size = tasks + (own.shape[0] if own is not None else 0)
    config.features = config.features | {TASK_KEY: PolicyFeature(FeatureType.ENV, (size,))}
    config.features_map = config.features_map | {TASK_KEY: OBS_ENV_STATE}


def declared_features(config: Any) -> dict[str, Any]:
    """Return the features that an EnvConfig declares, by LeRobot's keys. Empty where they cannot be known before an
    environment is there: the type makes its environments itself, or has processors of its own."""
    from lerobot.envs.utils import env_to_policy_features

    return env_to_policy_features(config) if is_made_by_id(config) else {}


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
    import_module("poco_vla.simulators.metaworld")
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
