"""A LeRobot ``smolvla`` folder: a complete match of weights and statistics, or an error that names what does not.

LeRobot's own `from_pretrained` logs a warning and returns a half-random model when names differ.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.processor import (
    NewLineTaskProcessorStep,
    TokenizerProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from lerobot.utils.constants import OBS_IMAGES, OBS_LANGUAGE_ATTENTION_MASK

from poco_vla import DataError, PolicyError
from poco_vla.adapting import camera_names, heads, policy_config, processors, weights

PREPROCESSOR, POSTPROCESSOR = processors.PREPROCESSOR, processors.POSTPROCESSOR
INPUT_STEPS: processors.Steps = {
    **processors.INPUT_STEPS,
    **processors.TOKENIZER_STEP,
    "smolvla_new_line_processor": {"task_key": processors.TEXT},
}
SIZES = dict.fromkeys(("num_vlm_layers", "num_expert_layers", "self_attn_every_n_layers"), 1000) | {
    "expert_width_multiplier": 16,
    "prefix_length": 65_536,
}
"""Largest values of this model's own fields."""
VLM = "model.vlm_with_expert.vlm."
LANGUAGE_HEAD = "model.vlm_with_expert.vlm.lm_head.weight"
EMBEDDINGS = "model.vlm_with_expert.vlm.model.text_model.embed_tokens.weight"
type Stats = Mapping[str, Mapping[str, Any]]


def read_config(source: heads.Source) -> SmolVLAConfig:
    """The configuration of a checkpoint.

    Raises:
        PolicyError: there is none, or it is of another model.
    """
    config = policy_config.load_policy_config(
        source.folder,
        "smolvla",
        SmolVLAConfig.from_pretrained,
        fields=[field.name for field in fields(SmolVLAConfig)],
        name=source.name,
        limits=SIZES,
    )
    if config.adapt_to_pi_aloha:
        raise PolicyError(
            f"{source.name} was trained with adapt_to_pi_aloha, whose actions this adapter does not convert"
        )
    return config


def cameras(config: SmolVLAConfig) -> list[str]:
    """Return a policy's cameras in the order of its slots, without LeRobot's empty ones."""
    return [key for key in config.image_features if not key.startswith(f"{OBS_IMAGES}.empty_camera")]


def load_weights(
    policy: SmolVLAPolicy, file: Path | weights.Weights, *, device: str, dtype: torch.dtype | None
) -> None:
    """Fill an empty policy from LeRobot's ``model.safetensors``, or what else holds the weights.

    Where a file holds one tensor for the language head and the embeddings that it is tied to, both get it.

    Args:
        policy: from :func:`poco_vla_smolvla.vlm.empty_policy`.
        file: the weights.
        device: where they go.
        dtype: of the VLM; None is the file's. All else is float32.

    Raises:
        PolicyError: the file is missing or damaged, or names or shapes differ.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in policy.named_parameters()}
    with weights.of_file(file) if isinstance(file, Path) else file as opened:
        tensors = {name: opened.tensor(name, as_stored=name.startswith(VLM)) for name in opened.keys()}  # noqa: SIM118
        where = opened.where
    if tied(policy):
        shared = tensors.get(EMBEDDINGS, tensors.get(LANGUAGE_HEAD))
        tensors |= {} if shared is None else {EMBEDDINGS: shared, LANGUAGE_HEAD: shared}
    heads.check_tensors(wanted, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, where)
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(device, (dtype or tensor.dtype) if name.startswith(VLM) else torch.float32)
    policy.load_state_dict(tensors, assign=True)
    policy.to(device)  # buffers


def tied(policy: SmolVLAPolicy) -> bool:
    """Whether the VLM's language head, which no action depends on, is its embeddings."""
    return bool(policy.model.vlm_with_expert.config.tie_word_embeddings)


def build_pipelines(
    config: SmolVLAConfig, stats: Stats, tokenizer: Any, *, renames: Mapping[str, str] | None = None
) -> tuple[Any, Any]:
    """Build pipelines, step for step those of LeRobot's `make_smolvla_pre_post_processors`, which loads its tokenizer
    by name; `renames` are of cameras."""
    steps = make_default_policy_processor_steps(config, {key: dict(value) for key, value in stats.items()})
    steps.rename_observations.rename_map = dict(renames or {})
    words = TokenizerProcessorStep(
        tokenizer=tokenizer,
        padding=config.pad_language_to,
        padding_side="right",
        max_length=config.tokenizer_max_length,
    )
    inputs = [steps.rename_observations, steps.add_batch_dim, NewLineTaskProcessorStep(), words, steps.to_device]
    return make_policy_processor_pipelines([*inputs, steps.normalize], [steps.unnormalize, steps.to_cpu])


def load_pipelines(
    folder: Path,
    config: SmolVLAConfig,
    tokenizer: Any,
    *,
    renames: Mapping[str, str] | None = None,
    max_length: int | None = None,
) -> tuple[Any, Any]:
    """Return the pipelines saved in `folder`, normalising as `config` says.

    Args:
        folder: holds both.
        config: the policy's.
        tokenizer: to use.
        renames: cameras of the data that have another name in the policy; None keeps the saved ones.
        max_length: tokens of the longest instruction; None keeps the saved one.
    """
    processors.check_pipelines(folder, INPUT_STEPS, processors.OUTPUT_STEPS)
    mapping = {"norm_map": config.normalization_mapping}
    words: dict[str, Any] = {"tokenizer": tokenizer, "tokenizer_name": None}
    overrides: dict[str, Any] = {
        "tokenizer_processor": words | ({} if max_length is None else {"max_length": max_length}),
        "device_processor": {"device": config.device},
        "normalizer_processor": mapping,
    }
    if renames is not None:
        table = camera_names.all_renames(folder / PREPROCESSOR, renames, config.image_features)
        overrides["rename_observations_processor"] = {"rename_map": table}
    try:
        return make_pre_post_processors(
            config,
            pretrained_path=str(folder),
            preprocessor_overrides=overrides,
            postprocessor_overrides={"unnormalizer_processor": mapping},
        )
    except Exception as error:  # LeRobot raises KeyError, ValueError, TypeError, its own ... on what does not fit
        raise PolicyError(f"the processors in {folder} cannot be loaded: {type(error).__name__}: {error}") from error


def check_instructions(processed: Mapping[str, Any], words: TokenizerProcessorStep) -> None:
    """Raise DataError if LeRobot's tokenizer step has cut off an instruction of a processed batch.

    Only rows that fill the longest prompt can be cut; those are tokenised once more, without a limit.
    """
    mask = processed[OBS_LANGUAGE_ATTENTION_MASK]
    if mask.shape[-1] < words.max_length:
        return
    tasks = processed.get("task") or ()
    for row, task in zip(mask.all(dim=-1).tolist(), [tasks] if isinstance(tasks, str) else tasks, strict=False):
        if row:
            check_instruction(task, words)


def check_instruction(task: str, words: TokenizerProcessorStep) -> None:
    """Raise DataError if an instruction has more tokens than the model is given."""
    text = task if task.endswith("\n") else f"{task}\n"
    tokens, limit = len(words.input_tokenizer(text)["input_ids"]), words.max_length
    if tokens > limit:
        raise DataError(
            f"the instruction {task.strip()[:80]!r} takes {tokens} tokens, and SmolVLA reads {limit}: its end would be "
            "cut off. Shorten the instruction, or give policy_options "
            f'{{"tokenizer_max_length": {limit * (1 + (tokens - 1) // limit)}}}.'
        )
