"""Numbered attempts, made by worker processes side by side and given in order."""

from collections.abc import Callable, Generator, Sequence
from itertools import count
from typing import Any

from poco_vla.rollout.chunk_env import TimeLimits
from poco_vla.rollout.workers import LocalWorker, Worker, close_all, wait, wait_for_one, worker_context

AHEAD = 3
"""Attempts per worker that may be made before the first of them is asked for."""


class Attempts:
    """Workers that make attempts.

    A worker that fails is replaced. An attempt whose process died or took too long is made once more: the next one may
    find more memory.

    Args:
        build: makes what attempts, in the worker.
        workers: how many.
        preload: modules that a worker server imports once.
        limits: time limits inside the workers.
        local: one worker, in this process.
    """

    def __init__(
        self, build: Callable[[], Any], workers: int, preload: Sequence[str], limits: TimeLimits, *, local: bool
    ) -> None:
        self._build, self._limits = build, limits
        self._context = None if local else worker_context(preload)
        self._number = 1 if local else max(1, workers)
        self._workers: list[Worker | LocalWorker] = [self._started(0)]

    def first(self, method: str, *arguments: Any) -> Any:
        """Call a method in the first worker; give its answer, or a Failure."""
        worker = self._workers[0]
        worker.ask(method, *arguments, within=self._limits.reset)
        wait([worker])
        return worker.failure if worker.failure is not None else worker.answers.pop()

    def made(self, method: str, *arguments: Any) -> Generator[Any]:
        """Give what `method(*arguments, i)` returns for i = 0, 1, ..., or a Failure, without end."""
        while len(self._workers) < self._number:
            self._workers.append(self._started(len(self._workers)))
        done: dict[int, Any] = {}
        at_work: dict[int, int] = {}  # worker -> attempt
        again: list[int] = []
        repeated: set[int] = set()
        begun = 0
        for wanted in count():
            while wanted not in done:
                for k, worker in enumerate(self._workers):
                    if k in at_work or not (again or begun < wanted + AHEAD * self._number):
                        continue
                    attempt = again.pop(0) if again else begun
                    begun = max(begun, attempt + 1)
                    at_work[k] = attempt
                    worker.ask(method, *arguments, attempt)
                wait_for_one(self._workers)
                for k, attempt in list(at_work.items()):
                    worker = self._workers[k]
                    if worker.answers:
                        done[attempt] = worker.answers.pop()
                        del at_work[k]
                    elif worker.failure is not None:
                        del at_work[k]
                        if worker.failure.kind in ("died", "timeout") and attempt not in repeated:
                            repeated.add(attempt)
                            again.append(attempt)
                        else:
                            done[attempt] = worker.failure
                        self._replace(k)
            yield done.pop(wanted)

    def close(self) -> None:
        """End the workers."""
        close_all(self._workers)
        self._workers = []

    def _replace(self, k: int) -> None:
        close_all([self._workers[k]])
        self._workers[k] = self._started(k)

    def _started(self, k: int) -> Worker | LocalWorker:
        if self._context is None:
            return LocalWorker(self._build)
        return Worker(self._context, self._build, f"demonstrations-{k}", within=self._limits.reset)
