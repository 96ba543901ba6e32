"""The policy's side: one policy, any number of robots, openpi's websocket protocol.

On connecting a client gets the metadata; then each request, a map of one state's observations and its instruction, gets
a map of one chunk. A request that cannot be answered gets a text with the reason, and the conversation goes on.
"""

import asyncio
import hmac
import ipaddress
import logging
import socket
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from poco_vla.errors import ConfigError, DataError, NonFiniteError, PocoError, PolicyError
from poco_vla.policy import FlowPolicy
from poco_vla.rollout.serving.codec import (
    MAX_BYTES,
    PROTOCOL_VERSION,
    VERSION_HEADER,
    Limits,
    ProtocolError,
    pack,
    unpack,
)

logger = logging.getLogger(__name__)

INSTRUCTION_KEYS = ("task", "prompt")
"""LeRobot's name of the instruction, and openpi's."""
_LONGEST_TEXT = 2000
"""Characters of a refusal: a client that sends a thousand keys gets them not all back."""


@runtime_checkable  # for the test run's machine-checked signatures
class ChunkSource(Protocol):
    """What is served: :class:`poco_vla.rollout.Actor`, or what acts like one."""

    policy: FlowPolicy

    def chunks(self, obs: Mapping[str, np.ndarray], tasks: Sequence[str]) -> np.ndarray:
        """[B, H, action_dim] float32, in the robot's units."""
        ...


@dataclass(frozen=True)
class Feature:
    """One observation of one state.

    Attributes:
        shape: its axes; a picture's are height, width, 3.
        dtype: numpy's name, such as "float32"; a picture's is "uint8".
    """

    shape: tuple[int, ...]
    dtype: str

    def check(self, key: str, found: Any) -> np.ndarray:
        """The value, if it is such a feature.

        Raises:
            DataError: it is not; the message says what was found and what was expected.
        """
        expected = f"expected {self.dtype} of shape {list(self.shape)}"
        if not isinstance(found, np.ndarray):
            raise DataError(f'"{key}" is a {type(found).__name__}, {expected}')
        if found.shape != self.shape or found.dtype.name != self.dtype:
            raise DataError(f'"{key}" is {found.dtype.name} of shape {list(found.shape)}, {expected}')
        if found.dtype.kind == "f" and not np.isfinite(found).all():
            raise DataError(f'"{key}" holds NaN or infinite numbers: nothing was sampled from it')
        return found


def observation_spec(features: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Feature]:
    """What a policy is to be sent: those of a LeRobot dataset's features (`DatasetInfo.features`) that it reads.

    Args:
        features: key -> dtype, shape, names.
        keys: the policy's `input_keys`.
    """
    keys = list(keys)
    if missing := [key for key in keys if key not in features]:
        raise ConfigError(f"the policy reads {missing}, which the dataset does not have; it has {sorted(features)}")
    return {key: _feature(features[key]) for key in keys}


def observations_of(policy: str, keys: Iterable[str]) -> dict[str, Feature]:
    """What an exported policy is to be sent, by its LeRobot configuration.

    Args:
        policy: LeRobot policy folder or Hub id.
        keys: the policy's `input_keys`.
    """
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.configs.types import FeatureType
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    inputs = PreTrainedConfig.from_pretrained(policy).input_features or {}
    found = {}
    for key in keys:
        if key not in inputs:
            raise ConfigError(f"{policy} does not say what {key} looks like; its inputs: {sorted(inputs)}")
        shape = tuple(inputs[key].shape)
        picture = inputs[key].type is FeatureType.VISUAL
        found[key] = Feature((*shape[1:], shape[0]), "uint8") if picture else Feature(shape, "float32")
    return found


def _feature(description: Mapping[str, Any]) -> Feature:
    shape = tuple(int(size) for size in description["shape"])
    if description["dtype"] not in ("image", "video"):
        return Feature(shape, description["dtype"])
    channels_first = "channel" in str((description.get("names") or [""])[0])
    return Feature((*shape[1:], shape[0]) if channels_first else shape, "uint8")


@dataclass(frozen=True)
class _Asked:
    """A checked request that waits for its chunk."""

    obs: dict[str, np.ndarray]
    task: str
    answer: "Future[_Answer]" = field(default_factory=Future)


@dataclass(frozen=True)
class _Answer:
    """A chunk [H, A], the weights it is of, the seconds of its forward and the states that shared that."""

    actions: np.ndarray
    weights_version: int
    seconds: float
    batch: int


class PolicyServer:
    """Serves chunks over a websocket, from a thread of its own, for as long as its ``with`` block lasts.

    Requests of several clients that wait at the same time are answered by one forward. GET /healthz answers 200 to
    anybody.

    Args:
        actor: samples the chunks. Nobody else may use it or its policy meanwhile, but through `publish`.
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
        weights_version: of the weights that the policy has now.
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
        weights_version: int = 0,
        insecure: bool = False,
    ) -> None:
        _check_access(host, token, insecure, encrypted=certificate is not None)
        self.actor, self.obs_spec = actor, dict(obs_spec)
        self.adapter, self.fps = adapter, fps
        self.host, self.port = host, port
        self.limits = Limits(max_bytes=max_bytes)
        self.max_batch = max_batch
        self.weights_version = weights_version
        self._token = token
        self._tls = _server_tls(certificate, key)
        self._head = threading.Lock()
        self._waiting: asyncio.Queue[_Asked] = asyncio.Queue()
        self._stop = asyncio.Event()
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where clients on this machine connect to."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'wss' if self._tls else 'ws'}://{host}:{self.port}"

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client is told on connecting."""
        spec = self.actor.policy.spec
        return {
            "protocol_version": PROTOCOL_VERSION,
            "adapter": self.adapter,
            "horizon": spec.horizon,
            "action_dim": spec.action_dim,
            "fps": self.fps,
            "observation": {key: {"shape": list(f.shape), "dtype": f.dtype} for key, f in self.obs_spec.items()},
            "max_bytes": self.limits.max_bytes,
            "weights_version": self.weights_version,
        }

    def __enter__(self) -> "PolicyServer":
        assert self._thread is None, "a server serves once"
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            listening = socket.create_server((self.host, self.port), family=family)
        except OSError as error:
            raise ConfigError(f"cannot listen on {self.host}:{self.port}: {error}") from error
        self.port = listening.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(listening,), name="policy-server", daemon=True)
        self._thread.start()
        logger.info("serving %s on %s", self.adapter, self.url)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye to the clients (close code 1001) and free the port. May be called twice."""
        if self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Put new weights into the policy's head, between two forwards and never inside one.

        Args:
            weights: name -> value, as in `policy.head.state_dict()`: every trained one, others if they changed.
            version: said with every chunk of these weights.

        Raises:
            PolicyError, NonFiniteError: they are not of this head, or not finite; the head keeps what it has.
        """
        head = self.actor.policy.head
        there = head.state_dict()
        trained = {name for name, parameter in head.named_parameters() if parameter.requires_grad}
        _check_weights(weights, there, trained)
        with self._head, torch.no_grad():
            for name, value in weights.items():
                there[name].copy_(value)
            self.weights_version = version

    # -- connections --------------------------------------------------------------------------------------------------

    def _run(self, listening: socket.socket) -> None:
        try:
            self._loop.run_until_complete(self._serve(listening))
        finally:
            self._loop.close()

    async def _serve(self, listening: socket.socket) -> None:
        forwards = asyncio.create_task(self._answer_all())
        settings: dict[str, Any] = {"ssl": self._tls, "max_size": self.limits.max_bytes}
        # Pictures hardly shrink and take long to; of what a client sends ahead, little is read ahead.
        settings |= {"compression": None, "max_queue": 2}
        async with serve(self._converse, sock=listening, process_request=self._admit, **settings):
            await self._stop.wait()
        forwards.cancel()
        with suppress(asyncio.CancelledError):
            await forwards

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer instead of opening the websocket, or None."""
        if request.path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
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
        return None

    async def _converse(self, connection: ServerConnection) -> None:
        with suppress(ConnectionClosed):  # a client may leave at any time
            await connection.send(pack(self.metadata))
            previous: dict[str, float] = {}
            async for message in connection:
                received = time.perf_counter()
                try:
                    reply = await self._reply(message, received, previous)
                except PocoError as error:
                    reply = str(error)[:_LONGEST_TEXT]
                except Exception as error:  # whatever the model raises: the other clients are still served
                    logger.exception("a request could not be answered")
                    await connection.send(f"internal error: {type(error).__name__}: {error}"[:_LONGEST_TEXT])
                    await connection.close(1011, "internal error")
                    return
                await connection.send(reply)
                previous = {"prev_total_ms": _milliseconds_since(received)}

    async def _reply(self, message: str | bytes, received: float, previous: Mapping[str, float]) -> bytes:
        if isinstance(message, str):
            raise ProtocolError("got a text; a request is a binary message")
        asked = check_request(unpack(message, self.limits), self.obs_spec)
        self._waiting.put_nowait(asked)
        answer = await asyncio.wrap_future(asked.answer)
        return pack(
            {
                "actions": answer.actions,
                "weights_version": answer.weights_version,
                "server_timing": {"infer_ms": _milliseconds_since(received), **previous},
                "policy_timing": {"infer_ms": answer.seconds * 1e3, "batch": answer.batch},
            }
        )

    # -- forwards -----------------------------------------------------------------------------------------------------

    async def _answer_all(self) -> None:
        """One forward after another, in a thread, so that pings and refusals do not wait for it."""
        with ThreadPoolExecutor(1, "policy-server-forward") as thread:
            while True:
                batch = [await self._waiting.get()]
                while len(batch) < self.max_batch and not self._waiting.empty():
                    batch.append(self._waiting.get_nowait())
                await asyncio.get_running_loop().run_in_executor(thread, self._answer, batch)

    def _answer(self, batch: Sequence[_Asked]) -> None:
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

    def _forward(self, batch: Sequence[_Asked]) -> list[_Answer]:
        obs = {key: np.stack([asked.obs[key] for asked in batch]) for key in self.obs_spec}
        with self._head:
            started = time.perf_counter()
            chunks = self.actor.chunks(obs, [asked.task for asked in batch])
            seconds = time.perf_counter() - started
            return [_Answer(chunk, self.weights_version, seconds, len(batch)) for chunk in chunks]


def check_request(request: Any, spec: Mapping[str, Feature]) -> _Asked:
    """A request's observations and instruction.

    Raises:
        DataError: a camera is missing, an observation is unknown or of another shape or dtype, a number is not finite.
    """
    if not isinstance(request, dict):
        raise DataError(f"a request is a map of observations, got a {type(request).__name__}")
    found = sorted(repr(key) for key in request)
    named = [key for key in INSTRUCTION_KEYS if key in request]
    if len(named) != 1:
        raise DataError(f'a request holds the instruction as "task" or as "prompt", got {named or "neither"}')
    expected = [*spec, named[0]]
    if missing := [key for key in spec if key not in request]:
        raise DataError(f"{missing} missing: expected {expected}, found {found}")
    if unknown := sorted(repr(key) for key in request if key not in expected):
        raise DataError(f"{unknown} not known: expected {expected}")
    if not isinstance(request[named[0]], str):
        raise DataError(f'"{named[0]}" is a {type(request[named[0]]).__name__}, expected a text')
    return _Asked({key: feature.check(key, request[key]) for key, feature in spec.items()}, request[named[0]])


def _check_weights(weights: Mapping[str, Tensor], there: Mapping[str, Tensor], trained: set[str]) -> None:
    wrong: dict[str, list[str]] = defaultdict(list)
    wrong["missing"] += sorted(trained - weights.keys())
    wrong["unknown"] += sorted(weights.keys() - there.keys())
    wrong["of another shape"] += [n for n, w in weights.items() if n in there and w.shape != there[n].shape]
    if any(wrong.values()):
        listed = "; ".join(f"{what}: {', '.join(names[:5])} ({len(names)})" for what, names in wrong.items() if names)
        raise PolicyError(f"these weights are not of the served head: {listed}")
    if broken := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise NonFiniteError(f"not published: {', '.join(broken[:5])} hold NaN or infinite weights")


def _check_access(host: str, token: str | None, insecure: bool, encrypted: bool) -> None:
    if token is not None and (not token or not token.isascii() or not token.isprintable() or token != token.strip()):
        raise ConfigError(
            "the token is empty, or holds what a header cannot: use printable ASCII without spaces around"
        )
    if _is_loopback(host):
        return
    if token is None and not insecure:
        raise ConfigError(
            f"{host} can be reached from other machines, and there is no token: give a token, listen on 127.0.0.1, or "
            "say insecure=True where everybody on the network may drive the policy"
        )
    if token is not None and not encrypted:
        logger.warning("the token and the pictures cross the network in the clear: give a certificate and a key")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may resolve to anything
        return False


def _server_tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if certificate is None and key is not None:
        raise ConfigError(f"a key ({key}) without a certificate: give both")
    if certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"cannot read the certificate {certificate} with the key {key or certificate}: {error}"
        ) from error
    return context


def _milliseconds_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
