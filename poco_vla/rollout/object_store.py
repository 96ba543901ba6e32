"""Tensors as plain bytes in Ray's object store."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def to_bytes(tensor: Tensor) -> np.ndarray:
    """Return the bytes of a tensor of any dtype as uint8; a view of a CPU tensor if possible."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def from_bytes(data: np.ndarray, dtype: torch.dtype, shape: Any) -> Tensor:
    """Return a view of :func:`to_bytes`' result as a tensor."""
    return torch.from_numpy(data).view(dtype).reshape(shape)


def _parts(tensor: Tensor) -> tuple[np.ndarray, torch.dtype, tuple[int, ...], bool]:
    return to_bytes(tensor), tensor.dtype, tuple(tensor.shape), tensor.requires_grad


def _tensor(parts: tuple[np.ndarray, torch.dtype, tuple[int, ...], bool]) -> Tensor:
    return from_bytes(*parts[:3]).clone()


def _parameter(parts: tuple[np.ndarray, torch.dtype, tuple[int, ...], bool]) -> nn.Parameter:
    """Return a parameter; if it is frozen, as a view of the object store's only copy, which is read-only."""
    data = from_bytes(*parts[:3])
    return nn.Parameter(data.clone() if parts[3] else data, requires_grad=parts[3])


@contextmanager
def tensors_as_bytes() -> Iterator[None]:
    """Let Ray pickle tensors as plain bytes within this context: torch's own archive costs several copies."""
    from ray.util import deregister_serializer, register_serializer

    kinds: dict[type, Callable[[Any], Tensor]] = {Tensor: _tensor, nn.Parameter: _parameter}
    for kind, back in kinds.items():
        register_serializer(kind, serializer=_parts, deserializer=back)
    try:
        yield
    finally:
        for kind in kinds:
            deregister_serializer(kind)


@contextmanager
def read_only_tensors() -> Iterator[None]:
    """Suppress torch's warning about tensors over read-only memory within this context."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        yield
