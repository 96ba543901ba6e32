"""What a person sees while a run goes on: one live bar per stage, and plain lines where there is no terminal."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from poco_vla.terminal import SafeConsole


class _LastingConsole(SafeConsole):
    """A console whose reader may leave: a run is not ended by a pipe or a terminal that is gone."""

    def on_broken_pipe(self) -> None:
        self.quiet = True

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError:  # a terminal that was closed, a full disk behind `> log`
            self.quiet = True


class _RunClock(ProgressColumn):
    """The time of the lines above the bar.

    Args:
        display: prints those lines.
    """

    def __init__(self, display: "Display") -> None:
        super().__init__()
        self._display = display

    def render(self, task: Task) -> Text:
        return Text(self._display.clock(), "dim")


class Display:
    """Stage, bar with the time left, and the scalars that say how learning goes. Silent when not `enabled`.

    Args:
        enabled: only the main process shows anything.
        interval: seconds between plain lines where the output is no terminal.
    """

    def __init__(self, *, enabled: bool = True, interval: float = 10.0) -> None:
        self.console = _LastingConsole(quiet=not enabled)
        self.interval = interval
        self._started = time.monotonic()

    def clock(self) -> str:
        """Return the time since the start as h:mm:ss."""
        return str(timedelta(seconds=int(time.monotonic() - self._started)))

    def say(self, text: str) -> None:
        """Print one line that stays, with the time since the start. The text is shown as it is: no markup."""
        self.console.print(Text.assemble((self.clock(), "dim"), "  ", text))

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator["Bar"]:
        """A bar for `total` steps, `done` of which lie behind."""
        progress = Progress(
            TextColumn("{task.description:<20}", style="bold", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            _RunClock(self),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        # The scalars have a line of their own below the bar, so that neither crowds the other out.
        scalars = Text(style="dim", overflow="ellipsis", no_wrap=True)
        bar = Bar(self, progress, scalars, name, total, done)
        if self.console.is_terminal:
            with Live(Group(progress, scalars), console=self.console, refresh_per_second=4):
                yield bar
        else:
            yield bar
        bar.close()


class Bar:
    """The bar of one stage."""

    def __init__(self, display: Display, progress: Progress, scalars: Text, name: str, total: int, done: int) -> None:
        self._display, self._progress, self._scalars = display, progress, scalars
        self._name, self._total, self.done = name, total, done
        self._shown = time.monotonic()
        self._task = progress.add_task(name, total=total, completed=done)

    def advance(self, steps: int = 1) -> None:
        """`steps` more are done."""
        self.to(self.done + steps)

    def to(self, done: int) -> None:
        """`done` steps are done."""
        self.done = done
        self._progress.update(self._task, completed=done)
        if not self._display.console.is_terminal and time.monotonic() - self._shown > self._display.interval:
            self._plain()

    def of(self, done: int, total: int | None) -> None:
        """`done` steps of `total` are done, where that is known by now only."""
        if total is not None and total != self._total:
            self._total = total
            self._progress.update(self._task, total=total)
        self.to(done)

    def note(self, scalars: Mapping[str, float | str]) -> None:
        """Scalars shown below the bar."""
        words = (f"{k} {v if isinstance(v, str) else format(v, '.3g')}" for k, v in scalars.items())
        self._scalars.plain = "  ".join(words)

    def close(self) -> None:
        """The stage is over."""
        if not self._display.console.is_terminal:
            self._plain()

    def _plain(self) -> None:
        self._shown = time.monotonic()
        self._display.say(f"{self._name}: {self.done}/{self._total}  {self._scalars.plain}")
