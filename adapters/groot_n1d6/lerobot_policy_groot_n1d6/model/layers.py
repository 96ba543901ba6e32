"""What several parts of the network share."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """A projection in `x`'s dtype: weights of another one are rounded for this product only, or, while poco_vla's
    `rounded_weights` is entered, once."""
    if type(module) is not nn.Linear or module.weight.dtype == x.dtype:
        return module(x)
    kept = {} if torch.is_grad_enabled() else vars(module).get("_rounded", {})
    if x.dtype not in kept:
        kept[x.dtype] = module.weight.to(x.dtype), None if module.bias is None else module.bias.to(x.dtype)
    return F.linear(x, *kept[x.dtype])


def layer_norm(x: Tensor, module: nn.LayerNorm | None = None, eps: float = 1e-5) -> Float[Tensor, "..."]:
    """LayerNorm in float32 whatever it is given, and float32 out. Without a module: no weights, and `eps`."""
    if module is None:
        return F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return F.layer_norm(x.float(), x.shape[-1:], module.weight.float(), module.bias.float(), module.eps)


class Stored(nn.Module):
    """Tensors of a checkpoint that nothing computes with, written back as they were found: the original loads
    strictly and expects the ViT's `head.*` and `lm_head`, though nothing uses them.

    They are neither parameters nor buffers: no device, dtype, optimizer or process group ever touches them. Loading
    keeps the checkpoint's own tensors, in main memory.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: tensor for name, tensor in self.tensors.items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, own in self.tensors.items():
            tensor = state_dict.get(prefix + name)
            if tensor is None:
                missing_keys.append(prefix + name)
            elif tensor.shape != own.shape:
                error_msgs.append(f"size mismatch for {prefix + name}: {tuple(tensor.shape)}, not {tuple(own.shape)}")
            else:
                self.tensors[name] = tensor.detach() if tensor.is_meta else tensor.detach().cpu()
        known = {prefix + name for name in self.tensors}
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in known)
