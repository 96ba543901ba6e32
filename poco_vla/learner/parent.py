"""Notice that the launcher is gone: nobody waits for the run any more, and nobody would stop it."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from poco_vla.files import is_alive
from poco_vla.learner.launcher import find_launcher
from poco_vla.locks import started

MARKS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
"""Environment variables that `accelerate launch` and `torchrun` set for the processes they start."""
STARTED_BY = "POCO_VLA_STARTED_BY"
"""Environment variable by which a program of this library tells the runs that it starts the number of its process."""


class ParentWatch:
    """While entered, look now and then whether the launcher that started this process still runs.

    A process that no launcher started is let be, so that `nohup`, `setsid` and `tmux` work as ever; a launcher started
    by one of these goes on, and so does its run.

    Args:
        gone: called once, in another thread, with the launcher's process number.
        every: seconds between two looks.
    """

    def __init__(self, gone: Callable[[int], None], every: float = 1.0) -> None:
        self._gone, self._every = gone, every
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "ParentWatch":
        pid = launcher_of_this_process()
        if pid is not None:
            direct = pid == os.getppid()
            self._thread = threading.Thread(
                target=self._look, args=(pid, direct, started(pid)), name="launcher", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _look(self, pid: int, direct: bool, began: int | None) -> None:
        while not self._end.wait(self._every):
            if (os.getppid() != pid) if direct else has_ended(pid, began):
                self._gone(pid)
                return


def launcher_of_this_process() -> int | None:
    """Return the number of the launcher's process; None where none started this one."""
    if os.environ.get(STARTED_BY, "").isdigit():
        return int(os.environ[STARTED_BY])
    if not any(name in os.environ for name in MARKS):
        return None
    found = find_launcher()
    if found is not None:
        return found.pid
    # A user may have exported Accelerate's variable; then the parent is a shell, which may end before the run.
    launched = "TORCHELASTIC_RUN_ID" in os.environ or multiprocessing.parent_process() is not None
    shown = Path("/proc/self/cmdline").exists()  # elsewhere command lines cannot be looked at
    return os.getppid() if (launched or not shown) and os.getppid() > 1 else None


def has_ended(pid: int, began: int | None) -> bool:
    """True if the process that had this number from `began` on is gone, or waits only to be collected."""
    return not is_alive(pid) or started(pid) != began
