"""The Gymnasium side of OGBench's tasks. Imports no LeRobot, so that worker processes start fast."""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from poco_vla.data import Episode
from poco_vla.errors import ConfigError
from poco_vla.rendering.render import render
from poco_vla.simulators.cameras import checked_cameras
from poco_vla.simulators.ogbench_expert import PlanExpert
from poco_vla.simulators.ogbench_play import Play, relabelled
from poco_vla.simulators.ogbench_tasks import (
    FPS,
    PROPRIOCEPTION,
    dimensions,
    make_simulator,
    sentence,
    time_limit,
)

GYM_ID = "poco_vla/OGBench-v0"
CAMERAS = {"front": "front", "wrist": "ur5e/robotiq/wrist"}
"""What a camera is called here -> its name in the MuJoCo model."""
_WRIST = {"pos": (0.12, 0.0, 0.03), "xyaxes": (0, 1, 0, 0.7349, 0, 0.6782), "fovy": 60}
"""A camera fixed to the gripper's base, looking down past the fingers at what is between the fingertips."""


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
        self.simulator = make_simulator(task, success_timing)
        self.cameras, self.image_size = checked_cameras(cameras, CAMERAS), image_size
        self.task, self.success_timing = task, success_timing
        self.task_description = sentence(task)
        self._max_episode_steps = episode_length or time_limit(task)
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

    def expert(self, noise: float, rng: np.random.Generator) -> PlanExpert:
        """OGBench's own plan oracles on this task, from the current state on."""
        return PlanExpert(self, noise, rng)

    def play(self, kind: Literal["play", "noisy"], noise: float, steps: int, rng: np.random.Generator) -> Episode:
        """A trajectory of OGBench's data collection in this task's scene, with this task's rewards."""
        if self.cameras:
            raise ConfigError("play data hold the whole state and no pictures; leave the cameras out")
        if self.success_timing != "post":
            raise ConfigError('play data have the rewards of success_timing "post"; leave the option out')
        family = self.task.split("-singletask")[0]
        return relabelled(self.task, _player(family, kind, noise).trajectory(steps, rng))

    def _observation(self, state: np.ndarray) -> dict[str, Any]:
        if not self.cameras:
            return {"agent_pos": state.astype(np.float32)}
        size = {"height": self.image_size, "width": self.image_size}
        pictures = {name: render(self.simulator, camera=CAMERAS[name], **size) for name in self.cameras}
        return {"pixels": pictures, "agent_pos": state[:PROPRIOCEPTION].astype(np.float32)}


@cache
def _player(family: str, kind: Literal["play", "noisy"], noise: float) -> Play:
    return Play(family, kind, noise)


def _with_wrist_camera(kind: Any) -> Any:
    """`kind.add_objects`, which adds what a task needs to the model, adding the camera as well."""

    def add_objects(simulator: Any, model: Any) -> None:
        kind.add_objects(simulator, model)
        model.find("body", "ur5e/robotiq/base").add("camera", name="wrist", **_WRIST)

    return add_objects


gym.register(id=GYM_ID, entry_point=f"{__name__}:{OGBenchEnv.__name__}")
