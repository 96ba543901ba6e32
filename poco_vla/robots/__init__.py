"""Acting on LeRobot robots at a fixed rate, and a simulated one to try it on.

`poco-vla robot` runs episodes on a robot for a learner elsewhere (:mod:`poco_vla.robots.program`).

LeRobot's own programs find the simulated arm by ``--robot.discover_packages_path=poco_vla.robots
--robot.type=simulated_arm``; in Python, importing this package is enough for ``make_robot_from_config``. (LeRobot
imports distributions by itself only when their names begin with ``lerobot_robot_``.)
"""

from poco_vla.robots.control import RobotInteraction
from poco_vla.robots.episode import EpisodeStats, RobotEpisode, Sent
from poco_vla.robots.safety import ActionError, ActionLimits, StoppedError
from poco_vla.robots.signals import AnySignals, KeySignals, RewardModelSuccess, RobotSuccess, Signal, Signals
from poco_vla.robots.simulated import SimulatedArm, SimulatedArmConfig

__all__ = [
    "ActionError",
    "ActionLimits",
    "AnySignals",
    "EpisodeStats",
    "KeySignals",
    "RewardModelSuccess",
    "RobotEpisode",
    "RobotInteraction",
    "RobotSuccess",
    "Sent",
    "Signal",
    "Signals",
    "SimulatedArm",
    "SimulatedArmConfig",
    "StoppedError",
]
