"""A LoRA on the action expert in the place of its full weights, by peft."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from poco_vla import PolicyError
from poco_vla_pi05.architecture import in_head

TARGETS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    "action_in_proj",
    "action_out_proj",
    "time_mlp_in",
    "time_mlp_out",
)
"""Every projection of the head but the adaRMS ones (`dense`). LeRobot 0.6.1's own default misses `time_mlp_*`."""


@dataclass(frozen=True)
class Lora:
    """What to train instead of the full head.

    Attributes:
        rank: of each pair of matrices.
        alpha: scale, `alpha / rank` is applied; None is twice the rank.
        targets: ends of the names of linear layers of the head.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = TARGETS

    @classmethod
    def of(cls, option: Any) -> "Lora | None":
        """From a policy option: None, a rank, or a mapping of these fields.

        Raises:
            PolicyError: it is none of them.
        """
        if option is None or isinstance(option, Lora):
            return option
        try:
            fields: dict[str, Any] = {"rank": option} if isinstance(option, int) else dict(option)
            listed: dict[str, Any] = {"targets": tuple(fields["targets"])} if "targets" in fields else {}
            lora = cls(**fields | listed)
        except (TypeError, ValueError) as error:
            raise PolicyError(
                f"lora is {option!r}; expected a rank, or a mapping of rank, alpha, targets: {error}"
            ) from error
        if not isinstance(lora.rank, int) or lora.rank is True or lora.rank < 1:
            raise PolicyError(f"lora.rank is {lora.rank!r}; expected a positive whole number")
        if lora.alpha is not None and not (isinstance(lora.alpha, int | float) and lora.alpha > 0):
            raise PolicyError(f"lora.alpha is {lora.alpha!r}; expected a positive number, or None for twice the rank")
        if isinstance(fields.get("targets"), str) or not lora.targets:
            raise PolicyError(f"lora.targets is {fields['targets']!r}; expected a list of ends of names")
        return lora

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inject(model: nn.Module, lora: Lora, dtype: torch.dtype) -> None:
    """Freeze the head and put float32 LoRA matrices beside the targets; at first they change nothing.

    Args:
        model: LeRobot's core model.
        lora: what to put where.
        dtype: of the frozen attention and MLP weights; the rest of the head stays in float32.

    Raises:
        PolicyError: a target names no linear layer of the head.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and in_head(name)]
    for target in lora.targets:
        if not any(name.endswith(f".{target}") or name == target for name in linear):
            last = sorted({".".join(name.split(".")[-2:]) for name in linear})
            raise PolicyError(f'lora target "{target}" is the end of no linear layer of the head: {", ".join(last)}')
    targets = [name for name in linear if any(name.endswith(f".{t}") or name == t for t in lora.targets)]
    for name, parameter in model.named_parameters():
        if in_head(name) and (".self_attn." in name or ".mlp." in name):
            parameter.data = parameter.data.to(dtype)
    alpha: Any = lora.alpha or 2 * lora.rank  # peft's annotation says int; it only divides
    settings = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)
    inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def merged(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of `model` without traces of LoRA: W + B A alpha / rank under W's own name."""
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    out = {name: tensor for name, tensor in weights.items() if ".lora_" not in name and ".base_layer." not in name}
    for name, layer in layers.items():
        base: Any = layer.get_base_layer()
        (adapter,) = layer.active_adapters
        out[f"{name}.weight"] = base.weight.detach().float() + layer.get_delta_weight(adapter).detach().float()
        if base.bias is not None:
            out[f"{name}.bias"] = base.bias
    return out
