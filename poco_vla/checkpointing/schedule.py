"""When a checkpoint is due: after so many updates, and after so many minutes."""

import time

SHARE = 20.0
"""A checkpoint by time waits at least so many times as long as the last one took to write: at most 5 % of a run."""


class CheckpointClock:
    """Minutes since the last checkpoint.

    Args:
        minutes: between two checkpoints; 0 asks for none by time.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = minutes * 60
        self._since = time.monotonic()
        self._took = 0.0

    def is_due(self) -> bool:
        """True if a checkpoint is due by time."""
        wait = max(self._seconds, SHARE * self._took)
        return self._seconds > 0 and time.monotonic() - self._since >= wait

    def began(self) -> None:
        """Note that a checkpoint is being written from now on."""
        self._since = time.monotonic()

    def ended(self) -> None:
        """Note that it is written."""
        now = time.monotonic()
        self._took, self._since = now - self._since, now
