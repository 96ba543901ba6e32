"""The policy's side: one policy, any number of robots, openpi's websocket protocol.

On connecting a client gets the metadata; then each request, a map of one state's observations and its instruction, gets
a map of one chunk. A request that cannot be answered gets a text with the reason, and the conversation goes on.

Where a learner is behind the policy, clients also ask ``{"status": True}``, which gets ``{"status": {...}}``, and send
the episodes that they made with it: see :mod:`upload`.
"""

import asyncio
import hmac
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from poco_vla.bugs import bug_behind
from poco_vla.data.episode import Episode
from poco_vla.errors import DataError, PocoError
from poco_vla.serving.access import check_access, server_tls
from poco_vla.serving.codec import (
    MAX_BYTES,
    PROTOCOL_VERSION,
    VERSION_HEADER,
    MessageLimits,
    ProtocolError,
    pack,
    unpack,
)
from poco_vla.serving.feature import Feature
from poco_vla.serving.gate import (
    BACKLOG,
    HANDSHAKE_SECONDS,
    MAX_CLIENTS,
    MESSAGES_AHEAD,
    BoundedConnection,
    Gate,
    PendingBytes,
    listen,
    message_limit,
    room_for_connections,
)
from poco_vla.serving.requests import ChunkAnswer, ChunkSource, EpisodeSink, PendingRequest, check_bounds, check_request
from poco_vla.serving.upload import MAX_EPISODE_BYTES, Inbox
from poco_vla.serving.uploads import IDLE, BusyError, Uploads

logger = logging.getLogger(__name__)
_UNAUTHENTICATED = logging.getLogger(f"{__name__}.unauthenticated")
_UNAUTHENTICATED.setLevel(logging.CRITICAL)  # websockets logs a traceback for each that does not speak its protocol

_LONGEST_TEXT = 2000
"""Characters of a refusal: a client that sends a thousand keys gets them not all back."""


class _NotStoredError(Exception):
    """An episode that is as it should be, but could not be kept now; `cause` says why."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class PolicyServer:
    """Serves chunks over a websocket, from a thread of its own, for as long as its ``with`` block lasts.

    Requests of several clients that wait at the same time are answered by one forward. GET /healthz answers 200 to
    anybody.

    Args:
        actor: samples the chunks. Nobody else may use it or its policy meanwhile.
        obs_spec: what a request has to hold beside the instruction.
        adapter: name of the policy's adapter, for the metadata.
        fps: control steps per second that the policy was trained for, for the metadata.
        host: address to listen on; "0.0.0.0" is every one of this machine.
        port: 0 takes a free one, which :attr:`port` then says.
        token: what clients have to know (header ``Authorization: Api-Key TOKEN``); None lets everybody in.
        certificate: PEM file of the certificate (chain): the server then speaks wss:// only.
        key: PEM file of its private key, where `certificate` does not hold it.
        max_bytes: longest message that is read; a longer one closes its connection (code 1009).
        max_batch: most states in one forward.
        episodes: where episodes go that clients send; None takes none.
        max_episode_bytes: longest episode that is taken. Each connection may have one on its way, held in memory.
        max_uploads: episodes that may be on their way at once, of twice `max_episode_bytes` together.
        max_clients: open connections; fewer where this process may open few files.
        task: the instruction that the policy was trained for, for the metadata.
        action_bounds: (lowest, highest), both [action_dim], of the actions that the policy was trained on, for the
            metadata; None where they are not known.
        insecure: allow an address that others reach without a token.

    Raises:
        ConfigError: it cannot be served like that.
    """

    def __init__(
        self,
        actor: ChunkSource,
        obs_spec: Mapping[str, Feature],
        *,
        adapter: str,
        fps: float,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
        max_bytes: int = MAX_BYTES,
        max_batch: int = 16,
        episodes: EpisodeSink | None = None,
        max_episode_bytes: int = MAX_EPISODE_BYTES,
        task: str = "",
        action_bounds: tuple[np.ndarray, np.ndarray] | None = None,
        insecure: bool = False,
        max_uploads: int = 8,
        max_clients: int = MAX_CLIENTS,
    ) -> None:
        check_access(host, token, insecure=insecure, encrypted=certificate is not None)
        self.actor, self.obs_spec = actor, dict(obs_spec)
        self.adapter, self.fps, self.task = adapter, fps, task
        self.action_bounds = check_bounds(action_bounds, actor.policy.spec.action_dim)
        self.episodes, self.max_episode_bytes = episodes, max_episode_bytes
        self.host, self.port = host, port
        observation_bytes = sum(feature.nbytes for feature in self.obs_spec.values())
        self.limits = MessageLimits(max_bytes=message_limit(observation_bytes, max_bytes))
        self.max_batch = max_batch
        self.max_clients = max_clients
        self._uploads = Uploads(max_uploads, 2 * max_episode_bytes)
        self._intake = PendingBytes(max(MESSAGES_AHEAD, 2 * self.limits.max_bytes))
        self._token = token
        self._tls = server_tls(certificate, key)
        self._connections: set[BoundedConnection] = set()
        self._waiting: asyncio.Queue[PendingRequest] = asyncio.Queue()
        self._taking: dict[str, asyncio.Future[None]] = {}
        self._stop = asyncio.Event()
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Return the address for clients on this machine."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'wss' if self._tls else 'ws'}://{host}:{self.port}"

    @property
    def num_clients(self) -> int:
        """Return the number of open connections."""
        return len(self._connections)

    @property
    def metadata(self) -> dict[str, Any]:
        """Return the metadata that a client receives on connecting."""
        spec = self.actor.policy.spec
        return {
            "protocol_version": PROTOCOL_VERSION,
            "adapter": self.adapter,
            "horizon": spec.horizon,
            "action_dim": spec.action_dim,
            "fps": self.fps,
            "observation": {key: {"shape": list(f.shape), "dtype": f.dtype} for key, f in self.obs_spec.items()},
            "max_bytes": self.limits.max_bytes,
            "weights_version": self.actor.weights_version,
            "task": self.task,
            "names": {key: list(names) for key, names in self.actor.policy.names.items()},
            "action_low": self.action_bounds and self.action_bounds[0].tolist(),
            "action_high": self.action_bounds and self.action_bounds[1].tolist(),
            "takes_episodes": self.episodes is not None,
        }

    def __enter__(self) -> "PolicyServer":
        assert self._thread is None, "a server serves once"
        listening = listen(self.host, self.port)
        self.max_clients = room_for_connections(self.max_clients)
        self.port = listening.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(listening,), name="policy-server", daemon=True)
        self._thread.start()
        logger.info("serving %s on %s", self.adapter, self.url)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections (close code 1001) and free the port. May be called twice.

        Waits for the episode that is being taken; its sender learns nothing of it and sends it again elsewhen.
        """
        if self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    # -- connections --------------------------------------------------------------------------------------------------

    def _run(self, listening: Gate) -> None:
        try:
            self._loop.run_until_complete(self._serve(listening))
        finally:
            self._loop.close()

    async def _serve(self, listening: Gate) -> None:
        forwards = asyncio.create_task(self._run_batches())
        self._taker = ThreadPoolExecutor(1, "policy-server-episodes")
        self._gate = listening
        settings: dict[str, Any] = {"ssl": self._tls, "max_size": self.limits.max_bytes}
        # Pictures hardly shrink and take long to; of what a client sends ahead, little is read ahead.
        settings |= {"compression": None, "max_queue": 2}
        settings |= {"open_timeout": HANDSHAKE_SECONDS, "backlog": BACKLOG, "logger": _UNAUTHENTICATED}
        settings |= {"create_connection": BoundedConnection.kind(self._intake)}
        if self._tls is not None:
            settings["ssl_handshake_timeout"] = HANDSHAKE_SECONDS
        async with serve(self._converse, sock=listening, process_request=self._admit, **settings):
            await self._stop.wait()
        self._taker.shutdown()  # idle: the conversations are over
        forwards.cancel()
        with suppress(asyncio.CancelledError):
            await forwards

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Return a response that refuses the websocket, or None to open it."""
        if request.path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if request.headers.get_all("Origin"):
            return connection.respond(HTTPStatus.FORBIDDEN, "web pages are not served\n")
        if self._token is not None:
            sent = " ".join(request.headers.get_all("Authorization"))
            if not hmac.compare_digest(sent.encode(errors="replace"), f"Api-Key {self._token}".encode()):
                found = "another one" if sent else "none"
                words = f"this server needs the header Authorization: Api-Key TOKEN with its token, got {found}\n"
                return connection.respond(HTTPStatus.UNAUTHORIZED, words)
        versions = request.headers.get_all(VERSION_HEADER)
        if versions and versions != [str(PROTOCOL_VERSION)]:
            words = f"this server speaks protocol version {PROTOCOL_VERSION}, the client {', '.join(versions)[:40]!a}\n"
            return connection.respond(HTTPStatus.BAD_REQUEST, words)
        if not self._has_place():
            words = f"this server has {len(self._connections)} clients, the most that it takes; try again later\n"
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, words)
        assert isinstance(connection, BoundedConnection)
        self._connections.add(connection)
        self._gate.mark_authenticated(connection.number)
        return None

    def _has_place(self) -> bool:
        """True if another client may connect; if all places are taken, the client that has been idle longest is
        disconnected."""
        self._connections = {one for one in self._connections if not one.transport.is_closing()}
        if len(self._connections) < self.max_clients:
            return True
        idlest = min(self._connections, key=lambda one: one.heard)
        if time.monotonic() - idlest.heard < IDLE:
            return False
        self._connections.discard(idlest)
        idlest.transport.abort()
        return True

    async def _converse(self, connection: ServerConnection) -> None:
        assert isinstance(connection, BoundedConnection)
        try:
            await self._serve_client(connection)
        except ConnectionClosed:  # a client may leave at any time
            pass
        finally:
            self._connections.discard(connection)

    async def _serve_client(self, connection: BoundedConnection) -> None:
        """Answer a client's messages until it leaves or a reply cannot be made."""
        await connection.send(pack(self.metadata))
        inbox = Inbox(self.obs_spec, self.actor.policy.spec.action_dim, self.max_episode_bytes, self._uploads)
        try:
            await self._answer_messages(connection, inbox)
        finally:
            self._uploads.release(inbox)

    async def _answer_messages(self, connection: BoundedConnection, inbox: Inbox) -> None:
        previous: dict[str, float] = {}
        async for message in connection:
            connection.message_read()
            received = time.perf_counter()
            try:
                reply = await self._reply(message, inbox, received, previous)
            except PocoError as error:
                reply = str(error)[:_LONGEST_TEXT]
            except BusyError as error:
                await connection.close(1013, f"try again later: {error}")
                return
            except _NotStoredError as error:
                words = "an episode could not be kept now, its sender keeps it: %s"
                logger.error(words, error, exc_info=bug_behind(error.cause))  # noqa: TRY400
                await connection.close(1011, "the episode could not be kept")
                return
            except Exception as error:  # whatever the model raises: the other clients are still served
                logger.exception("a request could not be answered")
                await connection.send(f"internal error: {type(error).__name__}: {error}"[:_LONGEST_TEXT])
                await connection.close(1011, "internal error")
                return
            await connection.send(reply)
            previous = {"prev_total_ms": _milliseconds_since(received)}

    async def _reply(self, message: str | bytes, inbox: Inbox, received: float, previous: Mapping[str, float]) -> bytes:
        if isinstance(message, str):
            raise ProtocolError("got a text; a request is a binary message")
        request = unpack(message, self.limits)
        if isinstance(request, dict) and request.keys() == {"status"}:
            return pack({"status": dict(self._sink().status())})
        if isinstance(request, dict) and "episode" in request:
            return pack(await self._handle_episode(request, inbox))
        return pack(await self._chunk(request, received, previous))

    async def _chunk(self, request: Any, received: float, previous: Mapping[str, float]) -> dict[str, Any]:
        asked = check_request(request, self.obs_spec)
        self._waiting.put_nowait(asked)
        answer = await asyncio.wrap_future(asked.answer)
        return {
            "actions": answer.actions,
            "weights_version": answer.weights_version,
            "server_timing": {"infer_ms": _milliseconds_since(received), **previous},
            "policy_timing": {"infer_ms": answer.seconds * 1e3, "batch": answer.batch},
        }

    # -- episodes -----------------------------------------------------------------------------------------------------

    def _sink(self) -> EpisodeSink:
        if self.episodes is None:
            raise DataError("this server takes no episodes: no training run is behind it")
        return self.episodes

    async def _handle_episode(self, message: Mapping[Any, Any], inbox: Inbox) -> dict[str, Any]:
        sink = self._sink()
        if "rows" in message:
            return {"episode": message["episode"], "rows": inbox.add(message)}
        episode = inbox.finish(message)
        try:
            await self._take(sink, episode, message["episode"])
        except DataError:
            raise
        except Exception as error:
            raise _NotStoredError(error) from error
        finally:
            self._uploads.release(inbox)
        return {"episode": message["episode"], "recorded": True}

    async def _take(self, sink: EpisodeSink, episode: Episode, key: str) -> None:
        """Pass an episode to the sink. If the same episode is being stored already, because its sender lost the
        connection and sent it again, wait for that: it is held in memory once."""
        if key not in self._taking:
            self._taking[key] = self._loop.run_in_executor(self._taker, sink.take, episode, key)
            self._taking[key].add_done_callback(lambda _: self._taking.pop(key))
        del episode
        await self._taking[key]

    # -- forwards -----------------------------------------------------------------------------------------------------

    async def _run_batches(self) -> None:
        """Run one forward after another in a thread, so that pings and refusals do not wait for it."""
        with ThreadPoolExecutor(1, "policy-server-forward") as thread:
            while True:
                batch = [await self._waiting.get()]
                while len(batch) < self.max_batch and not self._waiting.empty():
                    batch.append(self._waiting.get_nowait())
                await asyncio.get_running_loop().run_in_executor(thread, self._answer, batch)

    def _answer(self, batch: Sequence[PendingRequest]) -> None:
        try:
            answers = self._forward(batch)
        except Exception as error:  # handed to whoever asked: this thread serves everybody
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
                return
            for asked in batch:  # one state may have spoilt it for the others
                self._answer([asked])
            return
        for asked, answer in zip(batch, answers, strict=True):
            asked.answer.set_result(answer)

    def _forward(self, batch: Sequence[PendingRequest]) -> list[ChunkAnswer]:
        obs = {key: np.stack([asked.obs[key] for asked in batch]) for key in self.obs_spec}
        started = time.perf_counter()
        chunks = self.actor.chunks(obs, [asked.task for asked in batch])
        seconds = time.perf_counter() - started
        return [ChunkAnswer(chunk, self.actor.weights_version, seconds, len(batch)) for chunk in chunks]


def check_serving(host: str, port: int, token: str | None, *, insecure: bool, encrypted: bool) -> None:
    """Raise ConfigError, before any long work, unless this machine can serve at an address with the required access
    control."""
    check_access(host, token, insecure=insecure, encrypted=encrypted)
    listen(host, port).close()


def _milliseconds_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
