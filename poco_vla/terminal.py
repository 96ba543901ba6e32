"""Console and log format that show control characters as escapes."""

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from poco_vla.errors import printable


class SafeConsole(Console):
    """Rich's console without interpretation of what it is given: texts are no markup unless `print(..., markup=True)`
    says so, and control characters in them are shown as escapes.

    Names of tasks, adapters and files come from files and from the network.
    """

    def __init__(self, **options: Any) -> None:
        # A path that is broken into lines cannot be copied.
        settings: dict[str, Any] = {"highlight": False, "soft_wrap": True, "markup": False, "emoji": False}
        super().__init__(**(settings | options))

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text = printable(segment.text)
            yield segment if segment.control or text == segment.text else Segment(text, segment.style)


def first_to_say(message: str, seconds: float = 60.0) -> bool:
    """Return True in one of the processes of a launch on this machine; True where there is one process alone.

    Args:
        message: what all of them may have to say.
        seconds: time after which the same launch may say it again.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    launch = f"{os.environ.get('MASTER_PORT', '')} {os.getppid()} {message}"
    mark = Path(tempfile.gettempdir()) / f"poco_vla_said_{hashlib.sha256(launch.encode()).hexdigest()[:24]}"
    try:
        if time.time() - mark.stat().st_mtime > seconds:
            mark.unlink()
    except FileNotFoundError:
        pass
    try:
        mark.touch(exist_ok=False)
    except OSError:
        return not mark.exists()
    return True


class SafeFormatter(logging.Formatter):
    """Log lines with control characters shown as escapes."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def format_logs_safely(format: str) -> None:
    """Send log records to the standard error stream through :class:`SafeFormatter`, where nothing is set up yet."""
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(SafeFormatter(format))
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
