"""What a person at the robot sees: a header, one live line, and a line for each episode that is over."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from poco_vla.robots.episode import EpisodeStats, Sent

_SHOWN = {"env_steps": "steps", "updates": "updates", "episodes": "episodes"}
"""Numbers of the learner's status that are shown, and what they are called."""


class View:
    """Calm output for one session. Where it is no terminal there is no live line; only a wait is then said, once.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._line: Callable[[], Text] = Text
        self._shown_text = self._learner = ""
        self._episode: tuple[int, int, int | float] = (0, 0, 1)
        self._live = Live(
            get_renderable=self._render,
            console=console,
            refresh_per_second=5,
            transient=True,
            auto_refresh=True,
        )

    def __enter__(self) -> "View":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._line = Text
        self._live.stop()

    def header(self, rows: Mapping[str, str]) -> None:
        """Print the robot, the learner, and the keys."""
        table = Table.grid(padding=(0, 2))
        for name, text in rows.items():
            table.add_row(Text(name, style="dim"), Text(text))
        self.console.print(Text("poco-vla robot", style="bold"))
        self.console.print(table)
        self.console.print()

    def say(self, text: str, style: str = "") -> None:
        """Print a line."""
        self.console.print(Text(text, style=style))

    def note(self, text: str, style: str = "") -> None:
        """Set the live line."""
        self._line = lambda: Text(text, style)

    def learner(self, status: Mapping[str, Any]) -> None:
        """Set the status of training, shown in grey behind the live line."""
        self._learner = learner_words(status)

    def waiting(self, status: Mapping[str, Any]) -> None:
        """Show that the learner lets no episode begin."""
        text = f"the robot rests: {status.get('note') or 'waiting for the learner'}"
        self.note(text)
        if not self.console.is_terminal and text != self._shown_text:
            self.say(text)
        self._shown_text = text

    def begin(self, number: int, max_steps: int, fps: int | float) -> None:
        """Show that an episode is about to begin: the robot may have to be put back first."""
        self._episode = number, max_steps, fps

    def step(self, sent: Sent) -> None:
        """Show a finished control step."""
        self._line = lambda: _episode_line(*self._episode, sent)

    def _render(self) -> Text:
        line = Text(no_wrap=True, overflow="ellipsis").append_text(self._line())
        return line.append(f"   {self._learner}" if line and self._learner else "", "dim")

    def finished(self, number: int, stats: EpisodeStats, version: int, fate: str, rate: tuple[int, float]) -> None:
        """Print a finished episode that was kept; `rate` is the number of recent episodes and the share of these that
        succeed."""
        style = {"success": "green", "failure": "yellow"}.get(stats.ending.value, "")
        details = [f"{stats.steps} steps", f"weights {version:,}" if version >= 0 else "", _unusual_counts(stats), fate]
        words = ", ".join(filter(None, details))
        count, success = rate
        line = Text.assemble(f"episode {number}: ", (stats.ending.value, f"bold {style}"), f", {words}; ")
        self.console.print(line.append(f"success of the last {count}: {success:.0%}".replace("%", " %"), style="dim"))

    def dropped(self, number: int, stats: EpisodeStats) -> None:
        """Print a finished episode that is not kept."""
        self.say(f"episode {number}: {stats.ending.value} after {stats.steps} steps, not kept", "dim")


def learner_words(status: Mapping[str, Any]) -> str:
    """Return a learner's status as text."""
    words = [f"{status[key]:,} {name}" for key, name in _SHOWN.items() if isinstance(status.get(key), int | float)]
    if isinstance(total := status.get("online_steps"), int | float) and words:
        words[0] += f" of {total:,}"
    if isinstance(refused := status.get("set_aside"), int | float) and refused:
        words.append(f"{refused:,} set aside")
    if rate := status.get("success"):
        words.append(f"success {rate}")
    return ", ".join(words)


@contextmanager
def log_lines(view: View, silent: str) -> Iterator[None]:
    """Print log records as lines of the view within this context, so that they do not overwrite its live line; only
    errors of the logger `silent`."""
    root, handler = logging.getLogger(), _Lines(view)
    handler.addFilter(lambda record: record.name != silent or record.levelno >= logging.ERROR)
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = root.handlers
    root.handlers = list[logging.Handler]([handler])
    try:
        yield
    finally:
        root.handlers = before


class _Lines(logging.Handler):
    def __init__(self, view: View) -> None:
        super().__init__(logging.WARNING)
        self._view = view

    def emit(self, record: logging.LogRecord) -> None:
        self._view.say(self.format(record), "red" if record.levelno >= logging.ERROR else "yellow")


def _episode_line(number: int, max_steps: int, fps: int | float, sent: Sent) -> Text:
    left = f"{(max_steps - sent.steps) / fps:.1f} s left"
    words = [f"step {sent.steps} of {max_steps}", left, f"missed {sent.missed}", f"weights {sent.weights_version:,}"]
    who = (" you drive ", "black on yellow") if sent.intervention else ""
    return Text.assemble((f"episode {number}  ", "bold"), "   ".join(words), "  ", who)


def _unusual_counts(stats: EpisodeStats) -> str:
    """Return the counts that are unusual in an episode, as text."""
    found = {"by hand": stats.interventions, "missed": stats.missed, "late": stats.overruns}
    return ", ".join(f"{count} {name}" for name, count in found.items() if count)
