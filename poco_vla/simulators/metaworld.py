"""Meta-World's tasks as LeRobot environment type ``metaworld_mt``: one, several, MT10 or MT50, by the state or cameras.

LeRobot's own type ``metaworld`` shows a picture of 480 pixels at every step and of the state only the gripper.
"""

from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_IMAGES, OBS_STATE

from poco_vla.simulators.cameras import check_image_size, checked_cameras
from poco_vla.simulators.metaworld_tasks import ACTION_DIM, CAMERAS, SEEN_DIM, STATE_DIM, task_names
from poco_vla.simulators.suite import TASK_KEY


@EnvConfig.register_subclass("metaworld_mt")
@dataclass
class MetaWorldConfig(EnvConfig):
    """Tasks of Meta-World 3 (arXiv 1910.10897, v3 names), by LeRobot's environment and with its instructions.

    Attributes:
        task: a name such as "push-v3", several with commas between them, "MT10", "MT50", or a level of difficulty of
            LeRobot's ("easy", "medium", "hard", "very_hard"). Episodes cycle over them.
        fps: control steps per second, LeRobot's number.
        episode_length: time limit in control steps (Meta-World: 500; LeRobot's configuration: 400).
        cameras: from `CAMERAS`; the state is then that of hand and gripper alone. Empty: the whole state, no picture.
        image_size: height and width of a picture, in pixels.
    """

    task: str | None = "MT10"
    fps: int = 80
    episode_length: int = 200
    cameras: tuple[str, ...] | list[str] = ()
    image_size: int = 128
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(
        default_factory=lambda: {ACTION: ACTION, "agent_pos": OBS_STATE, TASK_KEY: OBS_ENV_STATE}
    )

    def __post_init__(self) -> None:
        self.tasks = task_names(self.task or "MT10")
        self.cameras = checked_cameras(self.cameras, CAMERAS)
        check_image_size(self.image_size)
        self.features = {
            ACTION: PolicyFeature(FeatureType.ACTION, (ACTION_DIM,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (SEEN_DIM if self.cameras else STATE_DIM,)),
        }
        if len(self.tasks) > 1:
            self.features[TASK_KEY] = PolicyFeature(FeatureType.ENV, (len(self.tasks),))
        for name in self.cameras:
            self.features[f"pixels/{name}"] = PolicyFeature(FeatureType.VISUAL, (self.image_size, self.image_size, 3))
            self.features_map[f"pixels/{name}"] = f"{OBS_IMAGES}.{name}"

    @property
    def preload(self) -> tuple[str, ...]:
        """Modules that a worker server imports once, for all its workers."""
        return ("poco_vla.simulators.metaworld_gym",)

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("episode_length", "cameras", "image_size")}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        """Create {"metaworld_mt": {number of the task: vector environment}}, as LeRobot asks for it."""
        from poco_vla.simulators.metaworld_gym import MetaWorldEnv

        def vector(task: str) -> gym.vector.VectorEnv:
            kind = gym.vector.AsyncVectorEnv if use_async_envs and n_envs > 1 else gym.vector.SyncVectorEnv
            mode = gym.vector.AutoresetMode.SAME_STEP
            return kind([lambda: MetaWorldEnv(task, **self.gym_kwargs)] * n_envs, autoreset_mode=mode)

        return {self.type: {number: vector(task) for number, task in enumerate(self.tasks)}}
