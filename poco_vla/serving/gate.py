"""Bound the connections, bytes and time that clients may take of a server, before memory is allocated."""

import logging
import resource
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import ref

from websockets.asyncio.server import ServerConnection
from websockets.protocol import State

from poco_vla.errors import ConfigError

logger = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 5.0
"""For a connection to be encrypted and to ask for the websocket."""
MAX_HEAD = 16 * 1024
"""Bytes of a request that asks for the websocket."""
MAX_UNAUTHENTICATED = 32
"""Connections that have not shown a token, nor got a websocket; of more the oldest is dropped."""
MAX_CLIENTS = 64
"""Open websockets."""
BACKLOG = 16
"""Connections that the system accepts ahead."""
FILES = 4096
"""Open files that this process asks the system for, where it may have fewer."""
RESERVE = 128
"""Open files that connections leave to the rest of the process: logs, checkpoints, datasets."""
MIN_MESSAGE, MESSAGES_AHEAD = 4 * 1024**2, 128 * 1024**2
"""Bytes of a message that is taken whatever the policy observes, and of all that have begun to come."""


def message_limit(observation_bytes: int, most: int) -> int:
    """Return the longest message that makes sense: observations in 8-byte numbers where 1-byte ones are expected."""
    return min(most, max(MIN_MESSAGE, 8 * observation_bytes + 1024**2))


def room_for_connections(wanted: int) -> int:
    """Raise this process's limit of open files as far as needed and allowed, and return how many connections it leaves
    room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES:
        soft = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return wanted
    room = max(1, min(wanted, soft - _open_files() - RESERVE))
    if room < wanted:
        logger.warning("%d connections are served at once: this process may open %d files (ulimit -n)", room, soft)
    return room


def _open_files() -> int:
    folder = Path("/proc/self/fd")
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else RESERVE


def listen(host: str, port: int) -> "Gate":
    """Return a socket that listens.

    Raises:
        ConfigError: it cannot, for a reason that the message says.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port is {port}; a port is a number from 1 to 65535, or 0 for a free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, port), family=family)
    except PermissionError as error:
        raise ConfigError(
            f"cannot listen on port {port}: ports below 1024 are the administrator's. Choose another port, such as 8000"
        ) from error
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}. Choose another port (0 takes a free one), or an address of "
            "this machine"
        ) from error
    return Gate(fileno=made.detach())


class Gate(socket.socket):
    """A listening socket with a bounded number of connections. Whoever is no client yet is a stranger: of too many, the
    one that has waited longest is dropped, so that idle ones keep nobody out.

    It counts what it accepts, so that connections count whose encryption has not even begun.
    """

    max_unauthenticated = MAX_UNAUTHENTICATED

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection; if there are too many unauthenticated ones, drop the oldest of them."""
        connection, address = super().accept()
        waiting = self._alive()
        for old in waiting[: max(0, len(waiting) + 1 - self.max_unauthenticated)]:
            with suppress(OSError):  # it may be gone already
                old.shutdown(socket.SHUT_RDWR)
        self._accepted = [*map(ref, waiting), ref(connection)]
        return connection, address

    def mark_authenticated(self, number: int) -> None:
        """Stop counting the connection of this file number as unauthenticated."""
        self._accepted = [ref(one) for one in self._alive() if one.fileno() != number]

    @property
    def num_unauthenticated(self) -> int:
        """Return the number of unauthenticated connections."""
        return len(self._alive())

    def _alive(self) -> list[socket.socket]:
        found = [one() for one in getattr(self, "_accepted", [])]
        return [one for one in found if one is not None and one.fileno() != -1]


class PendingBytes:
    """Bytes of incomplete messages, over all connections."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held: dict[BoundedConnection, int] = {}

    def add(self, connection: "BoundedConnection", count: int) -> None:
        """Count bytes; beyond the bound, the connection that holds most of them is dropped."""
        self.held[connection] = self.held.get(connection, 0) + count
        while len(self.held) > 1 and sum(self.held.values()) > self.most:
            greedy = max(self.held, key=lambda one: self.held[one])
            logger.warning("a client is disconnected: incomplete messages take more than %d bytes", self.most)
            self.release(greedy)
            greedy.transport.abort()

    def release(self, connection: "BoundedConnection") -> None:
        """Release a connection's bytes, after its message was read or the connection closed."""
        self.held.pop(connection, None)


class BoundedConnection(ServerConnection):
    """A connection whose request, and whose messages on their way, are bounded in bytes."""

    intake: PendingBytes
    heard = 0.0

    @classmethod
    def kind(cls, intake: PendingBytes) -> Callable[..., "BoundedConnection"]:
        """Return a factory of connections that count their bytes in `intake`."""

        def make(*args: Any, **kwargs: Any) -> BoundedConnection:
            connection = cls(*args, **kwargs)
            connection.intake, connection.heard, connection._head = intake, time.monotonic(), 0
            return connection

        return make

    def data_received(self, data: bytes) -> None:
        """Accept bytes, or close the connection."""
        if self.protocol.state is State.CONNECTING:
            self._head += len(data)
            if self._head > MAX_HEAD:
                self.transport.abort()
                return
        else:
            self.intake.add(self, len(data))
            if self.transport.is_closing():
                return
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the bytes that the connection held."""
        self.intake.release(self)
        super().connection_lost(exc)

    def message_read(self) -> None:
        """Record that a whole message was read."""
        self.heard = time.monotonic()
        self.intake.release(self)

    @property
    def number(self) -> int:
        """Return the file number of the connection's socket."""
        return self.transport.get_extra_info("socket").fileno()
