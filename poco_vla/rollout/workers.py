"""Objects in worker processes with time limits: a call that hangs, dies or raises is noticed, and its process replaced.

Each worker has a pipe of its own. It ends when the pipe closes or its parent is gone, also in the middle of a call, and
the kernel ends it (SIGALRM) when a call inside :func:`time_limit` takes too long: that needs neither the parent nor
Python in the worker, so that code which never returns from C is ended as well.
"""

import atexit
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import pickle
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import Any, Literal

from gymnasium.vector.utils import CloudpickleWrapper

from poco_vla.bugs import RemoteBugError, bug_behind, place_of, traceback_of
from poco_vla.errors import ConfigError, DataError, NonFiniteError, PocoError
from poco_vla.rollout.shield import ignore_signals_to_the_group

logger = logging.getLogger(__name__)

POLL = 0.1
"""Seconds between two looks at deadlines and at whether to give up."""
GRACE = 3.0
"""Seconds that workers get to close, and busy ones at least to finish a call when the run stops: twice the longest call
of theirs so far, where that is more."""
MARGIN = 20.0
"""Seconds beyond a call's own time limits after which the parent kills a worker that the kernel has not ended: a
suspended one."""

type Kind = Literal["contract", "raised", "died", "timeout", "stopped"]


@dataclass(frozen=True)
class Failure:
    """A call that brought no result.

    Attributes:
        kind: "contract": it broke a rule of this library, which its text names; "raised" any other error; "died" the
            process ended; "timeout" it was ended for taking too long; "stopped" because the run stops.
        words: a clause for a message, with file and line where an error was raised.
        details: the traceback of a bug, "" where the user can mend what the words say.
    """

    kind: Kind
    words: str
    details: str = ""

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """Describe an exception, naming the file and line that raised it unless its text is this library's own."""
        bug = bug_behind(error)
        details = traceback_of(bug) if bug is not None else ""
        if isinstance(error, PocoError):
            return cls("raised" if isinstance(error, NonFiniteError | DataError) else "contract", str(error), details)
        advice = graphics_advice(details)
        words = f"{type(error).__name__}: {error}{place_of(error)}{advice}"
        return cls("raised", words, "" if advice else details)

    def cause(self) -> Exception | None:
        """Return the worker's traceback as an exception to chain to, None if there is none."""
        return RemoteBugError(self.details) if self.details else None


def graphics_advice(details: str) -> str:
    """Return advice if a traceback shows that MuJoCo found no OpenGL context, else ""."""
    signs = ("gladLoadGL", "GLContext", "OpenGL", "GLFWError", "mujoco/egl", "mujoco/glfw", "mujoco/osmesa", "EGL")
    if not any(sign in details for sign in signs):
        return ""
    return (
        ". There is no OpenGL context here: set the environment variable MUJOCO_GL=egl (or osmesa), which needs the "
        "driver's libraries (apt install libegl1 libegl-mesa0 libgl1-mesa-dri)"
    )


# -- in the worker ----------------------------------------------------------------------------------------------------

_in_worker = False


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End this process if the block takes longer; 0 sets no limit. Does nothing outside of a worker process."""
    if not _in_worker or not seconds or not hasattr(signal, "setitimer"):
        yield
        return
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, outer)


def _end_with_parent() -> None:
    """End this process as soon as its parent is gone, whatever it is doing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), name="parent", daemon=True).start()


def _serve(connection: multiprocessing.connection.Connection, build: Callable[[], Any], seconds: float) -> None:
    """Build the object, then answer calls until the pipe closes or one fails."""
    global _in_worker
    _in_worker = True
    ignore_signals_to_the_group()
    _end_with_parent()
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    target: Any = None
    # Answers are sent beside the work: pictures fill a pipe, and the next call (a reset) does not wait until the
    # parent, which may be learning, takes them in.
    answers: SimpleQueue[memoryview | None] = SimpleQueue()
    sender = threading.Thread(target=_send_all, args=(connection, answers), name="answers", daemon=True)
    sender.start()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            with time_limit(seconds):
                target = build()
            answers.put(ForkingPickler.dumps((True, None, 0.0)))
            while True:
                name, arguments = connection.recv()
                if name == "close":
                    break
                began = time.monotonic()
                value = getattr(target, name)(*arguments)
                answers.put(ForkingPickler.dumps((True, value, time.monotonic() - began)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise  # the parent is gone
        except Exception as error:  # a simulator raises anything: its words are for the parent
            answers.put(ForkingPickler.dumps((False, Failure.of(error), 0.0)))
    answers.put(None)
    sender.join()
    if target is not None:
        with time_limit(GRACE), suppress(Exception):  # nothing that is wrong from here on matters any more
            target.close()


def _send_all(connection: multiprocessing.connection.Connection, answers: "SimpleQueue[memoryview | None]") -> None:
    """Send answers in order, until None comes or the pipe closes."""
    with suppress(OSError):
        while (answer := answers.get()) is not None:
            connection.send_bytes(answer)


# -- in the parent ----------------------------------------------------------------------------------------------------

_processes: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()


@atexit.register  # after multiprocessing's own, and so called before it
def _kill_workers() -> None:
    """Kill workers that were not closed. Multiprocessing would send them SIGTERM, which they ignore, and wait."""
    for process in _processes:
        process.kill()


class Worker:
    """An object in a process of its own.

    Attributes:
        failure: why it answers no more.
        answers: those that came, for whoever asked to take away.
        longest: seconds of its longest call so far, its start left out.

    Args:
        context: where processes come from.
        build: makes the object, in the worker.
        name: of the process.
        within: seconds that making it may take; 0 sets no limit.

    Raises:
        ConfigError: the system gives no further process.
    """

    def __init__(
        self, context: multiprocessing.context.BaseContext, build: Callable[[], Any], name: str, *, within: float
    ) -> None:
        self.failure: Failure | None = None
        self.answers: list[Any] = []
        self.longest = 0.0
        self._pending: deque[tuple[str, float]] = deque()
        try:
            self.connection, theirs = context.Pipe()
            arguments = (theirs, CloudpickleWrapper(build), within)
            self.process = context.Process(target=_serve, args=arguments, name=name, daemon=True)  # type: ignore[attr-defined]
            self.process.start()
            _processes.add(self.process)
            theirs.close()
        except (OSError, EOFError) as error:
            raise ConfigError(
                f"the worker process {name} could not be started: {type(error).__name__}: {error}. Ask for fewer at "
                "once (env.num_envs, demonstrations.workers), or give more: open files (ulimit -n), processes (ulimit "
                "-u), memory, room in /dev/shm"
            ) from error
        self._expect("start", within)

    @property
    def busy(self) -> bool:
        """True while an answer is outstanding."""
        return bool(self._pending) and self.failure is None

    def ask(self, method: str, *arguments: Any, within: float = 0.0) -> None:
        """Call a method of the object; `within` is the sum of the time limits inside it, 0 for none."""
        if self.failure is not None:
            return
        self._expect(method, within)
        try:
            self.connection.send((method, arguments))
        except (OSError, EOFError):
            self._died()

    def take(self) -> None:
        """Receive one answer."""
        try:
            good, value, seconds = self.connection.recv()
        except (OSError, EOFError, pickle.UnpicklingError):
            self._died()
            return
        method, _ = self._pending.popleft()
        self.longest = max(self.longest, seconds)
        if not good:
            self.failure = value
        elif method != "start":
            self.answers.append(value)
        self._restart_clock()

    def check_clock(self) -> None:
        """Kill the process if its call is overdue."""
        if self.busy and time.monotonic() > self._deadline:
            self.kill(Failure("timeout", f"{self._pending[0][0]} did not return in time"))

    def kill(self, failure: Failure) -> None:
        """End the process at once."""
        if self.failure is None:
            self.failure = failure
        self.process.kill()
        self._reap()

    def close(self, deadline: float) -> None:
        """Close the object and end the process, by force at `deadline` (monotonic seconds)."""
        with suppress(OSError, EOFError):
            self.connection.send(("close", ()))
        self.process.join(max(0.0, deadline - time.monotonic()))
        if self.process.exitcode is None:
            self.process.kill()
        self._reap()

    def _expect(self, method: str, within: float) -> None:
        self._pending.append((method, within + MARGIN if within else float("inf")))
        if len(self._pending) == 1:
            self._restart_clock()

    def _restart_clock(self) -> None:
        self._deadline = time.monotonic() + (self._pending[0][1] if self._pending else float("inf"))

    def _died(self) -> None:
        method = self._pending[0][0] if self._pending else "waiting"
        self.process.join(1.0)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
        self._reap()
        if hasattr(signal, "SIGALRM") and code == -signal.SIGALRM:
            self.failure = Failure("timeout", f"{method} did not return in time")
        elif code is not None and code < 0:
            name = signal.Signals(-code).name
            memory = ": no memory left?" if code == -signal.SIGKILL else ""
            self.failure = Failure("died", f"its process was ended by {name} in {method}{memory}")
        else:
            self.failure = Failure("died", f"its process ended with code {code} in {method}")

    def _reap(self) -> None:
        self.process.join(GRACE)
        self.connection.close()


class LocalWorker:
    """An object in this process behind the interface of `Worker`, without time limits. Its calls run in `work`."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self.failure: Failure | None = None
        self.answers: list[Any] = []
        self._pending: deque[tuple[str, tuple[Any, ...]]] = deque()
        self.target: Any = None
        self._try(lambda: setattr(self, "target", build()))

    def ask(self, method: str, *arguments: Any, within: float = 0.0) -> None:
        """Queue a call of a method of the object."""
        del within
        self._pending.append((method, arguments))

    def work(self) -> None:
        """Run the queued calls."""
        while self._pending and self.failure is None:
            method, arguments = self._pending.popleft()
            self._try(lambda: self.answers.append(getattr(self.target, method)(*arguments)))  # noqa: B023 (at once)

    def close(self, deadline: float = 0.0) -> None:
        """Close the object."""
        del deadline
        if self.target is not None:
            with suppress(Exception):  # it is closed, or broken
                self.target.close()
        self.target = None

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # a simulator raises anything
            self.failure = Failure.of(error)
            self._pending.clear()


def wait(workers: Sequence[Worker | LocalWorker], give_up: Callable[[], bool] = lambda: False) -> None:
    """Wait until all answers have come. Once `give_up` returns True, workers that take much longer than ever before are
    killed."""
    for worker in workers:
        if isinstance(worker, LocalWorker):
            worker.work()
    stopped = float("inf")
    while busy := _look(workers):
        if stopped == float("inf") and give_up():
            stopped = time.monotonic()
        for worker in busy:
            if worker.busy and time.monotonic() > stopped + max(GRACE, 2 * worker.longest):
                worker.kill(Failure("stopped", "it was busy when the run stopped"))


def wait_for_one(workers: Sequence[Worker | LocalWorker]) -> None:
    """Wait some time until one of the workers has an answer, or has failed."""
    for worker in workers:
        if isinstance(worker, LocalWorker):
            worker.work()
    _look(workers)


def _look(workers: Sequence[Worker | LocalWorker]) -> list[Worker]:
    """Receive answers that come within `POLL` and kill overdue workers; return the workers that were busy."""
    busy = {w.connection: w for w in workers if isinstance(w, Worker) and w.busy}
    if busy:
        for connection in multiprocessing.connection.wait(list(busy), timeout=POLL):
            busy[connection].take()  # type: ignore[index]
    for worker in busy.values():
        worker.check_clock()
    return list(busy.values())


def close_all(workers: Sequence[Worker | LocalWorker]) -> None:
    """Close all workers, each by force after a moment."""
    deadline = time.monotonic() + GRACE
    for worker in workers:
        if isinstance(worker, Worker) and worker.failure is None:
            with suppress(OSError, EOFError):
                worker.connection.send(("close", ()))
    for worker in workers:
        worker.close(deadline)


def worker_context(preload: Sequence[str]) -> multiprocessing.context.BaseContext:
    """Return a context that forks workers from a clean process with all imports done, never from the learner."""
    multiprocessing.set_forkserver_preload(["__main__", "poco_vla.rollout.pool", *preload])
    return multiprocessing.get_context("forkserver")
