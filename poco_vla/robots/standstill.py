"""Notice that a control loop stood still: what was planned before is not what the robot needs after it."""

import time

SHORTEST = 1.0
"""Seconds without a control step that count as a standstill, at least."""
WITHOUT_RATE = 10.0
"""Seconds where the loop has no fixed rate, as with a simulated robot."""


def time_since_boot() -> float:
    """Return seconds on a clock that nobody sets and that goes on while the machine sleeps, where there is one."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


class Standstill:
    """The moments at which a control loop was seen to go on.

    Args:
        period: seconds between two control steps; 0 where there is no fixed rate.
    """

    def __init__(self, period: float) -> None:
        self.longest = max(SHORTEST, 5 * period) if period else WITHOUT_RATE
        self._last: float | None = None

    def passed(self) -> float:
        """Record that the loop runs. Return the seconds for which it stood still, 0 if it did not."""
        now = time_since_boot()
        gap = 0.0 if self._last is None else now - self._last
        self._last = now
        return gap if gap > self.longest else 0.0


def oldest_chunk(horizon: int, period: float) -> float:
    """Return the seconds after which a chunk's actions are not sent any more: twice what it should last, and some."""
    return 2 * horizon * period + SHORTEST if period else float("inf")
