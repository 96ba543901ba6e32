"""Episodes that go up a real socket: they arrive as they were, whatever is cut off, and what is none is refused."""

import random
import socket
import threading
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot_policy_flow_mlp.adapter import FlowMlp
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from poco_vla.data.episode import Episode
from poco_vla.errors import DataError
from poco_vla.rollout import Actor
from poco_vla.serving.client import ConnectionLostError, PolicyClient, RefusedError, Retry
from poco_vla.serving.codec import MessageLimits, ProtocolError, pack, unpack
from poco_vla.serving.feature import Feature
from poco_vla.serving.server import PolicyServer
from poco_vla.serving.upload import PIECE_BYTES, Inbox, ending, pieces

SPEC = {"observation.state": Feature((6,), "float32"), "observation.images.top": Feature((4, 5, 3), "uint8")}
ROW_BYTES = 6 * 4 + 4 * 5 * 3 + 3 * 4 + 4 + 1 + 1
SHORT = 1500
"""Bytes of a message, so that an episode takes several."""
NO_RETRY = Retry(budget=0.0)


def episode(steps=25, seed=0, *, from_policy=True, **changes):
    rng = np.random.default_rng(seed)
    whole = Episode(
        obs={
            "observation.state": rng.normal(size=(steps, 6)).astype(np.float32),
            "observation.images.top": rng.integers(0, 256, (steps, 4, 5, 3), np.uint8),
        },
        action=rng.normal(size=(steps, 3)).astype(np.float32),
        reward=rng.normal(size=steps).astype(np.float32),
        success=rng.random(steps) < 0.5,
        terminal=rng.random(steps) < 0.5,
        task="pick up the pen",
        seed=seed or None,
        policy_version=rng.integers(-1, 10**12, steps) if from_policy else None,
        interventions=rng.random(steps) < 0.5 if from_policy else None,
    )
    return replace(whole, **changes)


def equal(a, b):
    return a.dtype == b.dtype and np.array_equal(a, b) if isinstance(a, np.ndarray) else (type(a), a) == (type(b), b)


def same(a, b):
    assert a.obs.keys() == b.obs.keys()
    assert all(equal(a.obs[key], b.obs[key]) for key in a.obs)
    own = [f.name for f in fields(Episode) if f.name != "obs"]
    assert all(equal(getattr(a, name), getattr(b, name)) for name in own)
    return True


class Sink:
    """Keeps episodes by their keys, and who asked for it."""

    def __init__(self):
        self.kept, self.calls = {}, []

    def status(self):
        return {"act": True, "done": False, "env_steps": 7, "note": "learning"}

    def take(self, episode, key):
        self.calls.append(key)
        self.kept.setdefault(key, episode)


class Seeing(Actor):
    """Its policy reads no pictures."""

    def chunks(self, obs, tasks, **options):
        return super().chunks({"observation.state": obs["observation.state"]}, tasks, **options)


def server_of(sink, **options):
    defaults = {"adapter": "flow_mlp", "fps": 15.0, "max_bytes": SHORT}
    return PolicyServer(Seeing(FlowMlp.tiny(), seed=5), SPEC, episodes=sink, **(defaults | options))


@pytest.fixture
def sink():
    return Sink()


@pytest.fixture
def server(sink):
    with server_of(sink) as running:
        yield running


@contextmanager
def raw(server):
    """A connection without our client, past the metadata."""
    with connect(server.url, compression=None) as connection:
        connection.recv(timeout=10)
        yield connection


def ask(connection, message):
    connection.send(message if isinstance(message, bytes) else pack(message))
    reply = connection.recv(timeout=10)
    return reply if isinstance(reply, str) else unpack(reply)


def messages_of(whole, key="a"):
    return [*pieces(whole, key, SHORT), ending(whole, key)]


def state():
    rows = episode(1).obs
    return {key: column[0] for key, column in rows.items()}


# -- cutting and joining ----------------------------------------------------------------------------------------------

EPISODES = st.builds(
    episode, steps=st.integers(1, 40), seed=st.integers(0, 5), from_policy=st.booleans(), task=st.text(max_size=20)
)


@settings(deadline=None, max_examples=150)
@given(EPISODES, st.integers(850, 6000), st.text("\u00e9k", min_size=1, max_size=20))
def test_what_is_cut_and_joined_is_the_same(whole, max_bytes, key):
    inbox = Inbox(SPEC, 3, 10**6)
    sent = [pack(piece) for piece in pieces(whole, key, max_bytes)]
    assert max(map(len, sent)) <= max_bytes
    counts = [inbox.add(unpack(message)) for message in sent]
    assert counts[-1] == len(whole)
    assert same(inbox.finish(unpack(pack(ending(whole, key)))), whole)


def test_pieces_are_as_long_as_messages_may_be_up_to_a_limit_that_lets_others_through():
    whole = episode(200)
    sent = [len(pack(piece)) for piece in pieces(whole, "a", 5000)]
    assert min(sent[:-1]) > 5000 - 2 * ROW_BYTES - 300
    large = replace(whole, obs={**whole.obs, "observation.images.top": np.zeros((200, 240, 320, 3), np.uint8)})
    sent = [sum(column.nbytes for column in piece["rows"].values()) for piece in pieces(large, "a", 64 * 2**20)]
    assert PIECE_BYTES / 2 < max(sent) <= PIECE_BYTES
    assert len(sent) == np.ceil(200 / (PIECE_BYTES // (240 * 320 * 3 + 200)))


def test_a_step_that_is_longer_than_a_piece_goes_alone():
    wide = episode(2, obs={"x": np.zeros((2, 3 * PIECE_BYTES), np.uint8)})
    assert [len(piece["rows"]["x"]) for piece in pieces(wide, "a", 4 * PIECE_BYTES)] == [1, 1]
    with pytest.raises(DataError, match="one step of the episode takes"):
        list(pieces(wide, "a", 2 * PIECE_BYTES))


@pytest.mark.parametrize("change", [{"action": np.zeros((24, 3), np.float32)}, {"terminal": np.zeros(26, bool)}])
def test_columns_of_different_lengths_are_not_sent(change):
    with pytest.raises(DataError, match="of one length"):
        list(pieces(episode(25, **change), "a", SHORT))


def test_an_episode_without_steps_is_not_sent():
    with pytest.raises(DataError, match="at least 1 step"):
        list(pieces(episode(0), "a", SHORT))


JUNK = st.one_of(
    *(st.none(), st.booleans(), st.integers(-3, 2**64 - 1), st.floats(), st.text(max_size=3), st.binary(max_size=3)),
    *(st.just([1, 2]), st.just({}), st.just({"action": 1}), st.just(np.arange(3)), st.just(np.float32(1))),
    *(st.just(np.zeros(())), st.just({"action": np.zeros(())}), st.just("k" * 201)),
)


@settings(deadline=None, max_examples=400)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["", "key", "column"]), st.integers(0, 20), JUNK)))
def test_messages_with_junk_in_them_are_refused_and_raise_nothing_else(changes):
    """Three pieces and the end in any order, with anything in the place of a field or of a column."""
    parts = messages_of(episode(25), "a")
    parts = [*parts[:3], parts[-1]]
    inbox = Inbox(SPEC, 3, 10**6)
    for which, where, place, junk in changes:
        message = {**parts[which]}
        if where == "key":
            message[list(message)[place % len(message)]] = junk
        elif where == "column" and "rows" in message:
            message["rows"] = {**message["rows"], list(message["rows"])[place % len(message["rows"])]: junk}
        with suppress(DataError):
            inbox.add(message) if "rows" in message else inbox.finish(message)


# -- over the wire ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_policy", [True, False])
def test_an_episode_is_with_the_learner_when_record_returns(server, sink, from_policy):
    whole = episode(25, seed=3, from_policy=from_policy)
    with PolicyClient(server.url) as client:
        assert client.metadata["takes_episodes"]
        client.record(whole, "a")
        assert same(sink.kept["a"], whole)
        client.record(episode(1), "b")
        assert client.chunk(state(), "go").actions.shape == (4, 3)
    assert sink.calls == ["a", "b"]


def test_pictures_of_a_real_size_arrive_through_messages_of_the_usual_one(sink):
    picture = Feature((128, 128, 3), "uint8")
    whole = episode(300)
    rng = np.random.default_rng(0)
    cameras = {f"observation.images.{name}": rng.integers(0, 256, (300, 128, 128, 3), np.uint8) for name in "ab"}
    whole = replace(whole, obs={"observation.state": whole.obs["observation.state"], **cameras})
    spec = {"observation.state": SPEC["observation.state"], **dict.fromkeys(cameras, picture)}
    server = PolicyServer(Actor(FlowMlp.tiny(), seed=5), spec, adapter="x", fps=15.0, episodes=sink)
    with server, PolicyClient(server.url) as client:
        client.record(whole, "a")
    assert same(sink.kept["a"], whole)


def test_the_status_is_what_the_learner_says(server, sink):
    with PolicyClient(server.url) as client:
        assert client.status() == {"act": True, "done": False, "env_steps": 7, "note": "learning"}
        sink.status = lambda: {"act": False, "done": True}
        assert client.status() == {"act": False, "done": True}


@pytest.mark.parametrize("status", [{"act": True}, {"act": 1, "done": 0}, {}])
def test_a_status_that_does_not_say_whether_to_act_is_a_protocol_error(server, sink, status):
    sink.status = lambda: status
    with PolicyClient(server.url) as client, pytest.raises(ProtocolError, match='"act" and "done"'):
        client.status()


def test_a_server_without_a_learner_says_so():
    with server_of(None) as server:
        with PolicyClient(server.url) as client:
            assert not client.metadata["takes_episodes"]
            for talk in (client.status, lambda: client.record(episode(), "a")):
                with pytest.raises(RefusedError, match="this server takes no episodes"):
                    talk()
            assert client.chunk(state(), "go").actions.shape == (4, 3)
        with raw(server) as connection:
            assert "takes no episodes" in ask(connection, ending(episode(), "a"))


@pytest.mark.parametrize("request_", [{}, {"state": 1}, {"status": True, "x": 1}, {"steps": 3}], ids=str)
def test_a_map_of_no_known_kind_is_refused_with_words(server, request_):
    with raw(server) as connection:
        assert "a request holds the instruction" in ask(connection, request_)


def test_the_version_of_a_chunk_is_the_actors_after_it_sampled(sink):
    class Learning(Seeing):
        def chunks(self, obs, tasks, **options):
            self.weights_version += 5
            return super().chunks(obs, tasks, **options)

    server = PolicyServer(Learning(FlowMlp.tiny(), seed=5), SPEC, adapter="x", fps=15.0, episodes=sink)
    with server, PolicyClient(server.url) as client:
        assert client.metadata["weights_version"] == 0
        assert [client.chunk(state(), "go").weights_version for _ in range(2)] == [5, 10]


# -- what is refused --------------------------------------------------------------------------------------------------


def with_rows(message, **columns):
    return message | {"rows": message["rows"] | columns}


def without(message, name):
    return {key: value for key, value in message.items() if key != name}


def rows_of(message):
    return len(message["rows"]["action"])


def nan_at(column):
    column = column.copy()
    column[-1] = np.nan
    return column


BAD = {
    "torn": (lambda m: [m[0], m[2]], ["starts at row", "expected row"]),
    "wrong order": (lambda m: [m[1]], ["expected row 0 of any"]),
    "twice": (lambda m: [m[0], m[1], m[1]], ["expected row"]),
    "ended early": (lambda m: [m[0], m[-1]], ["of the 25 rows of 'a'"]),
    "ended at once": (lambda m: [m[-1]], ["no rows"]),
    "ended twice": (lambda m: [*m, m[-1]], ["no rows"]),
    "another's end": (lambda m: [*m[:-1], m[-1] | {"episode": "b"}], ["'b'", "'a'"]),
    "another's piece": (lambda m: [m[0], m[1] | {"episode": "b"}], ["of 'b'", "of 'a'"]),
    "steps changed": (lambda m: [m[0], m[1] | {"steps": 26}], ["of 26", "of 25"]),
    "no steps": (lambda m: [m[0] | {"steps": 0}], ["an episode of 0 steps"]),
    "too few steps": (lambda m: [m[0] | {"steps": 2}], ["rows from row 0 on", "an episode of 2"]),
    "steps no number": (lambda m: [m[0] | {"steps": np.arange(3)}], ['"steps" is a number']),
    "first negative": (lambda m: [m[0] | {"first": -1}], ['"first" is a number', "-1"]),
    "too many bytes": (lambda m: [m[0] | {"steps": 10**12}], ["1000000000000 steps", "bytes"]),
    "no rows": (
        lambda m: [m[0] | {"rows": {name: column[:0] for name, column in m[0]["rows"].items()}}],
        ["0 rows"],
    ),
    "rows no map": (lambda m: [m[0] | {"rows": [1]}], ['"rows" is a map', "list"]),
    "no camera": (
        lambda m: [m[0] | {"rows": without(m[0]["rows"], "observation.images.top")}],
        ["'observation.images.top'", "missing"],
    ),
    "other camera": (lambda m: [with_rows(m[0], side=m[0]["rows"]["reward"])], ["'side'", "not known"]),
    "camera's shape": (
        lambda m: [with_rows(m[0], **{"observation.images.top": np.zeros((rows_of(m[0]), 5, 4, 3), np.uint8)})],
        ["5, 4, 3]", "4, 5, 3]"],
    ),
    "action's width": (
        lambda m: [with_rows(m[0], action=np.zeros((rows_of(m[0]), 2), np.float32))],
        ['"action"', "2]", "3]"],
    ),
    "dtype": (lambda m: [with_rows(m[0], success=m[0]["rows"]["success"].astype(float))], ["float64", "bool"]),
    "column's length": (lambda m: [with_rows(m[0], success=m[0]["rows"]["success"][:-1])], ['"success"', "shape"]),
    "no array": (lambda m: [with_rows(m[0], success=[True])], ['"success" is a list']),
    "nan action": (lambda m: [with_rows(m[0], action=nan_at(m[0]["rows"]["action"]))], ['"action" holds NaN']),
    "nan state": (
        lambda m: [m[0], with_rows(m[1], **{"observation.state": nan_at(m[1]["rows"]["observation.state"])})],
        ['"observation.state" holds NaN'],
    ),
    "column lost": (lambda m: [m[0], m[1] | {"rows": without(m[1]["rows"], "interventions")}], ["'interventions'"]),
    "empty key": (lambda m: [m[0] | {"episode": ""}], ["1 to 200 characters"]),
    "key no text": (lambda m: [m[0] | {"episode": 3}], ["its key", "3"]),
    "unknown field": (lambda m: [m[0] | {"more": 1}], ["'more'", "not known"]),
    "task no text": (lambda m: [*m[:-1], m[-1] | {"task": 1}], ['"task" is a text']),
    "seed no number": (lambda m: [*m[:-1], m[-1] | {"seed": 0.5}], ['"seed" an integer']),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_message_is_answered_by_words_and_a_good_episode_is_taken_after_it(server, sink, kind):
    change, words = BAD[kind]
    good = messages_of(episode())
    assert len(good) > 4
    with raw(server) as connection:
        replies = [ask(connection, message) for message in change(good)]
        assert isinstance(replies[-1], str)
        assert not any(isinstance(reply, str) for reply in replies[:-1])
        assert not [word for word in words if word not in replies[-1]], replies[-1]
        assert len(sink.kept) == (kind == "ended twice")
        assert ask(connection, good[1]).startswith("this piece starts at"), "what came before is forgotten"
        assert ask(connection, {**state(), "task": "go"})["actions"].shape == (4, 3)
        replies = [ask(connection, message | {"episode": "good"}) for message in good]
        assert replies[-1] == {"episode": "good", "recorded": True}
    assert same(sink.kept["good"], episode())


def test_a_piece_that_starts_at_zero_begins_anew(server, sink):
    first, second = messages_of(episode(seed=1), "a"), messages_of(episode(seed=2), "b")
    with raw(server) as connection:
        for message in (*first[:2], *second):
            reply = ask(connection, message)
    assert reply == {"episode": "b", "recorded": True}
    assert list(sink.kept) == ["b"]
    assert same(sink.kept["b"], episode(seed=2))


def test_an_episode_beyond_the_limit_is_refused_at_its_first_piece():
    sink = Sink()
    size = ROW_BYTES + 8 + 1
    with server_of(sink, max_episode_bytes=25 * size) as server, PolicyClient(server.url) as client:
        client.record(episode(25), "a")
        with pytest.raises(RefusedError, match=f"an episode of 26 steps of {size} bytes"):
            client.record(episode(26), "b")
        with raw(server) as connection:
            assert "26 steps" in ask(connection, messages_of(episode(26))[0])
    assert sink.calls == ["a"]


def test_what_the_robot_cannot_send_is_refused_before_it_is_sent(server, sink):
    with PolicyClient(server.url) as client:
        with pytest.raises(RefusedError, match=r"not sent.*of one length"):
            client.record(episode(25, reward=np.zeros(3, np.float32)), "a")
        client.record(episode(), "b")
    assert sink.calls == ["b"]


def damaged(rng, message):
    data = bytearray(message)
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
    at = rng.randrange(len(data))
    return bytes(data[:at] + rng.randbytes(rng.randrange(3)) + data[at + rng.randrange(3) :])


def test_the_server_survives_300_damaged_messages_on_one_connection(server, sink):
    rng = random.Random(0)
    good = [pack(message) for message in messages_of(episode())]
    refused = 0
    with raw(server) as connection:
        for i in range(300):
            reply = ask(connection, damaged(rng, good[i % len(good)]) if i % 3 else good[i % len(good)])
            refused += isinstance(reply, str)
            assert not (isinstance(reply, str) and reply.startswith("internal"))
        assert 150 < refused < 300
        assert ask(connection, pack({**state(), "task": "go"}))["actions"].shape == (4, 3)
        for message in messages_of(episode(), "last"):
            ask(connection, message)
    assert same(sink.kept["last"], episode())


# -- several at once, and sinks that fail or take their time ----------------------------------------------------------


def test_two_clients_at_once_each_send_their_own_and_are_taken_one_at_a_time(server, sink):
    inside, most = [], []

    def take(whole, key):
        inside.append(key)
        time.sleep(0.02)
        most.append(len(inside))
        inside.remove(key)
        sink.kept[key] = whole

    sink.take = take
    together = threading.Barrier(2)

    def robot(seed):
        with PolicyClient(server.url) as client:
            together.wait(timeout=10)
            for i in range(5):
                client.record(episode(25 + seed, seed=10 * seed + i), f"{seed}/{i}")

    robots = [threading.Thread(target=robot, args=(seed,)) for seed in (1, 2)]
    for one in robots:
        one.start()
    for one in robots:
        one.join(timeout=30)
    assert max(most) == 1
    assert len(sink.kept) == 10
    for seed in (1, 2):
        assert all(same(sink.kept[f"{seed}/{i}"], episode(25 + seed, seed=10 * seed + i)) for i in range(5))


def test_pieces_of_two_connections_do_not_mix(server, sink):
    first, second = messages_of(episode(seed=1), "a"), messages_of(episode(seed=2), "b")
    with raw(server) as one, raw(server) as two:
        for message, other in zip(first, second, strict=True):
            ask(one, message)
            ask(two, other)
    assert same(sink.kept["a"], episode(seed=1))
    assert same(sink.kept["b"], episode(seed=2))


class Waiting(Sink):
    """Takes an episode when it is let."""

    def __init__(self):
        super().__init__()
        self.began, self.gate = threading.Event(), threading.Event()

    def take(self, episode, key):
        self.began.set()
        assert self.gate.wait(timeout=30)
        super().take(episode, key)


@contextmanager
def recording(client, whole, key, sink):
    """While the client waits for its acknowledgement; the sink lets it have that in the end."""
    thread = threading.Thread(target=client.record, args=(whole, key))
    thread.start()
    try:
        yield thread
    finally:
        sink.gate.set()
        thread.join(timeout=30)
    assert not thread.is_alive()


def test_chunks_and_pings_go_on_while_an_episode_is_taken():
    """Longer than the usual timeout, which is not that of an episode."""
    sink = Waiting()
    with (
        server_of(sink) as server,
        PolicyClient(server.url, timeout=1.0, retry=NO_RETRY) as robot,
        recording(robot, episode(), "a", sink) as sending,
    ):
        assert sink.began.wait(timeout=10)
        with PolicyClient(server.url, timeout=20.0, retry=NO_RETRY) as other, raw(server) as connection:
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                assert other.chunk(state(), "go").actions.shape == (4, 3)
                assert other.status()["act"]
                assert connection.ping().wait(timeout=20.0)
                time.sleep(0.1)
        assert sending.is_alive()
        assert not sink.kept
    assert sink.calls == ["a"]


def test_an_episode_that_comes_again_while_it_is_taken_is_taken_once():
    """The sender thought the connection lost; the server, whose disk may be full for hours, holds the episode once."""
    sink = Waiting()
    patient = Retry(budget=20.0, first=0.01, longest=0.05)
    with (
        server_of(sink) as server,
        PolicyClient(server.url, record_timeout=0.2, retry=patient) as robot,
        recording(robot, episode(), "a", sink) as sending,
    ):
        assert sink.began.wait(timeout=10)
        time.sleep(1.0)
        assert sending.is_alive()
        assert server._taker._work_queue.qsize() == 0
        assert not sink.kept
    # Should its acknowledgement come too late as well, it is sent once more, and is then for the sink to know.
    assert same(sink.kept["a"], episode())


def test_a_key_that_comes_twice_is_for_the_sink_to_know(server, sink):
    with PolicyClient(server.url) as client:
        client.record(episode(), "a")
        client.record(episode(), "a")
    assert sink.calls == ["a", "a"]
    assert list(sink.kept) == ["a"]


def test_an_episode_that_the_learner_refuses_is_told_in_its_words_and_the_next_may_come(server, sink):
    def refuse(whole, key):
        raise DataError("other cameras than the dataset's")

    take, sink.take = sink.take, refuse
    with PolicyClient(server.url, retry=NO_RETRY) as client:
        with pytest.raises(RefusedError, match="refused: other cameras than the dataset's"):
            client.record(episode(), "a")
        sink.take = take
        client.record(episode(), "a")
    assert sink.calls == ["a"]


def test_a_learner_that_cannot_keep_an_episode_now_leaves_it_to_its_sender_and_serves_on(server, sink):
    def fail(whole, key):
        raise OSError("the disk is gone")

    take, sink.take = sink.take, fail
    with PolicyClient(server.url) as other, PolicyClient(server.url, retry=NO_RETRY) as client:
        with pytest.raises(ConnectionLostError, match="the episode could not be kept"):
            client.record(episode(), "a")
        other.chunk(state(), "go")
        sink.take = take
        client.record(episode(), "a")
    assert sink.calls == ["a"]


def test_a_server_that_closes_waits_for_the_episode_that_is_taken():
    sink = Waiting()
    server = server_of(sink).__enter__()
    with raw(server) as connection:
        for message in messages_of(episode()):
            connection.send(pack(message))
        assert sink.began.wait(timeout=10)
        threading.Timer(0.3, sink.gate.set).start()
        server.close()
    assert same(sink.kept["a"], episode())


# -- connections that are cut -----------------------------------------------------------------------------------------


class Wire:
    """Between client and server; cuts the first connection after `up` bytes to the server or `down` bytes from it."""

    def __init__(self, port, up=10**9, down=10**9):
        self.target, self.limits, self.connections, self.seen = port, (up, down), 0, [0, 0]
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"ws://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self):
        while True:
            try:
                client = self._listening.accept()[0]
            except OSError:
                return
            up, down = self.limits if self.connections == 0 else (10**9, 10**9)
            self.connections += 1
            ends = client, socket.create_connection(("127.0.0.1", self.target))
            for which, limit, ways in ((0, up, ends), (1, down, ends[::-1])):
                threading.Thread(target=self._carry, args=(which, limit, *ways), daemon=True).start()

    def _carry(self, which, left, source, sink):
        with suppress(OSError):
            while left and (data := source.recv(min(left, 65536))):
                sink.sendall(data)
                left -= len(data)
                self.seen[which] += len(data)
        for end in (source, sink):
            with closing(end), suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def sent_over(wire, whole, key):
    retry = Retry(budget=20.0, first=0.001, longest=0.01)
    with closing(wire), PolicyClient(wire.url, retry=retry, timeout=5.0) as client:
        client.record(whole, key)
    return wire


def test_an_upload_that_is_cut_anywhere_is_sent_again_and_arrives_whole(server, sink):
    whole = episode(40, seed=4)
    total = sent_over(Wire(server.port), whole, "uncut").seen
    assert total[0] > 5000
    assert total[1] > 500
    cuts = [{"up": at} for at in range(1, total[0], total[0] // 25)]
    cuts += [{"down": at} for at in range(1, total[1], total[1] // 25)]
    lost = 0
    for i, cut in enumerate(cuts):
        lost += sent_over(Wire(server.port, **cut), whole, f"{i}").connections == 2
        assert same(sink.kept[f"{i}"], whole)
        assert sink.calls.count(f"{i}") <= 2
    assert lost >= len(cuts) - 2, "the last bytes close the connection"
    assert not server._taking


def test_a_connection_that_is_lost_takes_its_pieces_with_it(server, sink):
    good = messages_of(episode())
    with raw(server) as connection:
        ask(connection, good[0])
    with raw(server) as connection:
        assert "expected row 0 of any" in ask(connection, good[1])
    assert not sink.calls


def test_an_episode_waits_for_a_server_that_is_restarted(sink):
    with server_of(sink) as first:
        client = PolicyClient(first.url, retry=Retry(budget=30.0, longest=0.1))
    again = server_of(sink, port=first.port)
    timer = threading.Timer(0.4, again.__enter__)
    timer.start()
    with closing(client):
        client.record(episode(), "a")
    timer.join()
    again.close()
    assert same(sink.kept["a"], episode())


def test_a_server_that_stays_away_is_a_lost_connection(sink):
    with server_of(sink) as server:
        client = PolicyClient(server.url, retry=Retry(budget=0.2, first=0.05))
    for talk in (client.status, lambda: client.record(episode(), "a")):
        with pytest.raises(ConnectionLostError):
            talk()


@pytest.mark.parametrize("reply", [{"episode": "b", "rows": 7}, {"episode": "a", "rows": 1}, {"rows": 7}, 7], ids=str)
def test_an_acknowledgement_of_something_else_is_a_protocol_error(server, sink, monkeypatch, reply):
    async def answer(self, message, inbox):
        return reply

    monkeypatch.setattr(PolicyServer, "_handle_episode", answer)
    with PolicyClient(server.url) as client, pytest.raises(ProtocolError, match="answered an episode"):
        client.record(episode(), "a")


def test_limits_of_a_message_hold_for_pieces_too(server):
    with raw(server) as connection:
        connection.send(b"\0" * (MessageLimits(max_bytes=SHORT).max_bytes + 1))
        with pytest.raises(ConnectionClosed):
            connection.recv(timeout=10)
