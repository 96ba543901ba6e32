"""What an array that comes over the wire has to look like."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from poco_vla.errors import DataError


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
