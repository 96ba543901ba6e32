"""OGBench's manipulation tasks as LeRobot environment type ``ogbench``."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from poco_vla.simulators import ogbench_gym, ogbench_tasks
from poco_vla.simulators.cameras import check_image_size, checked_cameras


@EnvConfig.register_subclass("ogbench")
@dataclass
class OGBenchConfig(EnvConfig):
    """A single-task OGBench environment (arXiv 2410.20092), observed by its state or by cameras.

    Attributes:
        task: OGBench id, such as "cube-single-singletask-task1-v0".
        episode_length: time limit in control steps; None is OGBench's own.
        success_timing: "post" checks success after the step (the published behaviour), "pre" before it.
        cameras: "front", "wrist" or both; the state is then the robot's own alone. Empty: the whole state, no picture.
        image_size: height and width of a picture, in pixels.
    """

    task: str | None = "cube-single-singletask-task1-v0"
    fps: int = ogbench_tasks.FPS
    episode_length: int | None = None
    success_timing: Literal["pre", "post"] = "post"
    cameras: tuple[str, ...] | list[str] = ()
    image_size: int = 128
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=lambda: {ACTION: ACTION, "agent_pos": OBS_STATE})

    def __post_init__(self) -> None:
        self.cameras = checked_cameras(self.cameras, ogbench_gym.CAMERAS)
        check_image_size(self.image_size)
        state_dim, action_dim = ogbench_tasks.dimensions(self.task or "", proprioceptive=bool(self.cameras))
        self.features = {
            ACTION: PolicyFeature(FeatureType.ACTION, (action_dim,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (state_dim,)),
        }
        for name in self.cameras:
            self.features[f"pixels/{name}"] = PolicyFeature(FeatureType.VISUAL, (self.image_size, self.image_size, 3))
            self.features_map[f"pixels/{name}"] = f"{OBS_IMAGES}.{name}"

    @property
    def preload(self) -> tuple[str, ...]:
        """Modules that a worker server imports once, for all its workers."""
        return (self.package_name, "ogbench.manipspace.envs.manipspace_env")

    @property
    def package_name(self) -> str:
        return ogbench_gym.__name__

    @property
    def gym_id(self) -> str:
        return ogbench_gym.GYM_ID

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        names = ("task", "episode_length", "success_timing", "cameras", "image_size")
        return {name: getattr(self, name) for name in names}
