"""An episode on a robot: its records while it runs, how it ended, and its statistics."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, runtime_checkable

import numpy as np
from lerobot.lerobot_types import RobotAction, RobotObservation

from poco_vla.data import Episode
from poco_vla.robots.pace import Pace
from poco_vla.robots.signals import Signal
from poco_vla.robots.standstill import Standstill

NOBODY = -1
"""Weights version of a step that no policy chose: a person drove, or the robot held."""


@runtime_checkable
class Answer(Protocol):
    """A chunk and the version of the weights that chose it; what a remote policy replies."""

    @property
    def actions(self) -> np.ndarray: ...

    @property
    def weights_version(self) -> int: ...


class Ending(Enum):
    """Why an episode ended."""

    SUCCESS = "success"
    FAILURE = "failure"
    TIME_LIMIT = "time limit"
    DISCARDED = "discarded"
    STOPPED = "emergency stop"
    POLICY_LOST = "policy lost"


ENDINGS = {
    Signal.SUCCESS: Ending.SUCCESS,
    Signal.FAILURE: Ending.FAILURE,
    Signal.DISCARD: Ending.DISCARDED,
    Signal.STOP: Ending.STOPPED,
}
_KEPT = (Ending.SUCCESS, Ending.FAILURE, Ending.TIME_LIMIT)


@dataclass(frozen=True)
class EpisodeStats:
    """How an episode went. Times in seconds.

    Attributes:
        ending: why it ended; `message` says it in words.
        steps: control steps, `interventions` of which a person drove.
        missed: control steps whose action was not there in time: the robot held.
        overruns: control steps that began a whole period late or more: the robot's cameras or this machine are slow.
        clipped: actions that the limits changed.
        waited: time spent on chunks that were asked for when they were needed (lead 0, first chunks).
        retries: times that the policy could not be reached.
        period_error_p50, period_error_p95, period_error_max: of |time between two control steps - 1/fps|.
        latency_p50, latency_max: of the policy's answers.
    """

    ending: Ending
    message: str
    steps: int
    interventions: int
    missed: int
    overruns: int
    clipped: int
    waited: float
    retries: int
    period_error_p50: float
    period_error_p95: float
    period_error_max: float
    latency_p50: float
    latency_max: float


@dataclass(frozen=True)
class RobotEpisode:
    """An episode with what only robots have.

    Attributes:
        interventions: [T] bool: a person drove this step by the teleoperator.
        weights_version: [T] int64: of the policy that chose the step's action, `NOBODY` where none did; 0 where the
            policy does not say.
    """

    episode: Episode
    interventions: np.ndarray
    stats: EpisodeStats
    weights_version: np.ndarray


@dataclass(frozen=True)
class Sent:
    """A finished control step, for `on_step`.

    Attributes:
        observation: what the robot saw before, by the robot's names.
        action: what was sent, by the robot's names.
        steps: control steps of the episode so far, this one included, `missed` of which held for want of an action.
        weights_version: of the policy's last answer.
        intervention: a person drove this step.
    """

    observation: RobotObservation
    action: RobotAction
    steps: int
    missed: int
    weights_version: int
    intervention: bool


@dataclass
class ChunkRequest:
    """A chunk on its way: `asked` when, after `k` actions of the plan, `early` while some of those were left."""

    future: Future[tuple[np.ndarray | Answer, float]]
    asked: float
    k: int
    early: bool


@dataclass
class EpisodeState:
    """State of the running episode."""

    pace: Pace
    standstill: Standstill
    observation: RobotObservation | None = None
    obs: dict[str, np.ndarray] = field(default_factory=dict)
    last: np.ndarray | None = None
    plan: np.ndarray | None = None
    k: int = 0
    accepted_at: float = 0.0
    version: int = 0
    request: ChunkRequest | None = None
    taken_over: bool = False
    lost_since: float | None = None
    rows: list[dict[str, np.ndarray]] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    interventions: list[bool] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    missed: int = 0
    clipped: int = 0
    retries: int = 0
    waited: float = 0.0

    @property
    def left(self) -> int:
        """Return the number of planned actions that have not been sent."""
        return 0 if self.plan is None else len(self.plan) - self.k

    def drop_plan(self) -> None:
        if self.request is not None:
            self.request.future.cancel()
        self.plan, self.request, self.k = None, None, 0

    def stats(self, ending: Ending, message: str) -> EpisodeStats:
        """Return the statistics of the steps so far."""
        errors, latencies = self.pace.errors or [0.0], self.latencies or [0.0]
        p50, p95 = np.percentile(errors, [50, 95])
        return EpisodeStats(
            ending=ending,
            message=message,
            steps=len(self.actions),
            interventions=sum(self.interventions),
            missed=self.missed,
            overruns=self.pace.overruns,
            clipped=self.clipped,
            waited=self.waited,
            retries=self.retries,
            period_error_p50=float(p50),
            period_error_p95=float(p95),
            period_error_max=max(errors),
            latency_p50=float(np.median(latencies)),
            latency_max=max(latencies),
        )

    def build(self, stats: EpisodeStats, task: str, *, failure_is_terminal: bool) -> RobotEpisode | None:
        """Return the recorded episode; None if it has no step, or ended in a way that is not kept."""
        ending = stats.ending
        if ending not in _KEPT or not self.actions:
            return None
        last = np.arange(len(self.actions)) == len(self.actions) - 1
        success = last & (ending is Ending.SUCCESS)
        terminal = success | (last & (ending is Ending.FAILURE and failure_is_terminal))
        episode = Episode(
            obs={key: np.stack([row[key] for row in self.rows]) for key in self.rows[0]},
            action=np.stack(self.actions),
            reward=success.astype(np.float32),
            success=success,
            terminal=terminal,
            task=task,
        )
        versions = np.array(self.versions, dtype=np.int64)
        return RobotEpisode(episode, np.array(self.interventions), stats, versions)
