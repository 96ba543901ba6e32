"""``pi05`` as a poco_vla adapter: LeRobot's PI05Policy behind :class:`poco_vla.FlowPolicy`."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from lerobot.policies.common.vla_utils import resize_with_pad_torch
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor

from poco_vla import Lora, raw
from poco_vla.adapting import naming
from poco_vla.adapting.lerobot_checkpoint import (
    DTYPES,
    Checkpoint,
    Described,
    LoadOptions,
    check_choice,
    tiny_features,
    tiny_stats,
)
from poco_vla.adapting.lerobot_vla import TRANSFORMER_LAYERS, LeRobotVla
from poco_vla.adapting.rounding import rounded_weights
from poco_vla.adapting.weights import Weights
from poco_vla.pretrained import heads
from poco_vla_pi05 import checkpoint, expert, processors
from poco_vla_pi05.architecture import ARCHITECTURE_FILE, PROJECTIONS, TINY, Architecture, empty_policy, random_weights
from poco_vla_pi05.prefix import Pi05Prefix, encode
from poco_vla_pi05.tokenizer import DEFAULT, byte_tokenizer, load_tokenizer, saved_tokenizer

logger = logging.getLogger(__name__)

TOKENIZER_FOLDER = "tokenizer"
VISION_DTYPE = "vision_dtype"
"""Option, and what poco.json calls it."""
LORA_TARGETS = (*TRANSFORMER_LAYERS, *PROJECTIONS)
"""Every projection of the head but the adaRMS ones (`dense`). LeRobot 0.6.1's own default misses `time_mlp_*`."""


@dataclass(frozen=True)
class Pi05Options:
    """Options of pi0.5 beside those of every LeRobot policy.

    Attributes:
        tokenizer: Hub id, folder or sentencepiece file; the checkpoint's own or LeRobot's default when None.
        asset: openpi's dataset id, where a checkpoint has several.
        recompute: see :class:`Pi05`.
        compute: see :class:`Pi05`.
        vision_dtype: dtype of SigLIP; when None that which a saved head was trained on, else LeRobot's float32.
    """

    tokenizer: str | Path | None = None
    asset: str | None = None
    recompute: bool = True
    compute: Literal["bfloat16", "float32"] | None = None
    vision_dtype: Literal["bfloat16", "float32"] | None = None

    def __post_init__(self) -> None:
        check_choice("compute", self.compute, DTYPES)
        check_choice("vision_dtype", self.vision_dtype, DTYPES)


@dataclass(frozen=True)
class Pi05Parts:
    """Hold what a policy needs beside its configuration and weights: its tokenizer, its sizes, and SigLIP's dtype."""

    tokenizer: Any
    architecture: Architecture
    vision: torch.dtype


class Pi05(LeRobotVla):
    """pi0.5 with a frozen backbone and a trainable action head.

    The head is the action expert without its language head and the four projections around it: 430,098,464 parameters
    in float32, or a LoRA on them. Everything else is frozen in the backbone's dtype, by default the configuration's,
    except SigLIP and norms, which LeRobot keeps in float32; "bfloat16" saves 7 GB. `vision_dtype` rounds SigLIP, too.

    pi0.5 counts time from the action (1 is noise) and predicts noise - action; this class converts both. Chunks are not
    clipped, as in pi0.5's own sampler: quantile normalisation leaves 2 % of the demonstrated actions outside [-1, 1].
    A shorter horizon than the checkpoint's is exact: no parameter depends on it. Checkpoints of openpi load, too.

    Args:
        policy: see :class:`poco_vla.adapting.lerobot_vla.LeRobotVla`, as of the other arguments that are not here. It
            stays usable by itself, except for LeRobot's joint training forward where the backbone is bfloat16.
        pipelines: likewise.
        architecture: its sizes.
        compute: dtype of the head's matrix products; None is the VLM's dtype.
        recompute: keep one tensor per layer for backward and compute the rest again: the head's forward and backward
            take a third longer and an eighth of the memory.
        source: likewise.
        lora: likewise.
        order: likewise.
    """

    adapter = "pi05"
    model = "pi0.5"
    example = 'a LeRobot folder or Hub id, such as "lerobot/pi05_base", or the folder of an openpi PyTorch checkpoint'
    backbone = "paligemma_with_expert.paligemma"
    head_modules = {"expert": "paligemma_with_expert.gemma_expert.model"} | {name: name for name in PROJECTIONS}
    lora_targets = LORA_TARGETS
    peft = heads.PeftLayout(modules=("gemma_expert.model", *PROJECTIONS), idle="multi_modal_projector.linear")
    input_steps = processors.INPUT_STEPS
    output_steps = processors.OUTPUT_STEPS
    options_class = Pi05Options
    takes_shared_time = True

    def __init__(
        self,
        policy: PI05Policy,
        pipelines: tuple[Any, Any] | None = None,
        *,
        architecture: Architecture | None = None,
        compute: torch.dtype | None = None,
        recompute: bool = True,
        source: heads.Source | None = None,
        lora: Lora | None = None,
        order: naming.VectorOrder | None = None,
    ) -> None:
        core: Any = policy.model.paligemma_with_expert
        dtype = compute or core.paligemma.model.language_model.layers[0].self_attn.q_proj.weight.dtype
        if lora is not None:
            for name, parameter in policy.model.named_parameters():
                if self.in_head(name) and _in_layers(name):
                    parameter.data = parameter.data.to(dtype)
        super().__init__(
            policy,
            pipelines,
            flow_steps=policy.config.num_inference_steps,
            width=core.paligemma.config.text_config.hidden_size,
            source=source,
            lora=lora,
            lora_dtype=lambda name: dtype if _in_layers(name) else torch.float32,
            order=order,
        )
        self.compute, self.recompute, self.architecture = dtype, recompute, architecture or Architecture()
        if self.architecture != Architecture():
            self.lerobot_arguments = ("--plugin.discover_packages_path=poco_vla_pi05.small",)
        self.train(self.training)  # LeRobot's gradient checkpointing would give no cache in train mode

    @property
    def backbone_dtype(self) -> torch.dtype:
        core: Any = self.policy.model.paligemma_with_expert
        return core.paligemma.model.language_model.layers[0].self_attn.q_proj.weight.dtype

    @property
    def _about(self) -> dict[str, Any]:
        vision: Any = self.policy.model.paligemma_with_expert.paligemma.model.vision_tower
        dtype = next(vision.parameters()).dtype
        own = {} if dtype == torch.float32 else {VISION_DTYPE: str(dtype).removeprefix("torch.")}
        return super()._about | own

    # -- the contract -------------------------------------------------------------------------------------------

    def check_processed(self, processed: Mapping[str, Any]) -> None:
        processors.check_prompts(processed, self.tokenizer_step)

    def check_prompts(self, tasks: Sequence[str]) -> None:
        """Raise DataError if an instruction and the longest state there can be do not fit the prompt."""
        if self.preprocessor is not None:
            processors.check_longest_prompts(self.preprocessor, tasks, self.policy.config)

    def encode(self, obs: Mapping[str, Any]) -> Pi05Prefix:
        """Run SigLIP and the VLM once per state; see :func:`poco_vla_pi05.prefix.encode`."""
        raw.refuse_raw(obs, (OBS_STATE, OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK))
        with torch.autocast(self.device.type, enabled=False):  # the dtypes are chosen here, for training and acting
            return encode(self.policy, obs)

    def unpack(self, states: Sequence[Mapping[str, Tensor]]) -> Pi05Prefix:
        return Pi05Prefix.unpack(states)

    def velocity(self, prefix: Any, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return -expert.velocity(self.policy.model, prefix, x, 1 - t, compute=self.compute, recompute=self.recompute)

    def sampling(self) -> AbstractContextManager[None]:
        return rounded_weights(self.head)

    def resize_images(self, images: np.ndarray) -> np.ndarray:
        """Return pictures at the model's resolution, by LeRobot's own letterbox, rounded to uint8."""
        height, width = self.policy.config.image_resolution
        if images.shape[1:3] == (height, width):
            return images
        resized = resize_with_pad_torch(torch.from_numpy(images).permute(0, 3, 1, 2), height, width)
        return resized.permute(0, 2, 3, 1).contiguous().numpy()

    def sample_time(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """1 - (Beta(1.5, 1) * 0.999 + 0.001): pi0.5's own training distribution, mirrored (most draws near noise)."""
        config = self.policy.config
        alpha, beta = config.time_sampling_beta_alpha, config.time_sampling_beta_beta
        device = generator.device if generator else None

        def gamma(concentration: float) -> Tensor:  # torch.distributions takes no generator
            parameter = torch.full(tuple(shape), concentration, device=device)
            return torch._standard_gamma(parameter, generator=generator)  # pyright: ignore[reportPrivateImportUsage]

        first, second = gamma(alpha), gamma(beta)
        time = first / (first + second) * config.time_sampling_scale + config.time_sampling_offset
        return 1 - time

    def native_sample(self, obs: Mapping[str, Any], noise: Tensor) -> Tensor:
        images, masks = self.policy._preprocess_images(dict(obs))
        return self.policy.model.sample_actions(
            images, masks, obs[OBS_LANGUAGE_TOKENS], obs[OBS_LANGUAGE_ATTENTION_MASK], noise=noise
        )

    # -- loading ------------------------------------------------------------------------------------------------

    @classmethod
    def describe(cls, found: Checkpoint, options: LoadOptions, own: Pi05Options) -> Described:
        return checkpoint.describe(found, options, own.asset)

    @classmethod
    def load_parts(cls, found: Checkpoint, config: PI05Config, own: Pi05Options) -> Pi05Parts:
        folder = found.source.folder
        beside = folder / TOKENIZER_FOLDER
        tokenizer = own.tokenizer or (beside if beside.is_dir() else saved_tokenizer(folder))
        vision = own.vision_dtype or heads.saved_dtype(folder, VISION_DTYPE) or "float32"
        return Pi05Parts(load_tokenizer(tokenizer), Architecture.of_folder(found.whole.folder), getattr(torch, vision))

    @classmethod
    def build_pipelines(
        cls, config: PI05Config, stats: Mapping[str, Any], tokenizer: Any, *, renames: Mapping[str, str] | None = None
    ) -> tuple[Any, Any]:
        return processors.build(config, stats, tokenizer, renames=renames)

    @classmethod
    def load_policy(
        cls, config: PI05Config, parts: Pi05Parts, opened: Weights, dtype: str | None, device: str
    ) -> PI05Policy:
        policy = empty_policy(config, parts.architecture)
        backbone = getattr(torch, dtype or config.dtype)
        dtypes = {"backbone": backbone, "vision": parts.vision}
        checkpoint.load_weights(policy, opened, **dtypes, in_head=cls.in_head, device=device)
        return policy

    @classmethod
    def assemble(
        cls, policy: PI05Policy, pipelines: tuple[Any, Any], parts: Pi05Parts, own: Pi05Options, **kept: Any
    ) -> Self:
        compute = getattr(torch, own.compute) if own.compute else None
        return cls(policy, pipelines, architecture=parts.architecture, compute=compute, recompute=own.recompute, **kept)

    @classmethod
    def tiny(cls, seed: int = 0) -> Self:
        """Build LeRobot's own classes at :data:`poco_vla_pi05.architecture.TINY`: two cameras, 6 state dimensions, 4
        action dimensions (of 32), chunks of 50 steps, a tokenizer of bytes."""
        config = PI05Config(**tiny_features(), image_resolution=(TINY.image_size, TINY.image_size), device="cpu")
        policy = empty_policy(config, TINY)
        checkpoint.drop_language_heads(policy)
        policy.load_state_dict(random_weights(policy, seed), assign=True)
        pipelines = processors.build(config, tiny_stats(q01=-2.0, q99=2.0), byte_tokenizer())
        return cls(policy, pipelines, architecture=TINY)

    def example_obs(self, batch_size: int, seed: int = 0) -> dict[str, Any]:
        """Return pictures of noise and prompts of different lengths."""
        generator = torch.Generator().manual_seed(seed)
        config = self.policy.config
        assert config.robot_state_feature is not None
        images = {
            key: torch.rand((batch_size, *feature.shape), generator=generator)
            for key, feature in config.image_features.items()
        }
        length = config.tokenizer_max_length
        mask = torch.arange(length) < torch.randint(8, 40, (batch_size, 1), generator=generator)
        tokens = torch.randint(5, 200, (batch_size, length), generator=generator) * mask
        state = torch.randn((batch_size, config.robot_state_feature.shape[0]), generator=generator)
        return images | {OBS_STATE: state, OBS_LANGUAGE_TOKENS: tokens, OBS_LANGUAGE_ATTENTION_MASK: mask}

    # -- saving -------------------------------------------------------------------------------------------------

    def saved_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return checkpoint.full_weights(self.policy, tensors)

    def save_parts(self, config: PI05Config, partial: Path, final: Path) -> str:
        """Write sizes that are not the real model's, and a tokenizer that is not LeRobot's default."""
        if self.architecture != Architecture():
            (partial / ARCHITECTURE_FILE).write_text(self.architecture.to_json() + "\n")
        tokenizer = self.tokenizer_step.input_tokenizer
        if getattr(tokenizer, "name_or_path", None) == DEFAULT:
            return DEFAULT
        tokenizer.save_pretrained(partial / TOKENIZER_FOLDER)
        name = str(final.resolve() / TOKENIZER_FOLDER)
        logger.info("LeRobot will look for the tokenizer in %s: its own commands find it there only", name)
        return name


def _in_layers(name: str) -> bool:
    """Return True if a part of the head works in the head's compute dtype: attention and MLP. The rest stays in
    float32."""
    return ".self_attn." in name or ".mlp." in name
