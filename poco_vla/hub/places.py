"""Folders that people name when they mean a policy: a run, a policy or head in it, a checkpoint, a file."""

from pathlib import Path

from poco_vla.checkpointing import checkpoint
from poco_vla.errors import HubError
from poco_vla.hub.artifact import source_folder
from poco_vla.pretrained.heads import ABOUT
from poco_vla.pretrained.sources import read_object

RESULT = "result.json"


def policy_folder(place: str | Path) -> str | Path:
    """Return the folder of the policy that `place` means; `place` itself where it names no run.

    Args:
        place: a run's folder (its last policy), the folder of a policy or a head, or a Hub id. `~` is the home folder.

    Raises:
        HubError: a file, a checkpoint, or a run that has no policy yet; the message says what to give.
    """
    folder = Path(place).expanduser()
    if folder.is_file():
        raise HubError(f"{folder} is a file: give the folder that it lies in, {folder.parent}")
    if not folder.is_dir():
        return place
    if (folder / RESULT).is_file():
        return source_folder(folder, "last")
    if (folder / ABOUT).is_file() or _is_policy(folder):
        return folder
    if (folder / "state.json").is_file() or folder.name == "checkpoints":
        run = next((above for above in folder.parents if (above / "config.json").is_file()), folder.parent)
        raise HubError(
            f"{folder} is a checkpoint that --resume goes on from, not a policy: give the run's folder, {run}"
            + ("" if (run / RESULT).is_file() else f", once it has ended{_best(run)}")
        )
    if checkpoint.can_resume(folder) or _is_config_of_run(folder):
        raise HubError(
            f"{folder} is a run that has not ended, and has no policy yet: go on with --resume{_best(folder)}"
        )
    return folder


def run_of(place: str | Path) -> Path | None:
    """Return the folder of the finished run that `place` is, or that it lies in; None where there is none."""
    folder = Path(place).expanduser()
    return next((path for path in (folder, folder.parent) if (path / RESULT).is_file()), None)


def _best(run: Path) -> str:
    best = run / "best"
    return f"; {best} is the policy of its best evaluation so far" if (best / "config.json").is_file() else ""


def _is_policy(folder: Path) -> bool:
    file = folder / "config.json"
    return file.is_file() and "type" in read_object(file)


def _is_config_of_run(folder: Path) -> bool:
    file = folder / "config.json"
    return file.is_file() and {"output_dir", "adapter"} <= read_object(file).keys()
