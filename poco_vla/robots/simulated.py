"""A simulated arm behind LeRobot's own Robot interface: to try everything without hardware."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from lerobot.lerobot_types import RobotAction, RobotObservation
from lerobot.robots import Robot, RobotConfig
from lerobot.utils.decorators import check_if_already_connected, check_if_not_connected

from poco_vla.errors import ConfigError
from poco_vla.rendering.render import render
from poco_vla.robots.safety import ActionError
from poco_vla.simulators.cameras import check_image_size, checked_cameras
from poco_vla.simulators.ogbench_gym import CAMERAS, OGBenchEnv
from poco_vla.simulators.ogbench_tasks import FPS, PROPRIOCEPTION, dimensions

STATE = (
    *(f"joint_{i}.pos" for i in range(1, 7)),
    *(f"joint_{i}.vel" for i in range(1, 7)),
    *("effector_x.pos", "effector_y.pos", "effector_z.pos", "effector_cos_yaw.pos", "effector_sin_yaw.pos"),
    *("gripper.pos", "gripper_contact.pos"),
)
"""The robot's own part of OGBench's state, in its order and units: rad, rad/s, 0.1 m, thirds of the opening, 50 N.
Every name, here, of the scene and of actions, ends in .pos or .vel: `lerobot-rollout` 0.6.1 leaves out all others."""
ACTION = ("x.vel", "y.vel", "z.vel", "yaw.vel", "gripper.vel")
"""Each in [-1, 1], from where the arm is now. In one control step, 1 is 0.05 m, 0.3 rad, the whole opening of the
gripper (OGBench)."""


@RobotConfig.register_subclass("simulated_arm")
@dataclass(kw_only=True)
class SimulatedArmConfig(RobotConfig):
    """OGBench's arm (a UR5e with a two-finger gripper) and its cubes as a robot.

    Attributes:
        task: OGBench id of a single task.
        views: cameras, "front", "wrist" or both. With any, the state is what the robot knows of itself; without, it
            goes on with the objects (`scene_0.pos`, ...). Either is what the environment type "ogbench" gives with
            these cameras: a policy of that environment drives this robot. (LeRobot keeps `cameras` for devices.)
        image_size: height and width of a picture, in pixels.
        realtime: a control step takes 1/20 s of wall time, as it does in the scene; an action that comes earlier
            waits. Otherwise the scene is as fast as it can be.
        seed: of the first episode; those after it count on. None draws another one each time it is connected, so that a
            session that is begun again does not meet the same scenes again.
    """

    task: str = "cube-single-singletask-task1-v0"
    views: tuple[str, ...] = ("front", "wrist")
    image_size: int = 128
    realtime: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.views = checked_cameras(self.views, CAMERAS)
        check_image_size(self.image_size)


class SimulatedArm(Robot):
    """The scene stands still between two actions: nothing falls while a policy thinks."""

    config_class = SimulatedArmConfig
    name = "simulated_arm"

    def __init__(self, config: SimulatedArmConfig) -> None:
        super().__init__(config)
        self.config = config
        self.cameras = dict.fromkeys(config.views)  # LeRobot's recorder counts them
        self._env: OGBenchEnv | None = None
        self._state = np.zeros(0, dtype=np.float32)
        self._success = False
        self._seed = self._episodes = 0
        self._free_at = 0.0

    @property
    def observation_features(self) -> dict:
        """Return name -> float, or (height, width, 3) of a camera."""
        size = self.config.image_size
        views = dict.fromkeys(self.config.views, (size, size, 3))
        beyond = 0 if views else dimensions(self.config.task)[0] - PROPRIOCEPTION
        return {**dict.fromkeys([*STATE, *(f"scene_{i}.pos" for i in range(beyond))], float), **views}

    @property
    def action_features(self) -> dict:
        """Return name -> float."""
        return dict.fromkeys(ACTION, float)

    @property
    def is_connected(self) -> bool:
        return self._env is not None

    @check_if_already_connected
    def connect(self, calibrate: bool = True) -> None:
        env = OGBenchEnv(self.config.task)
        if env.action_space.shape != (len(ACTION),):
            raise ConfigError(f'"{self.config.task}" takes actions {env.action_space.shape}, not {ACTION}')
        self._env = env
        self._episodes = 0
        self._seed = int(np.random.default_rng().integers(2**31)) if self.config.seed is None else self.config.seed
        self._reset(self._seed)

    @property
    def is_calibrated(self) -> bool:
        return True

    def calibrate(self) -> None:
        """Do nothing: the arm needs no calibration."""

    def configure(self) -> None:
        """Do nothing: the arm has no settings."""

    @check_if_not_connected
    def reset(self) -> None:
        """Reset the scene for the next episode, with the next seed, as a person does at a real robot."""
        self._reset(self._seed + self._episodes)
        self._episodes += 1

    @property
    def success(self) -> bool:
        """True if the task is done after the last action."""
        return self._success

    @check_if_not_connected
    def get_observation(self) -> RobotObservation:
        assert self._env is not None
        floats = [name for name, kind in self.observation_features.items() if kind is float]
        size = {"height": self.config.image_size, "width": self.config.image_size}
        views = {name: render(self._env.simulator, camera=CAMERAS[name], **size) for name in self.config.views}
        # Not strict: of the scene's state only the robot's own part is shown where there are views.
        return dict(zip(floats, self._state.tolist(), strict=False)) | views

    @check_if_not_connected
    def send_action(self, action: RobotAction) -> RobotAction:
        """Run one control step and return the action that was sent, clipped to [-1, 1].

        Raises:
            ActionError: names that the arm does not have, or misses; a number that is not finite.
        """
        assert self._env is not None
        sent = np.clip(_vector(action), -1.0, 1.0)
        if self.config.realtime:
            time.sleep(max(0.0, self._free_at - time.monotonic()))
            self._free_at = time.monotonic() + 1 / FPS
        observation, _, _, _, info = self._env.step(sent)
        self._state, self._success = observation["agent_pos"], bool(info["is_success"])
        return dict(zip(ACTION, sent.tolist(), strict=True))

    @check_if_not_connected
    def disconnect(self) -> None:
        assert self._env is not None
        self._env.close()
        self._env = None

    def _reset(self, seed: int) -> None:
        assert self._env is not None
        observation, _ = self._env.reset(seed=seed)
        self._state, self._success = observation["agent_pos"], False


def _vector(action: Mapping[str, float]) -> np.ndarray:
    if set(action) != set(ACTION):
        raise ActionError(f"an action for {sorted(action)}; the simulated arm takes {list(ACTION)}")
    vector = np.array([action[name] for name in ACTION], dtype=np.float32)
    if not np.isfinite(vector).all():
        raise ActionError(f"an action that is not finite: {dict(action)}. Nothing was sent.")
    return vector
