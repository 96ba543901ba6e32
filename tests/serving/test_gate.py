"""Test the bounds of a server: connections, clients, unfinished messages, texts, episodes, files."""

import logging
import socket
import time
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from test_episodes import SHORT, SPEC, Sink, ask, episode, messages_of, server_of, state
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from poco_vla.errors import ConfigError
from poco_vla.serving import gate
from poco_vla.serving import server as module
from poco_vla.serving.client import PolicyClient, Retry
from poco_vla.serving.codec import pack, unpack

ANSWERS = 10.0
"""Seconds for anything here to happen."""


@contextmanager
def stranger(server, data=b""):
    with socket.create_connection(("127.0.0.1", server.port), timeout=ANSWERS) as connection:
        connection.sendall(data)
        yield connection


def is_dropped(connection):
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


def raw(server, stack):
    connection = stack.enter_context(connect(server.url, compression=None))
    connection.recv(timeout=ANSWERS)
    return connection


def until(true):
    deadline = time.monotonic() + ANSWERS
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


# -- strangers --------------------------------------------------------------------------------------------------------


def test_of_many_idle_strangers_the_oldest_are_dropped_and_a_robot_gets_in():
    with server_of(Sink(), token="secret") as server, ExitStack() as stack:
        strangers = [stack.enter_context(stranger(server)) for _ in range(gate.MAX_UNAUTHENTICATED + 20)]
        assert is_dropped(strangers[0])
        assert until(lambda: server._gate.num_unauthenticated <= gate.MAX_UNAUTHENTICATED)
        with PolicyClient(server.url, "secret") as client:
            assert client.chunk(state(), "go").actions.shape == (4, 3)
            assert until(lambda: server._gate.num_unauthenticated <= gate.MAX_UNAUTHENTICATED)


def test_a_stranger_that_says_nothing_is_dropped_after_a_while_without_a_line_in_the_log(monkeypatch, caplog):
    monkeypatch.setattr(module, "HANDSHAKE_SECONDS", 0.2)
    with server_of(Sink()) as server, stranger(server, b"GET / HTTP/1.1\r\nHost: x\r\n") as connection:
        assert is_dropped(connection)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_request_without_end_is_cut_off_early():
    """websockets would read 128 lines of 8 kB."""
    with server_of(Sink()) as server, stranger(server, b"GET / HTTP/1.1\r\n") as connection:
        sent = 0
        with pytest.raises(ConnectionError):  # noqa: PT012 (it ends at any of them)
            for _ in range(200):
                connection.sendall(b"X: " + 4000 * b"x" + b"\r\n")
                sent += 4005
                time.sleep(0.005)
        assert sent < 20 * gate.MAX_HEAD


def test_a_refused_stranger_that_stays_is_counted_as_one():
    request = b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    request += b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    with server_of(Sink(), token="secret") as server, stranger(server, request) as connection:
        assert b"401" in connection.recv(1000)
        assert server.num_clients == 0


# -- clients ----------------------------------------------------------------------------------------------------------


def test_clients_beyond_the_bound_are_told_to_come_later_and_an_idle_one_makes_room(monkeypatch):
    with server_of(Sink(), max_clients=2) as server, ExitStack() as stack:
        first, second = raw(server, stack), raw(server, stack)
        with pytest.raises(InvalidStatus) as caught:
            connect(server.url)
        assert caught.value.response.status_code == 503
        assert b"2 clients" in caught.value.response.body
        assert not isinstance(ask(second, pack({"status": True})), str)
        monkeypatch.setattr(module, "IDLE", 0.0)
        third = raw(server, stack)
        assert not isinstance(ask(third, pack({"status": True})), str)
        with pytest.raises(ConnectionClosed):
            ask(first, pack({"status": True}))


def test_a_place_is_free_again_when_its_client_is_gone():
    with server_of(Sink(), max_clients=1) as server:
        for _ in range(5):
            with PolicyClient(server.url, retry=Retry(budget=ANSWERS)) as client:
                client.status()


def test_connections_leave_files_to_the_rest_of_the_process(monkeypatch):
    monkeypatch.setattr(gate.resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(gate, "_open_files", lambda: 40)
    for limit, room in ((100_000, 64), (40 + gate.RESERVE + 10, 10), (64, 1)):
        monkeypatch.setattr(gate.resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert gate.room_for_connections(64) == room


def test_the_limit_of_open_files_is_raised_where_it_may_be():
    soft, hard = gate.resource.getrlimit(gate.resource.RLIMIT_NOFILE)
    try:
        gate.resource.setrlimit(gate.resource.RLIMIT_NOFILE, (min(512, hard), hard))
        gate.room_for_connections(64)
        assert gate.resource.getrlimit(gate.resource.RLIMIT_NOFILE)[0] == min(gate.FILES, hard)
    finally:
        gate.resource.setrlimit(gate.resource.RLIMIT_NOFILE, (soft, hard))


# -- bytes on their way -----------------------------------------------------------------------------------------------


def frame(size, sent):
    """The beginning of a binary frame of `size` bytes, masked by zeros."""
    return b"\x82\xff" + size.to_bytes(8) + bytes(4) + bytes(sent)


def test_a_message_longer_than_observations_can_be_is_refused_at_its_first_bytes():
    with server_of(Sink(), max_bytes=64 * 1024**2) as server, ExitStack() as stack:
        assert server.limits.max_bytes == server.metadata["max_bytes"] == gate.MIN_MESSAGE
        connection = raw(server, stack)
        connection.socket.sendall(frame(55 * 1024**2, 10))
        with pytest.raises(ConnectionClosed) as caught:
            connection.recv(timeout=ANSWERS)
        assert caught.value.rcvd.code == 1009
    assert gate.message_limit(2 * 640 * 480 * 3, 64 * 1024**2) > 8 * 2 * 640 * 480 * 3


def test_messages_that_are_not_whole_are_bounded_together(monkeypatch):
    monkeypatch.setattr(module, "MESSAGES_AHEAD", 300_000)
    with server_of(Sink(), max_bytes=100_000) as server, ExitStack() as stack:
        bystander = raw(server, stack)
        greedy = [raw(server, stack) for _ in range(5)]
        for connection in greedy:
            connection.socket.sendall(frame(100_000, 90_000))
        assert until(lambda: sum(server._intake.held.values()) <= 300_000 and server.num_clients < 6)
        assert server.num_clients >= 4
        assert not isinstance(ask(bystander, pack({"status": True})), str)
        for connection in greedy:  # a close frame would be taken for the message's next bytes, and waited for
            connection.socket.close()


def test_a_message_that_was_read_holds_nothing():
    with server_of(Sink()) as server, PolicyClient(server.url) as client:
        for seed in range(5):
            client.record(episode(seed=seed), f"k{seed}")
        assert sum(server._intake.held.values()) < SHORT


@pytest.mark.parametrize("text", [5000 * "x", 100_000 * "x"])
def test_texts_are_bounded_and_the_conversation_goes_on(text):
    with server_of(Sink(), max_bytes=10**6) as server, ExitStack() as stack:
        connection = raw(server, stack)
        reply = ask(connection, pack({**state(), "task": text}))
        assert "at most" in reply
        assert len(reply) < 200
        *rows, end = messages_of(episode())
        for message in rows:
            ask(connection, message)
        assert "at most" in ask(connection, end | {"task": text})
        assert unpack(ask_bytes(connection))["actions"].shape == (4, 3)


def ask_bytes(connection):
    connection.send(pack({**state(), "task": "go"}))
    return connection.recv(timeout=ANSWERS)


# -- episodes ---------------------------------------------------------------------------------------------------------


def test_an_episode_beyond_those_that_may_be_on_their_way_comes_later():
    sink = Sink()
    with server_of(sink, max_uploads=1) as server, ExitStack() as stack:
        first = raw(server, stack)
        begin, *rest = messages_of(episode())
        ask(first, begin)
        second = raw(server, stack)
        with pytest.raises(ConnectionClosed) as caught:
            ask(second, begin)
        assert caught.value.rcvd.code == 1013
        for message in rest:
            assert not isinstance(ask(first, message), str)
        with PolicyClient(server.url) as client:
            client.record(episode(seed=1), "b")
        assert set(sink.kept) == {"a", "b"}


def test_who_stops_in_the_middle_loses_the_place_to_another(monkeypatch):
    monkeypatch.setattr("poco_vla.serving.uploads.IDLE", 0.0)
    sink = Sink()
    with server_of(sink, max_uploads=1) as server, ExitStack() as stack:
        first = raw(server, stack)
        begin, second_piece, *_ = messages_of(episode())
        ask(first, begin)
        with PolicyClient(server.url) as client:
            client.record(episode(seed=1), "b")
        assert "expected row 0 of any" in ask(first, second_piece)
        assert list(sink.kept) == ["b"]


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("port", "said"), [(99999, "number from 1 to 65535"), (-1, "number from 1")])
def test_a_port_that_is_none_is_said_in_a_sentence(port, said):
    with pytest.raises(ConfigError, match=said), server_of(Sink(), port=port):
        pass


def test_a_port_of_the_administrators_is_said_in_a_sentence(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(gate.socket, "create_server", refuse)
    with (
        pytest.raises(ConfigError, match=r"port 80: ports below 1024 are the administrator's"),
        server_of(Sink(), port=80),
    ):
        pass


def test_an_address_that_is_not_this_machines_is_said_in_a_sentence():
    with (
        pytest.raises(ConfigError, match=r"cannot listen on 192.0.2.1"),
        server_of(Sink(), host="192.0.2.1", token="x"),
    ):
        pass


def test_no_token_for_other_machines_names_the_options():
    with pytest.raises(ConfigError, match=r"POCO_VLA_TOKEN.*--host.*--insecure.*--interaction.insecure"):
        server_of(Sink(), host="0.0.0.0")


# -- numbers of other kinds -------------------------------------------------------------------------------------------


def test_numbers_of_numpys_own_kinds_are_taken_as_float32():
    """Send what openpi's clients send: float64 by default, whole numbers where they were counted."""
    seen = []

    with server_of(Sink(), max_bytes=10**5) as server, ExitStack() as stack:
        chunks = server.actor.chunks
        server.actor.chunks = lambda obs, tasks: seen.append(obs["observation.state"]) or chunks(obs, tasks)
        connection = raw(server, stack)
        picture = {"observation.images.top": np.ones(SPEC["observation.images.top"].shape, np.int64)}
        for numbers in (np.arange(6.0), np.arange(6), np.arange(6, dtype=np.float16)):
            reply = ask(connection, pack({"observation.state": numbers, **picture, "prompt": "go"}))
            assert reply["actions"].shape == (4, 3), reply
    for obs in seen:
        assert obs.dtype == np.float32
        np.testing.assert_array_equal(obs[0], np.arange(6))
