"""The expert for OGBench's tasks: every task of the paper is solved, and what is in the way is moved first."""

import itertools

import numpy as np
import pytest

from poco_vla.demonstrations.scripted import demonstrate
from poco_vla.errors import ConfigError
from poco_vla.simulators.ogbench_expert import lights_out, next_subgoal
from poco_vla.simulators.ogbench_gym import OGBenchEnv

TASKS = [
    "scene-singletask-task2-v0",
    "puzzle-3x3-singletask-task1-v0",
    "cube-double-singletask-task4-v0",
    *(
        pytest.param(f"{name}-v0", marks=pytest.mark.exhaustive)
        for name in (
            "scene-singletask-task1",
            "scene-singletask-task4",
            "cube-double-singletask-task2",
            "cube-double-singletask-task5",
            "cube-triple-singletask-task4",
            "cube-quadruple-singletask-task3",
        )
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_expert_solves_the_task(task):
    """Among them: through a lock, into a drawer that is closed, cubes that change places, towers."""
    env = OGBenchEnv(task)
    episode = demonstrate(env, 0.1, np.random.default_rng(0), seed=0)
    assert episode.success[-1]
    assert not episode.success[:-1].any()
    assert np.abs(episode.action).max() <= 1


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_expert_solves_the_task_from_where_a_disturbance_left_it():
    env = OGBenchEnv("cube-double-singletask-task1-v0")
    for seed in range(3):
        episode = demonstrate(env, 0.1, np.random.default_rng(seed), seed=seed, disturb_at=25)
        assert episode.success[-1]


def pressed(buttons, rows, columns):
    """Which lamps of a board flip, by the rule itself."""
    flips = np.zeros((rows, columns), dtype=int)
    for button in buttons:
        x, y = divmod(button, columns)
        for dx, dy in [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]:
            if 0 <= x + dx < rows and 0 <= y + dy < columns:
                flips[x + dx, y + dy] += 1
    return flips.ravel() % 2


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (2, 3), (4, 4), (4, 5)])
def test_lights_out_gives_presses_that_flip_what_is_asked_for(rows, columns):
    rng = np.random.default_rng(0)
    for _ in range(20):
        buttons = np.flatnonzero(rng.integers(2, size=rows * columns))
        flips = pressed(buttons, rows, columns)
        np.testing.assert_array_equal(pressed(lights_out(flips, rows, columns), rows, columns), flips)


def test_lights_out_says_when_there_is_no_way():
    """Of the 16 patterns of a 2 x 2 board each has one answer; of a 4 x 4 board's only a sixteenth has any."""
    assert all(lights_out(np.array(f), 2, 2) is not None for f in itertools.product((0, 1), repeat=4))
    one_lamp = np.eye(16, dtype=int)[0]
    assert lights_out(one_lamp, 4, 4) is None


def test_a_pattern_that_cannot_be_reached_is_told():
    env = OGBenchEnv("puzzle-4x4-singletask-task1-v0")
    env.reset(seed=0)
    simulator = env.simulator
    simulator._target_button_states = simulator._cur_button_states.copy()
    assert next_subgoal(simulator, np.random.default_rng(0)) is None
    simulator._target_button_states[0] ^= 1
    with pytest.raises(ConfigError, match="cannot be reached"):
        next_subgoal(simulator, np.random.default_rng(0))
