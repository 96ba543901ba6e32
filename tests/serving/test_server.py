"""A policy behind a real socket: its replies, what it refuses, and that it goes on after whatever is sent to it."""

import random
import shutil
import subprocess
import threading
import time
import urllib.request
from contextlib import closing

import numpy as np
import pytest
import torch
from lerobot_policy_flow_mlp.adapter import FlowMlp
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from poco_vla.errors import ConfigError, PolicyError
from poco_vla.rollout import Actor
from poco_vla.rollout.actor import ActingCopy, WeightsVersion
from poco_vla.serving.client import ConnectionLostError, PolicyClient, RefusedError, Retry
from poco_vla.serving.codec import VERSION_HEADER, ProtocolError, pack, unpack
from poco_vla.serving.feature import Feature, observation_spec
from poco_vla.serving.server import PolicyServer

SPEC = {"observation.state": Feature((6,), "float32")}
CAMERA = {"observation.images.top": Feature((4, 5, 3), "uint8")}
NO_RETRY = Retry(budget=0.0)


def state(seed=0):
    return {"observation.state": np.random.default_rng(seed).normal(size=6).astype(np.float32)}


def direct(actor, *states):
    return actor.chunks({key: np.stack([s[key] for s in states]) for key in states[0]}, ["go"] * len(states))


def actor_of(weights_version):
    actor = Actor(FlowMlp.tiny(), seed=5)
    actor.weights_version = weights_version
    return actor


def server_of(actor=None, spec=SPEC, **options):
    return PolicyServer(
        actor or Actor(FlowMlp.tiny(), seed=5), spec, **({"adapter": "flow_mlp", "fps": 15.0} | options)
    )


@pytest.fixture
def server():
    with server_of() as running:
        yield running


@pytest.fixture
def raw(server):
    """A connection without our client, past the metadata."""
    with connect(server.url, compression=None) as connection:
        connection.recv(timeout=10)
        yield connection


def ask(connection, message):
    connection.send(message)
    return connection.recv(timeout=10)


def valid(seed=0):
    return pack({**state(seed), "task": "go"})


# -- chunks -----------------------------------------------------------------------------------------------------------


def test_a_client_gets_what_the_actor_samples(server):
    twin = Actor(FlowMlp.tiny(), seed=5)
    with PolicyClient(server.url) as client:
        for seed in range(3):
            chunk = client.chunk(state(seed), "go")
            np.testing.assert_array_equal(chunk.actions, direct(twin, state(seed))[0])
            assert chunk.actions.dtype == np.float32
            assert chunk.actions.flags.writeable
            assert chunk.weights_version == 0
            assert 0 < chunk.latency < 10


def test_the_metadata_say_what_is_served_and_what_to_send():
    with server_of(actor_of(3), SPEC | CAMERA) as server, PolicyClient(server.url) as client:
        assert client.metadata == {
            "protocol_version": 1,
            "adapter": "flow_mlp",
            "horizon": 4,
            "action_dim": 3,
            "fps": 15,
            "observation": {
                "observation.state": {"shape": [6], "dtype": "float32"},
                "observation.images.top": {"shape": [4, 5, 3], "dtype": "uint8"},
            },
            "max_bytes": server.limits.max_bytes,
            "weights_version": 3,
            "task": "",
            "names": {},
            "action_low": None,
            "action_high": None,
            "takes_episodes": False,
        }


def test_what_to_send_follows_from_a_datasets_features():
    features = {
        "observation.state": {"dtype": "float32", "shape": (6,), "names": None},
        "observation.images.a": {"dtype": "video", "shape": (4, 5, 3), "names": ["height", "width", "channels"]},
        "observation.images.b": {"dtype": "image", "shape": (3, 4, 5), "names": ["channels", "height", "width"]},
        "action": {"dtype": "float32", "shape": (3,), "names": None},
    }
    picture = Feature((4, 5, 3), "uint8")
    keys = ["observation.state", "observation.images.a", "observation.images.b"]
    assert observation_spec(features, keys) == dict(
        zip(keys, [Feature((6,), "float32"), picture, picture], strict=True)
    )
    with pytest.raises(ConfigError, match=r"reads \['observation.images.c'\].*it has"):
        observation_spec(features, ["observation.images.c"])


def test_an_unmodified_openpi_client_gets_actions():
    openpi = pytest.importorskip("openpi_client.websocket_client_policy")
    with server_of(token="secret") as server:
        client = openpi.WebsocketClientPolicy("127.0.0.1", server.port, api_key="secret")
        assert client.get_server_metadata()["horizon"] == 4
        reply = client.infer({**state(), "prompt": "go"})
        np.testing.assert_array_equal(reply["actions"], direct(Actor(FlowMlp.tiny(), seed=5), state())[0])
        assert reply["server_timing"]["infer_ms"] >= reply["policy_timing"]["infer_ms"] > 0
        with pytest.raises(RuntimeError, match="missing"):
            client.infer({"prompt": "go"})
        assert "prev_total_ms" in client.infer({**state(), "prompt": "go"})["server_timing"]
        client._ws.close()


class Slow(Actor):
    """Says that it has begun, waits for `gate`, and counts the states of each forward."""

    def __init__(self):
        super().__init__(FlowMlp.tiny(), seed=5)
        self.began, self.gate, self.sizes = threading.Event(), threading.Semaphore(0), []

    def chunks(self, obs, tasks, **options):
        self.began.set()
        assert self.gate.acquire(timeout=30)
        self.sizes.append(len(tasks))
        return super().chunks(obs, tasks, **options)


def send_in_turn(server, connections, requests):
    """The first is being answered when the others come, one after the other."""
    for i, (connection, request) in enumerate(zip(connections, requests, strict=True)):
        connection.send(request)
        assert server.actor.began.wait(timeout=10)
        deadline = time.monotonic() + 10
        while server._waiting.qsize() < i and time.monotonic() < deadline:
            time.sleep(0.001)


def test_requests_that_wait_at_the_same_time_share_a_forward_and_each_gets_its_own():
    actor = Slow()
    with server_of(actor) as server:
        connections = [connect(server.url, compression=None) for _ in range(4)]
        for connection in connections:
            connection.recv(timeout=10)
        send_in_turn(server, connections, [valid(i) for i in range(4)])
        actor.gate.release(2)
        replies = [unpack(connection.recv(timeout=10)) for connection in connections]
        for connection in connections:
            connection.close()
    assert actor.sizes == [1, 3]
    assert [reply["policy_timing"]["batch"] for reply in replies] == [1, 3, 3, 3]
    twin = Actor(FlowMlp.tiny(), seed=5)
    expected = [*direct(twin, state(0)), *direct(twin, state(1), state(2), state(3))]
    np.testing.assert_array_equal([reply["actions"] for reply in replies], expected)


def test_the_metadata_say_what_training_knows():
    bounds = np.array([-1.0, -2.0, -3.0], np.float32), np.array([1.0, 2.5, -3.0], np.float32)
    with server_of(task="pick", action_bounds=bounds) as server, PolicyClient(server.url) as client:
        said = [client.metadata[name] for name in ("task", "action_low", "action_high")]
    assert said == ["pick", [-1.0, -2.0, -3.0], [1.0, 2.5, -3.0]]


@pytest.mark.parametrize(
    ("low", "high"), [([0.0] * 2, [1.0] * 2), ([0.0] * 3, [1.0, 1.0, np.nan]), ([0.0] * 3, [1.0, -1.0, 1.0])]
)
def test_bounds_that_are_none_are_a_configuration_error(low, high):
    with pytest.raises(ConfigError, match="lowest and a highest value for each of 3"):
        server_of(action_bounds=(np.array(low), np.array(high)))


# -- weights ----------------------------------------------------------------------------------------------------------


def test_a_learners_weights_act_from_the_next_request_on():
    """The same noise, the weights half a unit on: another chunk, and the reply and the metadata say whose it is."""
    learner, weights = Actor(FlowMlp.tiny(), seed=5), WeightsVersion()
    with server_of(ActingCopy(learner, weights, seed=5)) as server, PolicyClient(server.url) as client:
        client.chunk(state(), "go")
        with torch.no_grad(), weights.change(7):
            for parameter in learner.policy.head.parameters():
                parameter.add_(0.5)
        chunk = client.chunk(state(), "go")
        assert chunk.weights_version == 7
        with PolicyClient(server.url) as other:
            assert other.metadata["weights_version"] == 7
    direct(learner, state())
    np.testing.assert_array_equal(chunk.actions, direct(learner, state())[0])


# -- requests that are refused ----------------------------------------------------------------------------------------

GOOD = {**state(), "observation.images.top": np.zeros((4, 5, 3), np.uint8), "task": "go"}


def without(*keys):
    return {key: value for key, value in GOOD.items() if key not in keys}


BAD = {
    "no camera": (without("observation.images.top"), ["'observation.images.top'", "missing", "'observation.state'"]),
    "unknown camera": (GOOD | {"observation.images.side": 0}, ["'observation.images.side'", "not known"]),
    "shape": (GOOD | {"observation.images.top": np.zeros((3, 4, 5), np.uint8)}, ["[3, 4, 5]", "[4, 5, 3]"]),
    "dtype": (GOOD | {"observation.images.top": np.zeros((4, 5, 3))}, ["float64", "uint8"]),
    "no byte": (GOOD | {"observation.images.top": np.full((4, 5, 3), 256)}, ["int64", "uint8"]),
    "too large": (GOOD | {"observation.state": np.full(6, 1e39)}, ["infinite", "observation.state"]),
    "no array": (GOOD | {"observation.state": [0.0] * 6}, ["is a list", "float32 of shape [6]"]),
    "nan": (GOOD | {"observation.state": np.full(6, np.nan, np.float32)}, ["NaN", "observation.state"]),
    "no task": (without("task"), ["task", "prompt", "neither"]),
    "two tasks": (GOOD | {"prompt": "go"}, ["task", "prompt"]),
    "task": (GOOD | {"task": 3}, ["is a int", "text"]),
    "no map": ([1, 2], ["map", "list"]),
}


@pytest.fixture(scope="module")
def cameras():
    class Seeing(Actor):
        def chunks(self, obs, tasks, **options):
            assert obs["observation.images.top"].shape == (1, 4, 5, 3)
            return super().chunks({"observation.state": obs["observation.state"]}, tasks, **options)

    with server_of(Seeing(FlowMlp.tiny(), seed=5), SPEC | CAMERA) as running:
        yield running


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_request_is_answered_by_a_text_that_says_what_and_the_conversation_goes_on(cameras, kind):
    request, words = BAD[kind]
    with connect(cameras.url) as connection:
        connection.recv(timeout=10)
        reply = ask(connection, pack(request))
        assert isinstance(reply, str)
        assert not [word for word in words if word not in reply], reply
        assert unpack(ask(connection, pack(GOOD)))["actions"].shape == (4, 3)


def test_the_client_raises_the_servers_words_and_can_go_on(cameras):
    with PolicyClient(cameras.url) as client:
        with pytest.raises(RefusedError, match=r"refused: \['observation.images.top'\] missing"):
            client.chunk(state(), "go")
        picture = {"observation.images.top": GOOD["observation.images.top"]}
        assert client.chunk(state() | picture, "go").actions.shape == (4, 3)


def test_a_text_is_no_request(raw):
    assert "binary" in ask(raw, "hello")
    assert isinstance(ask(raw, valid()), bytes)


def test_a_policy_that_samples_nan_is_reported_and_nothing_is_sent(server):
    broken = Actor(FlowMlp.tiny(), seed=5)
    torch.nn.init.constant_(next(broken.policy.head.parameters()), float("nan"))
    with server_of(broken) as server, PolicyClient(server.url) as client:
        for _ in range(2):
            with pytest.raises(RefusedError, match="non-finite action"):
                client.chunk(state(), "go")


def test_an_internal_failure_is_a_text_and_close_code_1011_and_others_are_still_served():
    class Failing(Actor):
        def chunks(self, obs, tasks, **options):
            if (obs["observation.state"] == 0).all(axis=-1).any():
                raise RuntimeError("out of memory")
            return super().chunks(obs, tasks, **options)

    with server_of(Failing(FlowMlp.tiny(), seed=5)) as server, connect(server.url) as connection:
        connection.recv(timeout=10)
        reply = ask(connection, pack({"observation.state": np.zeros(6, np.float32), "task": "go"}))
        assert reply == "internal error: RuntimeError: out of memory"
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(timeout=10)
        assert closed.value.rcvd.code == 1011
        with PolicyClient(server.url, retry=NO_RETRY) as client:
            client.chunk(state(), "go")


def test_one_state_that_fails_does_not_spoil_the_forward_of_the_others():
    class Picky(Slow):
        def chunks(self, obs, tasks, **options):
            chunks = super().chunks(obs, tasks, **options)
            if "bad" in tasks:
                raise PolicyError('no such instruction: "bad"')
            return chunks

    actor = Picky()
    with server_of(actor) as server:
        connections = [connect(server.url) for _ in range(3)]
        for connection in connections:
            connection.recv(timeout=10)
        send_in_turn(server, connections, [pack({**state(), "task": task}) for task in ("go", "bad", "go")])
        actor.gate.release(10)
        replies = [connection.recv(timeout=10) for connection in connections]
        for connection in connections:
            connection.close()
    assert [type(reply) for reply in replies] == [bytes, str, bytes]
    assert actor.sizes == [1, 2, 1, 1]


def test_a_frame_that_is_too_long_closes_its_connection_and_no_other():
    with server_of(max_bytes=1000) as server, PolicyClient(server.url) as bystander:
        with connect(server.url) as connection:
            connection.recv(timeout=10)
            connection.send(b"\0" * 1001)
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv(timeout=10)
            assert closed.value.rcvd.code == 1009
        bystander.chunk(state(), "go")
        with pytest.raises(RefusedError, match="the server takes 1000"):
            bystander.chunk(state(), "go" * 1000)
        bystander.chunk(state(), "go")


def damaged(rng):
    """A valid request with bytes changed, cut out or put in, or noise."""
    if rng.random() < 0.2:
        return rng.randbytes(rng.randrange(300))
    data = bytearray(valid())
    for _ in range(rng.randrange(1, 6)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    at = rng.randrange(len(data))
    return bytes(data[:at] + rng.randbytes(rng.randrange(4)) + data[at + rng.randrange(4) :])


def test_the_server_survives_200_damaged_frames_on_one_connection(raw):
    rng = random.Random(0)
    refused = 0
    for i in range(200):
        reply = ask(raw, damaged(rng))
        refused += isinstance(reply, str)
        assert "internal" not in reply[:10] if isinstance(reply, str) else unpack(reply)["actions"].shape == (4, 3)
        if i % 20 == 0:
            assert unpack(ask(raw, valid()))["actions"].shape == (4, 3)
    assert refused > 100


def test_the_server_survives_peers_that_do_not_speak_websocket_or_vanish(server):
    import socket

    for junk in (b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)), b""):
        with closing(socket.create_connection(("127.0.0.1", server.port))) as peer:
            peer.sendall(junk)
    vanishing = connect(server.url)
    vanishing.recv(timeout=10)
    vanishing.send(valid())
    vanishing.socket.close()
    with PolicyClient(server.url, retry=NO_RETRY) as client:
        client.chunk(state(), "go")


# -- who may come in --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", [None, "Api-Key wrong", "Api-Key secre", "Bearer secret", "secret", "Api-Key \xe9", "Api-Key secret x"]
)
def test_a_wrong_token_gets_401_before_the_websocket_opens(header):
    with server_of(token="secret") as server:
        with pytest.raises(InvalidStatus) as refused:
            connect(server.url, additional_headers={"Authorization": header} if header else None)
        assert refused.value.response.status_code == 401
        with connect(server.url, additional_headers={"Authorization": "Api-Key secret"}) as connection:
            connection.recv(timeout=10)


def test_a_web_page_does_not_get_in(server):
    """Browsers say where a page is from; a page of anybody's could else talk to a server on this machine."""
    with pytest.raises(InvalidStatus) as refused:
        connect(server.url, additional_headers={"Origin": "https://example.org"})
    assert refused.value.response.status_code == 403


def test_the_client_says_that_its_token_is_wrong_and_does_not_try_again():
    with server_of(token="secret") as server:
        for token in (None, "wrong"):
            started = time.perf_counter()
            with pytest.raises(RefusedError, match=r"HTTP 401.*Api-Key TOKEN"):
                PolicyClient(server.url, token=token, retry=Retry(budget=60.0))
            assert time.perf_counter() - started < 10
        with PolicyClient(server.url, token="secret") as client:
            client.chunk(state(), "go")


def test_health_is_for_everybody():
    with server_of(token="secret") as server:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{server.port}/healthz", timeout=10) as reply:
            assert (reply.status, reply.read()) == (200, b"OK\n")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "robot.lab"])
def test_an_address_that_others_reach_needs_a_token(host):
    with pytest.raises(ConfigError, match="token"):
        server_of(host=host)
    server_of(host=host, token="secret")
    server_of(host=host, insecure=True)


@pytest.mark.parametrize("token", ["", "a b\n", " a", "schl\xfcssel"])
def test_a_token_that_no_header_can_hold_is_refused(token):
    with pytest.raises(ConfigError, match="token"):
        server_of(token=token)


def test_a_port_that_is_taken_is_a_configuration_error(server):
    with pytest.raises(ConfigError, match="cannot listen"), server_of(port=server.port):
        pass


def test_a_client_of_another_protocol_version_is_told_so(server, monkeypatch):
    with pytest.raises(InvalidStatus) as refused:
        connect(server.url, additional_headers={VERSION_HEADER: "2"})
    assert refused.value.response.status_code == 400
    monkeypatch.setattr("poco_vla.serving.client.PROTOCOL_VERSION", 2)
    with pytest.raises(RefusedError, match="speaks protocol version 1, the client '2'"):
        PolicyClient(server.url)


@pytest.mark.parametrize(("key", "value"), [("protocol_version", 2), ("protocol_version", None), ("horizon", "4")])
def test_a_client_leaves_a_server_of_another_protocol(server, monkeypatch, key, value):
    monkeypatch.setattr(PolicyServer, "metadata", server.metadata | {key: value})
    with pytest.raises(ProtocolError, match=r"protocol version|does not say"):
        PolicyClient(server.url)


@pytest.mark.parametrize(
    "actions",
    [np.zeros((4, 3)), np.zeros((3, 3), np.float32), np.full((4, 3), np.nan, np.float32)],
    ids=["float64", "short", "nan"],
)
def test_a_client_hands_over_no_actions_that_were_not_announced(actions):
    class Odd(Actor):
        def chunks(self, obs, tasks, **options):
            return actions[None]

    with server_of(Odd(FlowMlp.tiny(), seed=5)) as server:
        client = PolicyClient(server.url)
        with closing(client), pytest.raises(ProtocolError, match="sent actions"):
            client.chunk(state(), "go")


# -- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pem(tmp_path_factory):
    """(certificate, key), self-signed, for 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=poco -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-out", certificate, "-keyout", key], check=True, capture_output=True)
    return certificate, key


def test_a_certificate_encrypts_and_is_checked(pem):
    certificate, key = pem
    with server_of(certificate=certificate, key=key, token="secret") as server:
        assert server.url.startswith("wss://")
        with PolicyClient(server.url, token="secret", certificate=certificate) as client:
            client.chunk(state(), "go")
        with pytest.raises(RefusedError, match=r"certificate.*not trusted"):
            PolicyClient(server.url, token="secret")
        with pytest.raises(ConnectionLostError):
            PolicyClient(server.url.replace("wss", "ws"), retry=NO_RETRY)


def test_certificates_that_cannot_be_used_are_configuration_errors(pem, tmp_path):
    certificate, key = pem
    with pytest.raises(ConfigError, match="without a certificate"):
        server_of(key=key)
    with pytest.raises(ConfigError, match="cannot read the certificate"):
        server_of(certificate=tmp_path / "none.pem")
    with pytest.raises(ConfigError, match="cannot read the certificate"):
        server_of(certificate=certificate)
    with pytest.raises(ConfigError, match="cannot read the certificate"):
        PolicyClient("wss://127.0.0.1:1", certificate=tmp_path / "none.pem")
    with pytest.raises(ConfigError, match="not encrypted"):
        PolicyClient("ws://127.0.0.1:1", certificate=certificate)


# -- lost connections -------------------------------------------------------------------------------------------------


def test_a_client_takes_up_again_with_a_server_that_was_restarted():
    with server_of() as first:
        client = PolicyClient(first.url, retry=Retry(budget=30.0, longest=0.2))
        client.chunk(state(), "go")
    restarted = server_of(actor_of(4), port=first.port)
    timer = threading.Timer(0.5, restarted.__enter__)
    timer.start()
    chunk = client.chunk(state(), "go")
    assert chunk.weights_version == 4
    assert chunk.latency > 0.3
    client.close()
    timer.join()
    restarted.close()


def test_a_client_waits_for_no_other_policy_than_before():
    with server_of() as first:
        client = PolicyClient(first.url)
    with server_of(port=first.port, fps=30.0), pytest.raises(ProtocolError, match="another policy: fps"):
        client.chunk(state(), "go")


def test_a_client_gives_up_when_its_budget_is_spent():
    with server_of() as server:
        client = PolicyClient(server.url, retry=Retry(budget=0.3, first=0.05))
    started = time.perf_counter()
    with pytest.raises(ConnectionLostError, match=r"no reply from ws://.* for 0.3 s"):
        client.chunk(state(), "go")
    assert time.perf_counter() - started < 10
    with pytest.raises(ConnectionLostError):
        PolicyClient(server.url, retry=NO_RETRY)
    with pytest.raises(ConfigError, match="no address"):
        PolicyClient("127.0.0.1")


def test_a_late_reply_is_never_taken_for_that_of_the_next_request():
    actor = Slow()
    twin = Actor(FlowMlp.tiny(), seed=5)
    with server_of(actor) as server:
        client = PolicyClient(server.url, timeout=0.3, retry=NO_RETRY)
        with pytest.raises(ConnectionLostError):
            client.chunk(state(0), "go")
        actor.gate.release(2)
        chunk = client.chunk(state(1), "go")
        client.close()
    direct(twin, state(0))
    np.testing.assert_array_equal(chunk.actions, direct(twin, state(1))[0])


def test_a_server_that_closes_while_a_chunk_is_sampled_ends_in_good_order():
    actor = Slow()
    server = server_of(actor).__enter__()
    with connect(server.url) as connection:
        connection.recv(timeout=10)
        connection.send(valid())
        assert actor.began.wait(timeout=10)
        threading.Timer(0.3, actor.gate.release).start()
        server.close()
        assert [*connection] == []  # iterating ends with the connection, and raises if that was not in good order
    server.close()
    assert not server._thread.is_alive()
