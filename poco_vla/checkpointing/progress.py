"""How far a run is: everything that counts, as a checkpoint holds it."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from poco_vla.algorithms import Stage


@dataclass
class Progress:
    """Plain data, and a clock that interruptions stop.

    Attributes:
        stage: "sft", "online", then "done".
        update: updates in all; `stage_update` of them in this stage.
        env_steps: control steps taken online, those of running episodes too.
        episodes: online episodes in the pool.
        owed_updates: updates that acting has earned and learning has not made; negative when learning is ahead.
        stopped: the collapse guard has ended the run.
        recent: success of the last training episodes.
        evaluated_at: control steps at the last evaluation on the way.
        evaluations: figures of each.
        best: those of the best one.
        seconds: wall time until `stamp`.
        update_seconds: wall time of the updates of the online stage.
        version_offset: versions of the weights that a kill took back: their numbers are not given again.
    """

    stage: Stage | str = "sft"
    update: int = 0
    stage_update: int = 0
    env_steps: int = 0
    episodes: int = 0
    owed_updates: float = 0.0
    stopped: bool = False
    recent: list[bool] = field(default_factory=list)
    evaluated_at: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    seconds: float = 0.0
    update_seconds: float = 0.0
    version_offset: int = 0

    def __post_init__(self) -> None:
        self._clock = time.monotonic()

    def elapsed(self) -> float:
        """Wall time in seconds, interruptions left out."""
        return self.seconds + time.monotonic() - self._clock

    @property
    def version(self) -> int:
        """Return the version of the learner's weights: updates that made them, and `version_offset`."""
        return self.update + self.version_offset

    def begin_at_version(self, newest_seen: int) -> None:
        """Give whatever comes next a version above those that somebody may have seen."""
        self.version_offset += max(0, newest_seen - self.version)

    def enter(self, stage: str) -> None:
        """Begin the next stage."""
        self.stage, self.stage_update = stage, 0

    def state(self) -> dict[str, Any]:
        """Return what `load` takes back from a checkpoint."""
        self.seconds, self._clock = self.elapsed(), time.monotonic()
        return asdict(self)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        for name, value in state.items():
            setattr(self, name, value)
