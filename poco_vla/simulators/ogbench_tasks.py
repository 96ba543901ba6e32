"""OGBench's manipulation tasks: their simulators, sizes, limits and instructions."""

import sys
import warnings
from functools import cache
from importlib.metadata import version
from typing import Any, Literal

import gymnasium as gym

from poco_vla.errors import ConfigError, UnknownNameError

# OGBench builds its action space from float64 bounds, several times an episode; Gymnasium warns each time.
warnings.filterwarnings("ignore", message=".*Box (high|low)'s precision lowered")
# MuJoCo's viewer looks for a display at import; poco_vla.rendering.render finds its own way to draw.
warnings.filterwarnings("ignore", module="glfw")

FPS = 20
"""Control steps per second."""
PROPRIOCEPTION = 19
"""Numbers by which OGBench's states begin: the robot's own; those of objects and targets follow."""
_SENTENCES = {
    "cube": "put the cubes on their targets",
    "scene": "bring the scene into the goal configuration",
    "puzzle": "press the buttons until the puzzle is solved",
}


def sentence(task: str) -> str:
    """Return the instruction for the robot."""
    return _SENTENCES[task.split("-")[0]]


@cache
def dimensions(task: str, *, proprioceptive: bool = False) -> tuple[int, int]:
    """State and action dimensions of a task; the whole state's, or those of the robot's own part of it."""
    simulator = make_simulator(task, "post")
    state_dim = simulator.observation_space.shape[0]
    return PROPRIOCEPTION if proprioceptive else state_dim, simulator.action_space.shape[0]


def time_limit(task: str) -> int:
    """OGBench's own time limit, in control steps."""
    limit = gym.spec(task).max_episode_steps
    assert limit is not None
    return limit


def available_tasks() -> list[str]:
    """List the ids of the single tasks.

    Raises:
        ConfigError: OGBench is not installed.
    """
    try:
        import ogbench.manipspace  # noqa: F401 (registers the tasks)
    except ImportError as error:
        raise ConfigError('OGBench is not installed: pip install "poco-vla[ogbench]"') from error
    return [name for name in gym.registry if "-singletask" in name and name.split("-")[0] in _SENTENCES]


def make_simulator(task: str, success_timing: Literal["pre", "post"]) -> Any:
    """OGBench's environment for a single task, without wrappers.

    Raises:
        UnknownNameError: no such task.
        ConfigError: OGBench is not installed, or an older one that computes success at a fixed time.
    """
    known = available_tasks()
    if task not in known:
        raise UnknownNameError("OGBench single task", task, known, "python -m poco_vla.simulators.ogbench_tasks")
    try:
        return gym.make(task, success_timing=success_timing, disable_env_checker=True).unwrapped
    except TypeError:
        raise ConfigError(
            f"OGBench {version('ogbench')} has no success_timing: before 1.2.0 success was always computed after the "
            "step. Rewards would not mean what they should; install ogbench==1.2.2."
        ) from None


if __name__ == "__main__":
    sys.stdout.write("".join(f"{name}\n" for name in sorted(available_tasks())))
