"""Products of float32 weights in an adapter's own dtype: weights are rounded for each, or once for a sample."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KEPT = "_rounded"
"""Attribute of a layer that has its rounded weight and bias by their dtype, while a sample is drawn."""


def rounded_linear(module: nn.Module, x: Tensor) -> Tensor:
    """Return a projection in `x`'s dtype: weights of another one are rounded for this product only, or were before, by
    `rounded_weights`."""
    if type(module) is not nn.Linear or module.weight.dtype == x.dtype:
        return module(x)
    kept = vars(module).get(KEPT)
    if kept is None or torch.is_grad_enabled():
        return F.linear(x, *_rounded(module, x.dtype))
    if x.dtype not in kept:
        kept[x.dtype] = _rounded(module, x.dtype)
    return F.linear(x, *kept[x.dtype])


@contextmanager
def rounded_weights(head: nn.Module) -> Iterator[None]:
    """Round the weights of a head's linear layers once while entered. They must not change meanwhile: no count of
    changes would tell, since fused optimizers do not raise a tensor's version."""
    layers = [module for module in head.modules() if type(module) is nn.Linear]
    for layer in layers:
        vars(layer)[KEPT] = {}
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop(KEPT, None)


def _rounded(module: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return module.weight.to(dtype), None if module.bias is None else module.bias.to(dtype)
