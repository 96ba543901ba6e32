"""An SO-101 that judges itself by a LeRobot reward model, such as HIL-SERL's classifier: a plug-in for

poco-vla robot --rewards robot --robot.discover_packages_path=judged_arm --robot.type=judged_arm ...
"""

from dataclasses import dataclass

from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.lerobot_types import RobotObservation
from lerobot.rewards.classifier.modeling_classifier import Classifier
from lerobot.rewards.factory import make_reward_pre_post_processors
from lerobot.robots import RobotConfig
from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig

from poco_vla.robots import RewardModelSuccess


@RobotConfig.register_subclass("judged_arm")
@dataclass
class JudgedArmConfig(SO101FollowerConfig):
    classifier: str = "you/classifier"
    """Hub id or folder of the reward model."""
    labels: str = "you/labels"
    """Dataset that it was trained on: its pictures are normalised by that one's statistics."""


class JudgedArm(SO101Follower):
    config_class = JudgedArmConfig
    name = "judged_arm"

    def __init__(self, config: JudgedArmConfig) -> None:
        super().__init__(config)
        model = Classifier.from_pretrained(config.classifier).eval()
        stats = LeRobotDatasetMetadata(config.labels).stats
        preprocess, _ = make_reward_pre_post_processors(model.config, dataset_stats=stats)
        self.judge = RewardModelSuccess(model, preprocess=preprocess, every=5, agree=2)

    def get_observation(self) -> RobotObservation:
        seen = super().get_observation()
        self.judge.observe({f"observation.images.{name}": seen[name] for name in self.cameras})
        return seen

    @property
    def success(self) -> bool:
        """Told once; then it is about the next episode."""
        found = self.judge.poll() is not None
        if found:
            self.judge.begin()
        return found
