"""Success rate with its confidence interval."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from poco_vla.algorithms import Algorithm
from poco_vla.config import EnvSpec
from poco_vla.data import Episode
from poco_vla.errors import SimulatorError
from poco_vla.policy import FlowPolicy
from poco_vla.rollout import Actor, EnvPool
from poco_vla.rollout.actor import UNTRAINED


@dataclass(frozen=True)
class SuccessRate:
    """A share of successful episodes and its 95 % interval.

    Attributes:
        successes: episodes that succeeded.
        episodes: episodes in all.
        mean_length: control steps per episode.
        tasks: of a suite, each task's name and rate; empty for a single task.
    """

    successes: int
    episodes: int
    mean_length: float
    tasks: tuple[tuple[str, "SuccessRate"], ...] = ()

    @classmethod
    def of(cls, episodes: Sequence[Episode], suite: Sequence[str] = ()) -> "SuccessRate":
        """Count episodes. Of a `suite` of several tasks, an episode's seed modulo their number is its task."""
        lengths = [len(episode) for episode in episodes]
        played: list[list[Episode]] = [[] for _ in suite]
        for episode in episodes if len(suite) > 1 else ():
            played[(episode.seed or 0) % len(suite)].append(episode)
        tasks = [(name, cls.of(own)) for name, own in zip(suite, played, strict=True) if own]
        return cls(sum(e.succeeded for e in episodes), len(lengths), sum(lengths) / len(lengths), tuple(tasks))

    @classmethod
    def from_figures(cls, figures: Mapping[str, Any]) -> "SuccessRate":
        """Read what :meth:`figures` gives."""
        tasks = [(name, cls.from_figures(one)) for name, one in figures.get("tasks", {}).items()]
        return cls(figures["successes"], figures["episodes"], figures["mean_length"], tuple(tasks))

    @property
    def rate(self) -> float:
        """Return the share of successes; of a suite the mean over its tasks."""
        if self.tasks:
            return sum(one.rate for _, one in self.tasks) / len(self.tasks)
        return self.successes / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the rate, Wilson's of all episodes: of a suite whose tasks differ, a little too wide."""
        return wilson_interval(self.rate * self.episodes if self.tasks else self.successes, self.episodes)

    def figures(self) -> dict[str, Any]:
        """Plain figures for result.json."""
        own = {name: getattr(self, name) for name in ("successes", "episodes", "mean_length")}
        own |= {"success_rate": self.rate, "interval_95": list(self.interval)}
        return own | ({"tasks": {name: one.figures() for name, one in self.tasks}} if self.tasks else {})

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.rate:.0%} [{low:.0%}, {high:.0%}]"


@dataclass(frozen=True)
class EvalResult:
    """Episodes of one evaluation, in the order of their seeds.

    Attributes:
        episodes: those that were played to their end.
        failures: episodes that the simulator failed in, which are left out.
        suite: names of the tasks that the episodes cycled over.
    """

    episodes: tuple[Episode, ...]
    failures: int = 0
    suite: tuple[str, ...] = ()

    @property
    def success(self) -> SuccessRate:
        return SuccessRate.of(self.episodes, self.suite)


class EvaluationStopped(Exception):  # noqa: N818 (no error)
    """Raised by an evaluation whose environments were told to give up."""


def wilson_interval(successes: float | int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927); z = 1.96 is 95 %. Holds its coverage near 0 and 1."""
    if trials == 0:
        return 0.0, 1.0
    p, n = successes / trials, trials
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # The interval holds p; at 0 and 1 rounding would leave it outside by 1e-16: a negative error bar.
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def evaluate(
    policy: FlowPolicy | Algorithm,
    env: EnvSpec | EnvPool,
    *,
    episodes: int = 50,
    seed: int = 100_000,
    trained: bool = True,
    on_episode: Callable[[int], None] = lambda done: None,
) -> EvalResult:
    """Run `episodes` episodes of each task, open loop within each chunk.

    Args:
        policy: the policy to evaluate, which acts by plain samples; or an algorithm, which acts by its `act`
            (`best_of_n` is for training alone).
        env: the environment, or a pool of it that is already running (its episodes are abandoned).
        episodes: how many; of a suite, of each task.
        seed: episode i starts from seed + i; the policy's noise is seeded too, so that an evaluation repeats.
        trained: False for an algorithm that has learned nothing beyond SFT, which acts by `act_untrained`.
        on_episode: told after each finished episode.

    Raises:
        SimulatorError: the simulator fails too often, or in all episodes.
        EvaluationStopped: the pool's `give_up` says so.
    """
    if isinstance(env, EnvSpec):
        with EnvPool(env, (policy.policy if isinstance(policy, Algorithm) else policy).spec.horizon) as pool:
            return evaluate(policy, pool, episodes=episodes, seed=seed, trained=trained, on_episode=on_episode)
    actor = Actor(policy, seed, 1 if trained else UNTRAINED)
    episodes *= env.num_tasks
    env.reset(seed, episodes)
    finished: list[Episode] = []
    failures = env.failures
    while not env.idle.all():
        if env.give_up():
            raise EvaluationStopped
        ended, _ = env.step(actor.chunks(env.obs, env.tasks))
        finished += ended
        if ended:
            on_episode(len(finished))
    failures = env.failures - failures
    if not finished:
        raise SimulatorError(f"{env.name} failed in all {episodes} episodes: success cannot be told")
    if failures:
        env.say(f"{env.name} failed in {failures} of {episodes} episodes, which are left out of the success rate")
    return EvalResult(tuple(sorted(finished, key=lambda episode: episode.seed or 0)), failures, tuple(env.suite))
