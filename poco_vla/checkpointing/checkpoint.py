"""Save and resume: everything that the next update depends on, as safetensors and JSON, whole or not at all.

A checkpoint is a folder ``checkpoints/<update>``:

    weights.safetensors    what trains (head or LoRA), critic, target critic, zeta, beta
    optimizer.safetensors  Adam's moments and step counts
    statistics.safetensors what the policy normalises by, and the dataset's statistics that it was built from
    random.safetensors     states of torch generators; chunks of the running episodes
    state.json             stage, step counts, numpy generators, seeds of the running episodes, recorded parts, and
                           size and checksum of the other files
    config.json            the run's configuration
    good_head.safetensors  the head that the collapse guard would go back to, and networks that act beside the policy

The frozen backbone is not in it: the base model is loaded again.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from poco_vla.config import TrainConfig, differences, from_json, to_json
from poco_vla.errors import CheckpointError
from poco_vla.files import atomic_file, discard_partial, recover_folders, replace_folder, write_json
from poco_vla.locks import LOCK, FolderLock, HeldError
from poco_vla.roles import role_of
from poco_vla.types import ChunkBatch

GOOD_HEAD = "good_head.safetensors"
SET_ASIDE = "checkpoints.set_aside"
"""Folder of a run that damaged checkpoints are moved to."""
BLOCK = 1 << 24
"""Bytes of a file that are read at once."""
STATISTICS = "statistics.safetensors"


def save(
    root: Path,
    update: int,
    *,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    config: TrainConfig,
    head: Path | None = None,
    keep: int = 2,
    keep_every: int = 0,
    statistics: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write checkpoint `update` under `root`, and drop all but the newest `keep` and the first one after every
    `keep_every` updates (0: none).

    Args:
        head: file of `save_good_head` that belongs to it; both names share its bytes where the file system can.
        statistics: see :func:`load_statistics`.
    """
    final = root / f"{update:08d}"
    partial = root / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file(_contiguous(weights), partial / "weights.safetensors")
        moments, groups = _flatten_optimizer(optimizer)
        save_file(moments, partial / "optimizer.safetensors")
        save_file(_contiguous(tensors), partial / "random.safetensors")
        save_file(_contiguous(statistics or {}), partial / STATISTICS)
        if head is not None and head.exists():
            _link(head, partial / GOOD_HEAD)
        sums = {path.name: _checksum(path) for path in sorted(partial.glob("*.safetensors"))}
        write_json(partial / "state.json", {**state, "optimizer_groups": groups, "files": sums})
        write_json(partial / "config.json", to_json(config))
        replace_folder(partial, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {final} could not be written: {error}. Earlier checkpoints are intact."
        ) from error
    for old in _superfluous(sorted(root.glob("[0-9]*")), keep, keep_every):
        shutil.rmtree(old)
    return final


def _checksum(path: Path) -> dict[str, int]:
    """Return size in bytes and CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return {"bytes": path.stat().st_size, "crc32": crc}


def _link(path: Path, name: Path) -> None:
    try:
        name.hardlink_to(path)
    except OSError:  # a file system without links
        shutil.copyfile(path, name)


def _superfluous(found: Sequence[Path], keep: int, keep_every: int) -> list[Path]:
    """Return the checkpoints that nobody asked to keep, oldest first."""
    milestones = [int(path.name) // keep_every if keep_every else 0 for path in found]
    return [path for i, path in enumerate(found[:-keep]) if milestones[i] == (milestones[i - 1] if i else 0)]


def latest(root: Path) -> Path:
    """The newest checkpoint under `root`.

    Raises:
        CheckpointError: there is none.
    """
    return available(root)[-1]


def available(root: Path) -> list[Path]:
    """Return all checkpoints under `root`, oldest first. One whose replacement was cut short is put back.

    Raises:
        CheckpointError: there is none.
    """
    recover_folders(root)
    found = sorted(root.glob("[0-9]*"))
    if not found:
        raise CheckpointError(f"nothing to resume: no checkpoint in {root}. Run without --resume to start.")
    return found


def can_resume(folder: Path) -> bool:
    """True if a run's folder holds a checkpoint."""
    return any(any((folder / "checkpoints").glob(pattern)) for pattern in ("[0-9]*", ".[0-9]*.old"))


class DamagedError(CheckpointError):
    """A checkpoint with a file that is missing, cut short, emptied or not what was written."""


type Loaded = tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor], dict[str, Any]]


def load(path: Path, config: TrainConfig) -> Loaded:
    """Weights, optimizer state, tensors and state of a checkpoint.

    Raises:
        DamagedError: a file is missing or damaged.
        CheckpointError: the run had another configuration (differences are listed).
    """
    try:
        old = from_json(TrainConfig, _read_json(path / "config.json"))
        state = _read_json(path / "state.json")
        _check_files(path, state.pop("files", {}))
        weights = load_file(path / "weights.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        tensors = load_file(path / "random.safetensors")
        groups = state.pop("optimizer_groups")
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError, KeyError) as error:
        raise DamagedError(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from error
    if not moments and weights and any(group.get("params") for group in groups) and _updates(state):
        raise DamagedError(f"checkpoint {path} is damaged: optimizer.safetensors is empty")
    if bad := next((name for name, tensor in weights.items() if not _is_finite(tensor)), None):
        raise DamagedError(f"checkpoint {path} holds weights that are NaN or infinite, in {bad}")
    free = {"free", "same data"} if "data" in state else {"free"}  # the run compares a digest of the demonstrations
    changed = [d for d in differences(old, config) if role_of(TrainConfig, d.split(":")[0]).resume not in free]
    if changed:
        listed = "\n  ".join(changed)
        raise CheckpointError(
            f"{path} belongs to a run of another configuration (saved -> now):\n  {listed}\n"
            "Resume with the same values, or choose another output_dir."
        )
    return weights, _unflatten_optimizer(moments, groups), tensors, state


def load_newest(
    root: Path, config: TrainConfig, tell: Callable[[str], None], needed: Sequence[str] = ()
) -> tuple[Path, Loaded]:
    """Load the newest checkpoint under `root` that is whole; `tell` is told where a newer one is not. `needed` are
    names that its state must have.

    Raises:
        DamagedError: none is.
        CheckpointError: there is none, or the run had another configuration.
    """
    first: DamagedError | None = None
    for path in reversed(available(root)):
        try:
            loaded = load(path, config)
            _check_state(path, loaded[3], needed)
        except DamagedError as error:
            first = first or error
            continue
        if first is not None:
            tell(f"{first}. Going on from the checkpoint before, {path}.")
        return path, loaded
    assert first is not None
    raise first


def set_newer_aside(path: Path) -> None:
    """Move checkpoints newer than `path`, which are damaged, to where no run looks for them."""
    aside = path.parent.with_name(SET_ASIDE)
    for newer in (found for found in available(path.parent) if found.name > path.name):
        aside.mkdir(exist_ok=True)
        shutil.rmtree(aside / newer.name, ignore_errors=True)
        newer.rename(aside / newer.name)


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object. Raises KeyError for any other value."""
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise KeyError(f"{path.name} holds no JSON object")
    return found


def _check_files(path: Path, sums: Mapping[str, Mapping[str, int]]) -> None:
    """Compare a checkpoint's files with what was noted when they were written (nothing, in one of an older version)."""
    for name, noted in sums.items():
        size = (path / name).stat().st_size
        if size != noted["bytes"]:
            raise DamagedError(f"checkpoint {path} is damaged: {name} has {size} bytes, {noted['bytes']} were written")
        if _checksum(path / name) != noted:
            raise DamagedError(
                f"checkpoint {path} is damaged: {name} is not what was written (its checksum differs; who has changed "
                'it on purpose removes its entry from "files" in state.json)'
            )


def _check_state(path: Path, state: Mapping[str, Any], needed: Sequence[str]) -> None:
    if missing := [name for name in needed if name not in state]:
        raise DamagedError(f"checkpoint {path} is damaged: state.json lacks {', '.join(missing)}")


def _updates(state: Mapping[str, Any]) -> int:
    progress = state.get("progress")
    return progress.get("update", 0) if isinstance(progress, Mapping) else 0


def load_statistics(path: Path) -> dict[str, Tensor]:
    """Return the statistics that a checkpoint's run normalises by; none where an older version wrote it.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = path / STATISTICS
    try:
        return load_file(file) if file.exists() else {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__}: {error}") from error


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of `module` (a Poco), each once, without what is frozen in its policy."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad or not name.startswith("policy.")}
    buffers = {name: buffer for name, buffer in module.named_buffers() if not name.startswith("policy.")}
    return parameters | buffers


def load_trainable_state(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put :func:`trainable_state` back.

    Raises:
        CheckpointError: names or shapes differ; they are listed.
    """
    own = trainable_state(module)
    wrong = sorted(own.keys() ^ weights.keys()) + [
        f"{name} {tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(own.keys() & weights.keys())
        if own[name].shape != weights[name].shape
    ]
    if wrong:
        raise CheckpointError(f"the checkpoint's weights do not fit this model: {'; '.join(wrong[:8])}")
    module.load_state_dict(weights, strict=False)


def save_batch(folder: Path, batch: ChunkBatch, rank: int) -> Path:
    """Keep a batch whose loss is not finite, to be looked at; never raises, since an error is on its way already."""
    path = folder / f"nonfinite_batch_{rank}.safetensors"
    tensors: dict[str, Tensor] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Mapping):
            tensors |= {f"{field.name}.{key}": one for key, one in value.items()}
        elif isinstance(value, Tensor):
            tensors[field.name] = value
        elif value is not None:
            tensors[f"{field.name}.features"] = value.features
    with suppress(OSError, SafetensorError), atomic_file(path) as partial:
        save_file(_contiguous(tensors), partial)
    return path


def save_good_head(folder: Path, head: Mapping[str, Tensor]) -> None:
    """Keep the parameters of a head in a run's folder, whole or not at all. The file that was there stays as it was
    under the names that checkpoints gave it.

    Raises:
        CheckpointError: they cannot be written.
    """
    try:
        with atomic_file(folder / GOOD_HEAD) as partial:
            save_file(_contiguous(head), partial)
    except OSError as error:
        raise CheckpointError(f"{folder / GOOD_HEAD} could not be written: {error}") from error


def load_good_head(folder: Path) -> dict[str, Tensor]:
    """The head in a run's folder or in a checkpoint; nothing where there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / GOOD_HEAD
    try:
        head = load_file(path) if path.exists() else {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if bad := next((name for name, tensor in head.items() if not _is_finite(tensor)), None):
        raise CheckpointError(f"{path} holds weights that are NaN or infinite, in {bad}")
    return head


def _is_finite(weights: Tensor) -> bool:
    """Return True for weights that can be gone on with. A single number may be NaN: zeta, until it is calibrated."""
    return weights.ndim == 0 or not weights.is_floating_point() or bool(torch.isfinite(weights).all())


def remove_unused_folder(path: Path) -> None:
    """Remove a run's folder if it holds nothing but its lock file, as after a start that failed."""
    with suppress(OSError):
        if {file.name for file in path.iterdir()} <= {LOCK}:
            (path / LOCK).unlink(missing_ok=True)
            path.rmdir()


def claim_folder(path: Path, *, lock: bool = True) -> FolderLock:
    """Make sure that a run can write in `path`, and is alone in it, before any long work. What a run that was killed
    left half written there is put in order.

    Args:
        path: the run's folder.
        lock: take the folder's lock, which the kernel gives back when the process ends in whatever way. Of several
            processes of one run the main one does.

    Raises:
        CheckpointError: it cannot, or another run is at work there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"cannot write in output_dir {path}: {error.strerror or error}. Choose another."
        ) from error
    own = FolderLock(path)
    if not lock:
        return own
    try:
        own.acquire()
    except HeldError as error:
        raise CheckpointError(
            f"another process is training in {path} ({error}). Wait for it, stop it (it saves first), or choose "
            "another output_dir."
        ) from error
    for folder in (path, path / "checkpoints"):
        recover_folders(folder)
        discard_partial(folder)
    return own


def discard_folder(path: Path) -> None:
    """Remove the folder of a run that ended before its first checkpoint, if there is one.

    Raises:
        CheckpointError: it holds a checkpoint or a result, cannot be removed, or a run is at work there.
    """
    if not path.exists():
        return
    claim_folder(path).release()
    if (path / "result.json").exists() or can_resume(path):
        raise CheckpointError(f"{path} holds a run that can be continued; nothing was removed")
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be removed: {error.strerror or error}") from error


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    moments = {
        f"{index}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for index, entry in state["state"].items()
        for name, value in entry.items()
    }
    return moments, state["param_groups"]


def _unflatten_optimizer(moments: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": groups}
