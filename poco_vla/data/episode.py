"""One episode as column arrays: what environments produce, recorders write, datasets hold and the pool takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from poco_vla.config import RewardConfig
from poco_vla.errors import DataError


@dataclass(frozen=True)
class Episode:
    """T control steps. Row k holds the observation *before* action k and what that action brought.

    Attributes:
        obs: LeRobot key (``observation.*``) -> [T, ...]; states float32, images uint8 [T, height, width, 3].
        action: [T, action_dim] float32, in the robot's units.
        reward: [T] float32, as the environment or dataset gave it (next.reward).
        success: [T] bool: the step reached success (next.success).
        terminal: [T] bool: nothing of value follows the step. An episode whose last step is not terminal was cut off
            by a time limit.
        task: the instruction.
        seed: the seed that the environment began from, None where there was none.
        policy_version: [T] int64: of the weights that chose each action (updates made until they were published), -1
            where no policy did; None where nobody noted it, as in demonstrations.
        interventions: [T] bool: a person drove this step; None where nobody could.
    """

    obs: Mapping[str, np.ndarray]
    action: np.ndarray
    reward: np.ndarray
    success: np.ndarray
    terminal: np.ndarray
    task: str = ""
    seed: int | None = None
    policy_version: np.ndarray | None = None
    interventions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.action)

    @property
    def succeeded(self) -> bool:
        """Success at any step."""
        return bool(self.success.any())

    def rewards(self, config: RewardConfig) -> np.ndarray:
        """[T] float32: the reward that the critic learns, by the rule of `config`."""
        earned = self.reward if config.source == "recorded" else config.success * self.success
        return (config.step + earned).astype(np.float32)

    def with_images(self, change: Callable[[np.ndarray], np.ndarray]) -> "Episode":
        """The same episode, its pictures changed."""
        return replace(self, obs={k: change(v) if v.dtype == np.uint8 else v for k, v in self.obs.items()})

    def check(self, where: str) -> None:
        """Raise DataError, naming column and frame, when a number is not finite."""
        columns = {"action": self.action, "next.reward": self.reward, **self.obs}
        for name, column in columns.items():
            if column.dtype.kind == "f":
                bad = ~np.isfinite(column.reshape(len(column), -1)).all(axis=1)
                if bad.any():
                    frame = int(bad.argmax())
                    raise DataError(
                        f'{where}: "{name}" is not finite at frame {frame} ({column[frame]}); '
                        f"{int(bad.sum())} of {len(column)} frames are affected. Remove the episode or repair it."
                    )
