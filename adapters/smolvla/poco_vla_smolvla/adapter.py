"""``smolvla`` as a poco_vla adapter: LeRobot's SmolVLAPolicy behind :class:`poco_vla.FlowPolicy`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lerobot.policies.common.vla_utils import resize_with_pad
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor

from poco_vla import Lora, raw
from poco_vla.adapting import naming
from poco_vla.adapting.lerobot_checkpoint import Checkpoint, Described, LoadOptions, tiny_features, tiny_stats
from poco_vla.adapting.lerobot_vla import TRANSFORMER_LAYERS, LeRobotVla
from poco_vla.adapting.weights import Weights
from poco_vla.pretrained import heads
from poco_vla_smolvla import checkpoint, network
from poco_vla_smolvla.network import SmolVlaPrefix
from poco_vla_smolvla.vlm import Vlm, empty_policy, random_weights, tiny_vlm

PROJECTIONS = ("action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out")
LORA_TARGETS = (*TRANSFORMER_LAYERS, *PROJECTIONS)
VLM_FOLDER = "vlm"
"""Beside the weights of a policy whose VLM is nowhere else: configuration and tokenizer."""


@dataclass(frozen=True)
class SmolVlaOptions:
    """Options of SmolVLA beside those of every LeRobot policy.

    Attributes:
        vlm: Hub id or folder of the VLM's configuration and tokenizer; the checkpoint's own when None.
    """

    vlm: str | Path | None = None


@dataclass(frozen=True)
class SmolVlaParts:
    """Hold what a policy needs beside its configuration and weights.

    Attributes:
        vlm: configuration and tokenizer of its VLM.
        kept: the same, where they are to be saved beside the weights.
    """

    vlm: Vlm
    kept: Vlm | None

    @property
    def tokenizer(self) -> Any:
        return self.vlm.tokenizer


class SmolVla(LeRobotVla):
    """SmolVLA with a frozen VLM and a trainable action expert.

    The head is the expert and the four projections around it, in float32, or a LoRA on them. Everything else is frozen,
    by default in the dtype of the file, `state_proj` with it, which LeRobot trains: it makes the state's token of the
    prefix, and a prefix is encoded once and does not change while the head trains.

    SmolVLA counts time from the action (1 is noise) and predicts noise - action; this class converts both. Chunks are
    not clipped, as in SmolVLA's own sampler: normalised by mean and deviation, actions have no fixed range. A shorter
    horizon than the checkpoint's is exact: a step sees none after it.

    Args:
        policy: see :class:`poco_vla.adapting.lerobot_vla.LeRobotVla`, as of the other arguments that are not here.
        pipelines: likewise.
        vlm: configuration and tokenizer of its VLM, if they are to be saved beside the weights; None where LeRobot
            finds them under `config.vlm_model_name`.
        source: likewise.
        lora: likewise.
        order: likewise.
    """

    adapter = "smolvla"
    model = "SmolVLA"
    example = 'the folder or Hub id of one, such as "lerobot/smolvla_base"'
    backbone = "vlm_with_expert.vlm"
    head_modules = {"expert": "vlm_with_expert.lm_expert"} | {name: name for name in PROJECTIONS}
    lora_targets = LORA_TARGETS
    peft = heads.PeftLayout(modules=("lm_expert", *PROJECTIONS), idle="modality_projection.proj")
    input_steps = checkpoint.INPUT_STEPS
    options_class = SmolVlaOptions

    def __init__(
        self,
        policy: SmolVLAPolicy,
        pipelines: tuple[Any, Any] | None = None,
        *,
        vlm: Vlm | None = None,
        source: heads.Source | None = None,
        lora: Lora | None = None,
        order: naming.VectorOrder | None = None,
    ) -> None:
        text: Any = policy.model.vlm_with_expert.config.text_config
        steps, width = policy.config.num_steps, text.hidden_size
        super().__init__(policy, pipelines, flow_steps=steps, width=width, source=source, lora=lora, order=order)
        self.vlm = vlm

    @property
    def backbone_dtype(self) -> torch.dtype | None:
        dtypes = {parameter.dtype for parameter in self.policy.model.vlm_with_expert.vlm.parameters()}
        return dtypes.pop() if len(dtypes) == 1 else None

    # -- the contract -------------------------------------------------------------------------------------------

    def check_processed(self, processed: Mapping[str, Any]) -> None:
        checkpoint.check_instructions(processed, self.tokenizer_step)

    def check_prompts(self, tasks: Sequence[str]) -> None:
        """Raise DataError if an instruction is longer than the model reads."""
        if self.preprocessor is not None:
            for task in dict.fromkeys(tasks):
                checkpoint.check_instruction(task, self.tokenizer_step)

    def resize_images(self, images: np.ndarray) -> np.ndarray:
        """Return pictures at the model's resolution, by LeRobot's own letterbox, rounded to uint8."""
        size = self.policy.config.resize_imgs_with_padding
        if size is None or images.shape[1:3] == size[::-1]:
            return images
        tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        resized = resize_with_pad(tensor, size[1], size[0], pad_value=0).round().byte()
        return resized.permute(0, 2, 3, 1).contiguous().numpy()

    def encode(self, obs: Mapping[str, Any]) -> SmolVlaPrefix:
        """Run SigLIP and the VLM once per state; see :func:`poco_vla_smolvla.network.encode`."""
        raw.refuse_raw(obs, (OBS_STATE, OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK))
        with torch.autocast(self.device.type, enabled=False):  # acting and training are one function
            return network.encode(self.policy, obs)

    def unpack(self, states: Sequence[Mapping[str, Tensor]]) -> SmolVlaPrefix:
        return SmolVlaPrefix.unpack(states)

    def velocity(self, prefix: Any, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return -network.velocity(self.policy.model, prefix, x, 1 - t)

    def sample_time(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """1 - (0.999 Beta(1.5, 1) + 0.001): SmolVLA's own training distribution, mirrored (most draws near noise).

        The distribution function of Beta(1.5, 1) is u^1.5, so that u^(2/3) draws from it.
        """
        u = torch.rand(tuple(shape), generator=generator, device=generator.device if generator else None)
        return 0.999 * (1 - u ** (2 / 3))

    def native_sample(self, obs: Mapping[str, Any], noise: Tensor) -> Tensor:
        return self.policy.model.sample_actions(*network.inputs(self.policy, obs), noise=noise)

    # -- loading and saving -------------------------------------------------------------------------------------

    @classmethod
    def describe(cls, found: Checkpoint, options: LoadOptions, own: SmolVlaOptions) -> Described:
        config = checkpoint.read_configuration(found.source)
        return Described(config, found.stats(config, options))

    @classmethod
    def load_parts(cls, found: Checkpoint, config: SmolVLAConfig, own: SmolVlaOptions) -> SmolVlaParts:
        beside = found.whole.folder / VLM_FOLDER
        if own.vlm is not None:
            config.vlm_model_name = str(Path(own.vlm).resolve()) if Path(own.vlm).is_dir() else str(own.vlm)
        is_beside = own.vlm is None and beside.is_dir()
        vlm = Vlm.load(beside if is_beside else config.vlm_model_name)
        return SmolVlaParts(vlm, vlm if is_beside or Path(config.vlm_model_name).is_dir() else None)

    @classmethod
    def build_pipelines(
        cls,
        config: SmolVLAConfig,
        stats: Mapping[str, Any],
        tokenizer: Any,
        *,
        renames: Mapping[str, str] | None = None,
    ) -> tuple[Any, Any]:
        return checkpoint.build_pipelines(config, stats, tokenizer, renames=renames)

    @classmethod
    def load_policy(
        cls, config: SmolVLAConfig, parts: SmolVlaParts, opened: Weights, dtype: str | None, device: str
    ) -> SmolVLAPolicy:
        policy = empty_policy(config, parts.vlm)
        checkpoint.load_weights(policy, opened, device=device, dtype=getattr(torch, dtype) if dtype else None)
        return policy.eval()

    @classmethod
    def assemble(
        cls, policy: SmolVLAPolicy, pipelines: tuple[Any, Any], parts: SmolVlaParts, own: SmolVlaOptions, **kept: Any
    ) -> Self:
        return cls(policy, pipelines, vlm=parts.kept, **kept)

    @classmethod
    def tiny(cls, seed: int = 0) -> Self:
        """Build LeRobot's own classes, small: two cameras, 6 state and 4 action dimensions (of 32), chunks of 50."""
        config = SmolVLAConfig(**tiny_features(), resize_imgs_with_padding=(32, 32), num_vlm_layers=4, device="cpu")
        vlm = tiny_vlm()
        policy = empty_policy(config, vlm)
        policy.load_state_dict(random_weights(policy, seed), assign=True)
        pipelines = checkpoint.build_pipelines(config, tiny_stats(mean=0.0, std=1.0), vlm.tokenizer)
        return cls(policy.eval(), pipelines, vlm=vlm)

    def example_obs(self, batch_size: int, seed: int = 0) -> dict[str, Any]:
        """Return pictures of noise and prompts of different lengths."""
        generator = torch.Generator().manual_seed(seed)
        config = self.policy.config
        assert config.robot_state_feature is not None
        obs: dict[str, Any] = {
            key: torch.rand((batch_size, *feature.shape), generator=generator)
            for key, feature in config.image_features.items()
        }
        mask = torch.arange(12) < 12 - 3 * (torch.arange(batch_size)[:, None] % 3)
        obs[OBS_LANGUAGE_TOKENS] = torch.randint(5, 200, mask.shape, generator=generator) * mask
        obs[OBS_STATE] = torch.randn((batch_size, config.robot_state_feature.shape[0]), generator=generator)
        return obs | {OBS_LANGUAGE_ATTENTION_MASK: mask}

    def saved_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if checkpoint.tied(self.policy):
            tensors.pop(checkpoint.LANGUAGE_HEAD)
        return tensors

    def save_parts(self, config: SmolVLAConfig, partial: Path, final: Path) -> str:
        """Write a VLM's configuration and tokenizer that are nowhere else."""
        if self.vlm is not None:
            self.vlm.save(partial / VLM_FOLDER)
            config.vlm_model_name, config.load_vlm_weights = str(final.resolve() / VLM_FOLDER), False
        return config.vlm_model_name
