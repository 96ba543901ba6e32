"""Keep video encoders and progress bars of libraries quiet, and the scheduling of this process as it was."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path


@contextmanager
def silent_stderr() -> Iterator[None]:
    """LeRobot and datasets draw a bar per episode and per file on stderr, and video encoders, which are C, write to
    its file descriptor; the run shows its own progress. Exceptions pass."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def keep_scheduling() -> Iterator[None]:
    """Restore the thread's scheduling, which SVT-AV1 as root sets to SCHED_FIFO 99, ahead of everything else."""
    if not hasattr(os, "sched_getscheduler"):  # macOS
        yield
        return
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, priority)
