"""GR00T N1.6 for LeRobot. Importing this registers policy type ``groot_n1d6`` and its processor steps."""

from lerobot_policy_groot_n1d6 import processing  # noqa: F401 (registers the steps)
from lerobot_policy_groot_n1d6.configuration_groot_n1d6 import GrootN1d6Config

__all__ = ["GrootN1d6Config"]
