"""The order of a robot's states and actions against that of the policy that drives it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from lerobot.robots import Robot

from poco_vla.data.episode import Episode
from poco_vla.errors import ConfigError, PolicyError
from poco_vla.joint_names import ACTION, STATE, checked_names, match_names

type ByName = Literal["by-name", "positional"]


@dataclass(frozen=True)
class JointOrder:
    """Brings states and actions [..., D] from a robot's order to its policy's, and actions back.

    Attributes:
        state: the robot's position of each number of the policy's state; empty where both have one order.
        action: likewise of the action.
    """

    state: tuple[int, ...] = ()
    action: tuple[int, ...] = ()

    def observation(self, obs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return observations in the policy's order."""
        moved = {STATE: obs[STATE][..., list(self.state)]} if self.state and STATE in obs else {}
        return dict(obs) | moved

    def to_robot(self, actions: np.ndarray) -> np.ndarray:
        """Return the policy's actions in the robot's order."""
        return actions[..., np.argsort(self.action)] if self.action else actions

    def episode(self, episode: Episode) -> Episode:
        """Return an episode in the policy's order."""
        if not (self.state or self.action):
            return episode
        action = episode.action[..., list(self.action)] if self.action else episode.action
        return replace(episode, obs=self.observation(episode.obs), action=action)


def joint_order(robot: Robot, metadata: Mapping[str, Any], joints: ByName = "by-name") -> JointOrder:
    """Return how a robot's numbers are brought to the policy's, by the names that the server announces.

    Args:
        robot: need not be connected.
        metadata: what the server said on connecting.
        joints: "positional" compares no names.

    Raises:
        ConfigError: the names are others; the message lists both.
    """
    state = [name for name, kind in robot.observation_features.items() if kind is float]
    given = {STATE: state, ACTION: list(robot.action_features)}
    order = {key: find_positions(names, metadata, key, robot.name, joints) for key, names in given.items()}
    return JointOrder(order[STATE], order[ACTION])


def find_positions(
    names: Sequence[str], metadata: Mapping[str, Any], key: str, robot: str, joints: ByName = "by-name"
) -> tuple[int, ...]:
    """Return the position in a robot's `names` of each name that a policy announces for a column; empty where both are
    in one order, or the policy announces none."""
    announced = metadata.get("names")
    own = checked_names(announced.get(key) if isinstance(announced, Mapping) else None, None)
    if own is None or joints == "positional" or len(own) != len(names):
        return ()
    try:
        return match_names(names, own, key=key, where=(robot, "the policy"), option="--joints positional")
    except PolicyError as error:
        raise ConfigError(f"{error} Nothing was moved.") from error
