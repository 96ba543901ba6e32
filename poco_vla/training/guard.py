"""A guard against collapse: when practice makes a policy significantly worse than it was, go back to where it was good.

The published ablations collapse to 0 % under a loose clip or a large beta; on a robot nobody wants to watch that.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from poco_vla.config import GuardConfig
from poco_vla.evaluation import wilson_interval

Z = 3.29
"""Of the intervals that are compared (99.9 %): every episode brings another comparison, and a false alarm costs much.
At 95 % and windows of 20, three false alarms held the point mass of the tests at 67 % instead of over 90."""

type Verdict = Literal["keep on", "good", "collapsed"]


@dataclass
class CollapseGuard:
    """Success over the last training episodes, against the policy that only imitates.

    Plain data all of it, so that a checkpoint holds it.

    Attributes:
        config: when it acts.
        reference: successes and episodes of the evaluation after SFT; None until there was one.
        recent: success of the last episodes since the actor began to learn, or was restored.
        tasks: the instruction of each of these; success is the mean over them.
        since_good: episodes since the last head that was kept as a good one.
        restores: how often a head was restored.
    """

    config: GuardConfig
    reference: tuple[int, int] | None = None
    recent: list[bool] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    since_good: int = 0
    restores: int = 0

    def add(self, success: bool, task: str = "") -> Verdict:
        """Take an episode in; "good" says that the present head is worth keeping, "collapsed" that it is not.

        Collapsed: the upper end of the recent success's interval lies below the lower end of the reference's.
        Good: the recent success is no lower than the reference.
        """
        self.recent = [*self.recent, success][-self.config.window :]
        self.tasks = [*self.tasks, task][-self.config.window :]
        self.since_good += 1
        num, successes = len(self.recent), self._successes()
        if self.config.action == "off" or self.reference is None or num < self.config.least:
            return "keep on"
        if wilson_interval(successes, num, Z)[1] < wilson_interval(*self.reference, Z)[0]:
            return "collapsed"
        if self.since_good >= self.config.window and successes / num >= self.reference[0] / self.reference[1]:
            self.since_good = 0
            return "good"
        return "keep on"

    def restored(self) -> bool:
        """Forget what was seen before a head was put back; return False when that has happened too often."""
        self.recent, self.tasks, self.since_good = [], [], 0
        self.restores += 1
        return self.config.action == "restore" and self.restores <= self.config.max_restores

    def _successes(self) -> float | int:
        """Return the recent successes; of several tasks the mean of their rates, in episodes, so that those with many
        short episodes do not count more."""
        by_task: dict[str, list[bool]] = {}
        for success, task in zip(self.recent, self.tasks, strict=True):
            by_task.setdefault(task, []).append(success)
        if len(by_task) == 1:
            return sum(self.recent)
        return len(self.recent) * sum(sum(own) / len(own) for own in by_task.values()) / len(by_task)

    def state(self) -> dict[str, Any]:
        """Return what `load` takes back from a checkpoint."""
        return {name: getattr(self, name) for name in ("reference", "recent", "tasks", "since_good", "restores")}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for name, value in state.items():
            setattr(self, name, tuple(value) if name == "reference" and value is not None else value)
        self.tasks = list(state.get("tasks", [""] * len(self.recent)))  # older versions knew of one task
