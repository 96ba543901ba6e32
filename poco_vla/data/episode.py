"""One episode as column arrays, for environments, recorders, datasets and the replay buffer."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from poco_vla.config import RewardConfig
from poco_vla.errors import DataError

NO_REWARD = (
    'reward.source is "recorded", but the demonstrations have no column next.reward: record it (OGBench\'s and '
    'robosuite\'s own reward is in what `poco-vla data make` writes), or take a reward of source "success" such as '
    "--reward.source success"
)
LONGEST_TASK = 4096
"""Characters of an instruction that is taken from robots and environments."""


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
        task: the instruction, of the first step where `step_tasks` says more.
        seed: the seed that the environment began from, None where there was none.
        policy_version: [T] int64: of the weights that chose each action (updates made until they were published), -1
            where no policy did; None where nobody noted it, as in demonstrations.
        interventions: [T] bool: a person drove this step; None where nobody could.
        step_tasks: [T] the instruction of each step where it changes within the episode; None where all have `task`.
        has_reward: False where no reward was recorded and `reward` repeats `success`.
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
    step_tasks: tuple[str, ...] | None = None
    has_reward: bool = True

    def __len__(self) -> int:
        return len(self.action)

    @property
    def succeeded(self) -> bool:
        """True if any step reached success."""
        return bool(self.success.any())

    @property
    def tasks(self) -> dict[str, int]:
        """Return each instruction of the episode and the first step that has it."""
        tasks = self.step_tasks or (self.task,)
        return {task: tasks.index(task) for task in dict.fromkeys(tasks)}

    def task_at(self, step: int) -> str:
        """Return the instruction of one step."""
        return self.task if self.step_tasks is None else self.step_tasks[step]

    def rewards(self, config: RewardConfig) -> np.ndarray:
        """Return the reward that the critic learns, [T] float32, by the rule of `config`.

        Raises:
            DataError: the recorded reward is asked for and none was recorded.
        """
        if config.source == "recorded" and not self.has_reward:
            raise DataError(NO_REWARD)
        return step_rewards(config, self.reward, self.success)

    def with_images(self, change: Callable[[np.ndarray], np.ndarray]) -> "Episode":
        """Return the episode with `change` applied to its pictures."""
        return replace(self, obs={k: change(v) if v.dtype == np.uint8 else v for k, v in self.obs.items()})

    def check(self, where: str) -> None:
        """Raise DataError, naming column and frame, when a number is not finite."""
        assert self.step_tasks is None or len(self.step_tasks) == len(self), "an instruction for each step"
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


def step_rewards(config: RewardConfig, reward: np.ndarray, success: np.ndarray) -> np.ndarray:
    """Return the reward that is learned, [T] float32, of steps with these recorded rewards [T] and successes [T]."""
    earned = reward if config.source == "recorded" else config.success * success
    return (config.step + earned).astype(np.float32)


def first_of_each_task(episodes: Iterable[Episode]) -> dict[str, tuple[Episode, int]]:
    """Return each instruction of some episodes with an episode and a step that has it."""
    found: dict[str, tuple[Episode, int]] = {}
    for episode in episodes:
        for task, step in episode.tasks.items():
            found.setdefault(task, (episode, step))
    return found
