"""pi0.5's LeRobot pipelines: normalise, write the state into the prompt, tokenise; and back.

LeRobot's own factory loads its gated tokenizer by name in the constructor. Here a tokenizer that is already loaded is
handed over instead, and what is saved is what LeRobot saves.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    ProcessorStep,
    RelativeActionsProcessorStep,
    TokenizerProcessorStep,
    TransitionKey,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from lerobot.processor.converters import create_transition
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_STATE

from poco_vla import DataError
from poco_vla.adapting import processors as pipelines

INPUT_STEPS: pipelines.Steps = {
    **pipelines.INPUT_STEPS,
    **pipelines.TOKENIZER_STEP,
    "relative_actions_processor": {
        "enabled": pipelines.FLAG,
        "exclude_joints": pipelines.list_of(pipelines.TEXT),
        "action_names": pipelines.optional(pipelines.list_of(pipelines.TEXT)),
    },
    "pi05_prepare_state_tokenizer_processor_step": {
        "max_state_dim": pipelines.whole_number(65_536, 1),
        "task_key": pipelines.TEXT,
    },
}
OUTPUT_STEPS: pipelines.Steps = {
    **pipelines.OUTPUT_STEPS,
    "absolute_actions_processor": {"enabled": pipelines.FLAG},
}
LONGEST_STATES = (1.0, 0.01, -0.2)
"""Normalised numbers that are written with three digits: 255, 129, 102."""
type Stats = Mapping[str, Mapping[str, Any]]


def build(
    config: PI05Config, stats: Stats, tokenizer: Any, *, renames: Mapping[str, str] | None = None
) -> tuple[Any, Any]:
    """Build pipelines, step for step those of LeRobot's `make_pi05_pre_post_processors`; `renames` are of cameras."""
    relative = RelativeActionsProcessorStep(
        enabled=config.use_relative_actions,
        exclude_joints=config.relative_exclude_joints,
        action_names=config.action_feature_names,
    )
    steps = make_default_policy_processor_steps(config, {key: dict(value) for key, value in stats.items()})
    steps.rename_observations.rename_map = dict(renames or {})
    inputs: list[ProcessorStep] = [
        steps.rename_observations,
        steps.add_batch_dim,
        relative,
        steps.normalize,
        Pi05PrepareStateTokenizerProcessorStep(max_state_dim=config.max_state_dim),
        TokenizerProcessorStep(
            tokenizer=tokenizer, max_length=config.tokenizer_max_length, padding_side="right", padding="max_length"
        ),
        steps.to_device,
    ]
    outputs: list[ProcessorStep] = [
        steps.unnormalize,
        AbsoluteActionsProcessorStep(enabled=config.use_relative_actions, relative_step=relative),
        steps.to_cpu,
    ]
    return make_policy_processor_pipelines(inputs, outputs)


def check_prompts(processed: Mapping[str, Any], words: TokenizerProcessorStep) -> None:
    """Raise DataError for a prompt that LeRobot's tokenizer step has cut off without a word.

    Args:
        processed: a batch behind the pre-processor.
        words: its step that makes tokens.
    """
    full = processed[OBS_LANGUAGE_ATTENTION_MASK].all(dim=1)
    if not full.any():
        return
    for row in full.nonzero().flatten().tolist():
        tokens, limit = len(words.input_tokenizer(processed["task"][row])["input_ids"]), words.max_length
        if tokens > limit:
            raise DataError(
                f"the prompt of row {row} takes {tokens} tokens, and the policy reads {limit}: its end would be cut "
                "off (the state is part of it): shorten the instruction, or give policy_options "
                f'{{"tokenizer_max_length": {_longer(limit, tokens)}}}.'
            )


def check_longest_prompts(pipeline: Any, tasks: Sequence[str], config: PI05Config) -> None:
    """Raise DataError if an instruction and the longest state there can be do not fit the prompt.

    The state is written as a number from -1 to 255 for each of its dimensions, so that its tokens depend on the digits:
    three each at most. That bound holds for every demonstration, and for what a robot meets beyond them.

    Args:
        pipeline: the pre-processor.
        tasks: the instructions.
        config: the policy's.
    """
    assert config.robot_state_feature is not None
    prepare = pipelines.step_of(pipeline, Pi05PrepareStateTokenizerProcessorStep)
    words = pipelines.step_of(pipeline, TokenizerProcessorStep)
    size, limit = config.robot_state_feature.shape[0], words.max_length
    for task in dict.fromkeys(tasks):
        states = torch.tensor(LONGEST_STATES)[:, None].expand(-1, size)
        made = prepare(create_transition({OBS_STATE: states}, complementary_data={"task": [task] * len(states)}))
        prompts = made[TransitionKey.COMPLEMENTARY_DATA]["task"]
        longest = max(map(len, words.input_tokenizer(prompts)["input_ids"]))
        if longest >= limit:
            raise DataError(
                f"the instruction {task[:80]!r} with a state of {size} numbers takes up to {longest} tokens, and the "
                f"prompt has {limit}: its end would be cut off. Shorten the instruction, or give policy_options "
                f'{{"tokenizer_max_length": {_longer(limit, longest)}}}.'
            )


def _longer(limit: int, tokens: int) -> int:
    """Return a multiple of a limit that is above a number of tokens."""
    return limit * (1 + tokens // limit)
