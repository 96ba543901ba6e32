"""The robot's side: asks for chunks, waits for a server that is away, and never hands over what is not a chunk. Where a
learner is behind the policy, it also asks how that is, and sends it episodes.

Needs numpy, msgpack and websockets; neither torch nor the model.
"""

import logging
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from poco_vla.data.episode import Episode
from poco_vla.errors import ConfigError, DataError, PocoError
from poco_vla.serving.access import is_exposed
from poco_vla.serving.codec import (
    MAX_BYTES,
    PROTOCOL_VERSION,
    VERSION_HEADER,
    MessageLimits,
    ProtocolError,
    pack,
    unpack,
)
from poco_vla.serving.upload import ending, pieces

logger = logging.getLogger(__name__)


class RefusedError(PocoError):
    """Raised when the server refuses a request; the message holds the server's reason."""


class ConnectionLostError(PocoError):
    """The server could not be reached for as long as was allowed."""


@dataclass(frozen=True)
class Retry:
    """Limits for reconnecting. All in seconds.

    Attributes:
        budget: from the first failure to giving up; 0 gives up at once.
        first: pause after the first failure; it doubles.
        longest: pause at most.
    """

    budget: float = 30.0
    first: float = 0.1
    longest: float = 2.0


@dataclass(frozen=True)
class Chunk:
    """Reply of the policy.

    Attributes:
        actions: [H, action_dim] float32, in the robot's units.
        weights_version: of the weights that it is a sample of.
        latency: seconds from asking to having it, reconnecting included.
    """

    actions: np.ndarray
    weights_version: int
    latency: float


class PolicyClient:
    """A connection to a :class:`PolicyServer`, opened at once and again whenever it is lost. For one thread at a time.

    Args:
        url: ``ws://host:port`` or ``wss://host:port``.
        token: the server's, if it wants one.
        certificate: PEM file to trust, for a server whose certificate no authority has signed.
        timeout: seconds to wait for a connection or for a reply, until it counts as lost.
        retry: how long and how often to try again.
        max_bytes: longest message that is read.
        record_timeout: seconds to wait until an episode that was sent is on the server's disk, its videos encoded,
            until the connection counts as lost.

    Raises:
        RefusedError: a wrong token, or a certificate that is not trusted.
        ProtocolError: whoever answers there speaks another protocol, or another version of it.
        ConnectionLostError: nobody answered within the budget.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        certificate: Path | None = None,
        timeout: float = 10.0,
        retry: Retry | None = None,
        max_bytes: int = MAX_BYTES,
        record_timeout: float = 300.0,
    ) -> None:
        self.url, self.timeout, self.retry = url, timeout, retry or Retry()
        self.record_timeout = record_timeout
        self.limits = MessageLimits(max_bytes=max_bytes)
        self._tls = _client_tls(url, certificate)
        self._headers = {VERSION_HEADER: str(PROTOCOL_VERSION)}
        if token is not None:
            self._headers["Authorization"] = f"Api-Key {token}"
            if is_exposed(url):
                logger.warning(
                    "the token crosses the network to %s in the clear, and whoever reads it can steer the robot: serve "
                    "with a certificate and a key, and connect to wss://",
                    url,
                )
        self._open: tuple[ClientConnection, ExitStack] | None = None
        self._metadata: dict[str, Any] = {}
        self._retry(lambda connection: None)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Return the server's metadata of the last connection: horizon, action_dim, fps, observation, adapter,
        weights_version, task, action_low and action_high (lists, None where not known), takes_episodes."""
        return self._metadata

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect. May be called twice; a later `chunk` connects again."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def chunk(self, obs: Mapping[str, np.ndarray], task: str) -> Chunk:
        """Return a chunk for one state.

        Args:
            obs: LeRobot's keys, as `metadata["observation"]` lists them; pictures uint8 [height, width, 3].
            task: the instruction.

        Raises:
            RefusedError: the server does not take this request; asking again is of no use.
            ProtocolError: its reply is not a finite chunk of the size that it announced.
            ConnectionLostError: no reply within the budget.
        """
        request = pack({**self._as_announced(obs), "task": task})
        started = time.perf_counter()
        reply = self._retry(lambda connection: self._ask(connection, request))
        return self._parse_chunk(reply, time.perf_counter() - started)

    def status(self) -> Mapping[str, Any]:
        """Return the learner's status: "act", True when an episode may begin; "done", True when training is over;
        further numbers and texts by name.

        Raises:
            RefusedError: no learner is behind this server.
            ProtocolError: its reply holds neither.
            ConnectionLostError: no reply within the budget.
        """
        reply = self._retry(lambda connection: self._ask(connection, pack({"status": True})))
        status = reply.get("status") if isinstance(reply, dict) else None
        if not isinstance(status, dict) or not all(isinstance(status.get(name), bool) for name in ("act", "done")):
            raise ProtocolError(f'the server at {self.url} sent no status with "act" and "done": {reply!r:.200}')
        return status

    def record(self, episode: Episode, key: str) -> None:
        """Send an episode; when this returns, the learner has it on disk. Sending it again does no harm.

        Args:
            episode: its columns as the server's metadata announce them.
            key: of this episode and no other, on every robot, such as a random UUID.

        Raises:
            RefusedError: the server does not take it, or it cannot be sent; the caller still has it, and better keeps
                it.
            ProtocolError: the reply is not to this episode.
            ConnectionLostError: no word within the budget that it is on disk; it may be.
        """
        try:
            self._retry(lambda connection: self._upload(connection, episode, key))
        except DataError as error:
            raise RefusedError(f"not sent to {self.url}: {error}") from error

    def _upload(self, connection: ClientConnection, episode: Episode, key: str) -> None:
        episode = replace(episode, obs=self._as_announced(episode.obs))
        for piece in pieces(episode, key, self._metadata["max_bytes"]):
            filled = piece["first"] + len(piece["rows"]["action"])
            self._expect({"episode": key, "rows": filled}, self._ask(connection, pack(piece)))
        recorded = self._ask(connection, pack(ending(episode, key)), self.record_timeout)
        self._expect({"episode": key, "recorded": True}, recorded)

    def _as_announced(self, obs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return observations in the floats that the server announces: an older one takes no others."""
        said = self._metadata.get("observation") or {}
        kinds = {key: str(said[key].get("dtype")) for key in obs if _is_map(said.get(key))}
        floats = {key: kind for key, kind in kinds.items() if kind in ("float16", "float32", "float64")}
        return {key: _as_float(column, floats[key]) if key in floats else column for key, column in obs.items()}

    def _expect(self, expected: dict[str, Any], reply: Any) -> None:
        if not _is_map(reply) or pack(reply) != pack(expected):
            raise ProtocolError(f"the server at {self.url} answered an episode by {reply!r:.200}, expected {expected}")

    def _ask(self, connection: ClientConnection, request: bytes, timeout: float | None = None) -> Any:
        if len(request) > self._metadata["max_bytes"]:
            raise RefusedError(f"a request of {len(request)} bytes; the server takes {self._metadata['max_bytes']}")
        connection.send(request)
        return self._receive(connection, timeout)

    def _receive(self, connection: ClientConnection, timeout: float | None = None) -> Any:
        message = connection.recv(timeout=timeout or self.timeout)
        if isinstance(message, str):
            raise RefusedError(f"the server at {self.url} refused: {message[:2000]}")
        return unpack(message, self.limits)

    def _parse_chunk(self, reply: Any, latency: float) -> Chunk:
        actions, version = (reply.get(name) for name in ("actions", "weights_version")) if _is_map(reply) else (None, 0)
        expected = (self._metadata["horizon"], self._metadata["action_dim"])
        if not isinstance(actions, np.ndarray) or actions.dtype != np.float32 or actions.shape != expected:
            found = f"{actions.dtype} {actions.shape}" if isinstance(actions, np.ndarray) else type(actions).__name__
            raise ProtocolError(f"the server at {self.url} sent actions of {found}, expected float32 {expected}")
        if not np.isfinite(actions).all():
            raise ProtocolError(f"the server at {self.url} sent actions that are NaN or infinite")
        if type(version) is not int:
            raise ProtocolError(f"the server at {self.url} sent no weights_version with its actions")
        return Chunk(actions, version, latency)

    # -- connecting ---------------------------------------------------------------------------------------------------

    def _retry[T](self, talk: Callable[[ClientConnection], T]) -> T:
        """Call `talk` with the connection; if it is lost, reconnect and call again, as repeated requests have no other
        effect."""
        pause, deadline = self.retry.first, None
        while True:
            try:
                return talk(self._connection())
            except (OSError, ConnectionClosed, InvalidHandshake) as error:
                self.close()  # a reply that is late must not be taken for that of the next request
                deadline = deadline or time.monotonic() + self.retry.budget
                if time.monotonic() + pause > deadline:
                    raise ConnectionLostError(
                        f"no reply from {self.url} for {self.retry.budget:g} s: {error or type(error).__name__}. Is "
                        "the server running, and can this machine reach it?"
                    ) from error
                logger.warning("lost %s (%s); trying again in %.1f s", self.url, error or type(error).__name__, pause)
            except (ProtocolError, KeyboardInterrupt):  # likewise
                self.close()
                raise
            time.sleep(pause)
            pause = min(2 * pause, self.retry.longest)

    def _connection(self) -> ClientConnection:
        if self._open is None:
            with ExitStack() as stack:
                connection = stack.enter_context(self._connect())
                self._metadata = self._check_metadata(self._receive(connection))
                self._open = connection, stack.pop_all()
        return self._open[0]

    def _connect(self) -> ClientConnection:
        try:
            return connect(
                self.url,
                ssl=self._tls,
                additional_headers=self._headers,
                compression=None,
                proxy=None,  # the way to a robot is not the way to the web
                max_size=self.limits.max_bytes,
                open_timeout=self.timeout,
                close_timeout=1,
            )
        except InvalidURI as error:
            raise ConfigError(f"{self.url} is no address of a server; one is ws://host:port or wss://...") from error
        except ssl.SSLCertVerificationError as error:
            raise RefusedError(
                f"the certificate of {self.url} is not trusted: {error.verify_message}. Give `certificate` its PEM "
                "file."
            ) from error
        except InvalidStatus as error:
            status, body = error.response.status_code, error.response.body
            if not 400 <= status < 500:  # a gateway whose server is away
                raise
            words = bytes(body or b"")[:2000].decode(errors="replace").strip()
            raise RefusedError(f"{self.url} refused (HTTP {status}): {words}") from error

    def _check_metadata(self, found: Any) -> dict[str, Any]:
        """Return the server's metadata. Raises ProtocolError for another protocol, or if the served policy has
        changed."""
        version = found.get("protocol_version") if _is_map(found) else None
        if version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"{self.url} speaks protocol version {version or 'unknown'}, this client {PROTOCOL_VERSION}: install "
                "the same poco-vla on both sides"
            )
        sizes = ("horizon", "action_dim", "max_bytes")
        if not all(type(found.get(name)) is int and found[name] > 0 for name in sizes):
            raise ProtocolError(f"{self.url} does not say {', '.join(sizes)}, whole numbers above 0")
        if changed := [k for k in self._metadata if k != "weights_version" and found.get(k) != self._metadata[k]]:
            raise ProtocolError(f"{self.url} now serves another policy: {', '.join(changed)} changed. Connect again.")
        return found


def _is_map(value: Any) -> bool:
    return isinstance(value, dict)


def _as_float(column: Any, kind: str) -> Any:
    is_number = isinstance(column, np.ndarray) and column.dtype.kind in "fiub"
    return column.astype(kind, copy=False) if is_number else column


def _client_tls(url: str, certificate: Path | None) -> ssl.SSLContext | None:
    if not url.startswith("wss:"):
        if certificate is not None:
            raise ConfigError(f"a certificate to trust, but {url} is not encrypted: it starts with wss://")
        return None
    try:
        return ssl.create_default_context(cafile=certificate)
    except OSError as error:
        raise ConfigError(f"cannot read the certificate {certificate}: {error}") from error
