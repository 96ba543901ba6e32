"""Demonstrations by a simulator's own scripted expert, as a LeRobot dataset."""

import hashlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from poco_vla.config import DemonstrationConfig, EnvSpec
from poco_vla.data import Episode
from poco_vla.errors import ConfigError
from poco_vla.rollout.environments import environment
from poco_vla.rollout.pool import flat_observation, make_env
from poco_vla.rollout.recorder import write_dataset

logger = logging.getLogger(__name__)


def demonstrations_root(spec: EnvSpec, config: DemonstrationConfig) -> Path:
    """Folder of the dataset: its name holds everything that decides its content."""
    options = "".join(f"_{name}-{_in_a_name(value)}" for name, value in sorted(spec.options.items()))
    form = "" if config.video else "_png"
    made = f"n{config.episodes}_noise{config.noise:g}_seed{config.seed}"
    return config.root / f"{_in_a_name(spec.task)}{options}_{made}{form}"


def _in_a_name(value: Any) -> str:
    """A value as part of a file name: itself where it can be, else with a digest of what had to be replaced."""
    if isinstance(value, list | tuple):
        return "+".join(map(_in_a_name, value))
    text = str(value)
    plain = re.sub(r"[^\w.-]", "-", text, flags=re.ASCII)
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def ensure_demonstrations(
    spec: EnvSpec, config: DemonstrationConfig, on_episode: Callable[[int], None] = lambda done: None
) -> Path:
    """The dataset's folder, made first when it is not there yet. Failed attempts of the expert are not kept.

    Args:
        spec: environment; its Gymnasium class must offer ``expert(noise, rng)``.
        config: how many, how noisy, from which seed.
        on_episode: told after each recorded episode.
    """
    root = demonstrations_root(spec, config)
    if (root / "meta" / "info.json").is_file():
        logger.info("demonstrations: using %s", root)
        return root
    env_config = environment(spec)
    env: Any = make_env(env_config.package_name, env_config.gym_id, env_config.gym_kwargs).unwrapped
    if not hasattr(env, "expert"):
        raise ConfigError(
            f'environment "{spec.type}" has no scripted expert; give dataset.repo_id or dataset.root instead'
        )
    rng = np.random.default_rng(config.seed)
    episodes: list[Episode] = []
    attempts = 0
    while len(episodes) < config.episodes:
        attempts += 1
        if attempts > 20 + 10 * config.episodes:
            raise ConfigError(
                f"the expert succeeded in {len(episodes)} of {attempts} attempts at noise {config.noise:g}; lower it, "
                "or allow longer episodes"
            )
        episode = demonstrate(env, config.noise, rng, seed=int(rng.integers(2**31)))
        if episode.succeeded:
            episodes.append(episode)
            on_episode(len(episodes))
    env.close()
    return write_dataset(episodes, root, fps=env_config.fps, repo_id=f"local/{root.name}", video=config.video)


def demonstrate(env: Any, noise: float, rng: np.random.Generator, *, seed: int) -> Episode:
    """One episode of the environment's expert."""
    observation, _ = env.reset(seed=seed)
    expert = env.expert(noise, rng)
    rows: list[tuple[Any, ...]] = []
    ended = False
    while not ended:
        action = expert.action()
        if action is None:
            break
        before = flat_observation(observation)
        observation, reward, terminated, truncated, info = env.step(action)
        rows.append((before, action, reward, info["is_success"], terminated))
        ended = terminated or truncated
    obs, action, reward, success, terminal = zip(*rows, strict=True)
    return Episode(
        obs={key: np.stack([one[key] for one in obs]) for key in obs[0]},
        action=np.stack(action).astype(np.float32),
        reward=np.array(reward, dtype=np.float32),
        success=np.array(success, dtype=bool),
        terminal=np.array(terminal, dtype=bool),
        task=env.task_description,
        seed=seed,
    )
