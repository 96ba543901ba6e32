"""What is stored of one state, as one run of bytes; in 8-bit floats where asked for."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ALIGN = 16
"""Bytes at whose multiples each tensor begins."""
FP8 = torch.float8_e4m3fn
SCALE = ".scale"
"""Ends the name of the scales of a tensor in 8-bit floats."""

type Layout = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Entry:
    """Tensors of one state, concatenated as bytes.

    Attributes:
        layout: name, dtype and shape of each.
        data: uint8, all of their bytes, each tensor's from a multiple of `ALIGN` on.
    """

    layout: Layout
    data: Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], *, dtype: Literal["exact", "fp8"] = "exact") -> "Entry":
        """Return a copy of these tensors, on their device."""
        tensors = quantize(tensors) if dtype == "fp8" else tensors
        layout = tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
        size = sum(_padded(tensor.nbytes) for tensor in tensors.values())
        data = torch.empty(size, dtype=torch.uint8, device=next(iter(tensors.values())).device)
        entry = cls(layout, data)
        for name, view in entry._views().items():
            view.copy_(tensors[name])
        return entry

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors as they were packed: views of the bytes, or dequantized copies of 8-bit floats."""
        return dequantize(self._views())

    def to(self, device: torch.device) -> "Entry":
        """Return a copy on another device; from page-locked memory without waiting."""
        return Entry(self.layout, self.data.to(device, non_blocking=True))

    @property
    def num_bytes(self) -> int:
        return self.data.numel()

    def _views(self) -> dict[str, Tensor]:
        views, begin = {}, 0
        for name, dtype, shape in self.layout:
            size = dtype.itemsize * torch.Size(shape).numel()
            views[name] = self.data[begin : begin + size].view(dtype).view(shape)
            begin += _padded(size)
        return views


def layout_to_json(layout: Layout) -> str:
    return json.dumps([[name, str(dtype).removeprefix("torch."), shape] for name, dtype, shape in layout])


def layout_from_json(text: str) -> Layout:
    return tuple((name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in json.loads(text))


def _padded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def quantize(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert matrices of floats to 8-bit floats (4 bits exponent, 3 mantissa) with a scale per row; vectors are
    unchanged.

    A number is off by at most a 16th of itself, or by a 2^-10th of the scale where it is tiny beside its row's largest;
    that is the rounding of 3 bits. The scale has the tensor's own dtype, by which `dequantize` knows it again.
    """
    out = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or not tensor.is_floating_point():
            out[name] = tensor
            continue
        largest = torch.finfo(FP8).max
        scale = tensor.abs().amax(dim=-1, keepdim=True).float().div(largest).to(tensor.dtype)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        # A rounded scale may be too small by a hair, and beyond the largest number this format has NaN.
        scaled = (tensor.float() / scale.float()).clamp(-largest, largest)
        out |= {name: scaled.to(FP8), f"{name}{SCALE}": scale}
    return out


def dequantize(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that `quantize` was given, up to rounding."""
    return {
        name: (tensor.float() * tensors[f"{name}{SCALE}"].float()).to(tensors[f"{name}{SCALE}"].dtype)
        if tensor.dtype == FP8
        else tensor
        for name, tensor in tensors.items()
        if not name.endswith(SCALE)
    }
