"""What an array that comes over the wire has to look like."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from poco_vla.errors import ConfigError, DataError


@dataclass(frozen=True)
class Feature:
    """One observation of one state.

    Attributes:
        shape: its axes; a picture's are height, width, 3.
        dtype: numpy's name, such as "float32"; a picture's is "uint8".
    """

    shape: tuple[int, ...]
    dtype: str

    def rows(self, count: int) -> "Feature":
        """`count` of it, stacked."""
        return Feature((count, *self.shape), self.dtype)

    @property
    def nbytes(self) -> int:
        """Of one."""
        return int(np.prod(self.shape, dtype=object)) * np.dtype(self.dtype).itemsize

    def check(self, key: str, found: Any) -> np.ndarray:
        """The value, if it is such a feature.

        Raises:
            DataError: it is not; the message says what was found and what was expected.
        """
        expected = f"expected {self.dtype} of shape {list(self.shape)}"
        if not isinstance(found, np.ndarray):
            raise DataError(f'"{key}" is a {type(found).__name__}, {expected}')
        if found.shape != self.shape or found.dtype.name != self.dtype:
            raise DataError(f'"{key}" is {found.dtype.name} of shape {list(found.shape)}, {expected}')
        if found.dtype.kind == "f" and not np.isfinite(found).all():
            raise DataError(f'"{key}" holds NaN or infinite numbers and is not taken')
        return found


def observation_spec(features: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Feature]:
    """What a policy is to be sent: those of a LeRobot dataset's features (`DatasetInfo.features`) that it reads.

    Args:
        features: key -> dtype, shape, names.
        keys: the policy's `input_keys`.
    """
    keys = list(keys)
    if missing := [key for key in keys if key not in features]:
        raise ConfigError(f"the policy reads {missing}, which the dataset does not have; it has {sorted(features)}")
    return {key: _feature(features[key]) for key in keys}


def _feature(description: Mapping[str, Any]) -> Feature:
    shape = tuple(int(size) for size in description["shape"])
    if description["dtype"] not in ("image", "video"):
        return Feature(shape, description["dtype"])
    channels_first = "channel" in str((description.get("names") or [""])[0])
    return Feature((*shape[1:], shape[0]) if channels_first else shape, "uint8")
