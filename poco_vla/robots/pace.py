"""The clock of a control loop."""

import time
from collections.abc import Callable

POLL = 0.01
"""Seconds between two polls of the signals while the robot waits for a deadline or for the policy."""
SPIN = 0.001
"""Seconds before a deadline that are spun instead of slept."""


class Pace:
    """Deadlines 1/fps apart on the monotonic clock; `fps` None has none."""

    def __init__(self, fps: int | float | None) -> None:
        self.period = 1 / fps if fps else 0.0
        self.errors: list[float] = []
        self.overruns = 0
        self._begun: float | None = None
        self._deadline = 0.0

    def wait(self, poll: Callable[[], None]) -> None:
        """Wait until the next control step begins, calling `poll` meanwhile."""
        if self._begun is None or not self.period:
            self._begun = time.monotonic()
            self._deadline = self._begun + self.period
            return
        while (left := self._deadline - time.monotonic()) > SPIN:
            time.sleep(min(left - SPIN, POLL))
            poll()
        while (now := time.monotonic()) < self._deadline:
            pass
        self.errors.append(abs(now - self._begun - self.period))
        if now - self._deadline >= self.period:  # what is lost is lost: no burst of actions to catch up
            self.overruns += 1
            self._deadline = now
        self._begun = now
        self._deadline += self.period

    def pause(self) -> None:
        """Restart the clock if an intended wait has exceeded the deadline."""
        if time.monotonic() > self._deadline:
            self._begun = None
