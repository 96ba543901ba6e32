"""Bounds on the episodes that a server holds until they are whole, over all of its clients."""

import time
from typing import Protocol, runtime_checkable

IDLE = 60.0
"""Seconds without a message after which a client's place may be given to another, when all are taken."""


@runtime_checkable  # for the test run's machine-checked signatures
class Owner(Protocol):
    """A place where an episode grows."""

    def drop(self) -> None:
        """Discard the episode."""
        ...


class BusyError(Exception):
    """Raised when there is no room now; the client may try again."""


class Uploads:
    """Episodes on their way: how many, and how many bytes they were announced to take.

    Args:
        most: episodes at once.
        max_bytes: of all of them.
    """

    def __init__(self, most: int, max_bytes: int) -> None:
        self.most, self.max_bytes = most, max_bytes
        self._held: dict[Owner, tuple[int, float]] = {}

    def reserve(self, owner: Owner, count: int) -> None:
        """Reserve the bytes of an owner's episode. Owners that have sent nothing for `IDLE` seconds are dropped if
        space is needed.

        Raises:
            BusyError: others take all the room.
        """
        self.release(owner)
        now = time.monotonic()
        idle = sorted((at, id(one), one) for one, (_, at) in self._held.items() if now - at > IDLE)
        while self._is_full(count) and idle:
            one = idle.pop(0)[2]
            self.release(one)
            one.drop()
        if self._is_full(count):
            raise BusyError(f"{len(self._held)} episodes are on their way already")
        self._held[owner] = count, now

    def touch(self, owner: Owner) -> None:
        """Record that an owner has sent something."""
        if owner in self._held:
            self._held[owner] = self._held[owner][0], time.monotonic()

    def release(self, owner: Owner) -> None:
        """Release the bytes of an owner."""
        self._held.pop(owner, None)

    def _is_full(self, count: int) -> bool:
        taken = sum(size for size, _ in self._held.values())
        return len(self._held) >= self.most or (bool(self._held) and taken + count > self.max_bytes)
