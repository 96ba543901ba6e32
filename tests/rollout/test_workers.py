"""Objects in worker processes: what goes on while nobody listens, and what the end of a run leaves time for."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_env import faulty_spec

from poco_vla.data import Episode
from poco_vla.rollout import workers
from poco_vla.rollout.video import _replay_frames
from poco_vla.rollout.workers import Worker, close_all, wait, worker_context


def build():
    return SimpleNamespace(
        nap=time.sleep,
        much=lambda: bytes(5_000_000),
        note=Path.touch,
        end_a_program=end_a_program,
        end_a_fork=end_a_fork,
        close=lambda: None,
    )


def end_a_program():
    """Return how a program ends that this process starts, as Unity and CARLA are, and then terminates."""
    with subprocess.Popen(["sleep", "60"]) as program:
        program.terminate()
        return program.wait(20)


def end_a_fork():
    """Return how a process ends that is forked from this one and then terminated."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)  # Python forgets a signal that comes while it forks
    os.kill(child, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def worker():
    made = Worker(worker_context(()), build, "test", within=120.0)
    wait([made])
    yield made
    close_all([made])


def test_the_next_call_is_worked_on_while_a_large_answer_waits_to_be_taken_in(worker, tmp_path):
    worker.ask("much")
    worker.ask("note", tmp_path / "here")
    deadline = time.monotonic() + 30
    while not (tmp_path / "here").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "here").exists()
    wait([worker])
    assert [answer and len(answer) for answer in worker.answers] == [5_000_000, None]


def test_a_call_that_is_as_slow_as_ever_may_end_when_the_run_stops_and_another_is_killed(worker, monkeypatch):
    monkeypatch.setattr(workers, "GRACE", 0.1)
    worker.ask("nap", 1.0)
    wait([worker])
    worker.ask("nap", 1.0)
    wait([worker], give_up=lambda: True)
    assert (worker.failure, worker.answers) == (None, [None, None])
    worker.ask("nap", 100.0)
    wait([worker], give_up=lambda: True)
    assert worker.failure is not None
    assert worker.failure.kind == "stopped"


def test_an_episode_whose_actions_and_frames_would_fill_the_pipes_is_played_again():
    length, every = 36_000, 600
    zeros = np.zeros(length, np.float32)
    episode = Episode({}, np.zeros((length, 2), np.float32), zeros, zeros > 0, zeros > 0, task="", seed=0)
    spec = faulty_spec("none", step_timeout=60.0)
    frames = []
    play = threading.Thread(target=lambda: frames.extend(_replay_frames(episode, spec, every)), daemon=True)
    play.start()
    play.join(60)
    assert len(frames) == 1 + length // every


def test_sigterm_ends_programs_that_a_simulator_starts_but_not_its_worker(worker):
    os.kill(worker.process.pid, signal.SIGTERM)
    worker.ask("end_a_program")
    worker.ask("end_a_fork")
    wait([worker])
    assert (worker.failure, worker.answers) == (None, [-signal.SIGTERM, -signal.SIGTERM])


PROGRAM = """
if __name__ == "__main__":
    import time
    from poco_vla.rollout.workers import Worker, wait, worker_context
    worker = Worker(worker_context(()), lambda: time, "test", within=60.0)
    wait([worker])
    worker.ask("sleep", 600)
"""


def test_a_program_that_closes_no_worker_ends_nevertheless(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    assert subprocess.run([sys.executable, str(file)], timeout=60, check=False).returncode == 0
