"""Check that dataset, policy and environment belong together, before any long work."""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from poco_vla.data import DatasetInfo
from poco_vla.errors import DataError
from poco_vla.policy import FlowPolicy
from poco_vla.simulators import declared_features
from poco_vla.simulators.observations import require_pictures

if TYPE_CHECKING:
    from poco_vla.rollout.pool import EnvPool

FIRST_STEPS = 10
"""Control steps of a first rollout that has nothing to complain of."""
MOST_STEPS = 1000
"""Control steps of a first rollout in which no step tells success."""
PATIENCE = 10.0
"""Seconds after which a first rollout ends in any case."""
CHANCES = 3
"""Failures in a row of one environment that end a first rollout with an error."""


def check_fit(info: DatasetInfo, env: Any) -> None:
    """Raise DataError unless the dataset has the environment's rate, actions and states.

    Args:
        info: of the dataset.
        env: LeRobot EnvConfig.
    """
    from lerobot.configs.types import FeatureType

    if "action" not in info.features:
        raise DataError(f"{info.repo_id} has no column action. Its columns: {', '.join(sorted(info.features))}.")
    if info.fps != env.fps:
        raise DataError(
            f"{info.repo_id} was recorded at {info.fps} fps, the environment runs at {env.fps}: a chunk would last "
            "another time. Use data of the same rate."
        )
    for key, feature in declared_features(env).items():
        if feature.type is FeatureType.VISUAL or key not in info.features:
            continue  # images are resized on their way in; what a policy reads is its own affair
        shape = tuple(info.features[key]["shape"])
        if shape != tuple(feature.shape):
            raise DataError(
                f'"{key}" has shape {shape} in {info.repo_id} and {tuple(feature.shape)} in the environment '
                f'"{env.type}" (task {env.task}): the data comes from another robot, task or choice of cameras.'
            )


def check_inputs(policy: FlowPolicy, info: DatasetInfo, env: Any | None) -> None:
    """Raise DataError unless dataset and environment offer what a policy reads, and act in its dimensions.

    Args:
        policy: the policy to train.
        info: of the dataset.
        env: LeRobot EnvConfig, None where there is none.
    """
    offers = {"the dataset": set(info.features)}
    if env is not None and (declared := declared_features(env)):
        offers[f'the environment "{env.type}"'] = set(declared)
    for where, keys in offers.items():
        missing = sorted(set(policy.input_keys) - keys)
        if missing:
            raise DataError(f"the policy reads {', '.join(missing)}, which {where} does not offer: {sorted(keys)}")
    action_dim = info.features["action"]["shape"][0]
    if action_dim != policy.spec.action_dim:
        raise DataError(f"the policy acts in {policy.spec.action_dim} dimensions, {info.repo_id} in {action_dim}")


def check_observations(policy: FlowPolicy, demos: Mapping[str, np.ndarray], env: "EnvPool") -> None:
    """Raise DataError unless the observations that an environment gives have what a policy reads, as the data have it.

    Args:
        policy: the policy to train.
        demos: columns of a demonstration.
        env: environments whose episodes have begun.
    """
    missing = sorted(set(policy.input_keys) - env.obs.keys())
    if missing:
        raise DataError(f"the policy reads {', '.join(missing)}, which {env.name} does not offer: {sorted(env.obs)}")
    for key in policy.input_keys:
        mine, shown = demos[key], env.obs[key]
        if mine.dtype != np.uint8 and mine.shape[1:] != shown.shape[1:]:
            raise DataError(
                f'"{key}" has shape {mine.shape[1:]} in the dataset and {shown.shape[1:]} in {env.name}: the data '
                "comes from another robot, task, suite of tasks or choice of cameras"
            )


def check_pictures(policy: FlowPolicy, demos: Mapping[str, np.ndarray], env: Mapping[str, np.ndarray]) -> None:
    """Raise DataError unless the environment's pictures have the demonstrations' size once the policy has resized them.

    Args:
        policy: whose `resize_images` is applied.
        demos: columns of a demonstration, resized.
        env: columns of an observation, as the environment gives it.
    """
    for key, column in demos.items():
        if column.dtype == np.uint8 and key in env:
            kept = policy.resize_images(env[key][:1])
            if kept.shape[1:] != column.shape[1:]:
                raise DataError(
                    f'"{key}" has {column.shape[1]}x{column.shape[2]} pixels in the dataset and {env[key].shape[1]}x'
                    f"{env[key].shape[2]} in the environment, and this policy does not bring them to one size: give "
                    "the environment the dataset's resolution"
                )


def check_rollout(pool: "EnvPool", actions: np.ndarray, say: Callable[[str], None]) -> None:
    """Play the first steps of an episode in each environment, so that errors in it are found before training.

    `EnvPool` checks every value that an environment returns. The rollout goes on beyond `FIRST_STEPS` until an
    episode ends, `MOST_STEPS` or `PATIENCE` where a step has failed or none has reported success yet.

    Args:
        pool: environments whose episodes have begun; they are left in the middle of some.
        actions: [T, action_dim], of a demonstration; repeated from the start where it is too short.
        say: tells a person one line.

    Raises:
        ConfigError: the environment breaks a rule.
        SimulatorError: it fails `CHANCES` times in a row.
    """
    most, pool.max_failures = pool.max_failures, min(pool.max_failures, CHANCES)
    began, taken, ended = time.monotonic(), 0, False
    size = min(pool.horizon, FIRST_STEPS // 2)
    try:
        while not ended and taken < MOST_STEPS and time.monotonic() - began < PATIENCE:
            if taken >= FIRST_STEPS and pool.reports_success and not pool.failures:
                break
            chunk = actions[np.arange(taken, taken + size) % len(actions)]
            episodes, _ = pool.step(np.broadcast_to(chunk, (pool.num_envs, *chunk.shape)))
            ended, taken = bool(episodes), taken + size
        pool.check()
    finally:
        pool.max_failures = most
    if not pool.reports_success:
        say(
            f"warning: no step of {taken} in {pool.name} has reported success yet: the step that ends an episode has "
            'to return info["is_success"]'
        )
    if pool.time_limit is None and pool.spec.max_episode_steps is None:
        say(
            f"{pool.name} declares no time limit: an episode is cut off after {pool.most_steps} control steps "
            "(env.max_episode_steps sets another)"
        )


def check_env_pictures(policy: FlowPolicy, pool: "EnvPool") -> None:
    """Raise DataError unless the pictures that a policy reads come as uint8 RGB."""
    require_pictures(pool.obs, list(policy.input_keys), pool.name)
