"""A LoRA on a flow head in the place of its full weights, by peft, which is only needed once one is asked for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poco_vla.errors import PolicyError

MAX_RANK = 4096
"""Largest rank of a LoRA: the widest head that any adapter has is narrower."""


@dataclass(frozen=True)
class Lora:
    """What to train instead of the full head.

    Attributes:
        rank: of each pair of matrices.
        alpha: scale, `alpha / rank` is applied; None is twice the rank.
        targets: ends of the names of linear layers of the head.
    """

    targets: tuple[str, ...]
    rank: int = 16
    alpha: float | None = None

    @classmethod
    def of(cls, option: Any, targets: tuple[str, ...]) -> "Lora | None":
        """From a policy option: None, a rank, or a mapping of these fields.

        Args:
            option: what a user gave.
            targets: those of a LoRA that names none.

        Raises:
            PolicyError: it is none of them.
        """
        if option is None or isinstance(option, Lora):
            return option
        fields = {"rank": option} if isinstance(option, int) else option
        if not isinstance(fields, Mapping) or not fields.keys() <= {"rank", "alpha", "targets"}:
            raise PolicyError(f"lora is {option!r}; expected a rank, or a mapping of rank, alpha, targets")
        rank, alpha, ends = fields.get("rank", 16), fields.get("alpha"), fields.get("targets", targets)
        if not isinstance(rank, int) or rank is True or rank < 1:
            raise PolicyError(f"lora.rank is {rank!r}; expected a positive whole number")
        if rank > MAX_RANK:
            raise PolicyError(f"lora.rank is {rank}; expected at most {MAX_RANK}, as wide as the layers that it is for")
        if alpha is not None and not (isinstance(alpha, int | float) and alpha > 0):
            raise PolicyError(f"lora.alpha is {alpha!r}; expected a positive number, or None for twice the rank")
        if (
            isinstance(ends, str)
            or not isinstance(ends, Sequence)
            or not ends
            or not all(isinstance(e, str) for e in ends)
        ):
            raise PolicyError(f"lora.targets is {ends!r}; expected a list of ends of names")
        return cls(tuple(ends), rank, None if alpha is None else float(alpha))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inject_lora(
    model: nn.Module, lora: Lora, in_head: Callable[[str], bool], dtype_of: Callable[[str], torch.dtype]
) -> None:
    """Freeze a model and put float32 LoRA matrices beside layers of its head; at first they change nothing.

    Args:
        model: holds the head.
        lora: what to put where.
        in_head: whether a layer, by its name in `model`, belongs to the head.
        dtype_of: the dtype that a target, by its name, is fed: its frozen weights are brought to it.

    Raises:
        PolicyError: a target names no linear layer of the head.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and in_head(name)}
    for target in lora.targets:
        if not any(name.endswith(f".{target}") or name == target for name in linear):
            last = sorted({".".join(name.split(".")[-2:]) for name in linear})
            raise PolicyError(f'lora target "{target}" is the end of no linear layer of the head: {", ".join(last)}')
    targets = [name for name in linear if any(name.endswith(f".{t}") or name == t for t in lora.targets)]
    for name in targets:
        linear[name].to(dtype_of(name))
    alpha: Any = lora.alpha or 2 * lora.rank  # peft's annotation says int; it only divides
    settings = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)
    inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def merge_lora(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of `model` without traces of LoRA: W + B A alpha / rank under W's own name."""
    from peft.tuners.lora import Linear as LoraLinear

    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    out = {name: tensor for name, tensor in weights.items() if ".lora_" not in name and ".base_layer." not in name}
    for name, layer in layers.items():
        base: Any = layer.get_base_layer()
        (adapter,) = layer.active_adapters
        out[f"{name}.weight"] = base.weight.detach().float() + layer.get_delta_weight(adapter).detach().float()
        if base.bias is not None:
            out[f"{name}.bias"] = base.bias
    return out
