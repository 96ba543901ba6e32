"""How a worker process makes the environments of a LeRobot type: by its Gymnasium id, or by its `create_envs`."""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gymnasium as gym

from poco_vla.config import EnvSpec
from poco_vla.errors import ConfigError
from poco_vla.simulators.supported import check_installed, import_package


@dataclass(frozen=True)
class EnvSource:
    """Makes environments, in any process.

    Attributes:
        make: makes one; of several tasks a :class:`TaskSuite`.
        preload: modules that a worker server imports once, for all its workers.
    """

    make: Callable[[], gym.Env]
    preload: tuple[str, ...]


type GymnasiumId = tuple[str, str, Mapping[str, Any]]
"""Package that registers it, id, arguments."""


def source_of(spec: EnvSpec, configs: Sequence[Any]) -> EnvSource:
    """Return how the environment of a specification is made.

    A type that leaves `create_envs` and `get_env_processors` to LeRobot is made by its Gymnasium id, as LeRobot makes
    it: workers then start without loading LeRobot.

    Args:
        spec: which environment.
        configs: LeRobot EnvConfig of each task that it names.

    Raises:
        ConfigError: its simulator is not installed, or it runs code of the Hub without consent.
    """
    from lerobot.envs.configs import HubEnvConfig

    first = configs[0]
    if isinstance(first, HubEnvConfig) and not spec.trust_remote_code:
        raise ConfigError(
            f'the environment type "{first.type}" downloads and runs code of the Hub repository {first.hub_path}: read '
            "it, and consent with --env.trust-remote-code"
        )
    check_installed(first)
    preload = tuple(getattr(first, "preload", ()))
    if is_made_by_id(first):
        ids: list[GymnasiumId] = [(config.package_name, config.gym_id, config.gym_kwargs) for config in configs]
        if len(ids) == 1:
            return EnvSource(partial(make_env, *ids[0]), preload)
        return EnvSource(partial(_gymnasium_suite, ids, [config.task for config in configs]), preload)
    loads = (type(first).__module__, "poco_vla.simulators.suite", *preload)
    return EnvSource(partial(_lerobot_suite, configs, spec.trust_remote_code), loads)


def is_made_by_id(config: Any) -> bool:
    """Return True if LeRobot would make an EnvConfig's environment by its Gymnasium id, without processors."""
    from lerobot.envs.configs import EnvConfig, HubEnvConfig

    kind = type(config)
    own = kind.create_envs is not EnvConfig.create_envs or kind.get_env_processors is not EnvConfig.get_env_processors
    return not (own or config.type in OWN_FACTORIES or isinstance(config, HubEnvConfig))


def make_env(package: str, gym_id: str, kwargs: Mapping[str, Any]) -> gym.Env:
    """Make one environment by its Gymnasium id, its package imported when the id is not registered yet."""
    if gym_id not in gym.registry:
        import_package(package, gym_id)
        if gym_id not in gym.registry:
            close = ", ".join(sorted(name for name in gym.registry if name.startswith(f"{gym_id.split('/')[0]}/")))
            raise ConfigError(
                f'the package {package} registers no Gymnasium environment "{gym_id}"'
                + (f"; it registers {close}" if close else "")
            )
    return gym.make(gym_id, disable_env_checker=True, **kwargs)


def _gymnasium_suite(ids: Sequence[GymnasiumId], tasks: Sequence[str]) -> gym.Env:
    from poco_vla.simulators.suite import TaskSuite

    return TaskSuite([make_env(*one) for one in ids], tasks)


def _lerobot_suite(configs: Sequence[Any], trust_remote_code: bool) -> gym.Env:
    """Make what `create_envs` gives, one environment of each task, with LeRobot's processors around it."""
    from poco_vla.simulators.suite import ProcessedEnv, TaskSuite

    envs: list[Any] = []
    names: list[str] = []
    limits: list[int | None] = []
    for config in configs:
        processors = config.get_env_processors()
        for name, env in _created(config, trust_remote_code):
            steps = [*processors[0].steps, *processors[1].steps]
            names.append(name)
            envs.append(ProcessedEnv(env, *processors) if steps else env)
            limits.append(getattr(config, "episode_length", None) or getattr(env.unwrapped, "_max_episode_steps", None))
    return TaskSuite(envs, names, limits)


def _created(config: Any, trust_remote_code: bool) -> list[tuple[str, gym.Env]]:
    """Return the environments of LeRobot's own factory with their tasks' names."""
    from lerobot.envs.factory import make_env as make_lerobot_env

    if config.type in OWN_FACTORIES:
        return [(config.task or config.type, OWN_FACTORIES[config.type](config))]
    with redirect_stdout(io.StringIO()):  # it prints a line for each task
        suites = make_lerobot_env(config, n_envs=1, use_async_envs=False, trust_remote_code=trust_remote_code)
    found: list[tuple[str, gym.Env]] = []
    for suite, tasks in suites.items():
        for number, vector in tasks.items():
            if not isinstance(vector, gym.vector.SyncVectorEnv):
                raise ConfigError(
                    f'the environment type "{config.type}" makes a {type(vector).__name__}; expected a SyncVectorEnv, '
                    "whose environments can be stepped one by one"
                )
            env = vector.envs[0]
            task = getattr(env.unwrapped, "task", None)
            found.append((task if isinstance(task, str) and task else f"{suite}/{number}", env))
    names = [name for name, _ in found]
    return [(name if names.count(name) == 1 else f"{name} {k}", env) for k, (name, env) in enumerate(found)]


def _gym_hil(config: Any) -> gym.Env:
    """Make one of gym-hil's simulations as LeRobot's HIL-SERL does."""
    from lerobot.rl.gym_manipulator import make_robot_env

    if config.name != "gym_hil":
        raise ConfigError(
            f'the environment type "gym_manipulator" with name "{config.name}" is a real robot, which no simulation '
            'replaces: give --env.options.name gym_hil and a task such as PandaPickCube-v0, or use "poco-vla robot"'
        )
    return make_robot_env(replace(config))[0]


OWN_FACTORIES: dict[str, Callable[[Any], gym.Env]] = {"gym_manipulator": _gym_hil}
"""Types that LeRobot makes by a function of their own, outside of `create_envs`."""
