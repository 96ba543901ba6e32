"""pi0.5's sizes, and LeRobot's own model built from them without a single random weight.

LeRobot knows one size of pi0.5 (18 layers, 2048 and 1024 wide). Tests, benchmarks and `--tiny` need the same classes at
other sizes: :func:`lerobot_builds` lends LeRobot another set of numbers while it builds a model.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import init_empty_weights
from lerobot.policies.pi05 import modeling_pi05
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Policy, PI05Pytorch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn

from poco_vla import PolicyError
from poco_vla.pretrained import heads, policy_config

ARCHITECTURE_FILE = "architecture.json"
"""Lies beside the weights of a model that has not pi0.5's own sizes."""


@dataclass(frozen=True)
class Stack:
    """One Gemma stack: hidden width, layers, MLP width, width of each of its 8 query heads and its one key head."""

    width: int
    depth: int
    mlp_dim: int
    head_dim: int

    num_heads: int = 8
    num_kv_heads: int = 1


@dataclass(frozen=True)
class Vision:
    """The SigLIP encoder: hidden width, layers, MLP width, heads, and the side of a square patch in pixels."""

    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    patch: int = 14


@dataclass(frozen=True)
class Architecture:
    """All sizes of a pi0.5. The defaults are the real model's."""

    vlm: Stack = Stack(2048, 18, 16_384, 256)
    expert: Stack = Stack(1024, 18, 4096, 256)
    vision: Vision = Vision()
    vocab: int = 257_152
    image_size: int = 224

    @classmethod
    def of_folder(cls, folder: Path) -> "Architecture":
        """The real sizes, unless the folder says that its model has others.

        Raises:
            PolicyError: it says so in words that are not understood.
        """
        file = folder / ARCHITECTURE_FILE
        if not file.is_file():
            return cls()
        try:
            sizes = heads.read_object(file)
            policy_config.check_sizes(sizes, policy_config.NETWORK_SIZES, file)
            stacks = {name: Stack(**sizes.pop(name)) for name in ("vlm", "expert")}
            return cls(**stacks, vision=Vision(**sizes.pop("vision")), **sizes)
        except (TypeError, KeyError, AttributeError) as error:
            raise PolicyError(f"{file} is damaged: {type(error).__name__}: {error}") from error

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def with_depth(self, depth: int) -> "Architecture":
        """The same widths, fewer layers everywhere: what benchmarks and slow tests afford on a CPU."""
        return replace(
            self,
            vlm=replace(self.vlm, depth=depth),
            expert=replace(self.expert, depth=depth),
            vision=replace(self.vision, depth=depth),
        )


TINY = Architecture(
    vlm=Stack(64, 3, 128, 16),
    expert=Stack(32, 3, 64, 16),
    vision=Vision(width=48, depth=2, mlp_dim=96, num_heads=4),
    vocab=512,
    image_size=56,
)
"""Some 300,000 parameters in every part that the real model has."""


@contextmanager
def lerobot_builds(architecture: Architecture) -> Iterator[None]:
    """While this lasts, a `PI05Policy` that LeRobot builds has these sizes."""
    if architecture == Architecture():
        yield
        return
    stacks = {"gemma_2b": architecture.vlm, "gemma_300m": architecture.expert}
    paligemma, gemma = modeling_pi05.PaliGemmaForConditionalGenerationWithPiGemma, modeling_pi05.PiGemmaForCausalLM

    def small_paligemma(config: Any) -> nn.Module:
        vision, text = config.vision_config, config.text_config
        vision.hidden_size, vision.num_hidden_layers = architecture.vision.width, architecture.vision.depth
        vision.intermediate_size, vision.num_attention_heads = (
            architecture.vision.mlp_dim,
            architecture.vision.num_heads,
        )
        vision.patch_size = architecture.vision.patch
        vision.projection_dim = config.projection_dim = architecture.vlm.width
        text.vocab_size = config.image_token_index = architecture.vocab
        text.pad_token_id = config.pad_token_id = 0
        return paligemma(config)

    def small_gemma(config: Any) -> nn.Module:
        config.vocab_size = architecture.vocab
        return gemma(config)

    with patch.multiple(
        modeling_pi05,
        get_gemma_config=lambda variant: stacks[variant],
        PaliGemmaForConditionalGenerationWithPiGemma=small_paligemma,
        PiGemmaForCausalLM=small_gemma,
    ):
        yield


def empty_policy(config: PI05Config, architecture: Architecture) -> PI05Policy:
    """Return LeRobot's policy, parameters without memory yet, and real buffers (rotary frequencies, positions).

    Buffers are rounded as `config.dtype` asks, as LeRobot does: a checkpoint that was trained with rounded rotary
    frequencies keeps them.
    """
    policy = PI05Policy.__new__(PI05Policy)  # its __init__ would move the empty parameters to a device
    PreTrainedPolicy.__init__(policy, config)
    config.validate_features()
    policy.config = config
    with policy_config.describing("these sizes make no pi0.5"):
        policy.init_rtc_processor()
        with lerobot_builds(architecture), init_empty_weights(include_buffers=False):
            policy.model = PI05Pytorch(config, rtc_processor=policy.rtc_processor)
        policy.reset()
    return policy


PROJECTIONS = ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out")


def random_weights(policy: PI05Policy, seed: int = 0) -> dict[str, Tensor]:
    """Small random float32 weights for every parameter, so that each of them matters (fresh adaRMS would be zero)."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in policy.state_dict().items():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        weights[name] = torch.randn(parameter.shape, generator=generator) * scale
    return weights
