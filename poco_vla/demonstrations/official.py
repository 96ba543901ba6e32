"""Helpers of the imports of official data sets: read errors, finite numbers, a limited number of episodes."""

import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from poco_vla.data import Episode
from poco_vla.errors import DataError


def no_report(done: int) -> None:
    """Do nothing after an episode."""


@contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """Raise as DataError what a damaged file makes its reader raise."""
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}: {error}): it is truncated, damaged or something else. "
            "Download it again."
        ) from None


def refuse_existing(root: Path) -> None:
    """Raise DataError when there is something in the dataset's place."""
    if root.exists():
        raise DataError(f"{root} exists already; remove it, or choose another folder")


def take_first[T](found: Iterable[T], count: int | None, source: Path) -> Iterator[T]:
    """The first `count`, or all. Raises DataError when there are fewer."""
    if count is not None and count < 1:
        raise DataError(f"{count} episodes are asked for; at least 1")
    taken = 0
    for one in islice(found, count):
        taken += 1
        yield one
    if count is not None and taken < count:
        raise DataError(f"{source} holds {taken} episodes, {count} are asked for")


def report_each(episodes: Iterable[Episode], on_episode: Callable[[int], None]) -> Iterator[Episode]:
    """The same episodes; whoever asks for the next one has written the one before."""
    for done, episode in enumerate(episodes, 1):
        yield episode
        on_episode(done)


def check_finite(where: str, column: np.ndarray) -> None:
    bad = ~np.isfinite(column.reshape(len(column), -1)).all(axis=1)
    if bad.any():
        raise DataError(
            f"{where} is not finite in row {int(bad.argmax())}; {int(bad.sum())} of {len(column)} rows are affected"
        )
