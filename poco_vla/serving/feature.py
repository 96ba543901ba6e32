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
        """Return the feature of `count` stacked values."""
        return Feature((count, *self.shape), self.dtype)

    @property
    def nbytes(self) -> int:
        """Return the bytes of one value."""
        return int(np.prod(self.shape, dtype=object)) * np.dtype(self.dtype).itemsize

    def check(self, key: str, found: Any) -> np.ndarray:
        """Return the value as this feature's dtype: other kinds of numbers are taken where they mean the same.

        Clients of numpy send float64 and whole numbers by default. Where float32 is expected, any number is rounded to
        it; where whole numbers or booleans are, whole numbers that fit.

        Raises:
            DataError: it is not such a feature; the message says what was found and what was expected.
        """
        expected = f"expected {self.dtype} of shape {list(self.shape)}"
        if not isinstance(found, np.ndarray):
            raise DataError(f'"{key}" is a {type(found).__name__}, {expected}')
        if found.shape != self.shape:
            raise DataError(f'"{key}" is {found.dtype.name} of shape {list(found.shape)}, {expected}')
        taken = found if found.dtype.name == self.dtype else _converted(found, np.dtype(self.dtype))
        if taken is None:
            raise DataError(f'"{key}" is {found.dtype.name} of shape {list(found.shape)}, {expected}')
        if taken.dtype.kind == "f" and not np.isfinite(taken).all():
            raise DataError(f'"{key}" holds NaN or infinite numbers and is not taken')
        return taken


def _converted(found: np.ndarray, wanted: np.dtype) -> np.ndarray | None:
    """Return the same numbers as another dtype; None where they would not be the same."""
    if wanted.kind == "f" and found.dtype.kind in "fiub":
        with np.errstate(over="ignore"):  # too large a number becomes infinite, and is refused as such
            return found.astype(wanted)
    if wanted.kind in "iub" and found.dtype.kind in "iu":
        low, high = (0, 1) if wanted.kind == "b" else (np.iinfo(wanted).min, np.iinfo(wanted).max)
        fits = found.size == 0 or (int(found.min()) >= low and int(found.max()) <= high)
        return found.astype(wanted) if fits else None
    return None


def observation_spec(features: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Feature]:
    """Return the observations that a policy must be sent: the features of a LeRobot dataset (`DatasetInfo.features`)
    that it reads.

    Numbers are float32 whatever the dataset stores them as: training reads them so, and robots give them so.

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
        return Feature(shape, "float32")
    channels_first = "channel" in str((description.get("names") or [""])[0])
    return Feature((*shape[1:], shape[0]) if channels_first else shape, "uint8")
