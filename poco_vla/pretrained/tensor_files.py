"""Safetensors files that somebody else may have written: opened, and their names, shapes and numbers checked."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from poco_vla.errors import PolicyError
from poco_vla.pretrained.sources import check_file


def open_tensors(file: Path) -> Any:
    """Open a safetensors file; the handle is a context manager.

    Raises:
        PolicyError: it is missing, or no safetensors file.
    """
    if file.exists() and not file.is_file():
        raise PolicyError(f"{file} is damaged: it is no regular file, and is not read")
    check_file(file)
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise PolicyError(f"{file} is damaged, cut short, or no safetensors file: {error}") from error


@contextmanager
def _read(file: Path) -> Iterator[Any]:
    """Open a safetensors file for a block that only reads it: its errors are of the file, and name it."""
    try:
        with open_tensors(file) as handle:
            yield handle
    except PolicyError:
        raise
    # A number format that this version of torch has not ends in the last two.
    except (SafetensorError, OSError, AttributeError, RuntimeError) as error:
        raise PolicyError(f"{file} is damaged, cut short, or no safetensors file: {error}") from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file.

    Raises:
        PolicyError: it is missing, or no safetensors file.
    """
    with _read(file) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a safetensors file; no tensor is read.

    Raises:
        PolicyError: it is missing, or no safetensors file.
    """
    with _read(file) as handle:
        return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118


def check_weights_file(file: Path) -> None:
    """Raise PolicyError unless a file holds safetensors whose numbers are finite. One tensor is in memory at a time."""
    with _read(file) as handle:
        for name in handle.keys():  # noqa: SIM118 (no mapping)
            check_finite({name: handle.get_tensor(name)}, file)


def check_finite(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raise PolicyError if a number in these tensors is NaN or infinite.

    Args:
        tensors: by name.
        file: that they come from, for the message.
    """
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise PolicyError(
            f"{file} holds weights that are NaN or infinite, in {bad[0]}{more}: take an earlier checkpoint, or fetch "
            "it again"
        )


def is_finite(tensor: Tensor) -> bool:
    """Return True unless a floating-point tensor holds NaN or infinity; without a mask of its size in memory."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(tensor)).tolist())


def check_tensors(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], file: Path) -> None:
    """Raise PolicyError unless two tables of tensor shapes are the same."""
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    shapes = [
        f"{name} is {list(found[name])}, expected {list(wanted[name])}"
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name] != found[name]
    ]
    points = [
        f"{len(names)} {words}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
        for words, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if points:
        raise PolicyError(f"{file} does not hold this model's weights. Tensors: {'; '.join(points)}")
