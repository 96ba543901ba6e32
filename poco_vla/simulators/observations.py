"""Observations of environments as LeRobot names and stores them: float32 numbers, uint8 [height, width, 3] pictures."""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from poco_vla.errors import ConfigError, DataError, NonFiniteError

CHANNELS = (1, 3, 4)
"""Grey, RGB, RGBA."""


def lerobot_key(name: str) -> str:
    """Return LeRobot's name of a Gymnasium observation, as lerobot.envs.utils.preprocess_observation has it."""
    if name == "pixels":
        return "observation.image"
    if name.startswith("observation."):  # an environment behind LeRobot's processors
        return name
    if name.startswith("pixels."):
        return f"observation.images.{name.removeprefix('pixels.')}"
    return {"agent_pos": "observation.state"}.get(name, f"observation.{name}")


def flat_observation(observation: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return an environment's observation under LeRobot's names, pictures of several cameras each under its own."""
    out: dict[str, np.ndarray] = {}
    for name, value in leaves(observation).items():
        key = lerobot_key(name)
        out[key] = as_picture(np.array(value)) if is_picture_key(key) else _column(value)
    return out


def leaves(observation: Mapping[str, Any]) -> dict[str, Any]:
    """Name what lies deeper with dots: {"pixels": {"top": x}} -> {"pixels.top": x}."""
    out: dict[str, Any] = {}
    for name, value in observation.items():
        nested = isinstance(value, Mapping)
        out |= {f"{name}.{key}": leaf for key, leaf in leaves(value).items()} if nested else {name: value}
    return out


def is_picture_key(key: str) -> bool:
    """Return True for LeRobot's names of pictures."""
    return key == "observation.image" or key.startswith("observation.images.")


def as_picture(picture: np.ndarray, highest: float | None = None) -> np.ndarray:
    """Convert a picture to uint8 [height, width, 3] where its form is known, else give it as it is (depth, say).

    Known are channels first, grey and RGBA, and numbers other than uint8 in [0, 1] or [0, `highest`].

    Args:
        picture: [height, width], [height, width, channels] or [channels, height, width].
        highest: white; None or inf tells it from the numbers, where anything above 1 means 255 (uint16: 65535).
    """
    if picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3:
        return picture
    if picture.ndim == 3 and picture.shape[2] not in CHANNELS and picture.shape[0] in CHANNELS:
        picture = picture.transpose(1, 2, 0)
    grey = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 1)
    if picture.ndim not in (2, 3) or not (grey or picture.shape[2] in CHANNELS) or picture.dtype.kind not in "buif":
        return picture
    if (
        grey
        and picture.dtype.kind != "b"
        and picture.dtype != np.uint8
        and (highest is None or highest not in (1, 255))
    ):
        return picture  # a depth camera gives such numbers, too
    pixels = _as_uint8(picture, highest)
    if pixels is None:
        return picture
    pixels = pixels.reshape(*pixels.shape[:2], 1).repeat(3, axis=2) if grey else pixels[..., :3]
    return np.ascontiguousarray(pixels)


def _as_uint8(picture: np.ndarray, highest: float | None) -> np.ndarray | None:
    """Return the same picture with 255 for white, None where its numbers leave open what white is."""
    if picture.dtype == np.uint8:
        return picture
    if picture.dtype == bool:
        return picture.astype(np.uint8) * np.uint8(255)
    low, high = float(picture.min()), float(picture.max())  # NaN stays NaN and fails the next line
    if not 0 <= low <= high:
        return None
    white = _white(picture, high, highest)
    if high > white * (1 + 1e-6):
        return None
    if white == 1 or white > 255:
        picture = picture * (255.0 / white)
    return np.rint(picture).clip(0, 255).astype(np.uint8)


def _white(picture: np.ndarray, high: float, highest: float | None) -> float:
    """Tell the number that means white. Fractions that stay below 1 are of [0, 1], whatever is declared."""
    declared = highest if highest is not None and np.isfinite(highest) else None
    if picture.dtype.kind == "f" and high <= 1 and (declared is None or (picture % 1).any()):
        return 1.0
    if declared is not None and (declared > 1 or picture.dtype.kind == "f"):
        return float(declared)
    return 65535.0 if picture.dtype == np.uint16 and high > 255 else 255.0


def require_pictures(obs: Mapping[str, np.ndarray], keys: tuple[str, ...] | list[str], where: str) -> None:
    """Raise DataError unless the pictures among `keys` are uint8 [B, height, width, 3].

    Args:
        obs: LeRobot key -> [B, ...].
        keys: what a policy reads.
        where: names the source in the message.
    """
    for key in keys:
        column = obs.get(key) if is_picture_key(key) else None
        if column is not None and (column.dtype != np.uint8 or column.ndim != 4 or column.shape[3] != 3):
            numbers = f", numbers from {column.min():g} to {column.max():g}" if column.size else ""
            raise DataError(
                f'{where} gives the picture "{key}" as {column.dtype} {column.shape[1:]}{numbers}; expected uint8 '
                "(height, width, 3), or a form that can be converted: channels first, grey, or floats in [0, 1] or "
                "[0, 255]. Let the environment return one of these."
            )


class ObservationReader:
    """Checks and converts the observations of one environment by the space that it declares.

    Args:
        space: the environment's observation space, a Dict.
        name: of the environment, for messages.

    Attributes:
        space: of what :meth:`read` gives: LeRobot key -> Box.
        converted: one clause for each camera whose pictures are converted.
    """

    def __init__(self, space: gym.Space, name: str) -> None:
        if not isinstance(space, gym.spaces.Dict):
            raise ConfigError(
                f"{name}: the environment's observations are a {space}, expected a Dict with LeRobot's names "
                "(agent_pos, ...)"
            )
        self.name = name
        self._leaves: dict[str, gym.Space] = leaves(space)
        self.space = gym.spaces.Dict({lerobot_key(k): _stored(lerobot_key(k), v) for k, v in self._leaves.items()})
        self.converted: dict[str, str] = {}
        self._highest = {k: _declared_white(v) for k, v in self._leaves.items()}

    def read(self, observation: Any) -> dict[str, np.ndarray]:
        """Give an observation under LeRobot's names, copied.

        Raises:
            ConfigError: not what the space declares.
            NonFiniteError: a number is NaN or infinite.
        """
        if not isinstance(observation, Mapping):
            raise ConfigError(
                f"{self.name} returns a {type(observation).__name__} as its observation; expected a dict with the keys "
                f"of its observation space: {', '.join(self._leaves)}"
            )
        found = leaves(observation)
        missing = [name for name in self._leaves if name not in found]
        if missing:
            raise ConfigError(
                f"{self.name} returns an observation without {', '.join(missing)}, which its observation space "
                f"declares; it has {', '.join(found) or 'nothing'}"
            )
        return {lerobot_key(name): self._column(name, found[name]) for name in self._leaves}

    def _column(self, name: str, value: Any) -> np.ndarray:
        key = lerobot_key(name)
        raw = np.array(value)
        if is_picture_key(key):
            array = as_picture(raw, self._highest[name])
            if array is not raw and name not in self.converted:
                self.converted[name] = (
                    f'pictures "{name}" are {raw.dtype} {raw.shape}, converted to uint8 {array.shape}'
                )
        else:
            array = raw.astype(np.float32) if raw.dtype.kind == "f" else raw
        box = self.space[key]
        if isinstance(box, gym.spaces.Box):
            declared = self._leaves[name].shape
            if array.shape != box.shape and raw.shape != declared:
                raise ConfigError(
                    f'{self.name} returns "{name}" of shape {raw.shape}; its observation space declares '
                    f"{self._leaves[name].shape}"
                )
            if array.dtype.kind not in "buif":
                raise ConfigError(f'{self.name} returns "{name}" of type {array.dtype}; expected numbers')
            if array.dtype != box.dtype and np.can_cast(array.dtype, box.dtype, "same_kind"):
                array = array.astype(box.dtype)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise NonFiniteError(f'{self.name} returned a non-finite "{name}"')
        return array


def _column(value: Any) -> np.ndarray:
    """Copy, floating-point numbers as float32: what datasets store and networks read."""
    array = np.array(value)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _declared_white(space: gym.Space) -> float | None:
    return float(np.max(space.high)) if isinstance(space, gym.spaces.Box) and space.shape else None


def _stored(key: str, space: gym.Space) -> gym.Space:
    """Return the space of what is stored of an entry."""
    if not isinstance(space, gym.spaces.Box):
        return space
    if is_picture_key(key):
        example = as_picture(np.zeros(space.shape, space.dtype), _declared_white(space))
        if example.dtype == np.uint8 and example.ndim == 3 and example.shape[2] == 3:
            return gym.spaces.Box(0, 255, example.shape, dtype=np.uint8)
    if space.dtype.kind == "f":
        return gym.spaces.Box(-np.inf, np.inf, space.shape, dtype=np.float32)
    return space
