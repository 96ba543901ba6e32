"""Workers outlive what a whole process group is sent: the learner saves first, and ends them itself."""

import os
import signal
from types import FrameType


def ignore_signals_to_the_group() -> None:
    """Let neither Ctrl-C nor SIGTERM end this worker.

    A terminal sends Ctrl-C, a cluster's cancel or `timeout` sends SIGTERM to all processes of a job: workers that die
    of it at once leave the learner with broken pipes before it has saved. They end with the learner, whose pipe closes.

    SIGTERM gets a handler and is neither blocked nor ignored: a program that a simulator starts would inherit that, and
    could not be terminated.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = os.getpid()

    def ignore(number: int, _: FrameType | None) -> None:
        if os.getpid() != worker:  # a process that the simulator forked
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    signal.signal(signal.SIGTERM, ignore)
    signal.siginterrupt(signal.SIGTERM, False)  # a simulator's system calls go on
