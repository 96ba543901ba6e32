"""Show an error that the user can mend as one line, and end with its exit status."""

import errno
import signal
import sys
from typing import NoReturn

from rich.console import Console
from rich.text import Text

from poco_vla.errors import PocoError
from poco_vla.files import is_out_of_space
from poco_vla.terminal import SafeConsole, first_to_say, format_logs_safely

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
OF_THE_SYSTEM = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.EMFILE),
    *(errno.ENFILE, errno.ENOMEM, errno.ENAMETOOLONG, errno.ELOOP),
}
"""Errors of the operating system that a user can mend: rights, space, limits, a file where a folder belongs."""


def guarded(work: object) -> None:
    """Run, and turn what a user can mend into one line on stderr, which one process of a launch writes."""
    format_logs_safely("%(levelname)s %(name)s: %(message)s")
    assert callable(work)
    # A launcher that waits for its children ignores Ctrl-C, and they inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work()
    except PocoError as error:
        _refuse(type(error).__name__, str(error))
    except Exception as error:  # every library wraps a full disk in its own
        if is_out_of_space(error):
            _refuse("the disk is full, or your share of it", f"{error}. Make room, then try again")
        if not (isinstance(error, OSError) and error.errno in OF_THE_SYSTEM):
            raise
        _refuse(type(error).__name__, f"{error.strerror}{f': {error.filename}' if error.filename else ''}")
    except KeyboardInterrupt as stop:
        error_console().print(str(stop) or "interrupted")
        sys.exit(INTERRUPTED)


def _refuse(kind: str, message: str) -> NoReturn:
    """End with status 1, and the message unless another process of this launch has written it."""
    if first_to_say(message):
        error_console().print(Text.assemble((kind, "bold red"), f": {message}"))
    sys.exit(1)


def error_console() -> Console:
    return SafeConsole(stderr=True)
