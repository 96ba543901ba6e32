"""What a policy server answers and to whom it passes episodes: its interfaces, and the check of a request."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from poco_vla.data.episode import Episode
from poco_vla.errors import ConfigError, DataError
from poco_vla.policy import FlowPolicy
from poco_vla.serving.feature import Feature
from poco_vla.serving.upload import check_task

INSTRUCTION_KEYS = ("task", "prompt")
"""LeRobot's name of the instruction, and openpi's."""


@runtime_checkable  # for the test run's machine-checked signatures
class ChunkSource(Protocol):
    """Source of the chunks that are served: :class:`poco_vla.rollout.Actor` or a class with the same methods."""

    policy: FlowPolicy
    weights_version: int
    """Of the weights that the last chunks are samples of, or the next ones will be where there were none."""

    def chunks(self, obs: Mapping[str, np.ndarray], tasks: Sequence[str]) -> np.ndarray:
        """Return [B, H, action_dim] float32, in the robot's units."""
        ...


@runtime_checkable
class EpisodeSink(Protocol):
    """Receiver of the episodes that robots send."""

    def status(self) -> Mapping[str, Any]:
        """Return the status that a robot asks for before an episode: numbers and texts by name. Called from the
        server's thread, which serves nobody meanwhile.

        At least "act", True when an episode may begin, False while the learner is to catch up first, and "done", True
        when training is over.
        """
        ...

    def take(self, episode: Episode, key: str) -> None:
        """Store an episode; it is on disk when this returns. Called in a thread of its own, one episode at a time, and
        may block.

        Args:
            episode: checked against what the server announces.
            key: the sender's. An episode whose acknowledgement got lost comes again, with the same key.

        Raises:
            DataError: it is refused for what it is; the sender gets the words, and does not send it again. After any
                other error the connection is closed, and the sender comes again.
        """
        ...


def read_observation_features(policy: str, keys: Iterable[str]) -> dict[str, Feature]:
    """Return the observations that clients of an exported policy must send, from its LeRobot configuration.

    Args:
        policy: LeRobot policy folder or Hub id.
        keys: the policy's `input_keys`.
    """
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.configs.types import FeatureType
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    inputs = PreTrainedConfig.from_pretrained(policy).input_features or {}
    found = {}
    for key in keys:
        if key not in inputs:
            raise ConfigError(f"{policy} does not say what {key} looks like; its inputs: {sorted(inputs)}")
        shape = tuple(inputs[key].shape)
        picture = inputs[key].type is FeatureType.VISUAL
        found[key] = Feature((*shape[1:], shape[0]), "uint8") if picture else Feature(shape, "float32")
    return found


@dataclass(frozen=True)
class PendingRequest:
    """A checked request that waits for its chunk."""

    obs: dict[str, np.ndarray]
    task: str
    answer: "Future[ChunkAnswer]" = field(default_factory=Future)


@dataclass(frozen=True)
class ChunkAnswer:
    """A chunk [H, A], the weights it is of, the seconds of its forward and the states that shared that."""

    actions: np.ndarray
    weights_version: int
    seconds: float
    batch: int


def check_request(request: Any, spec: Mapping[str, Feature]) -> PendingRequest:
    """Return a request's observations and instruction, checked.

    Raises:
        DataError: a camera is missing, an observation is unknown or of another shape or dtype, a number is not finite.
    """
    if not isinstance(request, dict):
        raise DataError(f"a request is a map of observations, got a {type(request).__name__}")
    found = sorted(repr(key) for key in request)
    named = [key for key in INSTRUCTION_KEYS if key in request]
    if len(named) != 1:
        raise DataError(f'a request holds the instruction as "task" or as "prompt", got {named or "neither"}')
    expected = [*spec, named[0]]
    if missing := [key for key in spec if key not in request]:
        raise DataError(f"{missing} missing: expected {expected}, found {found}")
    if unknown := sorted(repr(key) for key in request if key not in expected):
        raise DataError(f"{unknown} not known: expected {expected}")
    if not isinstance(request[named[0]], str):
        raise DataError(f'"{named[0]}" is a {type(request[named[0]]).__name__}, expected a text')
    check_task(named[0], request[named[0]])
    return PendingRequest({key: feature.check(key, request[key]) for key, feature in spec.items()}, request[named[0]])


def check_bounds(bounds: tuple[np.ndarray, np.ndarray] | None, action_dim: int) -> tuple[np.ndarray, ...] | None:
    if bounds is None:
        return None
    low, high = bounds
    if low.shape != (action_dim,) or high.shape != (action_dim,) or not np.isfinite(bounds).all() or (low > high).any():
        raise ConfigError(f"action_bounds are a lowest and a highest value for each of {action_dim}, got {bounds}")
    return bounds
