"""The folder of a run: its choice, and files in it that wait for room on the disk."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from poco_vla.checkpointing import checkpoint
from poco_vla.config import TrainConfig
from poco_vla.errors import CheckpointError, ConfigError
from poco_vla.files import wait_for_space, write_json
from poco_vla.learner.broadcast import shared
from poco_vla.progress import Display

EPISODES = "episodes"
"""Dataset of online episodes in a run's folder."""


def runs_of(config: TrainConfig) -> list[Path]:
    """Return the folders of the runs of this seed that `output_dir` stands for, oldest first."""
    root = Path(config.output_dir.anchor)
    pattern = str(config.output_dir.relative_to(root)).replace("{time}", f"*-seed{config.seed}")
    return sorted(path for path in root.glob(pattern) if (path / "config.json").is_file())


def choose_folder(config: TrainConfig, accelerator: Accelerator) -> Path:
    """Return `output_dir` with "{time}" replaced: by start time and seed, the same on all processes; for a resume, by
    those of the newest run of this seed.

    Raises:
        CheckpointError: there is no run to resume.
    """
    if "{time}" not in str(config.output_dir):
        return config.output_dir
    if config.resume:
        runs = runs_of(config)
        if not runs:
            raise CheckpointError(
                f"nothing to resume: no run of seed {config.seed} matches {config.output_dir}; --seed names another"
            )
        return runs[-1]
    seconds = torch.tensor([int(time.time())], device=accelerator.device)
    start = time.strftime("%Y%m%d-%H%M%S", time.localtime(int(shared(seconds))))
    return Path(str(config.output_dir).format(time=f"{start}-seed{config.seed}"))


def refuse_to_overwrite(config: TrainConfig) -> None:
    """Refuse a folder that does not suit the run.

    Raises:
        CheckpointError: a run is to be resumed, and the folder holds no checkpoint.
        ConfigError: a run is to begin, and the folder holds one already.
    """
    folder = config.output_dir
    if config.resume:
        checkpoint.latest(folder / "checkpoints")
    elif (folder / "config.json").exists():
        resumable = checkpoint.can_resume(folder)
        state = "a run. Continue it with --resume" if resumable else "a run that has no checkpoint yet"
        raise ConfigError(f"{folder} already holds {state}, choose another --output-dir, or delete it.")


class RunFolder:
    """Write files of a run. While the disk is full, the run pauses and says so.

    Args:
        path: the folder.
        display: shows that the disk is full.
        give_up: True ends the waiting for room.
    """

    def __init__(self, path: Path, display: Display, give_up: Callable[[], bool]) -> None:
        self.path = path
        self._display, self._give_up = display, give_up

    @property
    def episodes(self) -> Path:
        """Return the folder of the dataset of online episodes."""
        return self.path / EPISODES

    def write[T](self, what: str, write: Callable[[], T]) -> T:
        """Return what `write` returns, which is called again and again until there is room for it.

        Raises:
            PocoError: `give_up`; what was not written is lost.
        """
        return wait_for_space(write, what=what, where=self.path, tell=self._display.say, give_up=self._give_up)

    def write_json(self, name: str, values: Any) -> None:
        """Write a JSON file."""
        self.write(name, lambda: write_json(self.path / name, values))
