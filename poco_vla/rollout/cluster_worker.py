"""The worker's side of a Ray cluster: environments and an actor in a process of their own."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version as version_of
from typing import Any

import torch

from poco_vla.algorithms import Algorithm
from poco_vla.bugs import RemoteBugError, bug_behind, place_of, traceback_of
from poco_vla.config import EnvSpec
from poco_vla.data import Episode
from poco_vla.data.batches import get_preprocessor
from poco_vla.errors import ConfigError, PocoError, SimulatorError
from poco_vla.policy import FlowPolicy
from poco_vla.rollout.actor import Actor, learned_parameters
from poco_vla.rollout.object_store import from_bytes, read_only_tensors
from poco_vla.rollout.pool import EnvPool


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
        with read_only_tensors():
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

        with read_only_tensors():
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

    for step in getattr(get_preprocessor(policy), "steps", ()):
        if isinstance(step, DeviceProcessorStep):
            step.device = device
            step.__post_init__()
    return device
