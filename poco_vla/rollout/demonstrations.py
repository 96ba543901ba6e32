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
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from poco_vla.config import DemonstrationConfig, EnvSpec
from poco_vla.data import Episode
from poco_vla.errors import ConfigError, DataError
from poco_vla.rollout.environments import environment
from poco_vla.rollout.pool import flat_observation, ignore_interrupts_in_workers, make_env, worker_context
from poco_vla.rollout.recorder import write_dataset

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
    form = "" if config.video else "_png"
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
    """The dataset's folder, made first when it is not there yet. Failed attempts of an expert are not kept.

    Args:
        spec: environment; its Gymnasium class must offer ``expert(noise, rng)``, or ``play(kind, noise, steps, rng)``.
        config: what, how many, how noisy, from which seed.
        on_episode: told after each recorded episode.

    Raises:
        ConfigError: the environment has no such expert, or the expert fails too often at this noise.
    """
    root = demonstrations_root(spec, config)
    if (root / "meta" / "info.json").is_file():
        logger.info("demonstrations: using %s", root)
        return root
    parts, lock = (root.with_name(f".{root.name}.{name}") for name in ("attempts", "lock"))
    env = environment(spec)
    try:
        _open_env(env.package_name, env.gym_id, env.gym_kwargs)
        _refuse_without_expert(spec, config)
        # Runs of several seeds begin together and want the same dataset: one makes it, the others wait for it.
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            parts.mkdir(exist_ok=True)
            if not (root / "meta" / "info.json").is_file():
                kept = _collect(env, config, parts, on_episode)
                write_dataset(map(_read, kept), root, fps=env.fps, repo_id=f"local/{root.name}", video=config.video)
    finally:
        _close_env()
        lock.unlink(missing_ok=True)
        if (root / "meta" / "info.json").is_file():
            shutil.rmtree(parts, ignore_errors=True)
    return root


def _collect(env: Any, config: DemonstrationConfig, parts: Path, on_episode: Callable[[int], None]) -> list[Path]:
    """Files of the first `config.episodes` attempts that are kept."""
    kept: list[Path] = []
    attempt, most = 0, 20 + 10 * config.episodes
    with closing(_attempts(env, config, parts)) as attempts:
        for attempt, path in enumerate(attempts, 1):
            with np.load(path, allow_pickle=False) as file:
                succeeded = bool(file["success"].any())
            if config.kind != "expert" or succeeded:
                kept.append(path)
                on_episode(len(kept))
            if len(kept) == config.episodes:
                return kept
            if attempt == (most if kept else min(most, HOPELESS)):
                break
    shutil.rmtree(parts)
    raise ConfigError(
        f"the expert succeeded in {len(kept)} of {attempt} attempts at noise {config.noise:g}; lower it, or allow "
        "longer episodes"
    )


def demonstrate(env: Any, noise: float, rng: np.random.Generator, *, seed: int, disturb_at: int = 0) -> Episode:
    """One episode of the environment's expert.

    With `disturb_at` the expert is interrupted after that many steps by `DISTURBANCE_STEPS` random actions; the episode
    that is given back begins after them. It shows how to recover (DAgger, arXiv 1011.0686), and none of its actions is
    one that nobody should imitate.
    """
    observation, _ = env.reset(seed=seed)
    if disturb_at:
        observation = _disturb(env, noise, rng, disturb_at, observation)
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
    if not rows:
        raise DataError(f"the expert had nothing to do in {env.task_description!r} from seed {seed}")
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


def _attempts(env: Any, config: DemonstrationConfig, parts: Path) -> Generator[Path]:
    """The file of each attempt's episode, in order, without end."""
    workers = min(config.workers or _num_cores(), -(-config.episodes // 4))
    if workers <= 1:
        yield from (_attempt(config, parts, attempt) for attempt in count())
    context = worker_context(getattr(env, "preload", ()))
    which = (env.package_name, env.gym_id, env.gym_kwargs)  # not the LeRobot config, whose import takes seconds
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_open_env, initargs=which)
    try:
        waiting: deque[Future[Path]] = deque()
        for attempt in count():
            waiting.append(executor.submit(_attempt, config, parts, attempt))
            if len(waiting) == 3 * workers:
                yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _num_cores() -> int:
    """Cores that this process may use: a container's share, not the whole machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_env: Any = None
"""The environment of this process."""


def _open_env(package: str, gym_id: str, kwargs: Mapping[str, Any]) -> None:
    global _env
    ignore_interrupts_in_workers()
    _env = make_env(package, gym_id, kwargs).unwrapped


def _close_env() -> None:
    global _env
    if _env is not None:
        _env.close()
    _env = None


def _attempt(config: DemonstrationConfig, parts: Path, attempt: int) -> Path:
    """The file of an attempt's episode, made unless an earlier run did."""
    path = parts / f"{attempt:07d}.npz"
    if path.is_file():
        return path
    rng = np.random.default_rng([config.seed, attempt])
    if config.kind == "expert":
        episode = demonstrate(_env, config.noise, rng, seed=int(rng.integers(2**31)))
        if rng.random() < config.recovery:
            moment = int(rng.integers(1, max(2, len(episode))))
            episode = demonstrate(_env, config.noise, rng, seed=int(rng.integers(2**31)), disturb_at=moment)
    else:
        episode = _env.play(config.kind, config.noise, config.steps, rng)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    columns: dict[str, Any] = {name: getattr(episode, name) for name in ("action", "reward", "success", "terminal")}
    columns |= episode.obs
    with partial.open("wb") as file:
        np.savez(file, task=np.array(episode.task), **columns)
    partial.rename(path)
    return path


def _read(path: Path) -> Episode:
    with np.load(path, allow_pickle=False) as file:
        columns = {name: file[name] for name in file.files}
    task = str(columns.pop("task"))
    obs = {name: columns.pop(name) for name in list(columns) if name.startswith("observation.")}
    return Episode(obs, **columns, task=task)


def _refuse_without_expert(spec: EnvSpec, config: DemonstrationConfig) -> None:
    needed, what = ("expert", "scripted expert") if config.kind == "expert" else ("play", "play data")
    if not hasattr(_env, needed):
        raise ConfigError(f'environment "{spec.type}" has no {what}; give dataset.repo_id or dataset.root instead')
