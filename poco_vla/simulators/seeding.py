"""Simulators that draw from numpy's global generator, made to repeat."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def numpy_seed(seed: int) -> Iterator[None]:
    """numpy's global generator, seeded for a while; the caller's state comes back afterwards."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def draw_seed(rng: np.random.Generator) -> int:
    """A seed for `numpy_seed`."""
    return int(rng.integers(2**32))
