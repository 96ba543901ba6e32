"""Offline data made on the spot, as a LeRobot dataset: demonstrations by a simulator's own scripted expert, recoveries
from disturbances, and play.

Attempt i draws all its random numbers from (seed, i): the same seed gives the same dataset with any number of worker
processes, and an interrupted collection goes on where it was.
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from filelock import FileLock

from poco_vla.config import DemonstrationConfig, EnvSpec
from poco_vla.data import Episode
from poco_vla.demonstrations.attempts import Attempts
from poco_vla.errors import ConfigError, DataError, NonFiniteError, SimulatorError
from poco_vla.recording.recorder import write_dataset
from poco_vla.rollout.chunk_env import UNLIMITED, TimeLimits, declared_limit, read_success
from poco_vla.rollout.workers import Failure, time_limit
from poco_vla.simulators import env_source, environment, name_of
from poco_vla.simulators.observations import ObservationReader, flat_observation
from poco_vla.simulators.suite import read_instruction

logger = logging.getLogger(__name__)
HOPELESS = 50
"""Attempts without one success after which an expert is given up."""
DISTURBANCE_STEPS = 10
"""Control steps of random actions before a recovery begins; with OGBench's arm up to half a metre."""


def demonstrations_root(spec: EnvSpec, config: DemonstrationConfig) -> Path:
    """Folder of the dataset: its name holds everything that decides its content."""
    options = "".join(f"_{name}-{_in_a_name(value)}" for name, value in sorted(spec.options.items()))
    made = f"{config.kind}_n{config.episodes}_noise{config.noise:g}_seed{config.seed}"
    if config.kind != "expert":
        made += f"_steps{config.steps}"
    if config.recovery:
        made += f"_recovery{config.recovery:g}"
    if spec.max_episode_steps is not None:
        made += f"_at_most{spec.max_episode_steps}"
    form = "" if config.video else "_png"
    # OGBench's tasks have names that no other simulator's have.
    kind = "" if spec.type == EnvSpec.type else f"{_in_a_name(spec.type)}_"
    return config.root / f"{kind}{_in_a_name(spec.task)}{options}_{made}{form}"


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
    """The dataset's folder, made first when it is not there yet. Failed attempts of an expert are not kept.

    An attempt in which the simulator fails (it raises, returns NaN, hangs, its process dies) is left out and said.

    Args:
        spec: environment; its Gymnasium class must offer ``expert(noise, rng)``, or ``play(kind, noise, steps, rng)``.
        config: what, how many, how noisy, from which seed.
        on_episode: told after each recorded episode.

    Raises:
        ConfigError: the environment has no such expert, or the expert fails too often at this noise.
        SimulatorError: the simulator fails `spec.max_failures` times in a row.
    """
    root = demonstrations_root(spec, config)
    if is_made(spec, config):
        logger.info("demonstrations: using %s", root)
        return root
    parts, lock = (root.with_name(f".{root.name}.{name}") for name in ("attempts", "lock"))
    source = env_source(spec)
    limits = TimeLimits(spec.step_timeout, spec.reset_timeout, spec.max_episode_steps)
    build = partial(Collector, source.make, limits, name_of(spec))
    workers, local = _num_workers(config), not needs_processes(spec, config)
    attempts = Attempts(build, workers, source.preload, limits, local=local)
    with closing(attempts):
        try:
            _refuse_without_expert(spec, config, attempts)
            # Runs of several seeds begin together and want the same dataset: one makes it, the others wait for it.
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                parts.mkdir(exist_ok=True)
                if not is_made(spec, config):
                    kept = _collect(spec, config, attempts, parts, on_episode)
                    write_dataset(
                        map(_read, kept),
                        root,
                        fps=environment(spec).fps,
                        repo_id=f"local/{root.name}",
                        video=config.video,
                    )
        finally:
            lock.unlink(missing_ok=True)
            if is_made(spec, config):
                shutil.rmtree(parts, ignore_errors=True)
    return root


def is_made(spec: EnvSpec, config: DemonstrationConfig) -> bool:
    """Return True if the demonstrations are on disk."""
    return (demonstrations_root(spec, config) / "meta" / "info.json").is_file()


def needs_processes(spec: EnvSpec, config: DemonstrationConfig) -> bool:
    """Return True if worker processes make the demonstrations, False if this process does."""
    return not spec.in_process or _num_workers(config) > 1


def _num_workers(config: DemonstrationConfig) -> int:
    return min(config.workers or _num_cores(), -(-config.episodes // 4))


def _collect(
    spec: EnvSpec, config: DemonstrationConfig, attempts: Attempts, parts: Path, on_episode: Callable[[int], None]
) -> list[Path]:
    """Files of the first `config.episodes` attempts that are kept; of a suite, of each task."""
    names: list[str] = attempts.first("tasks")
    left = dict.fromkeys(range(len(names)), config.episodes)  # attempts cycle over the tasks
    kept: list[Path] = []
    attempt, in_a_row, most = 0, 0, len(names) * (20 + 10 * config.episodes)
    hopeless = len(names) * HOPELESS
    for attempt, path in enumerate(attempts.made("attempt", config, parts), 1):
        if isinstance(path, Failure):
            in_a_row += 1
            _refuse_failure(spec, path, attempt - 1, in_a_row, first=not kept)
            continue
        in_a_row = 0
        with np.load(path, allow_pickle=False) as file:
            succeeded = bool(file["success"].any())
        task = (attempt - 1) % len(names)
        if (config.kind != "expert" or succeeded) and left[task]:
            left[task] -= 1
            kept.append(path)
            on_episode(len(kept))
        if not any(left.values()):
            return kept
        if attempt == (most if kept else min(most, hopeless)):
            break
    shutil.rmtree(parts)
    lacking = [names[task] for task, number in left.items() if number]
    raise ConfigError(
        f"the expert succeeded in {len(kept)} of {attempt} attempts at noise {config.noise:g}; lower it, or allow "
        "longer episodes" + (f" (too few of {', '.join(lacking)})" if len(names) > 1 else "")
    )


def _refuse_failure(spec: EnvSpec, failure: Failure, attempt: int, in_a_row: int, *, first: bool) -> None:
    """Say that the simulator failed in an attempt; raise where that is a rule that it breaks, or happens again and
    again."""
    name = name_of(spec)
    words = failure.words
    if failure.kind == "timeout":
        words += f" (env.step_timeout {spec.step_timeout:g} s, env.reset_timeout {spec.reset_timeout:g} s)"
    if failure.kind == "contract" and first:
        raise ConfigError(words) from failure.cause()
    if in_a_row >= spec.max_failures:
        raise SimulatorError(
            f"{name} failed in {in_a_row} demonstrations in a row (env.max_failures); the last time: {words}"
        ) from failure.cause()
    logger.warning("%s: demonstration %d is left out: %s", name, attempt, words)


def demonstrate(
    env: Any,
    noise: float,
    rng: np.random.Generator,
    *,
    seed: int,
    disturb_at: int = 0,
    limits: TimeLimits | None = None,
    name: str = "",
) -> Episode:
    """One episode of the environment's expert.

    With `disturb_at` the expert is interrupted after that many steps by `DISTURBANCE_STEPS` random actions; the episode
    that is given back begins after them. It shows how to recover (DAgger, arXiv 1011.0686), and none of its actions is
    one that nobody should imitate.

    Args:
        env: the environment, unwrapped.
        noise: of the expert.
        rng: draws all that is random but the environment.
        seed: of the environment.
        disturb_at: steps before the disturbance; 0 disturbs nothing.
        limits: of its steps and episodes.
        name: of the environment, for messages.
    """
    limits, name = limits or TimeLimits(), name or str(env)
    space = getattr(env, "observation_space", None)
    read = ObservationReader(space, name).read if space is not None else flat_observation
    most = limits.steps or declared_limit(env) or UNLIMITED
    observation, _ = env.reset(seed=seed)
    if disturb_at:
        observation = _disturb(env, noise, rng, disturb_at, observation)
    expert = env.expert(noise, rng)
    rows: list[tuple[Any, ...]] = []
    before, ended = read(observation), False
    while not ended and len(rows) < most:
        with time_limit(limits.step):
            action = expert.action()
        if action is None:
            break
        if not np.isfinite(action).all():
            raise NonFiniteError(f"the expert of {name} gave a non-finite action at step {len(rows)} from seed {seed}")
        observation, reward, terminated, truncated, info = env.step(action)
        ended = bool(terminated or truncated)
        success = read_success(info, name)
        if success is None:
            raise ConfigError(f'{name} returns info without "is_success"; a demonstration is told a success by it')
        if not np.isfinite(reward):
            raise NonFiniteError(f"{name} returned the reward {reward} at step {len(rows)} from seed {seed}")
        rows.append((before, action, reward, success, bool(terminated)))
        before = read(observation)
    if not rows:
        raise DataError(f"the expert had nothing to do in {read_instruction(env)!r} from seed {seed}")
    obs, action, reward, success, terminal = zip(*rows, strict=True)
    return Episode(
        obs={key: np.stack([one[key] for one in obs]) for key in obs[0]},
        action=np.stack(action).astype(np.float32),
        reward=np.array(reward, dtype=np.float32),
        success=np.array(success, dtype=bool),
        terminal=np.array(terminal, dtype=bool),
        task=read_instruction(env),
        seed=seed,
    )


def _disturb(env: Any, noise: float, rng: np.random.Generator, steps: int, observation: Any) -> Any:
    """Begin as the expert does, then let go; the observation after that. What has ended meanwhile begins anew."""
    expert = env.expert(noise, rng)
    # One direction for all steps: opposite random steps would cancel out.
    push = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
    for k in range(steps + DISTURBANCE_STEPS):
        action = expert.action() if k < steps else push
        if action is None:
            break
        observation, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            observation, _ = env.reset(seed=int(rng.integers(2**31)))
            break
    return observation


def _num_cores() -> int:
    """Cores that this process may use: a container's share, not the whole machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Collector:
    """The environment of a process that collects demonstrations."""

    def __init__(self, make: Callable[[], gym.Env], limits: TimeLimits, name: str) -> None:
        wrapped = make()
        # A limit that a wrapper keeps is none of the environment inside, which alone has an expert.
        self.limits = replace(limits, steps=limits.steps or declared_limit(wrapped))
        self.name = name
        self.env: Any = wrapped.unwrapped
        # On the instance, so that an expert's own steps are limited as well.
        self.env.step = _limited(self.env.step, limits.step)
        self.env.reset = _limited(self.env.reset, limits.reset)

    def tasks(self) -> list[str]:
        """List the names of the tasks that attempts cycle over: one without a name for a single task."""
        return list(getattr(self.env, "names", ())) or [""]

    def offers(self, method: str) -> bool:
        """Return True if the environment has this method."""
        return hasattr(self.env, method)

    def attempt(self, config: DemonstrationConfig, parts: Path, attempt: int) -> Path:
        """Return the file of an attempt's episode, made unless an earlier run did."""
        path = parts / f"{attempt:07d}.npz"
        if path.is_file():
            return path
        rng = np.random.default_rng([config.seed, attempt])
        if config.kind == "expert":
            known = {"limits": self.limits, "name": self.name}
            episode = demonstrate(self.env, config.noise, rng, seed=self._seed(rng, attempt), **known)
            if rng.random() < config.recovery:
                moment = int(rng.integers(1, max(2, len(episode))))
                seed = self._seed(rng, attempt)
                episode = demonstrate(self.env, config.noise, rng, seed=seed, disturb_at=moment, **known)
        else:
            episode = self.env.play(config.kind, config.noise, config.steps, rng)
            episode.check(f"play data of {self.name}")
        partial_path = path.with_name(f".{path.name}.{os.getpid()}")
        columns: dict[str, Any] = {name: getattr(episode, name) for name in ("action", "reward", "success", "terminal")}
        columns |= episode.obs
        with partial_path.open("wb") as file:
            np.savez(file, task=np.array(episode.task), **columns)
        partial_path.rename(path)
        return path

    def close(self) -> None:
        self.env.close()

    def _seed(self, rng: np.random.Generator, attempt: int) -> int:
        """Draw the seed of an episode; of a suite one that chooses the attempt's task."""
        drawn, tasks = int(rng.integers(2**31)), len(self.tasks())
        return drawn - drawn % tasks + attempt % tasks


def _limited(act: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def limited(*args: Any, **options: Any) -> Any:
        with time_limit(seconds):
            return act(*args, **options)

    return limited


def _read(path: Path) -> Episode:
    with np.load(path, allow_pickle=False) as file:
        columns = {name: file[name] for name in file.files}
    task = str(columns.pop("task"))
    obs = {name: columns.pop(name) for name in list(columns) if name.startswith("observation.")}
    return Episode(obs, **columns, task=task)


def _refuse_without_expert(spec: EnvSpec, config: DemonstrationConfig, attempts: Attempts) -> None:
    needed, what = ("expert", "scripted expert") if config.kind == "expert" else ("play", "play data")
    offered = attempts.first("offers", needed)
    if isinstance(offered, Failure):
        words = offered.words if offered.kind == "contract" else f"{name_of(spec)} cannot be made: {offered.words}"
        raise ConfigError(words) from offered.cause()
    if not offered:
        raise ConfigError(f'environment "{spec.type}" has no {what}; give dataset.repo_id or dataset.root instead')
