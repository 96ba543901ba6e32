"""Acting elsewhere: robots ask this process for chunks over a websocket and send their episodes back."""

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from poco_vla.data import Episode
from poco_vla.policy import FlowPolicy
from poco_vla.recording.recorder import EpisodeRecorder
from poco_vla.rollout.actor import ActingCopy
from poco_vla.rollout.interaction import Interaction, Received
from poco_vla.serving.feature import Feature
from poco_vla.serving.server import PolicyServer

FAREWELL = 60.0
"""Seconds that robots have to end and send their episodes once training is over."""


class RemoteInteraction(Interaction):
    """Robots act. They are served the learner's weights, and each of their episodes is on disk here before they hear
    that it is. Between two episodes they wait when acting runs too far ahead of learning.

    It is what the server asks for chunks and where the server puts episodes.

    Args:
        actor: chooses the chunks.
        recorder: keeps the episodes, called from the server's thread.
        obs_spec: what robots have to send.
        taken: control steps that were taken before.
        patience: seconds that `receive` waits.
        server: further arguments of :class:`PolicyServer`.

    Raises:
        ConfigError: it cannot be served like that.
    """

    def __init__(
        self,
        actor: ActingCopy,
        recorder: EpisodeRecorder,
        obs_spec: Mapping[str, Feature],
        *,
        taken: int = 0,
        patience: float = 0.5,
        **server: Any,
    ) -> None:
        self.actor, self.recorder = actor, recorder
        self.policy: FlowPolicy = actor.policy
        self.weights_version = actor.weights_version
        self._taken, self._patience = taken, patience
        self._until, self._best_of_n = 0.0, 1
        self._news: deque[Episode] = deque()
        self._changed = threading.Condition()
        self._progress: Mapping[str, Any] = {}
        self._done = False
        self.server = PolicyServer(self, obs_spec, episodes=self, **server)

    # -- the learner's side -------------------------------------------------------------------------------------------

    def act(self, *, best_of_n: int, until: float) -> None:
        with self._changed:
            self._best_of_n, self._until = best_of_n, until

    def open(self) -> str:
        """Start serving robots and return the address."""
        self.server.__enter__()
        return self.server.url

    def receive(self, *, wait: bool) -> Received:
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._news, timeout=self._patience)
            episodes = list(self._news)
            self._news.clear()
        versions = [e.policy_version for e in episodes if e.policy_version is not None]
        chosen = np.concatenate([np.zeros(0, dtype=np.int64), *versions])
        return Received(episodes, sum(map(len, episodes)), chosen[chosen >= 0])

    def report_progress(self, progress: Mapping[str, Any]) -> None:
        self._progress = dict(progress)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Do nothing: robots begin anew, and send or keep the episodes that they had."""

    def pause(self) -> None:
        with self._changed:
            self._until = 0.0

    def finish(self) -> None:
        """Report to robots that training is over, and wait until they have ended and sent their episodes."""
        self._done = True
        deadline = time.monotonic() + FAREWELL
        while self.server.num_clients and time.monotonic() < deadline:
            time.sleep(0.05)

    def close(self) -> None:
        self.server.close()

    # -- the server's side, in its threads ----------------------------------------------------------------------------

    def chunks(self, obs: Mapping[str, np.ndarray], tasks: Sequence[str]) -> np.ndarray:
        """Return [B, H, action_dim] float32, in the robot's units."""
        chunks = self.actor.chunks(obs, tasks, best_of_n=self._best_of_n)
        self.weights_version = self.actor.weights_version
        return chunks

    def status(self) -> dict[str, Any]:
        """Return the status for robots: whether an episode may begin, whether training is over, and progress."""
        with self._changed:
            act = self._taken < self._until and not self._done
        return {"act": act, "done": self._done, **self._progress}

    def take(self, episode: Episode, key: str) -> None:
        """Record an episode; when this returns, it is on disk."""
        if self.recorder.has(key):
            return
        self.recorder.add(episode, key)
        with self._changed:
            self._taken += len(episode)
            self._news.append(episode)
            self._changed.notify_all()
