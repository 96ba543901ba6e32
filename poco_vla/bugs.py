"""Tell a bug from a mistake of the user: a bug is shown with its traceback, a mistake in one sentence."""

import errno
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType

from poco_vla.errors import OtherProcessError, PocoError

LIBRARIES = frozenset(
    {
        *{"av", "datasets", "draccus", "httpcore", "httpx", "huggingface_hub", "lerobot", "msgpack", "pandas"},
        *{"pyarrow", "requests", "safetensors_rust", "torch", "tyro", "websockets", "yaml"},
        *{"_pickle", "json", "pickle", "struct", "tomllib", "zipfile", "zlib"},
    }
)
"""Packages whose own exception classes speak of files, networks, options and memory."""
PASS_CALLS_ON = frozenset({"beartype", "jaxtyping", *sys.stdlib_module_names})
"""Packages that are neither at fault nor called for their own sake."""
ABOUT_SURROUNDINGS = (OSError, ModuleNotFoundError, MemoryError)
"""Built-in exceptions that are no bug where this library has said what they mean."""

OF_THE_SYSTEM = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENAMETOOLONG, errno.ELOOP),
    }
)
"""Errors of the operating system that a user can mend: rights, space, limits, a file where a folder belongs."""


class RemoteBugError(Exception):
    """An exception of another process, of which there is only its traceback's text."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


def bug_behind(error: BaseException) -> BaseException | None:
    """Return the bug that is or has caused an error, None where the user can mend it by what it says.

    An exception that this library has not turned into one of its own is a bug, unless it is of the system. The cause of
    one of its own is, but for exceptions that speak of what was given:

    - errors of the system and exceptions of well-known libraries (:data:`LIBRARIES`);
    - what the code that raises `error` has met itself, such as a key that a file lacks;
    - what the package that this code calls refuses by a `raise` statement of its own.

    Args:
        error: its chain of causes (`raise ... from ...`) is looked at; `from None` says that there is no bug.
    """
    if not isinstance(error, PocoError):
        return None if is_of_system(error) else error
    cause: BaseException | None = error
    while isinstance(cause, PocoError) or (cause is not None and _package(type(cause).__module__) in LIBRARIES):
        cause = cause.__cause__
    return None if cause is None or isinstance(cause, ABOUT_SURROUNDINGS) or _speaks_of_input(cause) else cause


def summary_of(error: BaseException) -> str:
    """Return kind and text of an error, which are alike in all processes that it stops."""
    if isinstance(error, OtherProcessError) and error.summary is not None:
        return error.summary
    return f"{type(error).__name__}: {error}"


def is_of_system(error: BaseException) -> bool:
    """Return True for an error of the operating system that a user can mend though this library has not foreseen it."""
    return isinstance(error, OSError) and error.errno in OF_THE_SYSTEM


def traceback_of(bug: BaseException) -> str:
    """Return an exception's traceback as Python prints it."""
    return str(bug.args[0]) if isinstance(bug, RemoteBugError) else "".join(traceback.format_exception(bug)).rstrip()


def place_of(error: BaseException) -> str:
    """Return " (file, line, function)" of the innermost call outside of this library, of Python's and of installed
    ones, else of the innermost call."""
    calls = list(_calls(error.__traceback__))
    own = [frame for package, frame in calls if package not in {*PASS_CALLS_ON, __package__}]
    own = [frame for frame in own if "site-packages" not in frame.filename] or [frame for _, frame in calls]
    return f" ({own[-1].filename}, line {own[-1].lineno}, in {own[-1].name})" if own else ""


def _speaks_of_input(error: BaseException) -> bool:
    """Return True if the code that caught an exception met it itself, or the package that it called refuses so."""
    if isinstance(error, AssertionError | NameError | RemoteBugError):
        return False
    calls = [(package, frame) for package, frame in _calls(error.__traceback__) if package not in PASS_CALLS_ON]
    if not calls:
        return False
    caught, (raised, frame) = calls[0][0], calls[-1]
    called = next((package for package, _ in calls if package != caught), caught)
    return raised == caught or (raised == called and (frame.line or "").lstrip().startswith("raise"))


def _calls(entry: TracebackType | None) -> Iterator[tuple[str, traceback.FrameSummary]]:
    """Yield package and place of each call of a traceback, the outermost first."""
    for frame in traceback.extract_tb(entry):
        assert entry is not None
        yield _package(entry.tb_frame.f_globals.get("__name__", "")), frame
        entry = entry.tb_next


def _package(module: str) -> str:
    return "" if module == "builtins" else module.partition(".")[0]
