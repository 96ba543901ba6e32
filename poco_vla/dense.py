"""Dense layers and what stands between them at the rate of the processor, on CPUs too where torch's own are not.

torch's x86 builds multiply float32 matrices by MKL, which takes a slower path on processors that are not Intel's.
oneDNN, which torch holds as well, does not: on an AMD EPYC with AVX-512 it is 2.2 times as fast, in the same precision
(tests/benchmarks/bench_update.py). torch uses it for float32 in convolutions and in compiled graphs only.
"""

import math
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

FEWEST_ROWS = 64
"""Below this, a call costs more than the product."""
CPU_ROWS = 2048
"""Chunks, candidates and data, that a CPU takes through a network at once: with 4 x 512 their activations stay in its
caches; in one go of 8,448 an update takes a quarter longer (tests/benchmarks/bench_update.py), and a critic's values
without gradients three quarters."""


def linear(
    x: Float[Tensor, "*batch I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, " O"] | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "*batch O"]:
    """activation(x W^T + b), as torch.nn.functional.linear and the activation give it, but for rounding.

    Without gradients a torch.nn.SiLU is applied while the product is in the cache.
    """
    if not suits_onednn(x):
        y = F.linear(x, weight, bias)
    elif isinstance(activation, nn.SiLU) and not torch.is_grad_enabled():
        return _product(x, weight, bias, "swish")
    else:
        y = _OneDnn.apply(x, weight, bias)
    return y if activation is None else activation(y)


def batched_linear(
    x: Float[Tensor, "E M I"], weight: Float[Tensor, "E I O"], bias: Float[Tensor, "E 1 O"] | None = None
) -> Float[Tensor, "E M O"]:
    """x_e W_e + b_e for each member of an ensemble: one batched product, or one of oneDNN's for each."""
    if suits_onednn(x[0]):
        biases = [None] * len(x) if bias is None else bias[:, 0]
        return torch.stack([_OneDnn.apply(*one) for one in zip(x, weight.mT, biases, strict=True)])
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)


def layer_norm(x: Float[Tensor, "*batch W"], eps: float) -> Float[Tensor, "*batch W"]:
    """Return torch.nn.functional.layer_norm without weights. On a CPU that takes two and a half times as long as with
    weights, so that there are some: ones, which change no bit (x86 with AVX-512)."""
    shape = x.shape[-1:]
    if x.device.type != "cpu":
        return F.layer_norm(x, shape, eps=eps)
    return F.layer_norm(x, shape, x.new_ones(shape), x.new_zeros(shape), eps)


def ensemble_norm(
    x: Float[Tensor, "E M W"], gain: Float[Tensor, "E 1 W"], shift: Float[Tensor, "E 1 W"], eps: float
) -> Float[Tensor, "E M W"]:
    """Return a LayerNorm of each member by its own weights. On a CPU its gradients take one pass over the numbers;
    those of `layer_norm` and a product take five, and differ by rounding."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.addcmul(shift, layer_norm(x, eps), gain)
    return _EnsembleNorm.apply(x, gain, shift, eps)


def gelu(x: Float[Tensor, "*batch W"]) -> Float[Tensor, "*batch W"]:
    """Return GELU in its approximation by tanh, as torch.nn.functional.gelu gives it, but for rounding: x sigmoid(2 u),
    u = sqrt(2 / pi) (x + 0.044715 x^3). On a CPU torch's own takes twice to ten times as long."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return _Gelu.apply(x) if torch.is_grad_enabled() and x.requires_grad else _gate(x).mul_(x)


def states_at_once(batch: int, chunks: int, device: str) -> int:
    """Return how many states of a batch are computed at once, each with so many chunks that have a gradient (0: none):
    what suits a CPU's caches, elsewhere all of them."""
    return max(1, CPU_ROWS // chunks) if chunks and device == "cpu" else batch


def row_blocks(x: Float[Tensor, "B N ..."]) -> list[slice]:
    """Return slices of the first axis in which a network without gradients is to be computed: on a CPU at most
    `CPU_ROWS` rows at once, elsewhere all."""
    batch, each = x.shape[0], x.shape[1]
    if x.device.type != "cpu" or torch.is_grad_enabled() or batch * each <= CPU_ROWS:
        return [slice(0, batch)]
    rows = states_at_once(batch, each, "cpu")
    return [slice(start, min(start + rows, batch)) for start in range(0, batch, rows)]


def suits_onednn(x: Float[Tensor, "*batch I"]) -> bool:
    """Return True if oneDNN takes the product of `x` with a float32 weight, and is faster."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() >= FEWEST_ROWS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # which chooses by itself
        and _slow_mkl()
    )


@cache
def _slow_mkl() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    vendor = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and "GenuineIntel" not in vendor
    )


class _OneDnn(torch.autograd.Function):
    """The products of a dense layer and of its gradients by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad = grad.reshape(-1, weight.shape[0])
        return (
            _product(grad, weight.T).view_as(x) if of_x else None,
            _product(grad.T, x.reshape(-1, x.shape[-1]).T) if of_weight else None,
            grad.sum(dim=0) if of_bias else None,
        )


class _EnsembleNorm(torch.autograd.Function):
    """LayerNorm by member."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
        shape = x.shape[-1:]
        y, mean, rstd = torch.native_layer_norm(x, shape, x.new_ones(shape), x.new_zeros(shape), eps)
        ctx.save_for_backward(x, mean, rstd, gain, shift)
        return torch.addcmul(shift, y, gain, out=y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        needs, shape = list(ctx.needs_input_grad[:3]), grad.shape[-1:]
        of_members = [
            torch.ops.aten.native_layer_norm_backward(one, x, shape, mean, rstd, gain[0], shift[0], needs)
            for one, x, mean, rstd, gain, shift in zip(grad.contiguous(), *ctx.saved_tensors, strict=True)
        ]
        of_x, of_gain, of_shift = zip(*of_members, strict=True)
        return (
            torch.stack(of_x) if needs[0] else None,
            torch.stack(of_gain)[:, None] if needs[1] else None,
            torch.stack(of_shift)[:, None] if needs[2] else None,
            None,
        )


CUBIC = 0.044715
DOUBLE_ROOT = 2 * math.sqrt(2 / math.pi)


class _Gelu(torch.autograd.Function):
    """GELU and its slope from few passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate = _gate(x)
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gate = ctx.saved_tensors
        slope = _polynomial(x, 3 * CUBIC).mul_(x)
        return torch.ops.aten.sigmoid_backward(slope, gate).add_(gate).mul_(grad)


def _gate(x: Tensor) -> Tensor:
    """sigmoid(2 u)"""
    return _polynomial(x, CUBIC).mul_(x).sigmoid_()


def _polynomial(x: Tensor, cubic: float) -> Tensor:
    """2 sqrt(2 / pi) (1 + cubic x^2)"""
    return torch.addcmul(x.new_full((), DOUBLE_ROOT), x, x, value=cubic * DOUBLE_ROOT)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), bias, activation, [], "")


def _dense(x: Tensor) -> Tensor:
    """`x` without gaps, be it transposed: with gaps oneDNN is a thousand times slower."""
    return x if x.is_contiguous() or (x.ndim == 2 and x.mT.is_contiguous()) else x.contiguous()
