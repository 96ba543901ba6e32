"""A session between a robot and a real server: who waits for whom, and where each episode is meanwhile."""

import errno
import io
import os
import threading
import time
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
from learner import Sink, Twitch, serve
from lerobot.utils.errors import DeviceNotConnectedError
from point_robot import Hand, PointRobot
from rich.console import Console
from scripted_signals import ScriptedSignals

from poco_vla.errors import PocoError
from poco_vla.files import wait_for_space
from poco_vla.robots import ActionLimits, KeySignals, RobotInteraction, Signal, StoppedError
from poco_vla.robots import session as session_module
from poco_vla.robots.episode import NOBODY
from poco_vla.robots.program import _run
from poco_vla.robots.session import Learner, RobotSession, call_with_retries
from poco_vla.robots.spool import Spool, decoded
from poco_vla.robots.view import View
from poco_vla.serving.client import ConnectionLostError, PolicyClient, Retry
from poco_vla.serving.feature import Feature

STATE = {"observation.state": Feature((6,), "float32")}
SOON = Retry(budget=0.1, first=0.02)


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(session_module, "EVERY", 0.02)
    monkeypatch.setattr(session_module, "wait_for_space", partial(wait_for_space, every=0.1))


@pytest.fixture
def sink(tmp_path):
    return Sink(tmp_path / "sink")


@pytest.fixture
def robot(tmp_path):
    return PointRobot(tmp_path, pictures=True)


def server_of(sink, actor=None, **options):
    return serve(sink, actor or Twitch(horizon=4, actions=3), spec=STATE, **options)


@contextmanager
def session_of(robot, server, folder, signals=None, keys=None, **changes):
    """A session of 3 steps an episode; `said` is what the person sees."""
    view = View(Console(file=io.StringIO(), width=200))
    options = {"horizon": 4, "task": "lift the cube", "limits": ActionLimits(-1.0, 1.0), "max_steps": 3, "fps": None}
    episodes = changes.pop("episodes", None)
    with PolicyClient(server.url, retry=SOON, timeout=5.0) as client, Spool(folder / "spool", view.say) as spool:
        learner = Learner(client, client.metadata["observation"], view)
        drive = RobotInteraction(
            robot,
            learner.chunk,
            signals=signals or keys or ScriptedSignals({}),
            reset=robot.reset,
            on_step=view.step,
            retry_on=(ConnectionLostError,),
            **(options | changes),
        )
        with drive, view:
            yield RobotSession(drive, learner, spool, view, keys=keys, episodes=episodes)


def said(session):
    return session.view.console.file.getvalue()


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


@contextmanager
def meanwhile(work):
    """`work` in a thread; its error is raised here."""
    errors = []

    def run():
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield thread
    thread.join(60)
    assert not thread.is_alive()
    for error in errors:
        raise error


def waiting(session):
    return session.spool.waiting()


def test_each_kept_episode_reaches_the_learner_with_its_versions_and_nothing_stays_here(robot, sink, tmp_path):
    """Chunks of 4, episodes of 3 steps: one chunk, so one version, an episode."""
    with server_of(sink) as server, session_of(robot, server, tmp_path, episodes=3) as session:
        session.run()
        assert waiting(session) == []
        assert "success of the last 3: 0 %" in said(session)
    found = sink.episodes()
    assert [list(e.policy_version) for e in found] == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]
    assert [e.task for e in found] == ["lift the cube"] * 3
    assert not any(e.interventions.any() for e in found)
    assert [set(e.obs) for e in found] == [{"observation.state"}] * 3  # the camera is not the policy's
    np.testing.assert_allclose(found[0].action, np.full((3, 3), 0.01))
    assert server.actor.asked[0][1] == ["lift the cube"]
    assert server.actor.asked[0][0]["observation.state"].shape == (1, 6)


def test_steps_that_a_person_drove_are_marked_and_are_nobodys_weights(robot, sink, tmp_path):
    signals = ScriptedSignals({1: Signal.TAKEOVER, 2: Signal.RELEASE})
    changes = {"signals": signals, "teleoperator": Hand(tmp_path), "episodes": 1}
    with server_of(sink) as server, session_of(robot, server, tmp_path, **changes) as session:
        session.run()
    (found,) = sink.episodes()
    assert found.interventions.tolist() == [False, True, False]
    assert found.policy_version.tolist() == [1, NOBODY, 2]


def test_the_robot_rests_until_the_learner_wants_an_episode_and_its_end_is_the_end(robot, sink, tmp_path):
    sink.act = False
    with server_of(sink) as server, session_of(robot, server, tmp_path) as session, meanwhile(session.run):
        until(lambda: "the robot rests" in said(session))
        time.sleep(0.2)
        assert robot.sent == []
        sink.act = True
        until(lambda: len(sink.taken) >= 2)
        sink.done = True
    assert said(session).count("the robot rests") == 1
    assert "training is over. 1,200 steps, 4,310 updates, success 25 %" in said(session)


def test_what_an_earlier_session_left_is_sent_first_and_in_order(robot, sink, tmp_path):
    """Also where training is over meanwhile; another task's stays; a damaged one is named."""
    with Spool(tmp_path / "spool") as spool, server_of(Sink(tmp_path / "before")) as server:
        with_episode = tmp_path / "made"
        with session_of(robot, server, with_episode, episodes=3) as made:
            made.run()
        episodes = server.episodes.episodes()
        for age, (key, episode) in enumerate(zip(("c", "a", "b"), episodes, strict=True)):
            spool.put(episode, key)
            os.utime(spool.folder / f"{key}.safetensors", (1e9 + age, 1e9 + age))
        spool.put(type(episodes[0])(**{**vars(episodes[0]), "task": "pour"}), "other")
        (spool.folder / "torn.safetensors").write_bytes(b"torn")
    sink.done, robot.sent = True, []
    with server_of(sink) as server, session_of(robot, server, tmp_path) as session:
        session.run()
        assert waiting(session) == ["other"]
    assert sink.taken == ["c", "a", "b"]
    assert robot.sent == []
    assert "torn.damaged" in said(session)
    assert '"pour"' in said(session)


def test_a_refused_episode_is_kept_here_with_the_reason_and_the_session_goes_on(robot, sink, tmp_path):
    sink.refuse = "this one looks odd"
    with server_of(sink) as server, session_of(robot, server, tmp_path, episodes=2) as session:
        session.run()
        (refused,) = session.spool.folder.glob("*.refused")
        assert waiting(session) == []
    assert "this one looks odd" in said(session)
    assert str(refused) in said(session)
    assert len(decoded(refused)) == 3
    assert len(sink.asked) == 2
    assert [refused.stem, *sink.taken] == sink.asked


def test_an_episode_lies_here_until_the_learner_has_it(robot, sink, tmp_path):
    sink.gate.clear()
    with (
        server_of(sink) as server,
        session_of(robot, server, tmp_path, episodes=1) as session,
        meanwhile(session.run),
    ):
        until(lambda: sink.asked)
        assert waiting(session) == sink.asked
        assert len(session.spool.get(sink.asked[0])) == 3
        sink.gate.set()
        until(lambda: not waiting(session))


def test_a_learner_that_goes_away_between_episodes_is_waited_for(robot, sink, tmp_path):
    sink.act = False
    with (
        server_of(sink) as server,
        session_of(robot, server, tmp_path, episodes=1) as session,
        meanwhile(session.run),
    ):
        until(lambda: "the robot rests" in said(session))
        server.close()
        until(lambda: "the learner is away" in said(session))
        time.sleep(0.5)
        assert robot.sent == []
        sink.act = True
        with server_of(sink, port=server.port):
            until(lambda: "success of the last 1" in said(session))
    assert said(session).count("the learner is away") == 1
    assert said(session).count("the learner is back") == 1


def test_a_learner_lost_within_an_episode_costs_that_episode_only(robot, sink, tmp_path):
    """Lost at the third chunk: the robot holds, gives up after its patience, and goes on when the learner is back."""
    actor = Twitch(horizon=1, actions=3)
    changes = {"horizon": 1, "max_steps": 50, "patience": 0.3, "retry_every": 0.05, "episodes": 1}
    with (
        server_of(sink, actor) as server,
        session_of(robot, server, tmp_path, **changes) as session,
        meanwhile(session.run),
    ):
        until(lambda: len(robot.sent) > 2)
        server.close()
        until(lambda: "policy lost" in said(session))
        assert not sink.asked
        with server_of(sink, Twitch(horizon=1, actions=3), port=server.port):
            until(lambda: "success of the last 1" in said(session))
    assert [len(e) for e in sink.episodes()] == [50]


def test_a_full_disk_is_said_and_the_robot_rests_until_there_is_room(robot, sink, tmp_path, monkeypatch):
    room = threading.Event()
    put = Spool.put

    def full(self, episode, key):
        if not room.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, episode, key)

    monkeypatch.setattr(Spool, "put", full)
    with (
        server_of(sink) as server,
        session_of(robot, server, tmp_path, episodes=1) as session,
        meanwhile(session.run),
    ):
        until(lambda: "the disk is full" in said(session))
        time.sleep(0.3)
        assert len(robot.sent) == 3
        assert not sink.asked
        room.set()
    assert len(sink.taken) == 1
    assert said(session).count("the disk is full") == 1


def test_after_an_emergency_stop_a_person_releases_or_ends(robot, sink, tmp_path):
    """Space and more of it; what is no answer is none; r goes on; then q ends, and nothing more was sent."""
    person, program = os.openpty()
    with (
        KeySignals(program) as keys,
        server_of(sink) as server,
        session_of(robot, server, tmp_path, keys=keys, max_steps=10_000, fps=50) as session,
        meanwhile(session.run) as running,
    ):
        for stops, answer in ((1, b"r"), (2, b"\r"), (3, b"q")):
            sent = len(robot.sent)
            until(lambda: len(robot.sent) > sent + 5)  # noqa: B023 (called at once)
            os.write(person, b"   ")
            until(lambda: said(session).count("emergency stop: nothing") == stops)  # noqa: B023
            time.sleep(0.1)
            sent = len(robot.sent)
            os.write(person, b"  xs")
            time.sleep(0.2)
            assert len(robot.sent) == sent
            assert running.is_alive()
            os.write(person, answer)
    assert sink.asked == []
    assert session.drive.stopped
    os.close(person)
    os.close(program)


def test_a_stop_that_nobody_can_release_ends_the_session(robot, sink, tmp_path):
    changes = {"signals": ScriptedSignals({1: Signal.STOP})}
    with (
        server_of(sink) as server,
        session_of(robot, server, tmp_path, **changes) as session,
        pytest.raises(StoppedError, match="no terminal"),
    ):
        session.run()
    assert len(robot.sent) == 2  # an action, and the one that holds


def test_a_terminal_that_goes_away_ends_the_session(robot, sink, tmp_path):
    person, program = os.openpty()
    away = threading.Timer(1.0, os.close, [person])
    with (
        KeySignals(program) as keys,
        server_of(sink) as server,
        session_of(robot, server, tmp_path, keys=keys, max_steps=10_000, fps=50) as session,
    ):
        away.start()
        with pytest.raises(StoppedError, match="no terminal"):
            session.run()
    os.close(program)


def test_a_question_of_a_late_answer_and_the_next_request_do_not_mix(robot, sink, tmp_path):
    """A discarded episode leaves a chunk on its way; the status that is asked meanwhile is a status."""
    actor = Twitch(horizon=4, actions=3, pause=0.3)
    signals = ScriptedSignals({3: Signal.DISCARD})
    changes = {"signals": signals, "lead": 3, "fps": 50}
    with server_of(sink, actor) as server, session_of(robot, server, tmp_path, **changes) as session:
        assert session.drive.run_episode() is None
        assert session.learner.status()["updates"] == 4310
    assert len(actor.asked) == 2


def test_a_driver_that_fails_is_told_and_the_robot_holds(robot, sink, tmp_path):
    def unplugged(observation):
        if len(robot.sent) == 2:
            raise DeviceNotConnectedError("no motor answers")
        return observation

    robot.broken = unplugged
    with server_of(sink) as server, session_of(robot, server, tmp_path) as session:
        with pytest.raises(PocoError, match=r"point_robot.*failed.*no motor answers"):
            _run(session)
        assert session.drive.stopped
    assert robot.sent[-1] == robot.sent[-2]


def test_patience_ends_at_other_errors(tmp_path):
    def refuse():
        raise PocoError("wrong token")

    with pytest.raises(PocoError, match="wrong token"):
        call_with_retries(refuse, View(Console(file=io.StringIO())))
