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
import os
import signal
import socket
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version as version_of
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from poco_vla.algorithms import Algorithm
from poco_vla.bugs import RemoteBugError, bug_behind, place_of, traceback_of
from poco_vla.config import EnvSpec, InteractionConfig
from poco_vla.data import Episode
from poco_vla.data.batches import pipeline_of
from poco_vla.errors import ConfigError, PocoError, SimulatorError
from poco_vla.policy import FlowPolicy
from poco_vla.recording.recorder import EpisodeRecorder
from poco_vla.rollout.actor import Actor, WeightsVersion, learned_parameters
from poco_vla.rollout.interaction import BackgroundInteraction
from poco_vla.rollout.pool import EnvPool
from poco_vla.simulators import environment

logger = logging.getLogger(__name__)

POLL = 0.02
"""Seconds after which the driver looks whether acting may go on or has to end."""
PATIENCE = 10.0
"""Seconds that an address may take to answer."""
SILENCE = 60.0
"""Seconds without an answer of any worker after which a person is told."""
MOST_DEATHS = 3
"""Deaths of one worker, without a finished episode in between, that are made good."""
GRACE = 5.0
"""Seconds that workers have to close their simulators."""
PUBLISHING = 0.1
"""Share of the time that may go into publishing weights: large ones are published less often than they change."""


# -- the worker's side ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker needs to build its environments and its actor.

    Attributes:
        algorithm: [reference to the algorithm that acts].
        env: the environments.
        plugin: the module that registers their type.
        horizon: H.
        first_seeds: of each environment's first episode.
        stride: from an environment's seed to its next one.
        seed: of the worker's own noise.
        gpu: the policy acts on a GPU.
        best_of_n: most candidates per acting step.
        version: of this library.
    """

    algorithm: list[Any]
    env: EnvSpec
    plugin: str
    horizon: int
    first_seeds: list[int]
    stride: int
    seed: int
    gpu: bool
    best_of_n: int
    version: str


@dataclass(frozen=True)
class Published:
    """Trained weights in the object store.

    Attributes:
        number: counts what was published.
        version: of the weights: updates that made them.
        tensors: [reference to their bytes, in the order of :func:`learned_parameters`].
    """

    number: int
    version: int
    tensors: list[Any]


@dataclass(frozen=True)
class Played:
    """Hold the result of one chunk in each environment: ended episodes, control steps taken, messages for the user."""

    episodes: list[Episode]
    steps: int
    version: int
    messages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failed:
    """Say what went wrong in a worker, as text: an exception would not come through in one piece.

    Attributes:
        words: kind and text of the error, and where it was raised unless the user can mend it by what it says.
        details: the traceback of a bug, else "".
    """

    words: str
    details: str = ""

    @classmethod
    def of(cls, error: Exception) -> "Failed":
        """Describe an exception."""
        words, bug = f"{type(error).__name__}: {error}", bug_behind(error)
        if bug is None:
            return cls(words)
        return cls(words if isinstance(error, PocoError) else f"{words}{place_of(error)}", traceback_of(bug))

    def error(self, worker: int) -> SimulatorError:
        """Return the error that ends the run."""
        error = SimulatorError(f"Ray worker {worker} cannot act: {self.words}")
        error.__cause__ = RemoteBugError(self.details) if self.details else None
        return error


class RolloutWorker:
    """Environments and an actor in a Ray process. It knows nothing of the learner.

    Every call answers: what went wrong is an answer, too. Only death is not.
    """

    _envs: EnvPool | None = None

    def begin(self, spec: WorkerSpec) -> Played | Failed:
        """Build everything, and begin the episodes."""
        return _answer(lambda: self._begin(spec))

    def play(self, published: Published, best_of_n: int) -> Played | Failed:
        """Play one chunk in each environment, with the newest weights."""
        return _answer(lambda: self._play(published, best_of_n))

    def close(self) -> None:
        if self._envs is not None:
            self._envs.close()

    def _begin(self, spec: WorkerSpec) -> Played:
        import ray

        if (found := version_of("poco-vla")) != spec.version:
            raise ConfigError(f"poco-vla {found} is installed there, and {spec.version} where the learner runs")
        import_module(spec.plugin)
        with _read_only_tensors():
            algorithm: Algorithm = ray.get(spec.algorithm[0])
        self._tensors = learned_parameters(algorithm)
        for parameter in self._tensors:
            if not parameter.requires_grad:  # a target network has no gradient, but it changes
                parameter.data = parameter.data.clone()
        algorithm.requires_grad_(False)
        algorithm.to(_set_device(algorithm.policy, "cuda" if spec.gpu else "cpu"))
        self._actor = Actor(algorithm, spec.seed, spec.best_of_n)
        self._number = -1
        self._messages: list[str] = []
        self._envs = EnvPool(spec.env, spec.horizon, spec.stride, say=self._messages.append)
        self._envs.reset(spec.first_seeds)
        return Played([], 0, 0, self._take_messages())

    def _play(self, published: Published, best_of_n: int) -> Played:
        assert self._envs is not None
        if published.number != self._number:
            self._renew(published)
        chunks = self._actor.chunks(self._envs.obs, self._envs.tasks, best_of_n=best_of_n)
        episodes, steps = self._envs.step(chunks, published.version)
        return Played(episodes, steps, published.version, self._take_messages())

    def _take_messages(self) -> tuple[str, ...]:
        """Return the messages of the environments since the last call."""
        messages = tuple(self._messages)
        self._messages.clear()
        return messages

    @torch.no_grad()
    def _renew(self, published: Published) -> None:
        import ray

        with _read_only_tensors():
            for own, data in zip(self._tensors, ray.get(published.tensors[0]), strict=True):
                own.copy_(from_bytes(data, own.dtype, own.shape))
        self._number = published.number


def _answer(act: Callable[[], Played]) -> Played | Failed:
    try:
        return act()
    except Exception as error:  # whatever it is, its words are for the learner
        return Failed.of(error)


def _set_device(policy: FlowPolicy, device: str) -> str:
    """Set the device on which the processors of a policy put their tensors, and return it."""
    from lerobot.processor import DeviceProcessorStep

    for step in getattr(pipeline_of(policy), "steps", ()):
        if isinstance(step, DeviceProcessorStep):
            step.device = device
            step.__post_init__()
    return device


# -- tensors in the object store --------------------------------------------------------------------------------------


def to_bytes(tensor: Tensor) -> np.ndarray:
    """Return the bytes of a tensor of any dtype as uint8; a view of a CPU tensor if possible."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def from_bytes(data: np.ndarray, dtype: torch.dtype, shape: Any) -> Tensor:
    """Return a view of :func:`to_bytes`' result as a tensor."""
    return torch.from_numpy(data).view(dtype).reshape(shape)


def _parts(tensor: Tensor) -> tuple[np.ndarray, torch.dtype, tuple[int, ...], bool]:
    return to_bytes(tensor), tensor.dtype, tuple(tensor.shape), tensor.requires_grad


def _tensor(parts: tuple[np.ndarray, torch.dtype, tuple[int, ...], bool]) -> Tensor:
    return from_bytes(*parts[:3]).clone()


def _parameter(parts: tuple[np.ndarray, torch.dtype, tuple[int, ...], bool]) -> nn.Parameter:
    """Return a parameter; if it is frozen, as a view of the object store's only copy, which is read-only."""
    data = from_bytes(*parts[:3])
    return nn.Parameter(data.clone() if parts[3] else data, requires_grad=parts[3])


@contextmanager
def _tensors_as_bytes() -> Iterator[None]:
    """Let Ray pickle tensors as plain bytes within this context: torch's own archive costs several copies."""
    from ray.util import deregister_serializer, register_serializer

    kinds: dict[type, Callable[[Any], Tensor]] = {Tensor: _tensor, nn.Parameter: _parameter}
    for kind, back in kinds.items():
        register_serializer(kind, serializer=_parts, deserializer=back)
    try:
        yield
    finally:
        for kind in kinds:
            deregister_serializer(kind)


@contextmanager
def _read_only_tensors() -> Iterator[None]:
    """Suppress torch's warning about tensors over read-only memory within this context."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        yield


# -- the learner's side -----------------------------------------------------------------------------------------------


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

        with self.weights.lock, _tensors_as_bytes():
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


def check(settings: InteractionConfig) -> None:
    """Find out what would keep `connect` from its cluster, before anything is trained.

    Raises:
        ConfigError: nobody listens at the address, or this machine has not the GPUs for a cluster of its own.
    """
    address, gpus = _address(settings), settings.workers * settings.worker_gpus
    if address is None and gpus > torch.cuda.device_count():
        raise ConfigError(_too_few_gpus(settings, float(torch.cuda.device_count())))
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
        except OSError as error:  # Ray itself would try for a quarter of an hour
            raise ConfigError(_no_cluster(address, error)) from error


def connect(settings: InteractionConfig) -> bool:
    """Connect this process to the cluster of `settings`; return True if it was not connected before.

    Raises:
        ConfigError: no cluster answers there, or this machine has not the GPUs for one.
    """
    address = _address(settings)
    if address is None:
        # Read when Ray is imported: node and workers listen on this machine alone.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    with _own_signals():
        if address is not None:
            quiet.pop("include_dashboard")
            try:
                ray.init(address, **quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConfigError(_no_cluster(address, error)) from error
            return True
        ray.init("local", num_cpus=int(np.ceil(settings.workers * settings.worker_cpus)), **quiet)
    gpus = ray.cluster_resources().get("GPU", 0.0)
    if gpus < settings.workers * settings.worker_gpus:
        ray.shutdown()
        raise ConfigError(_too_few_gpus(settings, gpus))
    return True


def _address(settings: InteractionConfig) -> str | None:
    return settings.address or os.environ.get("RAY_ADDRESS")


def _no_cluster(address: str | None, error: Exception) -> str:
    return (
        f"no Ray cluster at {address}: {error}. The learner's machine has to belong to it: "
        "ray start --address=HEAD:6379 (on the head: ray start --head)"
    )


def _too_few_gpus(settings: InteractionConfig, found: float) -> str:
    wanted = settings.workers * settings.worker_gpus
    return (
        f"{settings.workers} workers with worker_gpus {settings.worker_gpus} need {wanted:g} GPUs, and there are "
        f"{found:g} on this machine"
    )


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep our handler of SIGTERM: Ray installs its own, which would end a run without saving it."""
    own = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if own is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, own)
