"""The instruction that a policy is told: the environment's after each reset, the data's, or the configuration's."""

import pytest
from tiny_env import faulty_spec, homing_chunks

from poco_vla.rollout import EnvPool
from poco_vla.simulators.instructions import settle_instruction


def settled(spec, told, known):
    said = []
    return settle_instruction(spec, told, known, said.append).instruction, said


def test_each_chunk_and_each_episode_has_the_instruction_of_its_own_reset():
    """It names the seed: environment i of 3 plays i, 3 + i, ..."""
    with EnvPool(faulty_spec("none", 3, in_process=True), 4) as pool:
        pool.reset(0, 9)
        episodes = []
        while not pool.idle.all():
            for i in range(3):
                if not pool.idle[i]:
                    assert pool.tasks[i] == f"task {pool._running[i].seed}"
            episodes += pool.step(homing_chunks(pool.obs, 4))[0]
    assert len(episodes) == 9
    assert all(e.task == f"task {e.seed}" for e in episodes)


def test_a_replayed_episode_is_asked_again():
    spec = faulty_spec("none", 2, in_process=True)
    with EnvPool(spec, 2) as pool:
        pool.reset(5)
        for _ in range(8):
            pool.step(homing_chunks(pool.obs, 2) / 2)
        state, tasks = pool.state(), pool.tasks
    with EnvPool(spec, 2) as pool:
        pool.restore(state)
        assert pool.tasks == tasks
        assert "task 5" not in tasks


def test_the_configured_instruction_is_told_and_recorded():
    with EnvPool(faulty_spec("none", 2, in_process=True, instruction="go home"), 4) as pool:
        pool.reset(0, 2)
        assert pool.tasks == ["go home", "go home"]
        episodes = []
        while not pool.idle.all():
            episodes += pool.step(homing_chunks(pool.obs, 4))[0]
    assert {e.task for e in episodes} == {"go home"}


def test_an_environment_without_an_instruction_is_given_the_only_one_of_the_data():
    told, (line,) = settled(faulty_spec("none"), ["", ""], ["push the T"])
    assert told == "push the T"
    assert '"push the T" (env.instruction tells it another)' in line


def test_with_several_instructions_in_the_data_somebody_has_to_say_which():
    told, (line,) = settled(faulty_spec("none"), ["", ""], ["a", "b"])
    assert told is None
    assert "env.instruction" in line


def test_an_instruction_that_is_not_among_the_datas_is_warned_of_once():
    told, (line,) = settled(faulty_spec("none"), ["a", "c", "d"], ["a", "b"])
    assert told is None
    assert line.startswith("warning:")
    assert '"c", which is not among the demonstrations\' ("a", "b")' in line
    assert "env.instruction" in line


@pytest.mark.parametrize(("told", "known"), [(["a", "b"], ["b", "a", "c"]), (["a"], ["a\n"]), ([""], [""])])
def test_what_fits_is_not_spoken_of(told, known):
    assert settled(faulty_spec("none"), told, known) == (None, [])


def test_a_configured_instruction_that_nobody_trained_on_is_warned_of():
    told, (line,) = settled(faulty_spec("none", instruction="x"), ["a"], ["a"])
    assert told == "x"
    assert '"x" is not among' in line
