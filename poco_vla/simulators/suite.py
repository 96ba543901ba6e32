"""Several tasks as one environment, and LeRobot's processors around one."""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from poco_vla.errors import ConfigError
from poco_vla.simulators.observations import as_picture, is_picture_key

TASK_KEY = "environment_state"
"""Observation that holds the task as a one-hot vector, behind what the environment itself has there."""


def read_instruction(env: Any) -> str:
    """Return the instruction of an environment as it is now: LeRobot's `task_description`, else `task`, else ""."""
    for name in ("task_description", "task"):
        text = getattr(env, name, None)
        if isinstance(text, str) and text:
            return text
    return ""


class TaskSuite(gym.Env):
    """Tasks with one observation and action space. Episode seeds choose the task: that of seed s is s modulo their
    number, so that consecutive seeds cycle over the tasks.

    Of several tasks, the observation has the task as a one-hot vector (`TASK_KEY`): policies without an instruction
    read it. Where an environment begins from a list of states (LIBERO's `init_state_id`), that of seed s is
    s // number of tasks.

    Args:
        envs: one per task.
        names: of the tasks.
        limits: control steps after which each truncates by itself; None leaves that to the environment.

    Raises:
        ConfigError: a task's space differs from the first one's.
    """

    def __init__(self, envs: Sequence[gym.Env], names: Sequence[str], limits: Sequence[int | None] = ()) -> None:
        self.envs, self.names = list(envs), list(names)
        self.limits = list(limits) or [None] * len(envs)
        self.current, self._taken = 0, 0
        first = self.envs[0]
        for name, env in zip(self.names[1:], self.envs[1:], strict=True):
            for what in ("action_space", "observation_space"):
                mine, other = getattr(env, what), getattr(first, what)
                if mine.shape != other.shape or (what == "observation_space" and not _alike(mine, other)):
                    raise ConfigError(
                        f'the tasks of a suite must be alike: "{name}" has the {what.replace("_", " ")} {mine}, '
                        f'"{self.names[0]}" has {other}'
                    )
        self.action_space = first.action_space
        self.observation_space = self._with_task_space(first.observation_space)
        known = [limit or _declared(env) for limit, env in zip(self.limits, self.envs, strict=True)]
        known = [limit for limit in known if limit]
        if known:
            self._max_episode_steps = max(known)

    @property
    def env(self) -> Any:
        """Return the environment of the present episode's task."""
        return self.envs[self.current]

    @property
    def task_description(self) -> str:
        """Return the present episode's instruction."""
        return read_instruction(self.env.unwrapped) or self.names[self.current]

    @property
    def instructions(self) -> list[str]:
        """List the instruction of each task, as far as it is known before an episode begins."""
        return [read_instruction(env.unwrapped) for env in self.envs]

    def task_of(self, seed: int) -> int:
        """Return the index of the task that a seed's episode plays."""
        return seed % len(self.envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        number = 0 if seed is None else seed
        self.current, self._taken = self.task_of(number), 0
        inner = self.env.unwrapped
        if hasattr(inner, "init_state_id"):
            inner.init_state_id = number // len(self.envs)
        observation, info = self.env.reset(seed=seed)
        return self._with_task(observation), info

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, Any]:
        answer = self.env.step(action)
        if not isinstance(answer, tuple) or len(answer) != 5:
            return answer  # whoever asked names what is wrong with it
        observation, reward, terminated, truncated, info = answer
        self._taken += 1
        limit = self.limits[self.current]
        if limit is not None and self._taken >= limit and not terminated:
            truncated = True
        return self._with_task(observation), reward, terminated, truncated, info

    def render(self) -> Any:
        return self.env.render()

    def close(self) -> None:
        for env in self.envs:
            env.close()

    def __getattr__(self, name: str) -> Any:
        """Offer what the present task's environment offers beyond Gymnasium's interface, such as an expert."""
        if name.startswith("_") or name == "envs":
            raise AttributeError(name)
        return getattr(self.env.unwrapped, name)

    def _with_task_space(self, space: gym.Space) -> gym.Space:
        if len(self.envs) == 1 or not isinstance(space, gym.spaces.Dict):
            return space
        own = space.spaces.get(TASK_KEY)
        size = len(self.envs) + (own.shape[0] if own is not None and own.shape else 0)
        return gym.spaces.Dict(dict(space.spaces) | {TASK_KEY: gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)})

    def _with_task(self, observation: Any) -> Any:
        if len(self.envs) == 1 or not isinstance(observation, Mapping):
            return observation
        which = np.zeros(len(self.envs), dtype=np.float32)
        which[self.current] = 1
        own = observation.get(TASK_KEY)
        return {**observation, TASK_KEY: which if own is None else np.concatenate([own, which]).astype(np.float32)}


def _declared(env: gym.Env) -> int | None:
    """Return the control steps after which an environment truncates by itself, as it says."""
    return getattr(env.spec, "max_episode_steps", None) or getattr(env.unwrapped, "_max_episode_steps", None)


def _alike(one: gym.Space, other: gym.Space) -> bool:
    """Return True for observation spaces with the same entries of the same shapes."""
    if isinstance(one, gym.spaces.Dict) and isinstance(other, gym.spaces.Dict):
        return one.spaces.keys() == other.spaces.keys() and all(
            _alike(one.spaces[key], other.spaces[key]) for key in one.spaces
        )
    return type(one) is type(other) and one.shape == other.shape


class ProcessedEnv(gym.Env):
    """An environment behind LeRobot's environment processors: observations have LeRobot's keys, as its policies read
    them, without the batch axis and with pictures as uint8 [height, width, 3].

    Args:
        env: the environment.
        observations: LeRobot's processor of observations.
        actions: its processor of actions.
    """

    def __init__(self, env: gym.Env, observations: Any, actions: Any) -> None:
        self.env, self._observations, self._actions = env, observations, actions
        self.action_space = env.action_space
        example = self._processed(_zeros(env.observation_space))
        self.observation_space = gym.spaces.Dict({key: _box(key, value) for key, value in example.items()})

    @property
    def unwrapped(self) -> Any:
        return self.env.unwrapped

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        observation, info = self.env.reset(seed=seed)
        return self._processed(observation), info

    def step(self, action: np.ndarray) -> tuple[dict, Any, Any, Any, Any]:
        if self._actions.steps:
            import torch
            from lerobot.utils.constants import ACTION

            batch = {ACTION: torch.as_tensor(np.asarray(action))[None]}
            action = self._actions(batch)[ACTION][0].cpu().numpy()
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._processed(observation), reward, terminated, truncated, info

    def render(self) -> Any:
        return self.env.render()

    def close(self) -> None:
        self.env.close()

    def _processed(self, observation: Mapping[str, Any]) -> dict[str, np.ndarray]:
        from lerobot.envs.utils import preprocess_observation

        found = self._observations(preprocess_observation(_batched(observation)))
        return {key: _unbatched(key, value) for key, value in found.items() if hasattr(value, "numpy")}


def _zeros(space: gym.Space) -> Any:
    """Return an observation of a space, all zeros."""
    if isinstance(space, gym.spaces.Dict):
        return {key: _zeros(value) for key, value in space.spaces.items()}
    return np.zeros(space.shape or (), dtype=space.dtype)


def _batched(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _batched(inner) for key, inner in value.items()}
    return np.ascontiguousarray(value)[None]


def _unbatched(key: str, value: Any) -> np.ndarray:
    array = value.numpy()[0]
    if is_picture_key(key):
        return as_picture(np.rint(array.transpose(1, 2, 0) * 255).astype(np.uint8))
    return array.astype(np.float32)


def _box(key: str, example: np.ndarray) -> gym.spaces.Box:
    if is_picture_key(key):
        return gym.spaces.Box(0, 255, example.shape, dtype=np.uint8)
    return gym.spaces.Box(-np.inf, np.inf, example.shape, dtype=np.float32)
