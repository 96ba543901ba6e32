"""Keys of a real (pseudo-)terminal, scripts, a robot's own success: one interface."""

import contextlib
import fcntl
import os
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from lerobot.rewards.classifier.configuration_classifier import RewardClassifierConfig
from lerobot.rewards.pretrained import PreTrainedRewardModel
from scripted_signals import CountedKeys, ScriptedSignals

from poco_vla.errors import ConfigError
from poco_vla.robots import (
    AnySignals,
    KeySignals,
    RewardModelSuccess,
    RobotSuccess,
    Signal,
)


@pytest.fixture
def terminal():
    """(the person's side, the program's side)"""
    person, program = os.openpty()
    yield person, program
    for end in (person, program):
        with contextlib.suppress(OSError):
            os.close(end)


def heard(signals, count, seconds=60.0):
    """`count` signals, then whatever else there is."""
    found, end = [], time.monotonic() + seconds
    while len(found) < count and time.monotonic() < end:
        if (signal := signals.poll()) is not None:
            found.append(signal)
    while (signal := signals.poll()) is not None:
        found.append(signal)
    return found


def typed(terminal, keys):
    """Type these keys, and return once the program's side has them to read."""
    person, program = terminal
    os.write(person, keys)
    end = time.monotonic() + 60
    while int.from_bytes(fcntl.ioctl(program, termios.FIONREAD, bytes(4)), sys.byteorder) < len(keys):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.001)


def asked(thread, keys, answers):
    """Ask in a thread, and return once keys are answers: the first read of a question forgets them."""
    before, answer, end = keys.reads, thread.submit(keys.ask, answers), time.monotonic() + 60
    while keys.reads < before + 2:
        assert time.monotonic() < end, "nobody asked"
        time.sleep(0.001)
    return answer


def settings(terminal):
    return termios.tcgetattr(terminal)


def test_each_key_is_its_signal_without_enter_and_nothing_is_echoed(terminal):
    person, program = terminal
    with KeySignals(program) as keys:
        assert keys.poll() is None
        os.write(person, b"sfxd Ft")
        assert heard(keys, 6) == [
            *(Signal.SUCCESS, Signal.FAILURE, Signal.DISCARD, Signal.STOP, Signal.FAILURE, Signal.TAKEOVER)
        ]
        os.write(person, b"t")
        assert heard(keys, 1) == [Signal.RELEASE]
        os.set_blocking(person, False)
        with pytest.raises(BlockingIOError):
            os.read(person, 1)


def test_arrow_keys_are_no_signals_also_in_two_pieces_and_never_hide_the_emergency_key(terminal):
    person, program = terminal
    with KeySignals(program) as keys:
        os.write(person, b"\x1b[D\x1bOD\x1b[1;5D")  # the left arrow, three ways
        assert heard(keys, 1, seconds=0.1) == []
        os.write(person, b"\x1b[")
        assert heard(keys, 1, seconds=0.1) == []
        os.write(person, b"D")
        assert heard(keys, 1, seconds=0.1) == []
        for begun in (b"\x1b", b"\x1b[", b"\x1b[1;"):
            os.write(person, begun)
            assert heard(keys, 1, seconds=0.05) == []
            os.write(person, b" ")
            assert heard(keys, 1) == [Signal.STOP]


def test_a_new_episode_forgets_the_keys_of_the_last_one_but_not_a_stop(terminal):
    person, program = terminal
    with KeySignals(program) as keys:
        typed(terminal, b"ts ")
        keys.begin()
        assert heard(keys, 1) == [Signal.STOP]
        os.write(person, b"t")
        assert heard(keys, 1) == [Signal.TAKEOVER]


@contextlib.contextmanager
def asked_in_a_thread(person):
    """A question that nobody answered is ended by a stop, so that a test that fails ends."""
    with ThreadPoolExecutor(1) as thread:
        try:
            yield thread
        finally:
            with contextlib.suppress(OSError):
                os.write(person, b" ")


def test_a_question_takes_the_answers_that_are_pressed_after_it_and_nothing_leaks(terminal):
    """Typed before: forgotten. No answer: passed over. Enter is Enter in either form. The signals hear none of it."""
    person, program = terminal
    with CountedKeys(program) as keys, asked_in_a_thread(person) as thread:
        typed(terminal, b"s\nrd")
        for pressed, found in ((b"sxd\n", "\n"), (b"t\r", "\n"), (b"\x1b[DQs", "q"), (b"R", "r")):
            answer = asked(thread, keys, "\nrq")
            assert not answer.done()
            os.write(person, pressed)
            assert answer.result(60) == found
        keys.begin()
        assert heard(keys, 1, seconds=0.1) == []
        os.write(person, b"t")
        assert heard(keys, 1) == [Signal.TAKEOVER]


def test_a_stop_ends_a_question_and_is_still_heard(terminal):
    """Pressed before it or during it; so does a terminal that goes away."""
    person, program = terminal
    with CountedKeys(program) as keys, asked_in_a_thread(person) as thread:
        typed(terminal, b" \n")
        assert keys.ask("\n") is None
        assert heard(keys, 1) == [Signal.STOP]
        answer = asked(thread, keys, "\n")
        os.write(person, b" ")
        assert answer.result(60) is None
        keys.begin()
        assert heard(keys, 1) == [Signal.STOP]
        assert not keys.gone
        answer = asked(thread, keys, "\n")
        os.close(person)
        assert answer.result(60) is None
        assert keys.gone


def test_keys_that_are_left_out_mean_nothing(terminal):
    person, program = terminal
    with KeySignals(program, {" ": Signal.STOP}) as keys:
        os.write(person, b"sfd t")
        assert heard(keys, 2) == [Signal.STOP, Signal.TAKEOVER]


def test_the_terminal_is_as_before_after_an_error(terminal):
    _, program = terminal
    before = settings(program)

    def failing():
        with KeySignals(program):
            assert not settings(program)[3] & (termios.ECHO | termios.ICANON)
            assert settings(program)[3] & termios.ISIG
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert settings(program) == before


PROGRAM = """
import os, signal, sys, termios, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # these tests may have been started by what ignores it
os.login_tty(int(sys.argv[1]))
before = termios.tcgetattr(0)
import atexit
atexit.register(lambda: print("restored", termios.tcgetattr(0) == before, flush=True))
from poco_vla.robots.signals import KeySignals
keys = KeySignals().__enter__()
print("ready", flush=True)
try:
    while True:
        time.sleep(0.01)
        if (heard := keys.poll()) is not None:
            print(heard, flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_standard_input_of_a_program_gives_keys_and_is_restored_at_its_end(terminal):
    """Ctrl-C is still the interrupt; the end of the program restores what nobody closed."""
    person, program = terminal
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, str(program)], pass_fds=[program])
    shown, typed, end = b"", {b"ready": b"s", b"Signal.SUCCESS": b"\x03"}, time.monotonic() + 60
    os.set_blocking(person, False)
    while b"restored" not in shown.rpartition(b"\n")[0] and time.monotonic() < end:  # a whole line
        for answer in [text for text in typed if text in shown]:
            os.write(person, typed.pop(answer))
        time.sleep(0.01)
        try:
            shown += os.read(person, 1000)
        except BlockingIOError:
            continue
    assert child.wait(20) == 0
    assert b"interrupted" in shown
    assert b"restored True" in shown


def test_a_terminal_that_goes_away_is_a_stop(terminal):
    person, program = terminal
    with KeySignals(program) as keys:
        os.close(person)
        assert heard(keys, 1) == [Signal.STOP]
        keys.begin()
        assert heard(keys, 1) == [Signal.STOP]


def test_what_is_no_terminal_is_refused_with_a_way_out():
    reader, writer = os.pipe()
    try:
        with pytest.raises(ConfigError, match="ssh -t"), KeySignals(reader):
            pass
    finally:
        os.close(reader)
        os.close(writer)


def test_a_closed_terminal_says_how_to_open_it(terminal):
    with pytest.raises(ConfigError, match="with KeySignals"):
        KeySignals(terminal[1]).poll()


def test_a_script_speaks_at_its_steps_in_every_episode():
    signals = ScriptedSignals({0: Signal.TAKEOVER, 2: Signal.SUCCESS})
    for _ in range(2):
        signals.begin()
        found = []
        for _ in range(4):
            signals.observe({})
            found.append([signals.poll(), signals.poll()])
        assert found == [[Signal.TAKEOVER, None], [None, None], [Signal.SUCCESS, None], [None, None]]


class Lamp:
    success = False


def test_a_robots_success_is_given_once_an_episode():
    lamp = Lamp()
    signals = RobotSuccess(lamp)
    assert signals.poll() is None
    lamp.success = True
    assert [signals.poll(), signals.poll()] == [Signal.SUCCESS, None]
    signals.begin()
    assert signals.poll() is Signal.SUCCESS


class Brightness(PreTrainedRewardModel):
    """LeRobot's base class; the reward is how bright the picture is, and it notes what it was shown."""

    config_class = RewardClassifierConfig
    name = "brightness"

    def __init__(self):
        super().__init__(RewardClassifierConfig())
        self.seen = []

    def compute_reward(self, batch):
        self.seen.append(batch)
        return batch["observation.images.front"].mean(dim=(1, 2, 3))


def test_a_lerobot_reward_model_is_asked_every_few_steps_and_must_agree_with_itself():
    """Looks at steps 2, 4, 6, 8: a flicker at 2 is not enough, 6 and 8 are."""
    model = Brightness()
    signals = RewardModelSuccess(model, "light up", every=2, agree=2)
    for _ in range(2):
        signals.begin()
        found = []
        for bright in (0, 200, 0, 100, 0, 200, 0, 200, 0, 200):
            signals.observe({"observation.images.front": np.full((4, 6, 3), bright, dtype=np.uint8)})
            found.append(signals.poll())
        assert [step for step, signal in enumerate(found, 1) if signal is Signal.SUCCESS] == [8]
    assert model.seen[0]["observation.images.front"].shape == (1, 3, 4, 6)
    assert model.seen[0]["task"] == "light up"
    assert len(model.seen) == 10


def test_a_reward_model_that_would_never_look_is_refused():
    with pytest.raises(ConfigError, match="every is 0"):
        RewardModelSuccess(Brightness(), every=0)


def test_several_sources_are_one(terminal):
    _, program = terminal
    lamp = Lamp()
    lamp.success = True
    with KeySignals(program) as keys:
        signals = AnySignals([keys, RobotSuccess(lamp), ScriptedSignals({0: Signal.FAILURE})])
        signals.begin()
        signals.observe({})
        typed(terminal, b"d")
        assert heard(signals, 3) == [Signal.DISCARD, Signal.SUCCESS, Signal.FAILURE]
