"""Errors of other people's code: a bug is told from a mistake of the user, and shown with its traceback, once."""

import importlib
import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from lerobot.envs.configs import EnvConfig
from tiny_env import faulty_spec

from poco_vla.bugs import RemoteBugError, bug_behind, place_of, traceback_of
from poco_vla.cli.errors import guarded
from poco_vla.config import EnvSpec
from poco_vla.errors import ConfigError, DataError, OtherProcessError, PocoError, SimulatorError
from poco_vla.learner.failures import Failures
from poco_vla.rollout import EnvPool
from poco_vla.rollout.cluster_worker import _answer
from poco_vla.simulators import environment

THEIRS = """
import random

def adds():
    return 1 + "1"

def looks_up():
    return {}["a"]

def calls_wrongly():
    return random.sample([1], 2)

def asserts():
    assert False, "never"

def forgets():
    return unknown

def refuses():
    raise ValueError(
        "task must be reach or push"
    )

def needs_a_package():
    import a_package_that_nobody_installed

def opens():
    open("/nowhere/at/all")

def opens_and_adds():
    try:
        opens()
    except OSError as error:
        raise RuntimeError("no assets") from error

def takes(one):
    return one
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "their_package.py").write_text(THEIRS)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("their_package")
    sys.path.remove(str(folder))


def wrapped(act):
    """The error that this library would raise after an exception of `act`."""
    try:
        act()
    except Exception as error:
        outer = ConfigError(f"it cannot be made: {error}")
        outer.__cause__ = error
        return outer
    raise AssertionError


@pytest.mark.parametrize("name", ["adds", "looks_up", "calls_wrongly", "asserts", "forgets"])
def test_an_exception_within_their_code_is_a_bug_with_file_and_line(theirs, name):
    error = wrapped(getattr(theirs, name))
    bug = bug_behind(error)
    assert bug is error.__cause__
    assert "their_package.py" in traceback_of(bug)
    line = 1 + next(i for i, text in enumerate(THEIRS.splitlines()) if text.startswith(f"def {name}(")) + 1
    assert place_of(bug).endswith(f"their_package.py, line {line}, in {name})")


@pytest.mark.parametrize("name", ["refuses", "needs_a_package", "opens"])
def test_what_their_code_refuses_or_the_system_lacks_is_no_bug(theirs, name):
    assert bug_behind(wrapped(getattr(theirs, name))) is None


@pytest.mark.parametrize(
    "act",
    [
        lambda: {}["a"],
        lambda: int("one"),
        lambda: json.loads("{"),
        lambda: b"\xff".decode(),
        lambda: np.load(__file__),
        lambda: importlib.import_module("their_package").takes(),
    ],
    ids=["key", "number", "json", "text", "library", "call"],
)
def test_what_the_code_that_reads_has_met_itself_is_no_bug(theirs, act):
    assert bug_behind(wrapped(act)) is None


def test_a_bug_is_found_through_errors_of_this_and_of_known_libraries(theirs):
    inner = wrapped(theirs.adds)
    between = json.JSONDecodeError("between", "", 0)
    between.__cause__ = inner
    outer = DataError("outer")
    outer.__cause__ = between
    assert bug_behind(outer) is inner.__cause__


def test_from_none_says_that_there_is_no_bug(theirs):
    error = wrapped(theirs.adds)
    error.__cause__ = None
    assert bug_behind(error) is None


# -- on the command line ----------------------------------------------------------------------------------------------


@EnvConfig.register_subclass("tiny_buggy")
@dataclass
class BuggyConfig(EnvConfig):
    """Fails by a bug, and refuses a task."""

    task: str | None = "reach"
    size: int = 1

    def __post_init__(self):
        if self.task == "fly":
            raise ValueError("the task is fly, expected reach")
        self.area = self.size * self.size + None

    @property
    def gym_kwargs(self):
        return {}


def shown(act, capsys):
    """Standard error of a command, which ends with status 1."""
    with pytest.raises(SystemExit) as stop:
        guarded(act)
    assert stop.value.code == 1
    return capsys.readouterr().err.rstrip()


def test_a_bug_in_an_environment_shows_where_it_is_above_the_sentence(capsys):
    lines = shown(lambda: environment(EnvSpec("tiny_buggy")), capsys).splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert any(line.strip() == "self.area = self.size * self.size + None" for line in lines)
    assert lines[-1].startswith('ConfigError: environment "tiny_buggy": unsupported operand type(s)')


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (EnvSpec("tiny_buggy", task="fly"), 'ConfigError: environment "tiny_buggy": the task is fly, expected reach'),
        (EnvSpec("tiny_buggy", options={"sise": 2}), 'Did you mean "size"?'),
    ],
)
def test_a_wrong_value_is_one_line(spec, words, capsys):
    (line,) = shown(lambda: environment(spec), capsys).splitlines()
    assert words in line


@pytest.mark.parametrize("in_process", [True, False])
def test_a_bug_in_a_simulator_shows_the_traceback_of_its_process(in_process, capsys):
    def play():
        with EnvPool(faulty_spec("raise", max_failures=1, in_process=in_process), 3, say=lambda line: None) as pool:
            pool.reset(0, 1)
            while True:
                pool.step(np.zeros((pool.num_envs, 3, 2), np.float32))

    *trace, sentence = shown(play, capsys).splitlines()
    assert sentence.startswith("SimulatorError: ")
    assert "tiny_gym.py, line " in sentence
    assert trace[0] == "Traceback (most recent call last):"
    assert any("tiny_gym.py" in line and "in _spoilt" in line for line in trace)
    assert sum(line.startswith("Traceback") for line in trace) == 1


def test_a_rule_that_a_simulator_breaks_is_one_line(capsys):
    def play():
        with EnvPool(faulty_spec("shape", in_process=True), 3) as pool:
            pool.reset(0, 1)
            while True:
                pool.step(np.zeros((pool.num_envs, 3, 2), np.float32))

    (line,) = shown(play, capsys).splitlines()
    assert "ConfigError: " in line


@pytest.mark.parametrize("far", [True, False], ids=["in the simulator's process", "in Ray's worker"])
def test_a_bug_in_a_ray_worker_comes_as_its_traceback(far, theirs, capsys):
    """What a worker answers is text, which Ray pickles; a mistake of the user stays one line."""

    def act():
        if far:
            raise SimulatorError("it failed 5 times in a row") from RemoteBugError("Traceback ...\nTypeError: theirs")
        theirs.adds()

    def refuse():
        raise ConfigError("poco-vla 0.1 is installed there")

    def learn(answer):
        raise answer.error(1)

    *trace, sentence = shown(lambda: learn(pickle.loads(pickle.dumps(_answer(act)))), capsys).splitlines()
    kind, clue = ("SimulatorError", "Traceback ...") if far else ("TypeError", "their_package.py")
    assert sentence.startswith(f"SimulatorError: Ray worker 1 cannot act: {kind}: ")
    assert clue in "\n".join(trace)
    assert far or "their_package.py, line 5, in adds" in sentence
    (line,) = shown(lambda: learn(_answer(refuse)), capsys).splitlines()
    assert line == "SimulatorError: Ray worker 1 cannot act: ConfigError: poco-vla 0.1 is installed there"


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", f"{os.getpid()}")


@pytest.mark.parametrize("kind", [PocoError, TypeError])
@pytest.mark.parametrize("last", [0, 1])
def test_the_error_of_one_process_is_shown_once_whoever_comes_first(tmp_path, launched, capsys, kind, last):
    """The other process meets a lost connection. Either shows the first one's error and its traceback."""
    words = f"{kind.__name__} {last} of one"

    def fails():
        with Failures(tmp_path, 0, 2).watch():
            raise kind(words)

    def follows():
        with Failures(tmp_path, 1, 2).watch():
            raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")

    with pytest.raises(kind):
        fails()
    acts = [fails, follows] if last else [follows, fails]
    if last and kind is TypeError:
        with pytest.raises(TypeError):  # Python shows it
            guarded(acts[0])
    else:
        said = shown(acts[0], capsys)
        assert words in said.splitlines()[-1]
        assert ("Traceback" in said) == (kind is TypeError)
    assert shown(acts[1], capsys) == ""


PROGRAM = """
import sys
from pathlib import Path
from accelerate import PartialState
from poco_vla.cli.errors import guarded
from poco_vla.learner.failures import Failures

def work():
    state = PartialState(cpu=True)
    with Failures(Path(sys.argv[1]), state.process_index, state.num_processes).watch():
        if state.process_index == 1:
            len(3)
        state.wait_for_everyone()

guarded(work)
"""


@pytest.mark.slow
@pytest.mark.xdist_group("launched")
def test_a_bug_in_one_of_two_launched_processes_is_shown_once(tmp_path):
    """The launcher says in a traceback of its own that a process has failed, and not why."""
    (tmp_path / "program.py").write_text(PROGRAM)
    config = Path(__file__).parents[1] / "recipes" / "accelerate" / "ddp_cpu.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", config]
    done = subprocess.run(
        [*map(str, launch), tmp_path / "program.py", tmp_path], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert said.count("TypeError: object of type 'int' has no len()") == 1, said
    assert said.count('program.py", line 12, in work') == 1, said
    assert "gloo" not in said


def test_a_process_that_knows_that_another_fails_waits_for_what_it_says(tmp_path):
    with pytest.raises(PocoError), Failures(tmp_path, 0, 2).watch():
        raise PocoError("the loss is nan")
    words = r"process 1 stops because .*: PocoError: the loss is nan"
    with pytest.raises(OtherProcessError, match=words) as caught, Failures(tmp_path, 1, 2).watch():
        raise OtherProcessError("not finite on process 0")
    assert caught.value.summary == "PocoError: the loss is nan"


def test_a_remote_bug_is_its_text():
    def remote():
        raise RemoteBugError("far")

    assert traceback_of(RemoteBugError("Traceback ...")) == "Traceback ..."
    assert bug_behind(wrapped(remote)) is not None
