"""One of several processes fails: it says why, and the others say which one it was."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import distributed

from poco_vla.errors import PocoError

NOTE = ".failed.json"
"""File in a run's folder: which process failed first."""


class OtherProcessError(PocoError):
    """Another process of this run has failed, and has said why."""


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
            OtherProcessError: another process failed before.
        """
        try:
            yield
        except OtherProcessError:
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
        first = self._first()
        if first is not None and first != self._rank:
            raise OtherProcessError(
                f"process {self._rank} stops because process {first} of this run has failed; that one says why"
            ) from error
        if lost:
            raise OtherProcessError(
                f"process {self._rank} has lost the others: one of them was killed, has run out of memory, or cannot "
                f"be reached ({str(error).strip().splitlines()[0][:160]}). Start the run again with --resume."
            ) from error

    def _note(self, error: Exception) -> bool:
        """Put the note there; False where another process was faster."""
        with suppress(OSError):
            try:
                with self._path.open("x") as file:
                    json.dump({"rank": self._rank, "error": f"{type(error).__name__}: {error}"}, file)
            except FileExistsError:
                return False
        return True

    def _first(self) -> int | None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads(self._path.read_text())["rank"])
        return None


def _is_of_connection(error: Exception) -> bool:
    """True if the processes cannot reach each other any more. Gloo's errors are plain RuntimeErrors."""
    kinds = tuple(kind for name in ("DistError", "DistNetworkError") if (kind := getattr(distributed, name, None)))
    text = str(error)
    return isinstance(error, kinds) or (
        type(error) is RuntimeError
        and any(word in text for word in ("gloo", "Gloo", "NCCL", "Connection closed by peer"))
    )
