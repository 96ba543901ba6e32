"""Workers outlive what a whole process group is sent: the learner saves first, and ends them itself."""

import multiprocessing
import os
import signal
import threading

ENDED = 128 + 15
"""Exit status of a process that SIGTERM ends, as shells have it."""


def obey_parent_alone() -> None:
    """Let SIGTERM end this worker only when the process that started it sends it.

    A cluster's cancel or `timeout` sends SIGTERM to all processes of a job: workers that die of it at once leave the
    learner with broken pipes before it has saved. They end with the learner, whose pipe closes. Does nothing where
    the system does not say who sends a signal (macOS).
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None or not hasattr(signal, "sigwaitinfo"):
        return
    # Threads that are started later inherit this, those of simulators too.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, args=(parent.pid,), name="SIGTERM", daemon=True).start()


def _end_when_told(parent: int) -> None:
    while True:
        told = signal.sigwaitinfo({signal.SIGTERM})
        if told.si_pid in (parent, os.getpid()):
            os._exit(ENDED)
