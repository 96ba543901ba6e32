"""The Gymnasium side of OGBench's tasks. Imports no LeRobot, so that worker processes start fast."""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from poco_vla.errors import ConfigError, UnknownNameError
from poco_vla.rollout.render import render

# OGBench builds its action space from float64 bounds, several times an episode; Gymnasium warns each time.
warnings.filterwarnings("ignore", message=".*Box (high|low)'s precision lowered")
# MuJoCo's viewer looks for a display at import; poco_vla.rollout.render finds its own way to draw.
warnings.filterwarnings("ignore", module="glfw")

GYM_ID = "poco_vla/OGBench-v0"
FPS = 20
_SENTENCES = {
    "cube": "put the cubes on their targets",
    "scene": "bring the scene into the goal configuration",
    "puzzle": "press the buttons until the puzzle is solved",
}
CAMERAS = {"front": "front", "wrist": "ur5e/robotiq/wrist"}
"""What a camera is called here -> its name in the MuJoCo model."""
_WRIST = {"pos": (0.12, 0.0, 0.03), "xyaxes": (0, 1, 0, 0.7349, 0, 0.6782), "fovy": 60}
"""A camera fixed to the gripper's base, looking down past the fingers at what is between the fingertips."""
_PROPRIOCEPTION = 19
"""Numbers by which OGBench's states begin: the robot's own; those of objects and targets follow."""


class OGBenchEnv(gym.Env):
    """One OGBench manipulation task with LeRobot's observation names, reproducible bit for bit under a seed.

    Args:
        task: OGBench id of a single task.
        episode_length: time limit in control steps; None is OGBench's own.
        success_timing: when success and reward are computed; "post" is after the step.
        cameras: names from `CAMERAS`. With any, pictures by these are observed, and of the state only what the robot
            knows of itself: where the objects are must be seen.
        image_size: height and width of a picture, in pixels.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012 (gymnasium's own convention)
    render_mode = "rgb_array"

    def __init__(
        self,
        task: str,
        episode_length: int | None = None,
        success_timing: Literal["pre", "post"] = "post",
        cameras: Sequence[str] = (),
        image_size: int = 128,
    ) -> None:
        self.simulator = _make(task, success_timing)
        self.cameras, self.image_size = checked_cameras(cameras), image_size
        self.task = task
        self.task_description = _SENTENCES[task.split("-")[0]]
        self._max_episode_steps = episode_length or _time_limit(task)
        self._steps = 0
        state_dim, _ = dimensions(task, proprioceptive=bool(cameras))
        spaces: dict[str, gym.Space] = {"agent_pos": gym.spaces.Box(-np.inf, np.inf, (state_dim,), dtype=np.float32)}
        if cameras:
            picture = gym.spaces.Box(0, 255, (image_size, image_size, 3), dtype=np.uint8)
            spaces["pixels"] = gym.spaces.Dict(dict.fromkeys(self.cameras, picture))
        self.observation_space = gym.spaces.Dict(spaces)
        # OGBench builds a new, unseeded space at every access and samples from it during reset: two resets under one
        # seed would differ in the solver's warm start. One space that is seeded with the episode mends that.
        self.action_space = self.simulator.action_space
        kind = type(self.simulator)
        changes = {"action_space": self.action_space, "add_objects": _with_wrist_camera(kind)}
        self.simulator.__class__ = type(kind.__name__, (kind,), changes)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self.action_space.seed(seed)
        observation, self.info = self.simulator.reset(seed=seed)
        self._steps = 0
        return self._observation(observation), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        observation, reward, terminated, _, self.info = self.simulator.step(np.clip(action, -1.0, 1.0))
        self._steps += 1
        success = bool(self.info["success"])
        truncated = self._steps >= self._max_episode_steps and not terminated
        return self._observation(observation), float(reward), bool(terminated), truncated, {"is_success": success}

    def render(self) -> np.ndarray:
        """RGB frame [height, width, 3] uint8, with or without a GL driver."""
        return render(self.simulator)

    def expert(self, noise: float, rng: np.random.Generator) -> "CubeExpert":
        """OGBench's own plan oracle for this task, reset to the current state."""
        if not self.task.startswith("cube-single"):
            raise ConfigError(f'no scripted expert for "{self.task}" yet; there is one for the cube-single tasks')
        return CubeExpert(self, noise, rng)

    def _observation(self, state: np.ndarray) -> dict[str, Any]:
        if not self.cameras:
            return {"agent_pos": state.astype(np.float32)}
        size = {"height": self.image_size, "width": self.image_size}
        pictures = {name: render(self.simulator, camera=CAMERAS[name], **size) for name in self.cameras}
        return {"pixels": pictures, "agent_pos": state[:_PROPRIOCEPTION].astype(np.float32)}


class CubeExpert:
    """OGBench's CubePlanOracle on the task itself; by itself it knows the target only in data-collection mode."""

    def __init__(self, env: OGBenchEnv, noise: float, rng: np.random.Generator) -> None:
        from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle

        self._env = env
        self._oracle = CubePlanOracle(env=env.simulator, noise=noise)
        # The oracle draws from numpy's global generator; the caller's stays untouched.
        state = np.random.get_state()
        np.random.seed(int(rng.integers(2**32)))
        try:
            self._oracle.reset(None, self._info())
        finally:
            np.random.set_state(state)

    def action(self) -> np.ndarray | None:
        """The next action in [-1, 1], or None when the plan is at its end."""
        if self._oracle.done:
            return None
        return self._oracle.select_action(None, self._info()).astype(np.float32)

    def _info(self) -> dict[str, Any]:
        target = self._env.simulator._data.mocap_pos[self._env.simulator._cube_target_mocap_ids[0]]
        return self._env.info | {
            "privileged/target_block": 0,
            "privileged/target_block_pos": target.copy(),
            "privileged/target_block_yaw": np.zeros(1),
        }


@cache
def dimensions(task: str, *, proprioceptive: bool = False) -> tuple[int, int]:
    """State and action dimensions of a task; the whole state's, or those of the robot's own part of it."""
    simulator = _make(task, "post")
    state_dim = simulator.observation_space.shape[0]
    return _PROPRIOCEPTION if proprioceptive else state_dim, simulator.action_space.shape[0]


def checked_cameras(names: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple. Raises UnknownNameError for one that is none of `CAMERAS`."""
    for name in names:
        if name not in CAMERAS:
            raise UnknownNameError("camera", name, CAMERAS)
    return tuple(names)


def _with_wrist_camera(kind: Any) -> Any:
    """`kind.add_objects`, which adds what a task needs to the model, adding the camera as well."""

    def add_objects(simulator: Any, model: Any) -> None:
        kind.add_objects(simulator, model)
        model.find("body", "ur5e/robotiq/base").add("camera", name="wrist", **_WRIST)

    return add_objects


def _time_limit(task: str) -> int:
    limit = gym.spec(task).max_episode_steps
    assert limit is not None
    return limit


def _make(task: str, success_timing: str) -> Any:
    try:
        import ogbench.manipspace  # noqa: F401 (registers the tasks)
    except ImportError as error:
        raise ConfigError('OGBench is not installed: pip install "poco-vla[ogbench]"') from error
    known = [name for name in gym.registry if "-singletask" in name and name.split("-")[0] in _SENTENCES]
    if task not in known:
        raise UnknownNameError("OGBench single task", task, known)
    return gym.make(task, success_timing=success_timing, disable_env_checker=True).unwrapped


gym.register(id=GYM_ID, entry_point=f"{__name__}:{OGBenchEnv.__name__}")
