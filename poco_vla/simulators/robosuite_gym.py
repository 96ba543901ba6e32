"""The Gymnasium side of RoboMimic's tasks on robosuite. Imports no LeRobot, so that worker processes start fast."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from poco_vla.errors import ConfigError, UnknownNameError
from poco_vla.rendering.render import render
from poco_vla.simulators.cameras import checked_cameras
from poco_vla.simulators.seeding import draw_seed, numpy_seed

if TYPE_CHECKING:
    from poco_vla.simulators.robosuite_expert import Expert

GYM_ID = "poco_vla/Robosuite-v0"
FPS = 20
ACTION_DIM = 7
"""Displacement of the gripper (3), its rotation as an axis times an angle (3), gripper: -1 opens, +1 closes."""
HORIZON = 400
"""Control steps that RoboMimic's evaluation allows for each of the three (robomimic/__init__.py, `ph_horizons`)."""
CAMERAS = {"front": "agentview", "wrist": "robot0_eye_in_hand"}
"""What a camera is called here -> its name in robosuite, and in RoboMimic's image datasets."""
PROPRIOCEPTION = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
"""RoboMimic's low-dimensional keys: 3 + 4 + 2 numbers, metres and a quaternion xyzw; the object's follow."""
_PROPRIOCEPTION_DIM = 9
_ARM = {
    "type": "OSC_POSE",
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "kp": 150,
    "damping_ratio": 1,
    "impedance_mode": "fixed",
    "kp_limits": [0, 300],
    "damping_ratio_limits": [0, 10],
    "position_limits": None,
    "orientation_limits": None,
    "uncouple_pos_ori": True,
    "input_type": "delta",
    "input_ref_frame": "base",
    "interpolation": None,
    "ramp_ratio": 0.2,
    "gripper": {"type": "GRIP"},
}
"""RoboMimic's controller (`controller_configs` of its datasets): an action of 1 asks for 5 cm, or half a radian."""


@dataclass(frozen=True)
class Task:
    """One of RoboMimic's tasks.

    Attributes:
        simulator: its name in robosuite.
        sentence: what the robot is told.
        object_dim: numbers of `object-state`, the object's pose in the world and relative to the gripper.
    """

    simulator: str
    sentence: str
    object_dim: int


TASKS = {
    "Lift": Task("Lift", "lift the red cube", 10),
    "Can": Task("PickPlaceCan", "put the can into its bin", 14),
    "Square": Task("NutAssemblySquare", "put the square nut on its peg", 14),
}


class RobosuiteEnv(gym.Env):
    """Lift, Can or Square with LeRobot's observation names, reproducible bit for bit under a seed.

    Every instance has one model, made once: RoboMimic's cube varies by 2 mm from episode to episode, this one does not.

    Args:
        task: "Lift", "Can" or "Square", or the same in lower case.
        episode_length: time limit in control steps; None is `HORIZON`.
        terminate_at_success: end the episode at the first success.
        cameras: names from `CAMERAS`. With any, pictures by these are observed, and of the state only what the robot
            knows of itself: where the object is must be seen.
        image_size: height and width of a picture, in pixels.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012 (gymnasium's own convention)
    render_mode = "rgb_array"

    def __init__(
        self,
        task: str = "Lift",
        episode_length: int | None = None,
        terminate_at_success: bool = True,
        cameras: Sequence[str] = (),
        image_size: int = 128,
    ) -> None:
        self.task = checked_task(task)
        self.task_description = TASKS[self.task].sentence
        self.cameras, self.image_size = checked_cameras(cameras, CAMERAS), image_size
        self.terminate_at_success = terminate_at_success
        self._max_episode_steps = episode_length or HORIZON
        self._steps = 0
        self.simulator = _make(TASKS[self.task].simulator)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (ACTION_DIM,), dtype=np.float32)
        state_dim = state_dimension(self.task, proprioceptive=bool(self.cameras))
        spaces: dict[str, gym.Space] = {"agent_pos": gym.spaces.Box(-np.inf, np.inf, (state_dim,), dtype=np.float32)}
        if self.cameras:
            picture = gym.spaces.Box(0, 255, (image_size, image_size, 3), dtype=np.uint8)
            spaces["pixels"] = gym.spaces.Dict(dict.fromkeys(self.cameras, picture))
        self.observation_space = gym.spaces.Dict(spaces)

    @property
    def model(self) -> Any:
        """MuJoCo's model, unwrapped."""
        return self.simulator.sim.model._model

    @property
    def data(self) -> Any:
        """MuJoCo's data, unwrapped."""
        return self.simulator.sim.data._data

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        with numpy_seed(draw_seed(self.np_random)):
            self.simulator.reset()
        self._steps = 0
        return self._observation(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.simulator.step(np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0))
        self._steps += 1
        observation = self._observation()
        success = bool(self.simulator._check_success())
        terminated = success and self.terminate_at_success
        truncated = self._steps >= self._max_episode_steps and not terminated
        # robosuite's sparse reward is 1 where this is so; its own call came before the state was made current.
        return observation, float(success), terminated, truncated, {"is_success": success}

    def render(self) -> np.ndarray:
        """RGB frame [height, width, 3] uint8, with or without a GL driver."""
        return render(self, camera=CAMERAS["front"])

    def expert(self, noise: float, rng: np.random.Generator) -> "Expert":
        """A scripted expert that acts on the current state, whatever happened before."""
        from poco_vla.simulators.robosuite_expert import make_expert

        return make_expert(self, noise, rng)

    def close(self) -> None:
        self.simulator.close()

    def _observation(self) -> dict[str, Any]:
        state = self._state()
        if not self.cameras:
            return {"agent_pos": state}
        size = {"height": self.image_size, "width": self.image_size}
        pictures = {name: render(self, camera=CAMERAS[name], **size) for name in self.cameras}
        return {"pixels": pictures, "agent_pos": state[:_PROPRIOCEPTION_DIM]}

    def _state(self) -> np.ndarray:
        """RoboMimic's state [D] float32 as it is now.

        MuJoCo's half steps leave the bodies' poses one substep behind the joints, and robosuite's sensors of relative
        poses read what other sensors found the last time: hence the kinematics, and two rounds of sensing.
        """
        import mujoco

        mujoco.mj_kinematics(self.model, self.data)  # type: ignore[attr-defined]
        self.simulator._update_observables(force=True)
        found = self.simulator._get_observations(force_update=True)
        return np.concatenate([*(found[key] for key in PROPRIOCEPTION), found["object-state"]]).astype(np.float32)


def checked_task(name: str) -> str:
    """The name as `TASKS` has it. Raises UnknownNameError for one that is none of them."""
    if name.capitalize() not in TASKS:
        raise UnknownNameError("RoboMimic task", name, TASKS)
    return name.capitalize()


def state_dimension(task: str, *, proprioceptive: bool) -> int:
    """Numbers of a task's whole state, or of the robot's own part of it."""
    return _PROPRIOCEPTION_DIM + (0 if proprioceptive else TASKS[task].object_dim)


def check_installed() -> None:
    """Raises ConfigError where robosuite is missing; does not import it."""
    if find_spec("robosuite") is None:
        raise ConfigError('robosuite is not installed: pip install "poco-vla[robomimic]"')


def _make(name: str) -> Any:
    with _quiet_import():
        import robosuite
    # The cube's size is drawn when the model is made: the same one in every instance.
    with numpy_seed(0):
        simulator = robosuite.make(
            name,
            robots="Panda",
            controller_configs={"type": "BASIC", "body_parts": {"right": _ARM}},
            control_freq=FPS,
            hard_reset=False,
            ignore_done=True,
            reward_shaping=False,
            use_object_obs=True,
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=False,
        )
    # Collision shapes, group 0, cover what is meant to be seen; MuJoCo leaves group 3 out of pictures.
    group = simulator.sim.model._model.geom_group
    group[group == 0] = 3
    return simulator


@contextmanager
def _quiet_import() -> Iterator[None]:
    """robosuite tells of optional parts that these tasks do not need, and chooses MuJoCo's OpenGL for the process."""
    check_installed()
    logging.getLogger("robosuite_logs").addFilter(_is_error)
    wanted = os.environ.get("MUJOCO_GL")
    with warnings.catch_warnings(action="ignore"):
        yield
    if wanted is None:
        os.environ.pop("MUJOCO_GL", None)
    else:
        os.environ["MUJOCO_GL"] = wanted


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


gym.register(id=GYM_ID, entry_point=f"{__name__}:{RobosuiteEnv.__name__}")
