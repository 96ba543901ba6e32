"""One of several processes fails: it says why, and the others say which one it was."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import distributed

from poco_vla.bugs import RemoteBugError, bug_behind, summary_of, traceback_of
from poco_vla.errors import OtherProcessError

NOTE = ".failed.json"
"""File in a run's folder: which process failed first."""
PATIENCE = 5.0
"""Seconds that a process which knows that another has failed waits for what that one says."""


@dataclass(frozen=True)
class _First:
    """What a process that has failed leaves for the others: its rank, its error, and the traceback of a bug."""

    rank: int
    error: str
    traceback: str

    @classmethod
    def of(cls, error: Exception, rank: int) -> "_First":
        bug = bug_behind(error)
        return cls(rank, summary_of(error), traceback_of(bug) if bug is not None else "")


class Failures:
    """Tells the processes of a run which of them failed first, by a note in the run's folder.

    Args:
        folder: of the run, seen by all of them.
        rank: this process.
        num_ranks: all of them.
    """

    def __init__(self, folder: Path, rank: int, num_ranks: int) -> None:
        self._path, self._rank, self._several = folder / NOTE, rank, num_ranks > 1

    def forget(self) -> None:
        """Remove the note of an earlier start; the main process calls this before the others go on."""
        self._path.unlink(missing_ok=True)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note an error within this block, when it is the run's first.

        Raises:
            OtherProcessError: another process failed before; it says why.
        """
        try:
            yield
        except OtherProcessError:
            if (follows := self._following(self._first(wait=PATIENCE))) is not None:
                raise follows from follows.__cause__
            raise
        except Exception as error:
            if self._several:
                self._tell(error)
            raise

    def _tell(self, error: Exception) -> None:
        """Note an error of this process.

        Raises:
            OtherProcessError: it is another's, or follows from another's.
        """
        lost = _is_of_connection(error)
        if not lost and self._note(error):
            return
        if (follows := self._following(self._first())) is not None:
            raise follows from follows.__cause__
        if lost:
            raise OtherProcessError(
                f"process {self._rank} has lost the others: one of them was killed, has run out of memory, or cannot "
                f"be reached ({str(error).strip().splitlines()[0][:160]}). Start the run again with --resume.",
                "this process has lost the others",
            ) from None

    def _following(self, first: _First | None) -> OtherProcessError | None:
        """Return the error of this process after that of another; None where no other has failed."""
        if first is None or first.rank == self._rank:
            return None
        error = OtherProcessError(
            f"process {self._rank} stops because process {first.rank} of this run has failed: {first.error}",
            first.error,
        )
        error.__cause__ = RemoteBugError(first.traceback) if first.traceback else None
        return error

    def _note(self, error: Exception) -> bool:
        """Put the note there; False where another process was faster."""
        with suppress(OSError):
            try:
                with self._path.open("x") as file:
                    json.dump(asdict(_First.of(error, self._rank)), file)
            except FileExistsError:
                return False
        return True

    def _first(self, *, wait: float = 0.0) -> _First | None:
        """Return what the first process that has failed left, None where none has within `wait` seconds."""
        until = time.monotonic() + wait
        while True:
            with suppress(OSError, ValueError, TypeError):
                return _First(**json.loads(self._path.read_text()))
            if time.monotonic() >= until:
                return None
            time.sleep(0.1)


def _is_of_connection(error: Exception) -> bool:
    """True if the processes cannot reach each other any more. Gloo's errors are plain RuntimeErrors."""
    kinds = tuple(kind for name in ("DistError", "DistNetworkError") if (kind := getattr(distributed, name, None)))
    text = str(error)
    return isinstance(error, kinds) or (
        type(error) is RuntimeError
        and any(word in text for word in ("gloo", "Gloo", "NCCL", "Connection closed by peer"))
    )
