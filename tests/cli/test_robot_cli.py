"""`poco-vla robot`: a real process at a real pseudo-terminal, with a real server on the other side."""

import importlib.util
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import forked
import numpy as np
import pytest
from learner import Sink, Twitch, serve
from point_robot import Hand, PointRobot
from rich.console import Console
from scripted_signals import CountedKeys

from poco_vla.cli import main
from poco_vla.cli.robot import split_devices
from poco_vla.errors import ConfigError, UnknownNameError
from poco_vla.robots import RobotSuccess, Signal, SimulatedArm, SimulatedArmConfig, devices
from poco_vla.robots.devices import make_devices
from poco_vla.robots.matching import action_limits, check_match
from poco_vla.robots.program import _put_back, _success_signals
from poco_vla.robots.spool import Spool, decoded
from poco_vla.robots.view import View
from poco_vla.serving.feature import Feature

HERE = Path(__file__).parents[1]
ARM = ["--robot.type=simulated_arm", "--robot.views=[]", "--robot.realtime=false"]
# One process at a time: each needs a core for seconds until it runs.
one_at_a_time = pytest.mark.xdist_group("robot_terminal")


class Terminal:
    """`poco-vla robot` at a terminal of its own; what it shows, without colours and cursor movements."""

    def __init__(self, url, folder, *options):
        self.person, program = os.openpty()
        words = [Path(sys.executable).with_name("poco-vla"), "robot", "--url", url, *ARM, "--fps", "100"]
        self.process = forked.Popen(
            [*words, "--spool", folder / "spool", *options],
            stdin=program,
            stdout=program,
            stderr=program,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "160"},
        )
        os.close(program)
        self._shown = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        while True:
            try:
                self._shown += os.read(self.person, 65536)
            except OSError:  # the program's side is closed
                return

    @property
    def shown(self):
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._shown.decode(errors="replace"))

    def until(self, pattern, after=0, seconds=90):
        """Wait until `pattern` is shown behind position `after`; the position behind it."""
        end = time.monotonic() + seconds
        while (found := re.compile(pattern).search(self.shown, after)) is None:
            assert time.monotonic() < end, f"no {pattern!r} in:\n{self.shown[after:]}"
            assert self.process.poll() is None or re.search(pattern, self.shown[after:]), self.shown
            time.sleep(0.02)
        return found.end()

    def press(self, keys):
        os.write(self.person, keys.encode())

    def ended(self):
        status = self.process.wait(30)
        self._reader.join(5)
        return status


@contextmanager
def terminal(url, folder, *options):
    running = Terminal(url, folder, *options)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait(10)
        running._reader.join(5)
        os.close(running.person)


@pytest.fixture
def sink(tmp_path):
    return Sink(tmp_path / "sink")


def eventually(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


# -- at the terminal --------------------------------------------------------------------------------------------------


@one_at_a_time
def test_each_key_ends_an_episode_as_it_says_and_the_end_of_training_ends_the_program(sink, tmp_path):
    """Success, failure, discard, time limit; a refused one; stop, release; the prompt before each; then exit status 0.

    Between episodes a person is asked to put the scene back. A key that is pressed too late, here a second s, says
    nothing about the next episode.
    """
    options = ["--reset", "prompt", "--max-steps", "150"]
    with serve(sink) as server, terminal(server.url, tmp_path, *options) as robot:
        at = robot.until("put the scene back")
        assert "simulated_arm, 100 Hz, chunks of 5, at most 150 steps" in robot.shown
        assert "lift the cube" in robot.shown
        assert "space EMERGENCY STOP" in robot.shown
        for number, (keys, said, taken) in enumerate(
            [
                ("ss", "success, [0-9]+ steps, weights [0-9]+.*recorded; success of the last 1: 100 %", 1),
                ("f", "failure, .*recorded; success of the last 2: 50 %", 2),
                ("d", "discarded after [0-9]+ steps, not kept", 2),
                ("", "time limit, 150 steps, .*recorded", 3),
            ],
            start=1,
        ):
            robot.press("\n")
            at = robot.until(f"episode {number}  step [0-9]+ of 150", at)
            robot.press(keys)
            at = robot.until(f"episode {number}: {said}", at)
            assert len(sink.taken) == taken
            at = robot.until("put the scene back", at)
        robot.press("\n")
        at = robot.until("step [0-9]+ of", at)
        robot.press(" ")
        at = robot.until("emergency stop: nothing is sent", at)
        at = robot.until("Enter or r releases", at)
        robot.press("r")
        at = robot.until("put the scene back", at)
        sink.refuse = "this one looks odd"
        robot.press("\n")
        at = robot.until("step [0-9]+ of", at)
        robot.press("f")
        at = robot.until("refused by the learner .*this one looks odd", at)
        sink.done = True
        at = robot.until("put the scene back|training is over", at)
        robot.press("\ns\n")
        robot.until("training is over")
        assert robot.ended() == 0
    kept = sink.episodes()
    assert [e.succeeded for e in kept[:3]] == [True, False, False]
    assert [bool(e.terminal[-1]) for e in kept[:3]] == [True, True, False]
    assert all(e.task == "lift the cube" for e in kept)
    (refused,) = (tmp_path / "spool").glob("*.refused")
    assert not decoded(refused).succeeded
    assert not list((tmp_path / "spool").glob("*.safetensors"))


@contextmanager
def learner(folder, port):
    """In a process of its own, which is killed at the end. It serves when it is told to."""
    program = HERE / "robots" / "learner.py"
    child = forked.Popen([sys.executable, program, folder, str(port)], stdin=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.wait(10)
        child.stdin.close()


@one_at_a_time
def test_either_side_is_killed_and_begun_again_and_each_episode_is_recorded_once(sink, tmp_path):
    """The robot is killed while it waits for the yes, the learner while a person puts the scene back. At the end the
    terminal hangs up."""
    port, options = free_port(), ["--rewards", "robot", "--reset", "prompt", "--max-steps", "100"]
    url = f"ws://127.0.0.1:{port}"
    sink.gate.clear()
    with learner(sink.folder, port) as one_that_is_killed:
        with serve(sink, port=port), terminal(url, tmp_path, *options) as robot:
            robot.until("put the scene back")
            robot.press("\n")
            eventually(lambda: sink.asked)
            robot.process.kill()
            robot.process.wait(10)
            (key,) = sink.asked
            assert [path.stem for path in (tmp_path / "spool").glob("*.safetensors")] == [key]
            sink.gate.set()
            eventually(lambda: sink.taken == [key])
        one_that_is_killed.stdin.write("\n")
        one_that_is_killed.stdin.flush()
        with terminal(url, tmp_path, *options) as robot:
            at = robot.until("an episode of an earlier session, 100 steps: recorded")
            assert recorded(sink) == {key}
            at = robot.until("put the scene back", at)
            robot.press("\n")
            at = robot.until("episode 1: time limit, .*recorded", at)
            at = robot.until("put the scene back", at)
            one_that_is_killed.kill()
            one_that_is_killed.wait(10)
            with serve(sink, port=port):
                robot.press("\n")
                at = robot.until("episode 2: time limit, .*recorded", at)
                at = robot.until("put the scene back", at)
                robot.press("\n")
                robot.until("episode 3  step [0-9]+ of", at)
                robot.process.send_signal(signal.SIGHUP)
                assert robot.ended() == 130
    assert "interrupted" in robot.shown
    assert len(recorded(sink)) == 3
    assert [path.name for path in (tmp_path / "spool").iterdir()] == [".lock"]


def recorded(sink):
    return {path.stem for path in sink.folder.iterdir()}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


# -- before anything moves --------------------------------------------------------------------------------------------


@pytest.fixture
def no_terminal(monkeypatch):
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield


def run(url, folder, *options):
    main(["robot", "--url", url, *ARM, "--spool", str(folder / "spool"), *options])


def refused(capsys, url, folder, *options):
    """The one error."""
    with pytest.raises(SystemExit) as stop:
        run(url, folder, *options)
    assert stop.value.code == 1
    return capsys.readouterr().err


def test_without_a_terminal_a_robot_that_judges_itself_needs_none(sink, tmp_path, capsys, no_terminal):
    with serve(sink) as server:
        run(server.url, tmp_path, "--rewards", "robot", "--fps", "0", "--max-steps", "7", "--episodes", "2")
    assert [len(e) for e in sink.episodes()] == [7, 7]
    states = [e.obs["observation.state"][0] for e in sink.episodes()]
    assert not np.array_equal(*states)
    assert "as fast as it goes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("server", "options", "words"),
    [
        ({}, [], "keys need a terminal"),
        ({}, ["--rewards", "robot", "--reset", "prompt"], "no terminal to ask in"),
        ({}, ["--horizon", "9"], "chunks have 5 steps"),
        ({"action_bounds": None}, [], "give --low and --high"),
        ({"spec": {"observation.state": Feature((7,), "float32")}}, [], "the policy takes float32 [7], the robot has"),
        ({"spec": {"observation.images.top": Feature((8, 8, 3), "uint8")}}, [], "the robot has none"),
        ({"actor": Twitch(actions=4)}, [], "the policy gives 4, the robot takes 5 (x.vel"),
        ({"episodes": None}, [], "takes no episodes"),
        ({"token": "secret"}, [], "Api-Key"),
        ({}, ["--low", "-1", "-1"], "--low has 2 numbers"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_run_is_one_error_before_anything_moves(
    server, options, words, sink, tmp_path, capsys, no_terminal
):
    with serve(sink, **server) as running:
        assert words in refused(capsys, running.url, tmp_path, *options).replace("\n", " ")
    assert not sink.asked
    assert not running.actor.asked


def test_a_viewer_that_cannot_be_started_is_told(sink, tmp_path, capsys, no_terminal, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with serve(sink) as running:
        shown = refused(capsys, running.url, tmp_path, "--show").replace("\n", " ")
    assert "--show needs LeRobot's viewer (lerobot[viz])" in shown
    assert not sink.asked


@pytest.mark.parametrize(("rewards", "kept"), [("keys", "sfd "), ("robot", "d "), ("keys+robot", "sfd ")])
def test_space_and_d_are_heard_whoever_judges(rewards, kept, monkeypatch, tmp_path):
    """At a terminal."""
    person, program = os.openpty()
    with os.fdopen(program) as stdin, ExitStack() as stack:
        monkeypatch.setattr(sys, "stdin", stdin)
        arm = SimulatedArm(SimulatedArmConfig(views=(), calibration_dir=tmp_path))
        signals, keys = _success_signals(rewards, arm, stack)
        assert "".join(keys.keys) == kept
        assert [type(source) for source in signals.sources][1:] == [RobotSuccess] * ("robot" in rewards)
    os.close(person)


def test_a_stop_while_the_scene_is_put_back_moves_nothing(tmp_path):
    """Enter lets a robot that can reset itself do so; space does not, and is still to be heard."""
    robot, (person, program) = PointRobot(tmp_path), os.openpty()
    with CountedKeys(program) as keys, ThreadPoolExecutor(1) as thread:
        for key, resets in (("\n", True), (" ", False)):
            robot.position, before = np.ones(3), keys.reads
            done = thread.submit(_put_back, robot, True, View(Console(file=io.StringIO())), keys)
            eventually(lambda: keys.reads >= before + 2)  # noqa: B023 (called at once; the first read forgets keys)
            waited = not done.done()
            os.write(person, key.encode())
            done.result(60)
            assert waited
            assert (robot.position == 0).all() == resets
        assert keys.poll() is Signal.STOP
    os.close(person)
    os.close(program)


def test_a_robot_that_cannot_judge_itself_is_not_asked_to(tmp_path, no_terminal):
    with ExitStack() as stack, pytest.raises(ConfigError, match="cannot tell success by itself"):
        _success_signals("robot", PointRobot(tmp_path), stack)


def test_help_needs_no_robot_and_says_each_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["robot", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--url", "--token", "--rewards", "--lead", "--max-step", "--spool", "--reset", "--show"):
        assert option in shown
    assert "devices" not in shown
    assert "--robot.type" in shown


# -- words ------------------------------------------------------------------------------------------------------------


def test_words_for_the_devices_are_lerobots_in_either_form():
    words = ["robot", "--url", "u", "--robot.type", "a", "--lead=2", "--teleop.port=p", "--robot.x=-1", "--low", "-1"]
    rest, devices = split_devices(words)
    assert rest == ["robot", "--url", "u", "--lead=2", "--low", "-1"]
    assert devices == ["--robot.type", "a", "--teleop.port=p", "--robot.x=-1"]


def test_devices_are_made_as_lerobots_commands_make_them(tmp_path, monkeypatch):
    """Their configurations, that is: no driver is installed here."""
    made = []
    monkeypatch.setattr(devices, "make_robot_from_config", lambda config: made.append(config) or PointRobot(tmp_path))
    monkeypatch.setattr(devices, "make_teleoperator_from_config", lambda config: made.append(config) or Hand(tmp_path))
    cameras = "{front: {type: opencv, index_or_path: 0, width: 640, height: 480, fps: 30}}"
    words = ["--robot.type", "so100_follower", "--robot.port", "/dev/a", f"--robot.cameras={cameras}"]
    make_devices([*words, "--teleop.type=so100_leader", "--teleop.port=/dev/b"])
    robot, teleop = made
    assert (robot.type, robot.port, teleop.type, teleop.port) == ("so100_follower", "/dev/a", "so100_leader", "/dev/b")
    assert (robot.cameras["front"].width, robot.cameras["front"].type) == (640, "opencv")


def test_a_driver_that_is_not_installed_is_told():
    if importlib.util.find_spec("scservo_sdk"):
        pytest.skip("it is installed")
    with pytest.raises(ConfigError, match=r"so100_follower.*feetech"):
        make_devices(["--robot.type=so100_follower", "--robot.port=/dev/a"])


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        ([], ConfigError, "say which robot.*simulated_arm.*so101_follower"),
        (["--robot.type=simulated_amr"], UnknownNameError, 'Did you mean "simulated_arm"'),
        (["--robot.seed=1"], UnknownNameError, "robot.type"),
        (["--robot.type=simulated_arm", "--robot.seed=x"], ConfigError, "robot.seed"),
        (["--robot.type=simulated_arm", "--robot.views=[top]"], ConfigError, "Known: front, wrist"),
        (["--robot.type=simulated_arm", "--robot.discover_packages_path=no.such"], ConfigError, "no.such"),
        ([*ARM, "--teleop.type=nothing"], UnknownNameError, "so101_leader"),
    ],
    ids=lambda value: "_".join(value) or "none" if isinstance(value, list) else None,
)
def test_devices_that_cannot_be_made_are_told(words, error, said):
    with pytest.raises(error, match=said):
        make_devices(words)


# -- agreement --------------------------------------------------------------------------------------------------------


def metadata(**changes):
    return {
        "observation": {"observation.state": {"shape": [6], "dtype": "float32"}},
        "action_dim": 3,
        "action_low": [0.0, -2.0, 5.0],
        "action_high": [1.0, 2.0, 5.0],
    } | changes


def test_what_the_policy_does_not_read_is_named_and_no_error(tmp_path):
    assert check_match(PointRobot(tmp_path), metadata()) == []
    assert check_match(PointRobot(tmp_path, pictures=True), metadata()) == ["observation.images.front"]


def test_all_that_does_not_fit_is_in_one_error(tmp_path):
    wants = {
        "observation.state": {"shape": [5], "dtype": "float32"},
        "observation.images.front": {"shape": [4, 5, 3], "dtype": "uint8"},
        "observation.images.top": {"shape": [4, 6, 3], "dtype": "uint8"},
    }
    with pytest.raises(ConfigError) as error:
        check_match(PointRobot(tmp_path, pictures=True), metadata(observation=wants, action_dim=2))
    for words in ("float32 [5]", "float32 [6]", "uint8 [4, 5, 3]", "uint8 [4, 6, 3]", "top", "elbow.pos"):
        assert words in str(error.value)


def test_bounds_are_the_demonstrations_and_a_twentieth_of_their_range_beyond():
    """[0, 1] -> [-0.05, 1.05]; [-2, 2] -> [-2.2, 2.2]; what never changed stays where it was."""
    names = ["a", "b", "c"]
    limits = action_limits(metadata(), names)
    low, high, step = limits.vectors(names)
    np.testing.assert_allclose(low, [-0.05, -2.2, 5.0], rtol=1e-4)
    np.testing.assert_allclose(high, [1.05, 2.2, 5.0], rtol=1e-4)
    assert np.isinf(step).all()
    assert limits.mode == "clip"
    np.testing.assert_allclose(
        limits.apply(np.full((1, 3), 9, np.float32), names, np.zeros(3, np.float32)), high[None], rtol=1e-5
    )


def test_given_bounds_come_first_one_for_all_or_one_each():
    names = ["a", "b", "c"]
    low, high, step = action_limits(metadata(), names, high=[7.0], max_step=[0.1, 0.2, 0.3]).vectors(names)
    np.testing.assert_allclose(low, [-0.05, -2.2, 5.0], rtol=1e-4)
    assert high.tolist() == [7, 7, 7]
    np.testing.assert_allclose(step, [0.1, 0.2, 0.3], rtol=1e-6)
    unknown = metadata(action_low=None, action_high=None)
    assert action_limits(unknown, names, low=[-1.0], high=[1.0]).vectors(names)[0].tolist() == [-1, -1, -1]
    for given in ({}, {"low": [0.0]}, {"high": [0.0]}):
        with pytest.raises(ConfigError, match="give --low and --high"):
            action_limits(unknown, names, **given)
    with pytest.raises(ConfigError, match="--max-step has 2"):
        action_limits(metadata(), names, max_step=[1.0, 1.0])


def test_a_second_session_with_the_same_spool_is_refused(sink, tmp_path, capsys, no_terminal):
    with serve(sink) as server, Spool(tmp_path / "spool"):
        assert "in use by another session" in refused(capsys, server.url, tmp_path, "--rewards", "robot")
