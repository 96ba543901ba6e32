"""RoboMimic's tasks on robosuite as LeRobot environment type ``robosuite``."""

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from poco_vla.simulators import robosuite_gym
from poco_vla.simulators.cameras import check_image_size, checked_cameras


@EnvConfig.register_subclass("robosuite")
@dataclass
class RobosuiteConfig(EnvConfig):
    """Lift, Can or Square of RoboMimic (arXiv 2108.03298) on robosuite 1.5, observed by the state or by cameras.

    Attributes:
        task: "Lift", "Can" or "Square", or the same in lower case.
        episode_length: time limit in control steps; None is RoboMimic's own, 400 for each of the three
            (robomimic/__init__.py). Q-chunking's code (envs/robomimic_utils.py) allows 300, 300 and 400.
        terminate_at_success: end the episode at the first success, as Q-chunking's code does.
        cameras: "front" (RoboMimic's agentview), "wrist" (robot0_eye_in_hand) or both; the state is then the robot's
            own alone. Empty: the whole state, no picture.
        image_size: height and width of a picture, in pixels.
    """

    task: str | None = "Lift"
    fps: int = robosuite_gym.FPS
    episode_length: int | None = None
    terminate_at_success: bool = True
    cameras: tuple[str, ...] | list[str] = ()
    image_size: int = 128
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=lambda: {ACTION: ACTION, "agent_pos": OBS_STATE})

    def __post_init__(self) -> None:
        robosuite_gym.check_installed()
        self.task = robosuite_gym.checked_task(self.task or "")
        self.cameras = checked_cameras(self.cameras, robosuite_gym.CAMERAS)
        check_image_size(self.image_size)
        state_dim = robosuite_gym.state_dimension(self.task, proprioceptive=bool(self.cameras))
        self.features = {
            ACTION: PolicyFeature(FeatureType.ACTION, (robosuite_gym.ACTION_DIM,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (state_dim,)),
        }
        for name in self.cameras:
            self.features[f"pixels/{name}"] = PolicyFeature(FeatureType.VISUAL, (self.image_size, self.image_size, 3))
            self.features_map[f"pixels/{name}"] = f"{OBS_IMAGES}.{name}"

    @property
    def preload(self) -> tuple[str, ...]:
        """Modules that a worker server imports once, for all its workers."""
        return (self.package_name,)

    @property
    def package_name(self) -> str:
        return robosuite_gym.__name__

    @property
    def gym_id(self) -> str:
        return robosuite_gym.GYM_ID

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        names = ("task", "episode_length", "terminate_at_success", "cameras", "image_size")
        return {name: getattr(self, name) for name in names}
