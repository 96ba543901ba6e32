"""A robot of three joints that is where it was told to be; LeRobot's real Robot and Teleoperator, no simulator."""

from dataclasses import dataclass

import numpy as np
from lerobot.robots import Robot, RobotConfig
from lerobot.teleoperators import Teleoperator, TeleoperatorConfig
from lerobot.utils.decorators import check_if_not_connected

JOINTS = ("shoulder.pos", "elbow.pos", "gripper.pos")


@dataclass(kw_only=True)
class PointRobotConfig(RobotConfig):
    pictures: bool = False


class PointRobot(Robot):
    """`sent` is every action in order; `broken` changes an observation."""

    config_class = PointRobotConfig
    name = "point_robot"
    action_features: dict = dict.fromkeys(JOINTS, float)
    observation_features: dict = {}  # noqa: RUF012
    is_calibrated = True
    is_connected = False

    def __init__(self, folder, pictures=False):
        super().__init__(PointRobotConfig(id="point", calibration_dir=folder))
        self.observation_features = dict.fromkeys([*JOINTS, *(f"{j[:-4]}.vel" for j in JOINTS)], float)
        if pictures:
            self.observation_features["front"] = (4, 6, 3)
        self.sent = []
        self.picture = np.zeros((4, 6, 3), dtype=np.uint8)
        self.broken = lambda observation: observation
        self.connect()

    def connect(self, calibrate=True):
        self.position = np.zeros(3)
        self.is_connected = True

    def calibrate(self):
        pass

    def configure(self):
        pass

    def reset(self):
        self.position = np.zeros(3)

    @check_if_not_connected
    def get_observation(self):
        values = [*self.position, 0.0, 0.0, 0.0]
        names = [name for name, kind in self.observation_features.items() if kind is float]
        observation = dict(zip(names, values, strict=True))
        if "front" in self.observation_features:
            self.picture[:] = len(self.sent)  # one buffer for all, as camera drivers have it
            observation["front"] = self.picture
        return self.broken(observation)

    @check_if_not_connected
    def send_action(self, action):
        assert list(action) == list(JOINTS)
        self.sent.append(list(action.values()))
        self.position = np.array(self.sent[-1])
        return dict(action)

    def disconnect(self):
        self.is_connected = False


@dataclass(kw_only=True)
class HandConfig(TeleoperatorConfig):
    pass


class Hand(Teleoperator):
    """A person who wants all joints at `target`."""

    config_class = HandConfig
    name = "hand"
    action_features: dict = {}  # noqa: RUF012
    feedback_features: dict = {}  # noqa: RUF012
    is_connected = True
    is_calibrated = True

    def __init__(self, folder, target=0.5, names=JOINTS):
        super().__init__(HandConfig(id="hand", calibration_dir=folder))
        self.target, self.action_features = target, dict.fromkeys(names, float)

    def connect(self, calibrate=True):
        pass

    def calibrate(self):
        pass

    def configure(self):
        pass

    def get_action(self):
        return dict.fromkeys(self.action_features, self.target)

    def send_feedback(self, feedback):
        pass

    def disconnect(self):
        pass
