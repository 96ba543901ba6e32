"""A head in peft's form: adapter_config.json and adapter_model.safetensors, which LeRobot puts on the base by itself.

A LoRA is one. A full head travels as peft's `modules_to_save`, beside a LoRA that is zero (peft wants one).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from poco_vla.errors import HubError
from poco_vla.pretrained.heads import PEFT_PREFIX, PEFT_WEIGHTS, Head

PEFT_CONFIG = "adapter_config.json"


def write_peft(head: Head, weights: dict[str, Tensor], folder: Path) -> Path:
    """Write both files, and switch peft on in the config.json that lies there; the weights' path.

    Args:
        head: what the weights are.
        weights: from :meth:`Head.read_weights`.
        folder: with the policy's config.json in it.

    Raises:
        HubError: this adapter's head has no such form.
    """
    from peft import LoraConfig

    if head.peft is None:
        raise HubError(
            f'the adapter "{head.adapter}" offers no peft form: LeRobot alone could not put its head on a base. Use '
            'the form "policy" (a whole LeRobot policy) or "head"'
        )
    shared = {"base_model_name_or_path": head.base, "revision": head.revision, "inference_mode": True}
    tensors = {f"{PEFT_PREFIX}{name.replace('.default.', '.')}": tensor for name, tensor in weights.items()}
    if head.lora is not None:
        targets = sorted({name.split(".lora_")[0] for name in weights})
        alpha: int = head.lora.alpha or 2 * head.lora.rank  # pyright: ignore[reportAssignmentType] (it only divides)
        config = LoraConfig(r=head.lora.rank, lora_alpha=alpha, target_modules=targets, **shared)
    else:
        outputs, inputs = head.peft.shape
        idle = f"{PEFT_PREFIX}{head.peft.idle}.lora_"
        tensors |= {f"{idle}A.weight": torch.zeros(1, inputs), f"{idle}B.weight": torch.zeros(outputs, 1)}
        config = LoraConfig(r=1, target_modules=[head.peft.idle], modules_to_save=list(head.peft.modules), **shared)
    save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    policy = folder / "config.json"
    policy.write_text(json.dumps(json.loads(policy.read_text()) | {"use_peft": True}, indent=4) + "\n")
    return folder / PEFT_WEIGHTS
