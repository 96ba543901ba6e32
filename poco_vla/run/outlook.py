"""One warning when nothing ever succeeds: without a success there is nothing that the critic could tell apart."""

from collections.abc import Callable, Sequence

from poco_vla.checkpointing.progress import Progress
from poco_vla.data import Episode

ENOUGH = 20
"""Online episodes after which a run in which demonstrations alone succeed is told so."""
ADVICE = (
    'Check what success is: next.success or next.reward of the dataset (dataset.success_reward), info["is_success"] of '
    "the environment, episodes long enough to succeed, and a policy that imitates at all (more --sft-steps)"
)


class Outlook:
    """Counts successes of demonstrations, evaluations and online episodes, and warns once.

    Args:
        tell: gets the warning.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell, self._told = tell, False
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

    def _warn(self, found: str) -> None:
        self._told = True
        self._tell(f"{found}. {ADVICE}.")
