"""The live table of a comparison: how far each run is."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from rich.live import Live
from rich.table import Table

from poco_vla.comparison.schedule import Schedule
from poco_vla.terminal import SafeConsole

WIDTH = 20
"""Letters of a bar."""


class ProgressTable:
    """Show a schedule: on a terminal as a table that is drawn anew, elsewhere as a line now and then.

    Args:
        console: where.
        interval: seconds between plain lines.
    """

    def __init__(self, console: SafeConsole, interval: float = 60.0) -> None:
        self.console, self.interval = console, interval
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._said = time.monotonic()

    def shown(self) -> AbstractContextManager[object]:
        """Return the context within which the table stands."""
        return nullcontext() if self._live is None else self._live

    def show(self, schedule: Schedule) -> None:
        """Show how far the runs are now."""
        if self._live is not None:
            self._live.update(table_of(schedule), refresh=True)
        elif time.monotonic() - self._said > self.interval:
            self._said = time.monotonic()
            running = [m for m, state in schedule.states.items() if state == "runs"]
            done = sum(state == "is done" for state in schedule.states.values())
            parts = [f"{m.label} {stage} {steps:,}/{m.steps:,}" for m in running for stage, steps, _ in [m.progress()]]
            self.console.print(f"{done} of {len(schedule.members)} runs are done; {'; '.join(parts)}")


def table_of(schedule: Schedule) -> Table:
    """Return the table of a schedule's runs."""
    table = Table(box=None, pad_edge=False)
    for name, right in (("run", False), ("seed", True), ("", False), ("steps", True), ("success", True), ("", False)):
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for member in schedule.members:
        state = schedule.states[member]
        stage, steps, rate = member.progress() if state != "waits" else ("", 0, None)
        share = 1.0 if state == "is done" else min(1.0, steps / max(1, member.steps))
        bar = "█" * round(WIDTH * share) + "·" * (WIDTH - round(WIDTH * share))
        success = "" if rate is None else f"{rate:.0%}"
        said = stage if state == "runs" else state
        table.add_row(member.name, str(member.seed), bar, f"{steps:,}/{member.steps:,}", success, said)
    return table


def clocked(say: Callable[[str], None]) -> Callable[[str], None]:
    """Return a function that says a line after the time of day."""
    return lambda text: say(f"{time.strftime('%H:%M:%S')}  {text}")
