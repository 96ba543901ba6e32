"""SmolVLA's VLM by description: its configuration and tokenizer, from the Hub, a folder or memory, and LeRobot's policy
built from them without a single random weight.

LeRobot's constructor asks the Hub for a configuration and a processor, and here gets ones that are at hand.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from accelerate import init_empty_weights
from lerobot.policies.smolvla import smolvlm_with_expert
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GPT2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.smolvlm import SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

from poco_vla import PolicyError
from poco_vla.pretrained import policy_config


@dataclass(frozen=True)
class Vlm:
    """What LeRobot must know of a VLM beside its weights.

    Attributes:
        config: transformers' configuration.
        tokenizer: of its prompts.
    """

    config: Any
    tokenizer: Any

    @classmethod
    def load(cls, name: str | Path) -> "Vlm":
        """From a local folder or the Hub.

        Raises:
            PolicyError: it cannot be had.
        """
        try:
            if Path(name).is_dir():
                policy_config.check_regular(Path(name))
            # Never None: transformers would ask at the terminal whether to run a repository's own code.
            config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False)
            policy_config.check_transformers_config(config, name)
            return cls(config, AutoTokenizer.from_pretrained(name, trust_remote_code=False))
        except Exception as error:  # transformers, the Hub client and the network each raise their own
            first_line = str(error).strip().split("\n")[0]
            raise PolicyError(
                f'configuration and tokenizer of the VLM "{name}" cannot be loaded ({type(error).__name__}: '
                f'{first_line}). Give policy_options a "vlm": a Hub id, or a local folder with a copy of both.'
            ) from error

    def save(self, folder: Path) -> None:
        """A folder that `load` and LeRobot's constructor read."""
        self.config.save_pretrained(folder)
        parts = {"image_processor": SmolVLMImageProcessor(), "video_processor": SmolVLMVideoProcessor()}
        SmolVLMProcessor(tokenizer=self.tokenizer, **parts).save_pretrained(folder)


def empty_policy(config: SmolVLAConfig, vlm: Vlm) -> SmolVLAPolicy:
    """LeRobot's policy with parameters that hold no memory yet, and real buffers."""

    def at_hand(found: Any) -> Any:
        return SimpleNamespace(from_pretrained=lambda _: found)

    weights_of_vlm, config.load_vlm_weights = config.load_vlm_weights, False
    try:
        with (
            policy_config.describing("these sizes make no SmolVLA"),
            patch.object(smolvlm_with_expert, "AutoConfig", at_hand(vlm.config)),
            patch.object(smolvlm_with_expert, "AutoProcessor", at_hand(SimpleNamespace(tokenizer=vlm.tokenizer))),
            init_empty_weights(include_buffers=False),
        ):
            return SmolVLAPolicy(config)
    finally:
        config.load_vlm_weights = weights_of_vlm


def tiny_vlm() -> Vlm:
    """SmolVLM2's classes at small sizes: 16 tokens for a picture of 32 x 32 pixels; tokens of text are bytes."""
    special = [f"<{name}>" for name in ("pad", "end", "fake_token_around_image", "image", "global-img")]
    letters = sorted(bytes_to_unicode().values())
    tokenizer = GPT2Tokenizer(
        vocab={token: i for i, token in enumerate([*special, *letters])},
        pad_token="<pad>",
        **dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<end>"),
        extra_special_tokens={
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "global_image_token": "<global-img>",
        },
    )
    text = {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "vocab_size": len(special) + len(letters),
        "pad_token_id": 0,
        "dtype": "float32",
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 4,
        "dtype": "float32",
    }
    sizes = {"text_config": text, "vision_config": vision, "scale_factor": 2, "image_token_id": 3, "pad_token_id": 0}
    return Vlm(SmolVLMConfig.from_dict(sizes | {"dtype": "float32"}), tokenizer)


def random_weights(policy: SmolVLAPolicy, seed: int = 0) -> dict[str, Tensor]:
    """Random float32 weights for every parameter, under which each of them matters; norms are near one."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, empty in policy.state_dict().items():
        scale = empty.shape[-1] ** -0.5 if empty.ndim > 1 else 0.1
        weights[name] = torch.randn(empty.shape, generator=generator) * scale
        if name.endswith("norm.weight") or (".layer_norm" in name and name.endswith("weight")):
            weights[name] += 1
    return weights
