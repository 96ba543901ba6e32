"""Test the end of a run from outside: a killed launcher, a signal to all processes of a job."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest

from poco_vla.checkpointing import checkpoint
from poco_vla.errors import CheckpointError
from poco_vla.files import is_alive
from poco_vla.locks import NOTE

HERE = Path(__file__).parents[1]
LAUNCH = ("--quiet", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("signals")]


def started(run, data, *before):
    """A small run with an endless online stage, in a process group of its own."""
    words = ["--output-dir", run, "--demonstrations.root", data, "--online-steps", 10**6, "--checkpoint-every", 0]
    program = subprocess.Popen if before[1:] else forked.Popen
    return program(
        [str(word) for word in (*before, HERE / "pointmass_run.py", *words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until_online(process, run):
    """Return once two online episodes are logged."""
    log = run / "episodes.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def newest(run):
    state = json.loads((checkpoint.latest(run / "checkpoints") / "state.json").read_text())
    return state["progress"]


def test_a_run_whose_launcher_is_killed_saves_and_ends(tmp_path, data):
    """Meanwhile nobody else gets in, though the lock file is deleted. The workers end with the learner."""
    run = tmp_path / "run"
    process = started(run, data, Path(sys.executable).parent / "accelerate", "launch", *LAUNCH)
    wait_until_online(process, run)
    (run / ".lock").unlink()
    learner = json.loads((run / NOTE).read_text())["pid"]
    assert learner != process.pid
    with pytest.raises(CheckpointError, match=f"another process is training in .*process {learner}"):
        checkpoint.claim_folder(run)
    process.kill()
    output, _ = process.communicate(timeout=120)  # the pipe closes when the last process has ended
    assert f"the launcher (process {process.pid}) is gone: saving, then stopping" in output
    assert "saved in" in output
    assert "Traceback" not in output
    assert not is_alive(learner)
    assert newest(run)["episodes"] >= 2


def test_a_signal_to_the_whole_group_saves_and_says_how_to_go_on(tmp_path, data):
    run = tmp_path / "run"
    process = started(run, data, sys.executable)
    wait_until_online(process, run)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "saved in" in output
    assert "--resume" in output
    assert "Traceback" not in output
    assert "BrokenPipe" not in output
    assert newest(run)["stage"] == "online"
