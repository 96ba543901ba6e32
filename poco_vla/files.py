"""Files and folders that appear whole or not at all."""

import errno
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from poco_vla.errors import PocoError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""What the system answers when a disk, or what a user may have of it, is full."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; the file replaces `path` when the block ends without an error."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Write JSON to a file atomically."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(values, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Return the JSON value in a file.

    Raises:
        PocoError: it is missing, or is no JSON (cut short, emptied, overwritten); the message names it.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise PocoError(f"{path} is missing") from error
    except OSError as error:
        raise PocoError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise PocoError(f"{path} is damaged: no JSON ({type(error).__name__})") from error


def replace_folder(partial: Path, final: Path) -> None:
    """Replace an older folder by a finished one; the older one stays whole until then. A process that is killed in
    between leaves the older one as ``.NAME.old``; :func:`recover_folder` restores it."""
    recover_folder(final)
    old = _old(final)
    for attempt in range(3):
        if final.exists():
            final.rename(old)
        try:
            partial.rename(final)
            break
        except OSError as error:  # a reader has just put the older one back
            if attempt == 2 or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(final: Path) -> bool:
    """Restore a folder whose replacement was interrupted; return True if it was. If the new folder is in its place
    already, the rest of the older one is removed."""
    old = _old(final)
    if not old.is_dir():
        return False
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        return False
    with suppress(OSError):  # its writer was faster
        old.rename(final)
        return True
    return False


def recover_folders(parent: Path) -> list[Path]:
    """Call :func:`recover_folder` for every folder in `parent`; return those that were put back."""
    finals = [path.with_name(path.name[1 : -len(".old")]) for path in sorted(parent.glob(".*.old"))]
    return [final for final in finals if recover_folder(final)]


def discard_partial(parent: Path) -> list[Path]:
    """Remove what processes that were killed left half written in `parent` (``.NAME.partial``); what was removed. Only
    for who is alone in `parent`."""
    left = sorted(parent.glob(".*.partial"))
    for path in left:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return left


def partial_of_process(final: Path) -> Path:
    """Return a name beside `final` for what this process is writing; others may write the same at once."""
    return final.with_name(f".{final.name}.{host()}.{os.getpid()}.partial")


def discard_partial_of_dead(final: Path) -> list[Path]:
    """Remove what processes of this machine that are gone left half written for `final` (:func:`partial_of_process`);
    what was removed."""
    removed = []
    for path in sorted(final.parent.glob(f".{final.name}.*.partial")):
        *_, machine, number = path.name.removesuffix(".partial").split(".")
        own = machine == host() or path.name == f".{final.name}.{number}.partial"  # without a machine: as before 0.2
        if own and number.isdigit() and not is_alive(int(number)):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


def host() -> str:
    """Return this machine's name, as part of a file's."""
    return socket.gethostname().split(".")[0] or "localhost"


def is_alive(pid: int) -> bool:
    """True if this machine has a process of this number that has not ended: not one that waits to be collected."""
    with suppress(OSError, IndexError):
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        return state not in ("Z", "X")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it replaces `path` when the block ends without an error, and is removed otherwise.

    Raises:
        PocoError: at `path` is something that is no policy's folder, which would be lost.
    """
    final = Path(path).resolve()
    recover_folder(final)
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
        _share(partial)
        replace_folder(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _share(folder: Path) -> None:
    """Give files the permissions that the umask gave their folder; safetensors creates files that only the owner can
    read."""
    rights = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(rights)


def _is_policy(folder: Path) -> bool:
    """True if a folder is a policy's, and not a run's, which has a config.json, too."""
    return (folder / "config.json").is_file() and not any((folder / n).exists() for n in ("checkpoints", "result.json"))


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_out_of_space(error: BaseException | None) -> bool:
    """True if a full disk caused this error.

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
    """Return the result of `write`, which is called again while the disk is full.

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
                raise PocoError(f"{_full(what, where)}, and the run ends: it is lost. Make room first.") from None
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
