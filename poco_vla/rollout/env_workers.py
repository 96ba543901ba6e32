"""Processes that hold one environment each, and how an environment is made."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import gymnasium as gym

from poco_vla.errors import ConfigError
from poco_vla.rollout.chunk_env import ChunkEnv, TimeLimits
from poco_vla.rollout.workers import LocalWorker, Worker, close_all, worker_context
from poco_vla.simulators.supported import install_command


class Environments:
    """Workers of one kind, each with a :class:`ChunkEnv`.

    Args:
        make: makes the i-th environment.
        count: how many.
        preload: modules that a worker server imports once, for all its workers.
        limits: time limits of each.
        in_process: no workers; everything in this process.
    """

    def __init__(
        self,
        make: Callable[[int], ChunkEnv],
        count: int,
        preload: Iterable[str],
        limits: TimeLimits,
        *,
        in_process: bool,
    ) -> None:
        self._make, self.limits = make, limits
        self._context = None if in_process else worker_context(tuple(preload))
        self.workers: list[Worker | LocalWorker] = []
        try:
            for index in range(count):
                self.workers.append(self._started(index))
        except BaseException:
            self.close()
            raise

    @property
    def envs(self) -> list[ChunkEnv]:
        """List the environments where they live in this process."""
        return [worker.target for worker in self.workers if isinstance(worker, LocalWorker)]

    def restart(self, indices: Iterable[int]) -> None:
        """Replace workers, whatever state they are in."""
        indices = list(indices)
        close_all([self.workers[i] for i in indices])
        for i in indices:
            self.workers[i] = self._started(i)

    def close(self) -> None:
        close_all(self.workers)
        self.workers = []

    def _started(self, index: int) -> Worker | LocalWorker:
        build = partial(self._make, index)
        if self._context is None:
            return LocalWorker(build)
        return Worker(self._context, build, f"environment-{index}", within=self.limits.reset)


def make_env(package: str, gym_id: str, kwargs: Mapping[str, Any]) -> gym.Env:
    """Make one environment by its Gymnasium id, its package imported when the id is not registered yet."""
    if gym_id not in gym.registry:
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            missing = error.name or package
            through = "" if missing.split(".")[0] == package.split(".")[0] else f", which imports {missing}"
            command = install_command(package.removeprefix("gym_"))
            raise ConfigError(
                f'the environment "{gym_id}" needs the package {package}{through}, which is not installed'
                + (f": {command}" if command else "")
            ) from error
        if gym_id not in gym.registry:
            close = ", ".join(sorted(name for name in gym.registry if name.startswith(f"{gym_id.split('/')[0]}/")))
            raise ConfigError(
                f'the package {package} registers no Gymnasium environment "{gym_id}"'
                + (f"; it registers {close}" if close else "")
            )
    return gym.make(gym_id, disable_env_checker=True, **kwargs)


def make_chunk_env(
    package: str,
    gym_id: str,
    kwargs: Mapping[str, Any],
    horizon: int,
    stride: int,
    limits: TimeLimits,
    name: str,
    index: int,
) -> ChunkEnv:
    return ChunkEnv(make_env(package, gym_id, kwargs), horizon, index, stride, limits, name)
