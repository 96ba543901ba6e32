"""GR00T N1.6 checkpoints: NVIDIA's layout, read whole or not at all."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lerobot_policy_groot_n1d6.model import GrootN1d6, GrootSizes, HeadSizes, LanguageSizes, VisionSizes
from lerobot_policy_groot_n1d6.processing.checkpoint import check_generation
from lerobot_policy_groot_n1d6.processing.embodiment import MAX_TABLE_BYTES
from lerobot_policy_groot_n1d6.processing.errors import ProcessingError

INDEX = "model.safetensors.index.json"
MASK_TOKEN = "action_head.mask_token"


class CheckpointError(ProcessingError):
    """A checkpoint that is missing, damaged, or another model's."""


def locate(path: str, revision: str | None = None) -> Path:
    """A checkpoint's folder on this machine; a Hub id is downloaded.

    Raises:
        CheckpointError: it cannot be had.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f'{path} is a local folder and has no revisions, but revision "{revision}" is given')
        return folder
    if folder.is_absolute() or path.count("/") != 1:
        raise CheckpointError(f"no GR00T N1.6 checkpoint in {path}: the folder does not exist")
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the Hub client and the network each raise their own
        first_line = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f'"{path}" is no local folder and cannot be had from the Hub ({type(error).__name__}: {first_line}). '
            "NVIDIA's N1.6 weights are gated: accept their licence on the model's page and run `hf auth login`."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``config.json``.

    Raises:
        CheckpointError: it is missing, damaged, or that of another model.
    """
    file = folder / "config.json"
    if not file.is_file():
        held = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise CheckpointError(f"no checkpoint in {folder}: config.json is missing (the folder holds {held})")
    config = read_object(file)
    check_generation(config, folder)
    if config.get("model_type") != "Gr00tN1d6":
        raise CheckpointError(f'{folder} holds a model of type "{config.get("model_type")}", expected "Gr00tN1d6"')
    return config


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it is damaged.
    """
    if file.exists() and (not file.is_file() or file.stat().st_size > MAX_TABLE_BYTES):
        raise CheckpointError(f"{file} is damaged: it is no regular file of at most {MAX_TABLE_BYTES / 1024**2:g} MB")
    try:
        found = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is damaged: it holds {type(found).__name__}, expected an object")
    return found


def shards(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it.

    Raises:
        CheckpointError: there are no weights, or their index is damaged.
    """
    if (folder / INDEX).is_file():
        index = read_object(folder / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise CheckpointError(f'{folder / INDEX} is damaged: it has no "weight_map"')
        if wrong := [file for file in index.values() if not isinstance(file, str) or Path(file).name != file]:
            raise CheckpointError(f"{folder / INDEX} names {wrong[0]!r:.200}, expected a file beside it")
        return {name: folder / file for name, file in index.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise CheckpointError(f"no weights in {folder}: neither {INDEX} nor {single.name} is there")
    with _opened(single) as handle:
        return dict.fromkeys(handle.keys(), single)


def load(folder: Path, sizes: GrootSizes, *, backbone: torch.dtype) -> GrootN1d6:
    """A checkpoint's network: the vision-language model in `backbone`'s dtype, the head in float32.

    Raises:
        CheckpointError: a file is missing or damaged, or names or shapes differ.
    """
    files = shards(folder)
    sizes = replace(sizes, head=replace(sizes.head, mask_token=MASK_TOKEN in files))
    network = GrootN1d6.empty(sizes)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    weights: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        with _opened(file) as handle:
            weights |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    _check(wanted, {name: tuple(tensor.shape) for name, tensor in weights.items()}, folder)
    for name, _ in network.named_parameters():  # what nothing uses stays as it is
        weights[name] = weights[name].to(torch.float32 if name.startswith("action_head.") else backbone)
    network.load_state_dict(weights, assign=True)
    return network


def sizes_of(table: Mapping[str, Any]) -> GrootSizes:
    """Sizes from a table as `dataclasses.asdict` makes it.

    LeRobot's command line reads 1e-06 as text: each number becomes what its field is.
    """
    parts = {"vision": VisionSizes, "language": LanguageSizes, "head": HeadSizes}
    kinds = {name: {f.name: type(f.default) for f in fields(kind)} for name, kind in parts.items()}
    return GrootSizes(
        **{name: kind(**{k: kinds[name][k](v) for k, v in table[name].items()}) for name, kind in parts.items()}
    )


def _check(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: Path) -> None:
    groups = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} is {list(found[name])}, expected {list(wanted[name])}"
            for name in sorted(wanted.keys() & found.keys())
            if wanted[name] != found[name]
        ],
    }
    points = [
        f"{len(names)} {words}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
        for words, names in groups.items()
        if names
    ]
    if points:
        raise CheckpointError(f"{where} is not GR00T N1.6's weights. Tensors: {'; '.join(points)}")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    if not file.is_file():
        raise CheckpointError(f"{file.parent} is not whole: {file.name} is missing")
    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or cut short: {error}") from error
    with handle as opened:
        yield opened
