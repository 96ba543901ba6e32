"""Set a GPU's arithmetic for the time of a run: products of float32 numbers, and the kernels of attention."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from poco_vla.errors import ConfigError

TF32_FROM = (8, 0)
"""Compute capability from which on a GPU has TF32."""


@contextmanager
def gpu_arithmetic(precision: Literal["fp32", "tf32"], device: torch.device) -> Iterator[None]:
    """Compute products and convolutions of float32 numbers in `precision` while entered; restore the settings after.

    These settings belong to the process, and neither torch's defaults (TF32 in convolutions) nor Accelerate's (TF32 in
    products, as soon as a run is compiled) are what a configuration says. cuDNN's attention, torch's first choice on
    Hopper, is left out: it plans for each shape, and the lengths of prefixes change from batch to batch.

    Args:
        precision: of the products; TF32 keeps 10 bits of each factor's mantissa.
        device: of the run; settings of others are left alone.

    Raises:
        ConfigError: the device has no TF32.
    """
    if precision == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < TF32_FROM):
        raise ConfigError(
            f"precision is tf32, which NVIDIA GPUs have from Ampere on, and this run is on {device}: leave it out"
        )
    backends: Any = torch.backends  # whose modules annotate none of these settings
    matmul, convolution, cuda = backends.cuda.matmul, backends.cudnn, backends.cuda
    before = matmul.allow_tf32, convolution.allow_tf32, cuda.cudnn_sdp_enabled()
    try:
        if device.type == "cuda":
            matmul.allow_tf32 = convolution.allow_tf32 = precision == "tf32"
            cuda.enable_cudnn_sdp(False)
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before[:2]
        cuda.enable_cudnn_sdp(before[2])


def arithmetic_told(precision: Literal["fp32", "tf32"], sampling: str | None) -> str:
    """Say what `gpu_arithmetic` has set, and the precision of sampled candidates where an algorithm has an own one."""
    name = {"fp32": "float32", "tf32": "TF32 (10 bits of mantissa)"}[precision]
    drawn = f", candidates sampled in {sampling}" if sampling not in (None, "float32") else ""
    return f"products of float32 numbers are computed in {name}{drawn}; attention without cuDNN's kernels"
