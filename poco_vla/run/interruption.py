"""Requests to stop a run: signals, a launcher that is gone, simulators that fail again and again."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor

from poco_vla.errors import SimulatorError
from poco_vla.learner.parent import ParentWatch
from poco_vla.progress import Display


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after everything was saved.

    Attributes:
        checkpoint: folder of the checkpoint.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"interrupted; saved in {checkpoint}. Continue with --resume.")
        self.checkpoint = checkpoint


class Interruption:
    """Note a request to stop; the loop obeys it after the current update, on all processes together.

    Args:
        accelerator: its processes.
        display: shows that the run stops.

    Attributes:
        requested: the run is to stop after the current update.
        failure: the error of the simulators that stops it, None otherwise.
    """

    def __init__(self, accelerator: Accelerator, display: Display) -> None:
        self.requested = False
        self.failure: SimulatorError | None = None
        self._accelerator, self._display = accelerator, display

    def is_requested(self) -> bool:
        """Return True if the run is to stop; nobody waits for a disk or a simulator any more."""
        return self.requested

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Let the first Ctrl-C or SIGTERM, or the end of the launcher, request a stop; a second Ctrl-C is Python's."""
        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # a terminal that is closed; nohup ignores it
            signals.append(signal.SIGHUP)
        old = {number: signal.signal(number, self._on_signal) for number in signals}
        try:
            with ParentWatch(self._on_orphaned):
                yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextmanager
    def simulators(self) -> Iterator[None]:
        """Let simulators that fail again and again within this block stop the run with a checkpoint."""
        try:
            yield
        except SimulatorError as error:
            self.failure, self.requested = error, True

    def anywhere(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag True if it is set on one of the processes, which call this together: a signal may reach
        them on different sides of an update."""
        if self._accelerator.num_processes == 1:
            return flags
        total = self.count(torch.tensor(flags, dtype=torch.float32, device=self._accelerator.device))
        return tuple(bool(count > 0) for count in total.tolist())

    def count(self, flags: Tensor) -> Tensor:
        """Return on how many processes each flag is set."""
        total = self._accelerator.reduce(flags, "sum") if self._accelerator.num_processes > 1 else flags
        assert isinstance(total, Tensor)
        return total

    def end(self, path: Path) -> NoReturn:
        """End the run, which is saved in `path`.

        Raises:
            SimulatorError: the simulators have failed.
            Interrupted: otherwise.
        """
        if self.failure is not None:
            raise SimulatorError(
                f"{self.failure}. The run is saved in {path}; continue with --resume."
            ) from self.failure.__cause__
        raise Interrupted(path)

    def _on_signal(self, signum: int, _: Any) -> None:
        if not self.requested:  # launchers and clusters send it more than once
            self._display.say("stopping after this update; press Ctrl-C again to stop at once without saving")
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _on_orphaned(self, launcher: int) -> None:
        """End as after Ctrl-C, since the launcher is gone. Called in another thread."""
        self._display.say(f"the launcher (process {launcher}) is gone: saving, then stopping")
        self.requested = True
