"""One warning when nothing ever succeeds, and one when the critic promises more than any episode can bring.

Without a success there is nothing that a critic could tell apart; and one that overestimates leads the policy astray.
"""

from collections.abc import Callable, Mapping, Sequence

from poco_vla.checkpointing.progress import Progress
from poco_vla.config import RewardConfig
from poco_vla.data import Episode

ENOUGH = 20
"""Online episodes after which a run in which demonstrations alone succeed is told so."""
ADVICE = (
    'Check what success is: next.success or next.reward of the dataset (dataset.success_reward), info["is_success"] of '
    "the environment, episodes long enough to succeed, and a policy that imitates at all (more --sft-steps)"
)

VALUES = ("q", "candidate_q", "target")
"""Metrics that are mean values of chunks, in units of discounted reward."""
TOLERANCE = 0.05
"""By how much a mean value may exceed the largest return, in rewards of a step or of success: a critic is not exact."""
AGAINST_OVERESTIMATES = (
    "Success usually falls while it does. What helps: a pessimistic aggregation (min, or mean_minus_std of more "
    "critics), a smaller optim.critic_lr, fewer updates_per_step"
)


class Outlook:
    """Counts successes of demonstrations, evaluations and online episodes, looks at the critic, and warns once of each.

    Args:
        tell: gets the warnings.
        reward: bounds what an episode can be worth.
        gamma: discount per control step.
    """

    def __init__(self, tell: Callable[[str], None], reward: RewardConfig, gamma: float) -> None:
        self._tell, self._told = tell, False
        self._largest = reward.largest_return(gamma)
        self._margin = TOLERANCE * max(abs(reward.success), abs(reward.step))
        self._told_of_values = False
        self._demos = self._succeeded = 0

    def demonstrated(self, demos: Sequence[Episode]) -> None:
        """Take the demonstrations in."""
        self._demos, self._succeeded = len(demos), sum(demo.succeeded for demo in demos)

    def evaluated(self, now: Progress) -> None:
        """Look, after an evaluation, whether anything has succeeded so far."""
        tried, succeeded = (sum(e[name] for e in now.evaluations) for name in ("episodes", "successes"))
        if self._told or succeeded or any(now.recent):
            return
        counts = f"0 of {tried} evaluation episodes" + (
            f", none of {now.episodes} online episodes" if now.episodes else ""
        )
        if not self._succeeded:
            self._warn(
                f"nothing has succeeded so far: 0 of {self._demos} demonstrations, {counts}. Every state is worth the "
                "same to the critic, and the policy gets no better than by imitation"
            )
        elif len(now.evaluations) > 1 and now.episodes >= ENOUGH:
            self._warn(
                f"nothing but demonstrations has succeeded so far: {self._succeeded} of {self._demos} of them, {counts}"
            )

    def learned(self, means: Mapping[str, float]) -> None:
        """Look at the critic's mean values over some online updates, by their metrics' names.

        Values of soft actor-critics hold entropy beside the return: no bound is known.
        """
        values = {name: means[name] for name in VALUES if name in means}
        if self._told_of_values or "entropy" in means or not values:
            return
        name = max(values, key=values.__getitem__)
        if values[name] > self._largest + self._margin:
            self._told_of_values = True
            self._tell(
                f"the critic overestimates: {name} is {values[name]:.4g} in the mean, and no episode can be worth more "
                f"than {self._largest:.4g} by this reward. {AGAINST_OVERESTIMATES}."
            )

    def _warn(self, found: str) -> None:
        self._told = True
        self._tell(f"{found}. {ADVICE}.")
