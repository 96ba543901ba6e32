"""Acting on many machines: Ray workers hold simulators and a policy of their own, the learner is Ray's driver.

The policy goes into Ray's object store once, its frozen weights included: every worker acts with the very model that is
learned, needs neither files nor the Hub, and on CPUs those of a machine share one copy of what is frozen. Trained
weights follow as plain bytes, one copy per version and machine, and are taken over before a chunk, never inside one.
Finished episodes come back whole.

A Ray cluster is one domain of trust: whoever may connect to it runs code on all of its machines, and objects travel by
Ray's own pickling. Keep it inside one network. A cluster that is started here listens on this machine alone; one that
you start is guarded as Ray is (`RAY_AUTH_MODE=token`). Robots and strangers go through the server (mode "remote"),
which reads no pickle. A robot does not belong into a Ray worker anyway: Ray ends a worker together with the learner, in
the middle of a motion, while `poco-vla robot` halts its arm and keeps its episodes.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version as version_of
from typing import Any

import numpy as np

from poco_vla.config import EnvSpec, InteractionConfig
from poco_vla.data import Episode
from poco_vla.errors import ConfigError, SimulatorError
from poco_vla.recording.recorder import EpisodeRecorder
from poco_vla.rollout.actor import Actor, WeightsVersion, learned_parameters
from poco_vla.rollout.cluster_address import connect
from poco_vla.rollout.cluster_worker import Failed, Published, RolloutWorker, WorkerSpec
from poco_vla.rollout.interaction import BackgroundInteraction
from poco_vla.rollout.object_store import tensors_as_bytes, to_bytes
from poco_vla.simulators import environment

logger = logging.getLogger(__name__)
POLL = 0.02
"""Seconds after which the driver looks whether acting may go on or has to end."""
SILENCE = 60.0
"""Seconds without an answer of any worker after which a message is shown."""
MOST_DEATHS = 3
"""Deaths of one worker, without a finished episode in between, that are made good."""
GRACE = 5.0
"""Seconds that workers have to close their simulators."""
PUBLISHING = 0.1
"""Share of the time that may go into publishing weights: large ones are published less often than they change."""


@dataclass
class _WorkerSlot:
    """A worker's place, which keeps its number when the worker is replaced.

    Attributes:
        index: of the place.
        seeds: of the episodes that its environments are in.
        deaths: of workers in this place since an episode was finished.
        lives: workers that were in this place.
        actor: Ray's handle of the present one.
        promised: control steps that the running round may bring.
    """

    index: int
    seeds: list[int]
    deaths: int = 0
    lives: int = 0
    actor: Any = None
    promised: int = 0


class ClusterInteraction(BackgroundInteraction):
    """Ray workers act, each with `env.num_envs` environments. A worker records its episodes here before it acts on.

    A worker that dies is replaced. The episodes that it was in are dropped whole, their steps stay counted (they were
    taken), and their seeds are not played again: as long as the run is not interrupted, no seed has two episodes.

    Args:
        env: the environments of one worker.
        horizon: H.
        actor: with the learner's policy and critic.
        weights: when these may be read.
        recorder: keeps the episodes, called from the thread.
        first_seed: of the first episode; environment e of all E plays first_seed + e, first_seed + e + E, ...
        settings: cluster and workers.
        seed: of the workers' noise.
        say: tells a person one line.
        background: further arguments of :class:`BackgroundInteraction`.

    Raises:
        ConfigError: no cluster there, the policy cannot be sent, or this machine is too small for the workers.
    """

    def __init__(
        self,
        env: EnvSpec,
        horizon: int,
        actor: Actor,
        weights: WeightsVersion,
        recorder: EpisodeRecorder,
        first_seed: int,
        *,
        settings: InteractionConfig,
        seed: int,
        say: Callable[[str], None],
        **background: Any,
    ) -> None:
        super().__init__(recorder, **background)
        self.env, self.horizon, self.settings, self.weights = env, horizon, settings, weights
        self._first_seed, self._seed, self._say = first_seed, seed, say
        self._most_candidates = actor.best_of_n
        self._trained = learned_parameters(actor.algorithm)
        self._published, self._seen, self._publish_after = Published(-1, 0, []), -1, 0.0
        self._running: dict[Any, _WorkerSlot] = {}
        self._idle: deque[_WorkerSlot] = deque()
        self._slots: list[_WorkerSlot] = []
        self._ours = connect(settings)
        try:
            self._algorithm = self._put_algorithm(actor)
            for index in range(settings.workers):
                first = first_seed + index * env.num_envs
                self._slots.append(_WorkerSlot(index, list(range(first, first + env.num_envs))))
                self._spawn_worker(self._slots[-1])
        except BaseException:
            self.close()
            raise

    @property
    def stride(self) -> int:
        """Return the number of environments of all workers."""
        return self.settings.workers * self.env.num_envs

    def close(self) -> None:
        import ray

        super().close()
        if not ray.is_initialized():
            return
        actors = [slot.actor for slot in self._slots if slot.actor is not None]
        self._slots, self._running = [], {}
        if actors:
            ray.wait([actor.close.remote() for actor in actors], num_returns=len(actors), timeout=GRACE)
        for actor in actors:
            ray.kill(actor)  # also one that is busy, or waits for room
        if self._ours:
            ray.shutdown()
            self._ours = False

    def _put_algorithm(self, actor: Actor) -> Any:
        import ray

        with self.weights.lock, tensors_as_bytes():
            try:
                return ray.put(actor.algorithm)
            except (TypeError, AttributeError) as error:
                raise ConfigError(f"this policy cannot be sent to Ray's workers: {error}") from error

    def _spawn_worker(self, slot: _WorkerSlot) -> None:
        """Start a new worker in a slot and begin its episodes."""
        import ray

        settings = self.settings
        noise = np.random.SeedSequence((self._seed, self._first_seed, slot.index, slot.lives)).generate_state(1)
        spec = WorkerSpec(
            algorithm=[self._algorithm],
            env=self.env,
            plugin=type(environment(self.env)).__module__,
            horizon=self.horizon,
            first_seeds=list(slot.seeds),
            stride=self.stride,
            seed=int(noise[0]),
            gpu=settings.worker_gpus > 0,
            best_of_n=self._most_candidates,
            version=version_of("poco-vla"),
        )
        remote = ray.remote(num_cpus=settings.worker_cpus, num_gpus=settings.worker_gpus)(RolloutWorker)
        slot.actor = remote.options(max_restarts=0, scheduling_strategy="SPREAD").remote()
        slot.lives += 1
        slot.promised = 0
        self._running[slot.actor.begin.remote(spec)] = slot

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _play(self) -> None:
        self._last_answer = time.monotonic()
        while not self._stop:
            self._start_rounds()
            self._receive_rounds()

    def _start_rounds(self) -> None:
        """Start a round on every idle worker, as long as acting may continue even if all running rounds take their most
        steps."""
        while self._idle:
            promised = sum(slot.promised for slot in self._running.values())
            with self._changed:
                if self._stop or self._taken + promised >= self._until:
                    return
                best_of_n = self._best_of_n
            slot = self._idle.popleft()
            self._publish()
            slot.promised = self.env.num_envs * self.horizon
            self._running[slot.actor.play.remote(self._published, best_of_n)] = slot

    def _receive_rounds(self) -> None:
        import ray

        if not self._running:
            with self._changed:
                self._changed.wait(timeout=POLL)
            self._last_answer = time.monotonic()
            return
        ready, _ = ray.wait(list(self._running), timeout=POLL)
        for reference in ready:
            self._receive_answer(self._running.pop(reference), reference)
        self._report_silence()

    def _receive_answer(self, slot: _WorkerSlot, reference: Any) -> None:
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            answer: Any = ray.get(reference)
        except RayTaskError as error:
            answer = Failed(str(error.cause), str(error))
        except RayError as death:
            self._replace(slot, death)
            return
        if isinstance(answer, Failed):
            raise answer.error(slot.index)
        for line in answer.messages:
            self._say(f"Ray worker {slot.index}: {line}")
        for episode in answer.episodes:
            assert episode.seed is not None
            slot.seeds[self._env_index(episode, slot)] = episode.seed + self.stride  # seeds that failed are left out
            slot.deaths = 0
        self._last_answer = time.monotonic()
        self._deliver(answer.episodes, answer.steps, answer.version)
        self._idle.append(slot)

    def _env_index(self, episode: Episode, slot: _WorkerSlot) -> int:
        """Return the index of the worker's environment that played an episode."""
        assert episode.seed is not None
        return (episode.seed - self._first_seed) % self.stride - slot.index * self.env.num_envs

    def _replace(self, slot: _WorkerSlot, death: Exception) -> None:
        import ray

        with suppress(Exception):  # it is dead, or cannot be reached and must not go on
            ray.kill(slot.actor)
        slot.deaths += 1
        why = " ".join(str(death).split())
        if slot.deaths > MOST_DEATHS:
            raise SimulatorError(
                f"Ray worker {slot.index} died {slot.deaths} times without finishing an episode in between; the last "
                f"time: {why}. Too little memory on its machine, or a simulator that crashes? Ray's logs are in "
                "/tmp/ray/session_latest/logs there."
            )
        self._say(f"Ray worker {slot.index} died and is replaced; its running episodes are dropped. {why[:200]}")
        slot.seeds = [seed + self.stride for seed in slot.seeds]
        self._spawn_worker(slot)

    def _publish(self) -> None:
        """Put the newest weights into the object store, unless they are there or others were published a moment ago."""
        import ray

        now = time.monotonic()
        if self._seen == self.weights.changes or now < self._publish_after:
            return
        with self.weights.lock:
            data = ray.put([to_bytes(tensor) for tensor in self._trained])
            version, self._seen = self.weights.version, self.weights.changes
        self._published = Published(self._published.number + 1, version, [data])
        took = time.monotonic() - now
        self._publish_after = now + took / PUBLISHING

    def _report_silence(self) -> None:
        import ray

        if time.monotonic() - self._last_answer < SILENCE:
            return
        self._last_answer = time.monotonic()
        free, settings = ray.available_resources(), self.settings
        self._say(
            f"no Ray worker has answered for {SILENCE:.0f} s; the cluster has {free.get('CPU', 0):g} CPUs and "
            f"{free.get('GPU', 0):g} GPUs free, and each of {settings.workers} workers asks for "
            f"{settings.worker_cpus:g} and {settings.worker_gpus:g}"
        )
