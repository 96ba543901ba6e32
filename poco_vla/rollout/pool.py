"""Environments side by side, stepped a whole chunk at a time, in worker processes while the learner learns."""

import multiprocessing
import multiprocessing.context
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space

from poco_vla.config import EnvSpec
from poco_vla.data import Episode
from poco_vla.errors import ConfigError
from poco_vla.rollout.environments import environment


class ChunkEnv(gym.Env):
    """Executes H actions open loop per step, and starts the next episode by itself.

    An observation holds the state to act on ("now") and every control step that the chunk brought, with LeRobot's
    keys. Episodes take their seeds from a plan: env i of n plays first + i, first + i + n, ... until `count` episodes
    of all n are done; afterwards it idles. A chunk of NaN leaves the environment as it is.
    """

    def __init__(self, env: gym.Env, horizon: int, index: int, num_envs: int) -> None:
        self.env = env
        self.index, self.num_envs, self.horizon = index, num_envs, horizon
        now = gym.spaces.Dict({lerobot_key(k): _stored(v) for k, v in _leaves(env.observation_space).items()})
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

    @property
    def instruction(self) -> str:
        """What the robot is told to do: LeRobot's `task_description`, or the task's name."""
        inner = self.env.unwrapped
        return str(getattr(inner, "task_description", getattr(inner, "task", "")))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """`options`: ``first`` (one seed, or one per environment), ``count``."""
        options = options or {}
        first = options.get("first", 0)
        self._next = first[self.index] if isinstance(first, list) else first + self.index
        self._end = first + options["count"] if options.get("count") is not None else None
        self._begin_episode()
        return self._result(_Steps(self.horizon)), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        steps = _Steps(self.horizon, seed=self._seed)
        if not self._idle and np.isfinite(action).all():
            for one in action:
                observation, reward, terminated, truncated, info = self.env.step(one)
                steps.add(self._now, float(reward), bool(info.get("is_success", False)), terminated)
                self._now = flat_observation(observation)
                if terminated or truncated:
                    if "is_success" not in info:
                        raise ConfigError(
                            f'{self.env} ends an episode without info["is_success"]; LeRobot and this library tell '
                            "success by it"
                        )
                    steps.ended = True
                    self._begin_episode()
                    break
        return self._result(steps), 0.0, False, False, {}

    def close(self) -> None:
        self.env.close()

    def _begin_episode(self) -> None:
        self._idle = self._end is not None and self._next >= self._end
        self._seed = self._next
        if not self._idle:
            observation, _ = self.env.reset(seed=self._next)
            self._now = flat_observation(observation)
            self._next += self.num_envs
        elif not hasattr(self, "_now"):
            self._now = flat_observation(self.env.observation_space.sample())

    def _result(self, steps: "_Steps") -> dict[str, Any]:
        def padded(values: list[Any], dtype: Any) -> np.ndarray:
            out = np.zeros(self.horizon, dtype=dtype)
            out[: len(values)] = values
            return out

        frames = steps.obs + [self._now] * (self.horizon - len(steps.obs))
        return {
            "now": self._now,
            "frames": {key: np.stack([frame[key] for frame in frames]) for key in self._now},
            "reward": padded(steps.reward, np.float32),
            "success": padded(steps.success, np.int8),
            "terminal": padded(steps.terminal, np.int8),
            "length": np.array([len(steps.obs)]),
            "ended": np.array([steps.ended], dtype=np.int8),
            "idle": np.array([self._idle], dtype=np.int8),
            "seed": np.array([steps.seed]),
        }


@dataclass
class _Steps:
    """Control steps that one chunk brought."""

    horizon: int
    seed: int = -1
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


@dataclass
class _Running:
    """The episode that an environment is in: its seed, the chunks sent so far and the weights' version that chose each,
    the steps they brought."""

    seed: int
    chunks: list[np.ndarray] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


class EnvPool:
    """`num_envs` environments of one kind.

    The two halves of a round are apart so that the learner can work in between: `send` chunks, learn, `receive`.

    Args:
        spec: which environment, how many.
        horizon: H, control steps per chunk.
        stride: from an environment's seed to its next one: of several pools that share a plan, the environments of all;
            `num_envs` when None.
    """

    def __init__(self, spec: EnvSpec, horizon: int, stride: int | None = None) -> None:
        config = environment(spec)
        self.num_envs = spec.num_envs
        self.stride = stride or spec.num_envs
        self.horizon = horizon
        self.fps: int = config.fps
        make = partial(_make_chunk_env, config.package_name, config.gym_id, config.gym_kwargs, horizon)
        makers = [partial(make, index, self.stride) for index in range(spec.num_envs)]
        self._envs = _vectorise(makers, getattr(config, "preload", ()), in_process=spec.in_process)
        self._chunks: np.ndarray | None = None
        self._versions = [0] * spec.num_envs
        space = self._envs.single_action_space
        assert isinstance(space, gym.spaces.Box)
        self.action_dim = space.shape[-1]
        self.tasks = _instructions(self._envs)

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self, first_seed: int | list[int], count: int | None = None) -> None:
        """Begin episodes with seeds first_seed, first_seed + 1, ...: `count` of them, or without end. Without end, each
        environment may be given a first seed of its own."""
        self._begin({"first": first_seed, "count": count})

    @property
    def obs(self) -> dict[str, np.ndarray]:
        """LeRobot key -> [num_envs, ...]: the states to act on."""
        return self._last["now"]

    @property
    def idle(self) -> np.ndarray:
        """[num_envs] bool: environments that have played all their episodes."""
        return self._last["idle"][:, 0].astype(bool)

    @property
    def steps_in_flight(self) -> int:
        """Control steps of episodes that have not ended yet."""
        return sum(len(row["reward"]) for running in self._running for row in running.rows)

    def send(self, chunks: np.ndarray, version: int = 0) -> None:
        """Start executing one chunk [num_envs, H, action_dim] in each environment, in the robot's units.

        `version` is that of the weights that chose them, to be noted with the steps.
        """
        self._versions = [version] * self.num_envs
        self._chunks = np.ascontiguousarray(chunks, dtype=np.float32)
        if isinstance(self._envs, AsyncVectorEnv):
            self._envs.step_async(self._chunks)

    def receive(self) -> tuple[list[Episode], int]:
        """Wait for the chunks; give the episodes that ended, and the number of control steps taken."""
        assert self._chunks is not None, "receive() without send()"
        envs = self._envs
        result = envs.step_wait() if isinstance(envs, AsyncVectorEnv) else envs.step(self._chunks)
        chunks, self._chunks = self._chunks, None
        self._last = _copied(result[0])
        return self._collect(chunks), int(self._last["length"].sum())

    def step(self, chunks: np.ndarray, version: int = 0) -> tuple[list[Episode], int]:
        """`send` and `receive`."""
        self.send(chunks, version)
        return self.receive()

    def state(self) -> dict[str, Any]:
        """What `restore` needs to bring the running episodes back: their seeds, and the chunks sent so far with their
        weights' versions."""
        empty = np.zeros((0, self.horizon, self.action_dim), dtype=np.float32)
        return {
            "seeds": [running.seed for running in self._running],
            "chunks": [np.stack(running.chunks) if running.chunks else empty for running in self._running],
            "versions": [list(running.versions) for running in self._running],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Replay the running episodes of a checkpoint: same seeds, same chunks, hence the same states."""
        self._begin({"first": list(state["seeds"])})
        for k in range(max(len(chunks) for chunks in state["chunks"])):
            nothing = np.full((self.horizon, self.action_dim), np.nan, dtype=np.float32)
            self.send(np.stack([chunks[k] if k < len(chunks) else nothing for chunks in state["chunks"]]))
            self._versions = [versions[k] if k < len(versions) else 0 for versions in state["versions"]]
            self.receive()

    def close(self) -> None:
        self._envs.close()

    def _begin(self, options: dict[str, Any]) -> None:
        observation, _ = self._envs.reset(options=options)
        self._last = _copied(observation)
        first = options["first"]
        seeds = first if isinstance(first, list) else [first + i for i in range(self.num_envs)]
        self._running = [_Running(seed) for seed in seeds]

    def _collect(self, chunks: np.ndarray) -> list[Episode]:
        finished = []
        for i, running in enumerate(self._running):
            length = int(self._last["length"][i, 0])
            if length == 0:
                continue
            running.chunks.append(chunks[i])
            running.versions.append(self._versions[i])
            frames = {key: column[i, :length] for key, column in self._last["frames"].items()}
            signals = {name: self._last[name][i, :length] for name in ("reward", "success", "terminal")}
            version = np.full(length, self._versions[i], dtype=np.int64)
            running.rows.append(frames | signals | {"action": chunks[i, :length], "version": version})
            if self._last["ended"][i, 0]:
                finished.append(_episode(running, self.tasks[i]))
                self._running[i] = _Running(running.seed + self.stride)
        return finished


def _episode(running: _Running, task: str) -> Episode:
    columns = {key: np.concatenate([row[key] for row in running.rows]) for key in running.rows[0]}
    return Episode(
        obs={key: column for key, column in columns.items() if key.startswith("observation.")},
        action=columns["action"],
        reward=columns["reward"],
        success=columns["success"].astype(bool),
        terminal=columns["terminal"].astype(bool),
        task=task,
        seed=running.seed,
        policy_version=columns["version"],
        interventions=np.zeros(len(columns["action"]), dtype=bool),
    )


def lerobot_key(name: str) -> str:
    """LeRobot's name of a Gymnasium observation, as lerobot.envs.utils.preprocess_observation has it."""
    if name == "pixels":
        return "observation.image"
    if name.startswith("pixels."):
        return f"observation.images.{name.removeprefix('pixels.')}"
    return {"agent_pos": "observation.state"}.get(name, f"observation.{name}")


def flat_observation(observation: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """An environment's observation under LeRobot's names, pictures of several cameras each under its own."""
    out: dict[str, np.ndarray] = {}
    for name, value in observation.items():
        if isinstance(value, Mapping):
            out |= {lerobot_key(f"{name}.{k}"): _column(v) for k, v in value.items()}
        else:
            out[lerobot_key(name)] = _column(value)
    return out


def make_env(package: str, gym_id: str, kwargs: Mapping[str, Any]) -> gym.Env:
    """One environment by its Gymnasium id, its package imported when the id is not registered yet."""
    if gym_id not in gym.registry:
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f'the environment "{gym_id}" needs the package {package}, which is not installed'
            ) from error
    return gym.make(gym_id, disable_env_checker=True, **kwargs)


def _make_chunk_env(
    package: str, gym_id: str, kwargs: Mapping[str, Any], horizon: int, index: int, num_envs: int
) -> ChunkEnv:
    ignore_interrupts_in_workers()
    return ChunkEnv(make_env(package, gym_id, kwargs), horizon, index, num_envs)


def _vectorise(makers: list[Any], preload: Sequence[str], *, in_process: bool) -> VectorEnv:
    if in_process:
        return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED, copy=True)
    context = worker_context(preload).get_start_method()
    return AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED, context=context, copy=True)


def ignore_interrupts_in_workers() -> None:
    """Ctrl-C goes to the whole process group; the process that started the workers decides when they stop."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def worker_context(preload: Sequence[str]) -> multiprocessing.context.BaseContext:
    """Where workers come from: forked from a clean process that has imported all they need once, never the learner."""
    multiprocessing.set_forkserver_preload(["__main__", __name__, *preload])
    return multiprocessing.get_context("forkserver")


def _instructions(envs: VectorEnv) -> list[str]:
    return [str(text) for text in envs.call("instruction")]  # type: ignore[attr-defined]


def _leaves(space: gym.Space) -> dict[str, gym.Space]:
    if not isinstance(space, gym.spaces.Dict):
        raise ConfigError(
            f"the environment's observations are a {space}, expected a Dict with LeRobot's names (agent_pos, ...)"
        )
    out: dict[str, gym.Space] = {}
    for name, value in space.items():
        out |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, gym.spaces.Dict) else {name: value}
    return out


def _column(value: Any) -> np.ndarray:
    """A copy, floating-point numbers as float32: what datasets store and networks read."""
    array = np.array(value)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _stored(space: gym.Space) -> gym.Space:
    """The space of :func:`_column`'s results."""
    if isinstance(space, gym.spaces.Box) and space.dtype.kind == "f":
        return gym.spaces.Box(-np.inf, np.inf, space.shape, dtype=np.float32)
    return space


def _copied(observation: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copied(v) if isinstance(v, Mapping) else np.array(v) for k, v in observation.items()}
