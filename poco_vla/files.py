"""Files and folders that appear whole or not at all."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from poco_vla.errors import PocoError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""What the system answers when a disk, or what a user may have of it, is full."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to; it takes `path`'s place when the block ends well."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """JSON, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(values, indent=2, default=str) + "\n")


def replace_folder(partial: Path, final: Path) -> None:
    """Put a finished folder in the place of an older one, which stays whole until then."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill; it takes `path`'s place when the block ends well, and goes away when it does not.

    Raises:
        PocoError: at `path` is something that is no policy's folder, which would be lost.
    """
    final = Path(path).resolve()
    if final.exists() and not (final.is_dir() and (not any(final.iterdir()) or _is_policy(final))):
        raise PocoError(
            f"{final} holds something else than a policy (no config.json, or a whole run) and is not replaced; choose "
            "another"
        )
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        replace_folder(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_policy(folder: Path) -> bool:
    """Whether a folder is a policy's, and not a run's, which has a config.json, too."""
    return (folder / "config.json").is_file() and not any((folder / n).exists() for n in ("checkpoints", "result.json"))


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_out_of_space(error: BaseException | None) -> bool:
    """Whether a full disk is behind this error.

    pyarrow and PyAV keep the system's number; safetensors and encoders in threads pass on its text alone.
    """
    while error is not None:
        if getattr(error, "errno", None) in NO_SPACE or any(os.strerror(code) in str(error) for code in NO_SPACE):
            return True
        error = error.__cause__ or error.__context__
    return False


def wait_for_space[T](
    write: Callable[[], T],
    *,
    what: str,
    where: Path,
    tell: Callable[[str], None],
    give_up: Callable[[], bool] = lambda: False,
    every: float = 5.0,
) -> T:
    """What `write` returns. While the disk is full, it is called again and again.

    Args:
        write: must leave nothing half done when it fails.
        what: is written, for the messages.
        where: a path on that disk, there or not.
        tell: gets one message when the waiting begins.
        give_up: True ends the waiting.
        every: seconds between two attempts.

    Raises:
        PocoError: `give_up`; what was not written is lost, and the message says so.
    """
    told = False
    while True:
        try:
            return write()
        except Exception as error:  # every library wraps the system's answer in its own
            if not is_out_of_space(error):
                raise
            if give_up():
                raise PocoError(f"{_full(what, where)}, and the run ends: it is lost. Make room first.") from error
        if not told:
            tell(f"{_full(what, where)}. It is tried again every {every:g} s until there is room.")
            told = True
        _sleep(every, give_up)


def _full(what: str, where: Path) -> str:
    there = next(folder for folder in (where, *where.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free / 1e6
    return f"{what} cannot be written to {where}: the disk is full, or your share of it ({free:.1f} MB are free)"


def _sleep(seconds: float, end: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not end():
        time.sleep(min(left, 0.2))
