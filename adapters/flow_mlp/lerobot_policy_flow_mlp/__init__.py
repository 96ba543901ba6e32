"""A small MLP flow-matching policy for LeRobot. Importing this registers policy type ``flow_mlp``."""

from lerobot_policy_flow_mlp.configuration_flow_mlp import FlowMlpConfig

__all__ = ["FlowMlpConfig"]
