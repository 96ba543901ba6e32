"""The interaction thread of Algorithm 1: where online episodes come from, in step with the learner or beside it."""

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from poco_vla.data import Episode
from poco_vla.recording.admission import SetAsideError
from poco_vla.recording.recorder import EpisodeRecorder
from poco_vla.rollout.actor import ActingCopy, Actor, WeightsVersion
from poco_vla.rollout.pool import EnvPool


@dataclass(frozen=True)
class Received:
    """Result of `Interaction.receive`.

    Attributes:
        episodes: those that ended, each of them on disk.
        steps: control steps taken, those of running episodes too where they are known.
        versions: [steps or fewer] int64, weights' version of each of these steps that a policy chose.
    """

    episodes: list[Episode] = field(default_factory=list)
    steps: int = 0
    versions: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


class Interaction(ABC):
    """Acts with the learner's weights and records what comes of it. Every finished episode is on disk before the next
    one takes its first action; without a recorder, whoever receives it sees to that.

    The learner's loop is: `act`, learn, `receive`.
    """

    @abstractmethod
    def act(self, *, best_of_n: int, until: float) -> None:
        """Continue acting.

        Args:
            best_of_n: candidates per acting step from here on.
            until: control steps in all that acting may have taken until it has to wait for the learner.
        """

    @abstractmethod
    def receive(self, *, wait: bool) -> Received:
        """Return the episodes and steps since the last call; with `wait`, wait some time for the first.

        Raises:
            PocoError: acting or recording failed.
        """

    def report_progress(self, progress: Mapping[str, Any]) -> None:  # noqa: B027 (nobody listens in a simulation)
        """Report the progress of training to clients on the robot's side."""

    def state(self) -> dict[str, Any]:
        """Return the state from which `restore` continues after a checkpoint."""
        return {}

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state."""

    def pause(self) -> None:  # noqa: B027
        """Begin no new rounds: no more steps are needed."""

    def finish(self) -> None:  # noqa: B027
        """End acting: training is over."""

    @abstractmethod
    def close(self) -> None:
        """Stop acting. May be called twice."""


class SynchronousInteraction(Interaction):
    """One round of chunks per call, in this process: the same under the same seed, bit for bit.

    The environments work while the learner does; what they bring is taken in when both are ready.

    Args:
        envs: the environments, their episodes not begun.
        actor: chooses the chunks, with the learner's own weights.
        weights: their version.
        recorder: keeps the episodes; None leaves that to others.
        first_seed: of the first episode.
    """

    def __init__(
        self, envs: EnvPool, actor: Actor, weights: WeightsVersion, recorder: EpisodeRecorder | None, first_seed: int
    ) -> None:
        self.envs, self.actor, self.weights, self.recorder = envs, actor, weights, recorder
        self._first_seed: int | None = first_seed
        self._version = 0

    def act(self, *, best_of_n: int, until: float) -> None:
        if self._first_seed is not None:
            self.envs.reset(self._first_seed)
            self._first_seed = None
        chunks = self.actor.chunks(self.envs.obs, self.envs.tasks, best_of_n=best_of_n)
        self._version = self.weights.version
        self.envs.send(chunks, self._version)

    def receive(self, *, wait: bool) -> Received:
        episodes, steps = self.envs.receive()
        if self.actor.rollouts is not None:
            self.actor.rollouts.received(self.envs.brought, self.envs.obs, self.envs.tasks)
        episodes = _record(self.recorder, episodes)
        return Received(episodes, steps, np.full(steps, self._version))

    def state(self) -> dict[str, Any]:
        """Return seeds and chunks of the running episodes; the owner of the actor saves its generator."""
        return {} if self._first_seed is not None else self.envs.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        if state:
            self.envs.restore(state)
            self._first_seed = None

    def close(self) -> None:
        self.envs.close()


class BackgroundInteraction(Interaction):
    """Acts in a thread of its own, as fast as the environments go; learning never waits for a chunk, nor acting for an
    update, as long as neither runs too far ahead.

    Args:
        recorder: keeps the episodes, called from that thread; None leaves that to others.
        taken: control steps that were taken before.
        patience: seconds that `receive` waits.
    """

    def __init__(self, recorder: EpisodeRecorder | None, *, taken: int | float = 0, patience: float = 0.5) -> None:
        self.recorder = recorder
        self._taken, self._patience = taken, patience
        self._until, self._best_of_n = 0.0, 1
        self._news: deque[Received] = deque()
        self._error: BaseException | None = None
        self._stop = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="interaction", daemon=True)

    @abstractmethod
    def _play(self) -> None:
        """Act in the thread until `_stop`."""

    def act(self, *, best_of_n: int, until: float) -> None:
        with self._changed:
            self._best_of_n, self._until = best_of_n, until
            self._changed.notify_all()
        if self._thread.ident is None:
            self._thread.start()

    def receive(self, *, wait: bool) -> Received:
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._news or self._error, timeout=self._patience)
            news = list(self._news)
            self._news.clear()
            if self._error is not None and not news:
                raise self._error
        return Received(
            [episode for one in news for episode in one.episodes],
            sum(one.steps for one in news),
            np.concatenate([np.zeros(0, dtype=np.int64), *(one.versions for one in news)]),
        )

    def pause(self) -> None:
        with self._changed:
            self._until = 0.0

    def restore(self, state: Mapping[str, Any]) -> None:
        """Do nothing: running episodes are not continued, as other episodes serve as well."""

    def close(self) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._play()
        except BaseException as error:  # handed to the learner, which raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _deliver(self, episodes: list[Episode], steps: int, version: int) -> None:
        """Record the episodes of a round, then pass them to the learner."""
        episodes = _record(self.recorder, episodes)
        with self._changed:
            self._taken += steps
            self._news.append(Received(episodes, steps, np.full(steps, version)))
            self._changed.notify_all()


class AsynchronousInteraction(BackgroundInteraction):
    """One pool of environments, beside the learner and with weights of its own.

    Args:
        envs: the environments, their episodes not begun.
        actor: chooses the chunks.
        recorder: keeps the episodes; None leaves that to others.
        first_seed: of the first episode.
        settings: further arguments of :class:`BackgroundInteraction`.
    """

    def __init__(
        self, envs: EnvPool, actor: ActingCopy, recorder: EpisodeRecorder | None, first_seed: int, **settings: Any
    ) -> None:
        super().__init__(recorder, **settings)
        self.envs, self.actor = envs, actor
        give_up = envs.give_up
        envs.give_up = lambda: self._stop or give_up()
        self._first_seed = first_seed

    def close(self) -> None:
        super().close()
        self.envs.close()

    def _play(self) -> None:
        self.envs.reset(self._first_seed)
        while self._may_go_on():
            chunks = self.actor.chunks(self.envs.obs, self.envs.tasks, best_of_n=self._best_of_n)
            version = self.actor.weights_version
            self._deliver(*self.envs.step(chunks, version), version)

    def _may_go_on(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stop or self._taken < self._until)
            return not self._stop


def _record(recorder: EpisodeRecorder | None, episodes: list[Episode]) -> list[Episode]:
    """Record episodes and return those that can be trained on. The others are set aside with a message."""
    if recorder is None:
        return episodes
    kept = []
    for episode in episodes:
        with suppress(SetAsideError):
            recorder.add(episode)
            kept.append(episode)
    return kept
