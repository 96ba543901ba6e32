"""Checkpoints of a run: one list of named parts, saved and loaded in its order."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from poco_vla.checkpointing import checkpoint
from poco_vla.checkpointing.schedule import CheckpointClock
from poco_vla.run.context import RunContext

NEEDED = ("progress", "batches", "acting", "base_version", "guard", "logbook")
"""Parts that state.json must hold; older versions wrote no others."""
OWN_FILE = ("weights", "optimizer", "statistics")
"""Parts whose whole state lies in a file of its own."""
WITH_TENSORS = ("draws", "acting", "rollouts")
"""Parts whose state holds tensors, by names that are unique among them; these lie in random.safetensors."""


@runtime_checkable
class Part(Protocol):
    """Something whose state the next update depends on."""

    def state(self) -> Any:
        """Return all that `load` needs: values for JSON, tensors for the parts that have some; {} where a checkpoint
        needs nothing of it. All processes call this together."""

    def load(self, state: Any) -> None:
        """Go on from a checkpoint's state; None where an older version noted nothing."""


class Checkpoints:
    """Save and load the parts of a run.

    Args:
        context: of the run; its main process writes.
        parts: by name, in the order in which they are loaded.

    Attributes:
        clock: tells when a checkpoint by time is due.
        saved: update of the newest checkpoint.
    """

    def __init__(self, context: RunContext, parts: Mapping[str, Part]) -> None:
        self.config, self.accelerator, self.progress = context.config, context.accelerator, context.progress
        self.folder, self.display, self.parts = context.folder, context.display, parts
        self.clock = CheckpointClock(context.config.checkpoint_minutes)
        self.saved = 0

    @property
    def root(self) -> Path:
        """Return the folder of all checkpoints."""
        return self.folder.path / "checkpoints"

    @property
    def is_due_by_time(self) -> bool:
        """Return True on the main process if so many minutes have gone by."""
        return self.accelerator.is_main_process and self.clock.is_due()

    @property
    def path(self) -> Path:
        """Return the folder of the newest checkpoint."""
        return self.root / f"{self.saved:08d}"

    def is_due(self, *, by_time: bool) -> bool:
        """Return True if a checkpoint is due by the number of updates, or `by_time`."""
        every, update = self.config.checkpoint_every, self.progress.update
        return (bool(every) and update // every != self.saved // every) or (by_time and update != self.saved)

    def save(self) -> None:
        """Write a checkpoint. Call it where a synchronous interaction has no chunk in flight; all processes call this
        together."""
        self.clock.began()
        self.saved = self.progress.update
        states = {name: part.state() for name, part in self.parts.items()}
        if self.accelerator.is_main_process:
            self.folder.write(f"checkpoint {self.path.name}", partial(self._write, states))
        self.accelerator.wait_for_everyone()
        self.clock.ended()

    def resume(self) -> None:
        """Load the newest checkpoint that is whole.

        Raises:
            CheckpointError: there is none, or it does not fit the run.
        """
        path, loaded = checkpoint.load_newest(self.root, self.config, self.display.say, NEEDED)
        weights, optimizer, tensors, values = loaded
        self.accelerator.wait_for_everyone()  # all have read
        if self.accelerator.is_main_process:
            checkpoint.set_newer_aside(path)
        states: dict[str, Any] = {
            **values,
            **{name: {**values.get(name, {}), **tensors} for name in WITH_TENSORS},
            "weights": weights,
            "optimizer": optimizer,
            "good_head": checkpoint.load_good_head(path),
        }
        for name, part in self.parts.items():
            part.load(states.get(name))
        self.saved = self.progress.update
        self.display.say(f"resumed from {path}: stage {self.progress.stage}, update {self.progress.update}")

    def _write(self, states: Mapping[str, Any]) -> None:
        tensors: dict[str, Tensor] = {}
        values = {name: state for name, state in states.items() if name not in OWN_FILE}
        for name in filter(values.__contains__, WITH_TENSORS):
            found = {key: value for key, value in values[name].items() if isinstance(value, Tensor)}
            values[name] = {key: value for key, value in values[name].items() if key not in found}
            tensors |= found
        if lost := [name for name, state in values.items() if _holds_tensors(state)]:
            raise TypeError(f"the state of {', '.join(lost)} holds tensors: name it in WITH_TENSORS")
        values = {name: state for name, state in values.items() if state != {} or name in NEEDED}
        checkpoint.save(
            self.root,
            self.saved,
            weights=states["weights"],
            optimizer=states["optimizer"],
            tensors=tensors,
            state=values,
            config=self.config,
            head=self.folder.path / checkpoint.GOOD_HEAD,
            keep_every=self.config.checkpoint_keep_every,
            statistics=states["statistics"],
        )


def _holds_tensors(state: Any) -> bool:
    """Return True if a tensor is anywhere in a state, where JSON would keep its first digits as text."""
    inner = state.values() if isinstance(state, Mapping) else state if isinstance(state, list | tuple) else ()
    return isinstance(state, Tensor) or any(map(_holds_tensors, inner))
