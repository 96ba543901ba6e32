"""A LeRobot ``smolvla`` folder: a complete match of weights and statistics, or an error that names what does not.

LeRobot's own `from_pretrained` logs a warning and returns a half-random model when names differ.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.processor import (
    NewLineTaskProcessorStep,
    TokenizerProcessorStep,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK

from poco_vla import DataError, PolicyError
from poco_vla.adapting import processors, weights
from poco_vla.adapting.lerobot_checkpoint import fill_policy, read_config
from poco_vla.pretrained import heads

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


def read_configuration(source: heads.Source) -> SmolVLAConfig:
    """Read the configuration of a checkpoint.

    Raises:
        PolicyError: there is none, or it is of another model.
    """
    config = read_config(source, SmolVLAConfig, model="SmolVLA", limits=SIZES)
    if config.adapt_to_pi_aloha:
        raise PolicyError(
            f"{source.name} was trained with adapt_to_pi_aloha, whose actions this adapter does not convert"
        )
    return config


def load_weights(policy: SmolVLAPolicy, opened: weights.Weights, *, device: str, dtype: torch.dtype | None) -> None:
    """Fill an empty policy from LeRobot's tensors.

    Where a file holds one tensor for the language head and the embeddings that it is tied to, both get it.

    Args:
        policy: from :func:`poco_vla_smolvla.vlm.empty_policy`.
        opened: the tensors.
        device: where they go.
        dtype: of the VLM; None is the file's. All else is float32.

    Raises:
        PolicyError: a file is missing or damaged, or names or shapes differ.
    """

    def names(keys: Iterable[str]) -> dict[str, str]:
        found = {key: key for key in keys}
        shared = found.get(EMBEDDINGS, found.get(LANGUAGE_HEAD))
        return found | ({EMBEDDINGS: shared, LANGUAGE_HEAD: shared} if shared and tied(policy) else {})

    def dtype_of(name: str) -> torch.dtype | None:
        return dtype if name.startswith(VLM) else torch.float32

    fill_policy(policy, opened, names=names, dtype_of=dtype_of, device=device)


def tied(policy: SmolVLAPolicy) -> bool:
    """Return True if the VLM's language head, which no action depends on, is its embeddings."""
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
