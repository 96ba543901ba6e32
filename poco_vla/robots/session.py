"""Episodes on a robot for a learner elsewhere, for as long as it wants them: either side may go away and come back."""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from poco_vla.data.episode import Episode
from poco_vla.files import wait_for_space
from poco_vla.robots.control import RobotInteraction
from poco_vla.robots.episode import NOBODY, RobotEpisode
from poco_vla.robots.joint_order import JointOrder
from poco_vla.robots.safety import StoppedError
from poco_vla.robots.signals import KeySignals
from poco_vla.robots.spool import Spool, new_key
from poco_vla.robots.view import View, learner_words
from poco_vla.serving.client import Chunk, ConnectionLostError, PolicyClient, RefusedError

EVERY = 1.0
"""Seconds between two questions to a learner that is away, or that is to catch up."""
RECENT = 20
"""Episodes that the success rate counts."""


class Learner:
    """The connection to the learner, for the two threads of a session: chunks are asked for in one, the rest in the
    other, and between episodes an answer to a question for a chunk may still be on its way.

    Args:
        client: connected.
        observations: what the policy reads; nothing else is sent.
        view: says that the learner is away, and back.
        order: of the robot's numbers against the policy's; None where they are alike.
    """

    def __init__(
        self, client: PolicyClient, observations: Collection[str], view: View, order: JointOrder | None = None
    ) -> None:
        self.client, self.observations, self.view = client, list(observations), view
        self.order = order or JointOrder()
        self._one_at_a_time = threading.Lock()

    def chunk(self, batch: Mapping[str, np.ndarray], task: str) -> Chunk:
        """Return a chunk for a batch of one state; raises what `PolicyClient.chunk` does."""
        with self._one_at_a_time:
            obs = self.order.observation({key: batch[key][0] for key in self.observations})
            chunk = self.client.chunk(obs, task)
        return replace(chunk, actions=self.order.to_robot(chunk.actions)) if self.order.action else chunk

    def status(self) -> Mapping[str, Any]:
        """Return the status of training; waits while the learner cannot be reached."""
        return self._call_with_retries(self.client.status)

    def record(self, episode: Episode, key: str) -> None:
        """Send an episode and return when the learner has it on disk; waits while the learner cannot be reached.

        Raises:
            RefusedError: it does not take this one.
        """
        wanted = replace(episode, obs={name: episode.obs[name] for name in self.observations})
        wanted = self.order.episode(wanted)
        self._call_with_retries(lambda: self.client.record(wanted, key))

    def _call_with_retries[T](self, talk: Callable[[], T]) -> T:
        with self._one_at_a_time:
            return call_with_retries(talk, self.view)


def call_with_retries[T](talk: Callable[[], T], view: View) -> T:
    """Call `talk` until the learner can be reached, with one message about the wait. Ctrl-C ends it."""
    away = False
    while True:
        try:
            answer = talk()
        except ConnectionLostError as error:
            if not away:
                view.say(f"the learner is away, and the robot rests until it is back: {error}", "yellow")
            away = True
            view.note("waiting for the learner")
            time.sleep(EVERY)
        else:
            if away:
                view.say("the learner is back", "green")
            return answer


class RobotSession:
    """Runs episodes while the learner asks for them, and sends it each that is kept.

    An episode is on this side's disk before it is sent and until the learner says that it is on its own, so that at
    any moment either side may be killed: only the episode that is running is lost.

    Args:
        drive: runs one episode; asks `learner` for chunks.
        learner: see above.
        spool: where episodes wait; locked.
        view: what a person sees.
        keys: a person's; None where there is no terminal.
        episodes: ends after so many that were kept; None goes on until the learner says that training is over.
    """

    def __init__(
        self,
        drive: RobotInteraction,
        learner: Learner,
        spool: Spool,
        view: View,
        *,
        keys: KeySignals | None,
        episodes: int | None = None,
    ) -> None:
        self.drive, self.learner, self.spool, self.view = drive, learner, spool, view
        self.keys, self.episodes = keys, episodes
        self._begun = self._kept = 0
        self._recent: deque[bool] = deque(maxlen=RECENT)

    def run(self) -> None:
        """Run episodes until training is over, `episodes` are kept, or a person ends the session after an emergency
        stop.

        Raises:
            StoppedError: the robot was stopped, and there is nobody who could release it.
        """
        self._send_waiting()
        while self._kept != self.episodes and self._may_begin():
            kept = self._episode()
            if self.drive.stopped and not self._released():
                return
            if kept is not None:
                self._keep(kept)

    def _may_begin(self) -> bool:
        """Wait until the learner wants an episode; return False when training is over."""
        while not (status := self.learner.status())["done"]:
            self.view.learner(status)
            if status["act"]:
                self.view.note("the next episode begins")
                return True
            self.view.waiting(status)
            time.sleep(EVERY)
        self.view.say(f"training is over. {learner_words(status)}".strip(), "green")
        return False

    def _episode(self) -> RobotEpisode | None:
        self._begun += 1
        self.view.begin(self._begun, self.drive.max_steps, self.drive.fps or self.learner.client.metadata["fps"])
        try:
            found = self.drive.run_episode()
        except StoppedError:  # pressed while nothing moved
            self._begun -= 1
            return None
        if found is None and self.drive.stats is not None:
            self.view.dropped(self._begun, self.drive.stats)
        return found

    def _released(self) -> bool:
        """Wait after an emergency stop until a person releases the robot; return False if the session is to end."""
        self.view.say("emergency stop: nothing is sent to the robot. Look at it.", "bold red")
        self.view.note("Enter or r releases it, q ends", "bold")
        answer = None
        while answer is None:
            if self.keys is None or self.keys.gone:
                raise StoppedError("the robot was stopped, and there is no terminal at which it could be released")
            self.drive.release()  # the stop key, pressed once more, is no answer
            answer = self.keys.ask("\nrq")
        self.drive.stopped = answer == "q"
        return answer != "q"

    def _keep(self, found: RobotEpisode) -> None:
        """Write an episode to this machine's disk, send it to the learner, and remove it here after that."""
        episode = replace(found.episode, policy_version=found.weights_version, interventions=found.interventions)
        key = new_key()
        self.view.note(f"episode {self._begun} is on its way to the learner")
        wait_for_space(
            lambda: self.spool.put(episode, key),
            what=f"episode {self._begun}",
            where=self.spool.folder,
            tell=lambda text: self.view.say(f"{text} The robot rests until then.", "bold red"),
        )
        fate = self._send(episode, key)
        self._kept += 1
        self._recent.append(episode.succeeded)
        rate = len(self._recent), sum(self._recent) / len(self._recent)
        self.view.finished(self._begun, found.stats, int(found.weights_version.max(initial=NOBODY)), fate, rate)

    def _send(self, episode: Episode, key: str) -> str:
        """Send an episode and return the outcome in words."""
        try:
            self.learner.record(episode, key)
        except RefusedError as error:
            where = self.spool.refuse(key)
            return f"refused by the learner ({error}) and kept as {where}"
        self.spool.remove(key)
        return "recorded"

    def _send_waiting(self) -> None:
        """Send the episodes of earlier sessions that the learner has not confirmed."""
        for key in self.spool.waiting():
            episode = self.spool.get(key)
            if episode is None:
                continue
            if episode.task != self.drive.task:
                self.view.say(f'an episode of another task ("{episode.task}") stays in {self.spool.folder}', "yellow")
                continue
            self.view.note("an episode of an earlier session is on its way to the learner")
            self.view.say(f"an episode of an earlier session, {len(episode)} steps: {self._send(episode, key)}")
