"""Start the runs of a comparison as their turn comes, so many side by side, and stop them so that each saves."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from poco_vla.checkpointing import checkpoint
from poco_vla.comparison.member import Member, last_lines
from poco_vla.errors import CheckpointError
from poco_vla.learner.parent import STARTED_BY

type State = Literal["waits", "runs", "is done", "failed", "is left out", "stopped"]
ATTEMPTS = "attempts.jsonl"
"""File in a comparison's folder with what each process took."""

REMIND = 10.0
"""Seconds after which a run that is to stop is told so again."""


@dataclass
class _Process:
    """A run's process, when it began, whether it goes on with an earlier one, and what its processes took."""

    member: Member
    process: subprocess.Popen[bytes]
    began: float
    resumed: bool
    cpu_seconds: dict[int, float] = field(default_factory=dict)


class Schedule:
    """Run what is missing of a comparison. A run that fails ends itself alone, and those that start from it.

    Args:
        root: folder of the comparison.
        members: its runs, those that others start from first.
        jobs: processes side by side.
        say: told in a line what begins and ends.

    Attributes:
        states: state of each run.
    """

    def __init__(self, root: Path, members: Sequence[Member], jobs: int, say: Callable[[str], None]) -> None:
        self.root, self.members, self.jobs, self._say = root, list(members), jobs, say
        self.states: dict[Member, State] = {m: "is done" if m.is_done else "waits" for m in self.members}
        self._running: list[_Process] = []
        self._by_folder = {member.folder: member for member in self.members}

    def run(self, show: Callable[[], None] = lambda: None, every: float = 0.5) -> None:
        """Run until nothing is left that can be run; `show` is called every so many seconds.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM; every run has saved, and ended.
        """
        with _terminated_as_interrupted():
            try:
                while self._advance() or self._running:
                    show()
                    time.sleep(every)
            except KeyboardInterrupt:
                self._stop(show)
                raise
            finally:
                show()

    @property
    def failed(self) -> list[Member]:
        """Return the runs that failed."""
        return [member for member, state in self.states.items() if state == "failed"]

    def _advance(self) -> bool:
        """Note what has ended and start what can be started; return True if something waits."""
        for one in list(self._running):
            self._collect(one)
        waiting = [member for member in self.members if self.states[member] == "waits"]
        for member in waiting:
            needed = self._by_folder[member.needs] if member.needs is not None else None
            if needed is not None and self.states[needed] in ("failed", "is left out"):
                self.states[member] = "is left out"
                self._say(f"{member.label} is left out: {needed.label}, from which it starts, failed")
            elif len(self._running) < self.jobs and (needed is None or self.states[needed] == "is done"):
                self._start(member)
        return any(state == "waits" for state in self.states.values())

    def _start(self, member: Member) -> None:
        """Start a run, or go on with it; leave it waiting while another process is at work in its folder."""
        resumed = checkpoint.can_resume(member.folder)
        try:
            if resumed:
                checkpoint.claim_folder(member.folder).release()
            else:
                checkpoint.discard_folder(member.folder)  # ended before its first checkpoint
        except CheckpointError:  # a run of a comparison that was killed saves before it ends
            return
        member.log.parent.mkdir(parents=True, exist_ok=True)
        command = [*member.command, *(["--resume"] if resumed else [])]
        with member.log.open("ab" if resumed else "wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {STARTED_BY: str(os.getpid())},
                start_new_session=True,  # Ctrl-C reaches it through `_stop` alone
            )
        self.states[member] = "runs"
        self._running.append(_Process(member, process, time.monotonic(), resumed))
        self._say(f"{member.label} {'goes on' if resumed else 'begins'}")

    def _collect(self, one: _Process) -> None:
        """Note the end of a process, if it has ended; else what it has taken."""
        one.cpu_seconds |= cpu_seconds_of(one.process.pid)
        pid, status, usage = os.wait4(one.process.pid, os.WNOHANG)
        if not pid:
            return
        self._running.remove(one)
        one.process.returncode = code = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - one.began
        # Simulators are no children of the run itself where it has them from a server of processes.
        self._note(one, seconds, sum(one.cpu_seconds.values()) or usage.ru_utime + usage.ru_stime, code)
        member = one.member
        if code == 0 and member.is_done:
            self.states[member] = "is done"
            rate = member.progress()[2]
            success = "" if rate is None else f", success {rate:.0%}"
            self._say(f"{member.label} is done after {seconds:.0f} s{success}")
        elif self.states[member] != "stopped":
            self.states[member] = "failed"
            lines = "\n".join(f"    {line}" for line in last_lines(member.log))
            self._say(f"{member.label} failed with status {code}; the end of {member.log}:\n{lines}")

    def _note(self, one: _Process, seconds: float, cpu_seconds: float, status: int) -> None:
        run = str(one.member.folder.relative_to(self.root))
        line: dict[str, Any] = {"run": run, "resumed": one.resumed, "status": status}
        line |= {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
        with (self.root / ATTEMPTS).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _stop(self, show: Callable[[], None]) -> None:
        """Let every run save and end; a second Ctrl-C ends them at once."""
        self._say("stopping: each run saves first; press Ctrl-C again to stop at once")
        told = float("-inf")
        for one in self._running:
            self.states[one.member] = "stopped"
        try:
            while self._running:
                if time.monotonic() - told > REMIND:
                    told = time.monotonic()
                    for one in self._running:  # it may not have listened yet; a run takes SIGTERM once
                        os.kill(one.process.pid, signal.SIGTERM)
                show()
                time.sleep(0.2)
                for one in list(self._running):
                    self._collect(one)
        except KeyboardInterrupt:
            for one in self._running:
                os.killpg(one.process.pid, signal.SIGKILL)
                one.process.wait()
            raise


def cpu_seconds_of(session: int) -> dict[int, float]:
    """Return the processor seconds of each process of a session; none where the system does not show processes."""
    seconds, tick = {}, os.sysconf("SC_CLK_TCK")
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            numbers = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(numbers[3]) == session:
            seconds[int(stat.parent.name)] = (int(numbers[11]) + int(numbers[12])) / tick
    return seconds


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM and the end of the terminal do what Ctrl-C does."""
    signals = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in signals:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
