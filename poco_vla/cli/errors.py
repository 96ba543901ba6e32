"""Show an error that the user can mend as one line, and end with its exit status."""

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import NoReturn

from rich.console import Console
from rich.text import Text

from poco_vla.bugs import bug_behind, is_of_system, summary_of, traceback_of
from poco_vla.errors import PocoError
from poco_vla.files import is_out_of_space
from poco_vla.terminal import SafeConsole, first_to_say, format_logs_safely

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def guarded(work: object) -> None:
    """Run, and turn what a user can mend into one line on stderr. A bug keeps its traceback, above that line where this
    library has one to say. Of several processes of a launch with the same error, one shows it."""
    format_logs_safely("%(levelname)s %(name)s: %(message)s")
    assert callable(work)
    # A launcher that waits for its children ignores Ctrl-C, and they inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work()
    except PocoError as error:
        _refuse(error, type(error).__name__, str(error))
    except Exception as error:  # every library wraps a full disk in its own
        if is_out_of_space(error):
            _refuse(error, "the disk is full, or your share of it", f"{error}. Make room, then try again")
        if isinstance(error, OSError) and is_of_system(error):
            _refuse(error, type(error).__name__, f"{error.strerror}{f': {error.filename}' if error.filename else ''}")
        if first_to_say(summary_of(error)):
            raise
        sys.exit(1)
    except KeyboardInterrupt as stop:
        if first_to_say(str(stop)):
            error_console().print(str(stop) or "interrupted")
        sys.exit(INTERRUPTED)


@contextmanager
def shown_once() -> Iterator[None]:
    """Let one process of a launch show what a parser prints within this block, an error or a help text."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    text = io.StringIO()
    try:
        with redirect_stdout(text), redirect_stderr(text):
            yield
    finally:
        if text.getvalue() and first_to_say(text.getvalue()):
            sys.stderr.write(text.getvalue())
            sys.stderr.flush()


def _refuse(error: Exception, kind: str, message: str) -> NoReturn:
    """End with status 1, and the message unless another process of this launch has written it."""
    if first_to_say(summary_of(error)):
        if isinstance(error, PocoError) and (bug := bug_behind(error)) is not None:
            error_console().print(f"{traceback_of(bug)}\n")
        error_console().print(Text.assemble((kind, "bold red"), f": {message}"))
    sys.exit(1)


def error_console() -> Console:
    return SafeConsole(stderr=True)
