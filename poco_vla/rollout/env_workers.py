"""Processes that hold one environment each, and how an environment is made."""

from collections.abc import Callable, Iterable
from functools import partial

import gymnasium as gym

from poco_vla.rollout.chunk_env import ChunkEnv, TimeLimits
from poco_vla.rollout.workers import LocalWorker, Worker, close_all, worker_context


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


def make_chunk_env(
    make: Callable[[], gym.Env], horizon: int, stride: int, limits: TimeLimits, name: str, index: int
) -> ChunkEnv:
    """Make an environment and the chunks around it, in the process that steps it."""
    return ChunkEnv(make(), horizon, index, stride, limits, name)
