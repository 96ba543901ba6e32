"""Services that all parts of a run share."""

from dataclasses import dataclass

from accelerate import Accelerator

from poco_vla.checkpointing.progress import Progress
from poco_vla.config import TrainConfig
from poco_vla.progress import Display
from poco_vla.run.folder import RunFolder
from poco_vla.run.interruption import Interruption
from poco_vla.run.logbook import Logbook


@dataclass(frozen=True)
class RunContext:
    """Hold what every part of a run may use.

    Attributes:
        config: with the run's own folder and precision.
        accelerator: Accelerate's, of this process.
        display: the live view.
        folder: writes the run's files.
        interruption: requests to stop.
        progress: how far the run is.
        logbook: its .jsonl files and trackers.
    """

    config: TrainConfig
    accelerator: Accelerator
    display: Display
    folder: RunFolder
    interruption: Interruption
    progress: Progress
    logbook: Logbook
