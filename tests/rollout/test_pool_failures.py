"""Simulators that hang, die, raise or return nonsense: the episode is dropped and said, and the others go on."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import numpy as np
import pytest
from tiny_env import assert_same_episode, faulty_spec, homing_chunks

from poco_vla.errors import ConfigError, SimulatorError
from poco_vla.evaluation import EvaluationStopped
from poco_vla.rollout import EnvPool

HORIZON = 3


def slowly(pool):
    """Chunks that take some steps to the origin."""
    return homing_chunks(pool.obs, HORIZON) / 2


def play(spec, count, first=0):
    """All episodes of a plan, and what was said."""
    said = []
    with EnvPool(spec, HORIZON, say=said.append) as pool:
        pool.reset(first, count)
        episodes = []
        while not pool.idle.all():
            episodes += pool.step(slowly(pool))[0]
        return episodes, said, pool.failures


@pytest.fixture(scope="module")
def clean():
    return {episode.seed: episode for episode in play(faulty_spec("none", 2, in_process=True), 6)[0]}


@pytest.mark.parametrize(
    ("fault", "in_process", "words"),
    [
        ("hang", False, "did not return in time (env.step_timeout 2 s"),
        ("kill", False, "ended by SIGKILL"),
        ("raise", False, "RuntimeError: the simulator lost its way"),
        ("raise", True, "RuntimeError: the simulator lost its way"),
        ("nan", True, 'returned a non-finite "agent_pos"'),
        ("nan reward", True, "returned the reward nan"),
    ],
)
def test_an_episode_in_which_the_simulator_fails_is_dropped_and_the_others_are_as_ever(fault, in_process, words, clean):
    episodes, said, failures = play(faulty_spec(fault, 2, seeds=(2,), in_process=in_process, max_failures=2), 6)
    assert sorted(e.seed for e in episodes) == [0, 1, 3, 4, 5]
    for episode in episodes:
        assert_same_episode(episode, clean[episode.seed])
    assert failures == 1
    (line,) = said
    assert words in line
    assert 'the environment "tiny_faulty" (task reach), environment 0' in line
    assert "seed 2" in line


def test_an_error_in_the_users_code_names_its_file_and_line_and_keeps_the_traceback():
    with pytest.raises(SimulatorError, match=r"failed 1 times in a row.*tiny_gym\.py, line \d+, in _spoilt") as caught:
        play(faulty_spec("raise", max_failures=1), 2)
    assert "the simulator lost its way" in str(caught.value.__cause__)
    assert "Traceback" in str(caught.value.__cause__)


def test_an_episode_that_ended_is_kept_when_the_next_reset_hangs(clean):
    spec = faulty_spec("hang in reset", seeds=(1,), reset_timeout=5.0, max_failures=2)
    said = []
    with EnvPool(faulty_spec("none"), HORIZON):
        pass  # the server of workers is up: a start takes less than the limit
    with EnvPool(spec, HORIZON, say=said.append) as pool:
        pool.reset(0, 3)
        episodes = []
        while not pool.idle.all():
            episodes += pool.step(slowly(pool))[0]
    assert [e.seed for e in episodes] == [0, 2]
    assert_same_episode(episodes[0], clean[0])
    assert len(said) == 1


def test_failures_in_a_row_end_in_one_sentence_and_leave_a_state_to_go_on_from():
    def forever(pool):
        while True:
            pool.step(slowly(pool))

    with EnvPool(faulty_spec("nan", at=1, in_process=True, max_failures=3), HORIZON, say=lambda line: None) as pool:
        pool.reset(10)
        with pytest.raises(SimulatorError, match=r"failed 3 times in a row \(env.max_failures\)"):
            forever(pool)
        assert pool.state()["seeds"] == [13]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("shape", r'returns "agent_pos" of shape \(3,\); its observation space declares \(4,\)'),
        ("key", "observation without agent_pos, which its observation space declares; it has state"),
        ("no info", "returns None as info; expected a dict"),
        ("two successes", r'info\["is_success"\] = array.*expected True or False'),
        ("four values", "returns 4 values from step; expected five"),
        ("other name", r"without info\[\"is_success\"\].*info has 'was_successful', which is not the name"),
    ],
)
def test_a_rule_that_an_environment_breaks_is_named_with_the_environment(fault, words):
    with pytest.raises(ConfigError, match=f'the environment "tiny_faulty" \\(task reach\\).*{words}'):
        play(faulty_spec(fault, in_process=True), 2)


def test_numbers_of_numpy_tell_success_and_end():
    from poco_vla.rollout.chunk_env import read_success

    assert read_success({"is_success": np.array([True])}, "it") is True
    assert read_success({"is_success": np.float64(0)}, "it") is False
    assert read_success({"is_success": np.nan}, "it") is False
    assert read_success({}, "it") is None
    assert read_success({"success": 1.0}, "Meta-World") is True
    assert read_success({"succeed": True}, "gym-hil") is True
    assert read_success({"success": 1.0, "is_success": False}, "LeRobot's name comes first") is False
    with pytest.raises(ConfigError, match=r"= 0.4; expected True or False"):
        read_success({"is_success": 0.4}, "it")


def test_an_episode_that_never_ends_is_cut_off_as_by_a_time_limit_and_said_once():
    spec = faulty_spec("endless", in_process=True, max_episode_steps=7)
    episodes, said, failures = play(spec, 2)
    assert [len(e) for e in episodes] == [7, 7]
    assert not any(e.terminal.any() or e.succeeded for e in episodes)
    assert failures == 0
    (line,) = said
    assert "did not end an episode within 7 control steps" in line


def test_without_any_limit_an_episode_is_cut_off_at_a_stated_number():
    with EnvPool(faulty_spec("endless", in_process=True), HORIZON) as pool:
        assert (pool.time_limit, pool.most_steps) == (None, 2000)
    with EnvPool(faulty_spec("none", in_process=True), HORIZON) as pool:
        assert (pool.time_limit, pool.most_steps) == (12, 24)


def test_a_hung_step_is_left_soon_after_the_run_stops():
    """Without a limit; the state is that of the next episode."""
    stop = threading.Event()
    spec = faulty_spec("hang", step_timeout=0.0)
    with EnvPool(spec, HORIZON, say=lambda line: None, give_up=stop.is_set) as pool:
        pool.reset(0)
        pool.send(slowly(pool))
        threading.Timer(0.5, stop.set).start()
        began = time.monotonic()
        assert pool.receive() == ([], 0)
        assert time.monotonic() - began < 20
        assert pool.state()["seeds"] == [1]


def test_an_evaluation_stops_when_it_is_told_to(monkeypatch):
    from lerobot_policy_flow_mlp.adapter import FlowMlp

    from poco_vla.evaluation import evaluate

    with (
        EnvPool(faulty_spec("none", in_process=True), 4, give_up=lambda: True) as pool,
        pytest.raises(EvaluationStopped),
    ):
        evaluate(FlowMlp.tiny(), pool, episodes=2)


PROGRAM = """
if __name__ == "__main__":  # the server of workers imports this file, too
    import sys, time
    sys.path[:0] = {path!r}
    from tiny_env import faulty_spec, homing_chunks
    from poco_vla.rollout import EnvPool
    pool = EnvPool(faulty_spec("hang", 2, step_timeout=600.0, seeds=(0,)), 3)
    pool.reset(0)
    pool.send(homing_chunks(pool.obs, 3) / 2)
    print(*[worker.process.pid for worker in pool._envs.workers], flush=True)
    time.sleep(600)
"""


def test_workers_end_when_their_parent_is_killed_also_one_that_hangs(tmp_path):
    path = [str(Path(__file__).parent)]
    file = tmp_path / "program.py"
    file.write_text(PROGRAM.format(path=path))
    process = forked.Popen([sys.executable, str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [int(word) for word in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in workers if alive(pid)] == []


def alive(pid):
    """True unless a process is gone, or has only its parent left to be told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
