"""One environment that plays a whole chunk per step, checks what it returns and keeps its time limits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import batch_space

from poco_vla.errors import ConfigError, NonFiniteError
from poco_vla.rollout.workers import time_limit
from poco_vla.simulators.observations import ObservationReader
from poco_vla.simulators.suite import read_instruction

SUCCESS_KEYS = ("is_success", "success", "succeed")
"""Entries of `info` that tell success, the first that is there: LeRobot's, many simulators' own, gym-hil's."""
UNLIMITED = 2000
"""Control steps after which an episode is cut off where neither the environment nor `env.max_episode_steps` says."""


@dataclass(frozen=True)
class TimeLimits:
    """Time limits of an environment.

    Attributes:
        step: seconds of one control step; 0 sets no limit.
        reset: seconds of a reset, and of the first step after the start; 0 sets no limit.
        steps: control steps per episode; None takes twice what the environment declares, else `UNLIMITED`.
    """

    step: float = 0.0
    reset: float = 0.0
    steps: int | None = None


def read_success(info: Any, name: str) -> bool | None:
    """Return info["is_success"], else "success" or "succeed" (gym-hil); None if all are missing. NaN is no success.

    Raises:
        ConfigError: info is no dict, or the value is no truth value.
    """
    if not isinstance(info, Mapping):
        raise ConfigError(f'{name} returns {_shown(info)} as info; expected a dict, with "is_success" at the end')
    key = next((key for key in SUCCESS_KEYS if info.get(key) is not None), None)
    if key is None:
        return None
    value = info[key]
    number = _single(value, f'{name} returns info["{key}"]', "True or False")
    if number != number:
        return False
    if number not in (0, 1):
        raise ConfigError(f'{name} returns info["{key}"] = {_shown(value)}; expected True or False')
    return bool(number)


def _single(value: Any, what: str, expected: str) -> float:
    """Return the number in a scalar or an array of one element. Raises ConfigError for anything else."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        array = np.empty(0)
    if array.size != 1 or array.dtype.kind not in "buif":
        raise ConfigError(f"{what} = {_shown(value)}; expected {expected}")
    return float(array.reshape(()).item())


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def declared_limit(env: Any) -> int | None:
    """Return the control steps per episode that an environment declares; None if it declares none."""
    inner = getattr(env, "unwrapped", env)
    spec = getattr(env, "spec", None)
    for value in (
        getattr(spec, "max_episode_steps", None),
        *(getattr(inner, name, None) for name in ("_max_episode_steps", "max_episode_steps", "episode_length")),
    ):
        if isinstance(value, int | np.integer) and value > 0:
            return int(value)
    return None


class ChunkEnv(gym.Env):
    """Executes H actions open loop per step, and starts the next episode by itself.

    An observation holds the state to act on ("now") and every control step that the chunk brought, with LeRobot's
    keys. Episodes take their seeds from a plan: env i of n plays first + i, first + i + n, ... until `count` episodes
    of all n are done; afterwards it idles. A chunk of NaN leaves the environment as it is.

    `step` is `play` and `settle`: `EnvPool` calls these two one by one, so that an episode that has ended is not lost
    when the next reset fails.

    Args:
        env: the environment.
        horizon: H.
        index: i.
        num_envs: n.
        limits: of its steps, resets and episodes.
        name: of the environment, for messages; its own when None.
    """

    def __init__(
        self,
        env: gym.Env,
        horizon: int,
        index: int,
        num_envs: int,
        limits: TimeLimits | None = None,
        name: str | None = None,
    ) -> None:
        self.env = env
        self.index, self.num_envs, self.horizon = index, num_envs, horizon
        self.name = name or str(env)
        self.limits = limits or TimeLimits()
        self.declared = declared_limit(env)
        self.most_steps = self.limits.steps or (2 * self.declared if self.declared else UNLIMITED)
        self._reader = ObservationReader(env.observation_space, self.name)
        if not isinstance(env.action_space, gym.spaces.Box) or len(env.action_space.shape) != 1:
            raise ConfigError(f"{self.name} has the actions {env.action_space}; expected a Box of shape (dimensions,)")
        now = self._reader.space
        flags = gym.spaces.Box(0, 1, (horizon,), dtype=np.int8)
        self.observation_space = gym.spaces.Dict(
            {
                "now": now,
                "frames": batch_space(now, horizon),
                "reward": gym.spaces.Box(-np.inf, np.inf, (horizon,), dtype=np.float32),
                "success": flags,
                "terminal": flags,
                "length": gym.spaces.Box(0, horizon, (1,), dtype=np.int64),
                "ended": gym.spaces.Box(0, 1, (1,), dtype=np.int8),
                "idle": gym.spaces.Box(0, 1, (1,), dtype=np.int8),
                "seed": gym.spaces.Box(-1, np.iinfo(np.int64).max, (1,), dtype=np.int64),
            }
        )
        self.action_space = batch_space(env.action_space, horizon)
        self._reports_success = self._stepped = False
        self._ended = False
        self._taken = 0
        self._task = ""
        self.cut_off = 0

    @property
    def instruction(self) -> str:
        """Return the instruction of the present episode: LeRobot's `task_description`, or the task's name."""
        env = self.env
        while not (text := read_instruction(env)) and isinstance(env, gym.Wrapper):
            env = env.env
        return text

    def describe(self) -> dict[str, Any]:
        """Return the action dimension, the step limits and the tasks of the environment, with their instructions."""
        return {
            "action_dim": self.env.action_space.shape[-1],  # type: ignore[index]
            "declared": self.declared,
            "limit": self.most_steps,
            "tasks": list(getattr(self.env, "names", ())),
            "instructions": list(getattr(self.env, "instructions", ())),
        }

    def begin(self, first: int, end: int | None = None) -> dict[str, Any]:
        """Begin the episode of seed `first`; seeds of `end` and beyond are not played."""
        self._next, self._end = first, end
        self._begin_episode()
        return self.state()

    def play(self, action: np.ndarray) -> dict[str, Any]:
        """Execute a chunk up to the episode's end and return its control steps."""
        steps = _Steps(self._seed)
        if not self._idle and np.isfinite(action).all():
            for one in action:
                self._step(one, steps)
                if steps.ended:
                    break
        self._ended = steps.ended
        return steps.columns(self._now)

    def settle(self) -> dict[str, Any]:
        """Begin the next episode if one has ended, and return the state to act on."""
        if self._ended:
            self._begin_episode()
        return self.state()

    def state(self) -> dict[str, Any]:
        """Return the state to act on and its instruction, messages and flags."""
        return {
            "now": self._now,
            "idle": self._idle,
            "task": self._task,
            "reports_success": self._reports_success,
            "cut_off": self.cut_off,
            "converted": sorted(self._reader.converted.values()),
        }

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Begin episodes; `options`: ``first`` (one seed, or one per environment), ``count``."""
        options = options or {}
        first = options.get("first", 0)
        own = first[self.index] if isinstance(first, list) else first + self.index
        self.begin(own, first + options["count"] if options.get("count") is not None else None)
        return self._result(_Steps(-1).columns(self._now)), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        steps = self.play(action)
        self.settle()
        return self._result(steps), 0.0, False, False, {}

    def close(self) -> None:
        self.env.close()

    def _step(self, action: np.ndarray, steps: "_Steps") -> None:
        with time_limit(self.limits.step if self._stepped else max(self.limits.step, self.limits.reset)):
            answer = self.env.step(action)
        self._stepped = True
        if not isinstance(answer, tuple) or len(answer) != 5:
            raise ConfigError(
                f"{self.name} returns {_parts(answer)} from step; expected five (observation, reward, terminated, "
                "truncated, info), as Gymnasium has it"
            )
        observation, reward, terminated, truncated, info = answer
        success = read_success(info, self.name)
        self._reports_success = self._reports_success or success is not None
        ends = bool(_single(terminated, f"{self.name} returns terminated", "True or False"))
        cut = bool(_single(truncated, f"{self.name} returns truncated", "True or False"))
        worth = _single(reward, f"{self.name} returns the reward", "one number")
        now = self._reader.read(observation)
        if not np.isfinite(worth):
            raise NonFiniteError(f"{self.name} returned the reward {worth}")
        self._taken += 1
        too_long = not (ends or cut) and self._taken >= self.most_steps
        if success is None and (ends or cut or (too_long and not self._reports_success)):
            raise ConfigError(self._without_success(info))
        self.cut_off += too_long
        steps.add(self._now, worth, bool(success), ends)
        steps.ended = ends or cut or too_long
        self._now = now

    def _without_success(self, info: Mapping[str, Any]) -> str:
        others = [str(key) for key in info if "success" in str(key).lower()]
        found = f"; info has {others[0]!r}, which is not the name that they read" if others else ""
        return (
            f'{self.name} ends an episode without info["is_success"]; LeRobot and this library tell success by it'
            f"{found}"
        )

    def _begin_episode(self) -> None:
        self._idle = self._end is not None and self._next >= self._end
        self._seed = self._next
        self._ended = False
        if not self._idle:
            with time_limit(self.limits.reset):
                answer = self.env.reset(seed=self._next)
            if not isinstance(answer, tuple) or len(answer) != 2:
                raise ConfigError(
                    f"{self.name} returns {_parts(answer)} from reset; expected two (observation, info), as Gymnasium "
                    "has it"
                )
            self._now = self._reader.read(answer[0])
            self._taken, self._task = 0, self.instruction
            self._next += self.num_envs
        elif not hasattr(self, "_now"):
            sample = self._reader.space.sample()
            self._now = {key: np.asarray(value) for key, value in sample.items()}

    def _result(self, steps: dict[str, Any]) -> dict[str, Any]:
        """Return `steps` and the state to act on in the form of the observation space."""
        length = steps["length"]

        def padded(column: np.ndarray) -> np.ndarray:
            out = np.zeros(self.horizon, dtype=column.dtype)
            out[:length] = column
            return out

        rest = {key: np.repeat(column[None], self.horizon - length, axis=0) for key, column in self._now.items()}
        return {
            "now": self._now,
            "frames": {key: np.concatenate([steps["frames"][key], rest[key]]) for key in self._now},
            **{name: padded(steps[name]) for name in ("reward", "success", "terminal")},
            "length": np.array([length]),
            "ended": np.array([steps["ended"]], dtype=np.int8),
            "idle": np.array([self._idle], dtype=np.int8),
            "seed": np.array([steps["seed"]]),
        }


def _parts(answer: Any) -> str:
    return f"{len(answer)} values" if isinstance(answer, tuple | list) else f"a {type(answer).__name__}"


@dataclass
class _Steps:
    """Control steps of one chunk."""

    seed: int
    obs: list[dict[str, np.ndarray]] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    success: list[bool] = field(default_factory=list)
    terminal: list[bool] = field(default_factory=list)
    ended: bool = False

    def add(self, obs: dict[str, np.ndarray], reward: float, success: bool, terminal: bool) -> None:
        self.obs.append(obs)
        self.reward.append(reward)
        self.success.append(success)
        self.terminal.append(terminal)

    def columns(self, like: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return one array per column, observations in the types of `like`."""
        frames = {
            key: np.stack([one[key] for one in self.obs]) if self.obs else np.empty((0, *column.shape), column.dtype)
            for key, column in like.items()
        }
        return {
            "frames": frames,
            "reward": np.array(self.reward, dtype=np.float32),
            "success": np.array(self.success, dtype=np.int8),
            "terminal": np.array(self.terminal, dtype=np.int8),
            "length": len(self.obs),
            "ended": self.ended,
            "seed": self.seed,
        }
