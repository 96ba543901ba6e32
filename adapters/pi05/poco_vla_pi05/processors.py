"""pi0.5's LeRobot pipelines: normalise, write the state into the prompt, tokenise; and back.

LeRobot's own factory loads its gated tokenizer by name in the constructor. Here a tokenizer that is already loaded is
handed over instead, and what is saved is what LeRobot saves.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    ProcessorStep,
    RelativeActionsProcessorStep,
    RenameObservationsProcessorStep,
    TokenizerProcessorStep,
    TransitionKey,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)
from lerobot.processor.converters import create_transition
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_STATE
from torch import Tensor

from poco_vla import DataError, PolicyError
from poco_vla.adapting import camera_names
from poco_vla.adapting import processors as pipelines

PREPROCESSOR, POSTPROCESSOR = pipelines.PREPROCESSOR, pipelines.POSTPROCESSOR
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


def load(
    folder: Path,
    config: PI05Config,
    tokenizer: Any,
    *,
    stats: Stats | None = None,
    normalization: bool = False,
    max_length: int | None = None,
    renames: Mapping[str, str] | None = None,
) -> tuple[Any, Any]:
    """Return the pipelines saved in `folder`, changed where it is asked for.

    Args:
        folder: holds both.
        config: the policy's; its device is taken.
        tokenizer: to use.
        stats: those of another dataset; its features and normalisation are then the configuration's, and names that the
            saved pipeline changes belong to the old one.
        normalization: take the configuration's normalisation, with the saved statistics.
        max_length: tokens of the longest prompt.
        renames: cameras of the data that have another name in the policy; None keeps the saved ones.
    """
    check_saved(folder)
    overrides: dict[str, Any] = {
        "tokenizer_processor": {"tokenizer": tokenizer, "tokenizer_name": None},
        "device_processor": {"device": config.device},
    }
    after: dict[str, Any] = {}
    if max_length is not None:
        overrides["tokenizer_processor"]["max_length"] = max_length
    if normalization:
        overrides["normalizer_processor"] = after["unnormalizer_processor"] = {"norm_map": config.normalization_mapping}
    if stats is not None:
        shared = {"stats": {key: dict(value) for key, value in stats.items()}, "norm_map": config.normalization_mapping}
        outputs = config.output_features or {}
        overrides["normalizer_processor"] = shared | {"features": {**(config.input_features or {}), **outputs}}
        overrides["rename_observations_processor"] = {"rename_map": dict(renames or {})}
        after["unnormalizer_processor"] = shared | {"features": outputs}
    elif renames is not None:
        table = camera_names.all_renames(folder / PREPROCESSOR, renames, config.image_features)
        overrides["rename_observations_processor"] = {"rename_map": table}
    try:
        return make_pre_post_processors(
            config, pretrained_path=str(folder), preprocessor_overrides=overrides, postprocessor_overrides=after
        )
    except Exception as error:  # LeRobot raises KeyError, ValueError, TypeError, its own ... on what does not fit
        raise PolicyError(f"the processors in {folder} cannot be loaded: {type(error).__name__}: {error}") from error


def check_saved(folder: Path) -> None:
    """Raise PolicyError if the pipelines in a folder hold steps or arguments that are not pi0.5's."""
    pipelines.check_pipelines(folder, INPUT_STEPS, OUTPUT_STEPS)


def check_inverse(pair: tuple[Any, Any], config: PI05Config, where: str) -> None:
    """Raise PolicyError unless the post-processor undoes to actions what the pre-processor does to them."""
    pipelines.check_inverse(*pair, config, where)
    kinds = (RelativeActionsProcessorStep, AbsoluteActionsProcessorStep)
    enabled = [
        any(step.enabled for step in one.steps if isinstance(step, kind)) for one, kind in zip(pair, kinds, strict=True)
    ]
    if enabled != [config.use_relative_actions] * 2:
        raise PolicyError(
            f"the processors in {where} do not belong together: use_relative_actions is {config.use_relative_actions}, "
            f"and actions are {'' if enabled[0] else 'not '}made relative going in, {'' if enabled[1] else 'not '}made "
            "absolute coming out"
        )


def are_saved(folder: Path) -> bool:
    """Return True if a folder holds both pipelines."""
    return pipelines.are_saved(folder)


def step_of[T: ProcessorStep](pipeline: Any, kind: type[T]) -> T:
    """A pipeline's step of a kind."""
    for step in pipeline.steps:
        if isinstance(step, kind):
            return step
    raise PolicyError(
        f"the pre-processor has no {kind.__name__}; it holds {[type(s).__name__ for s in pipeline.steps]}"
    )


def raw_keys(pipeline: Any, keys: Sequence[str]) -> tuple[str, ...]:
    """The names that `keys` have before the pipeline renames them."""
    renamed = {new: old for old, new in step_of(pipeline, RenameObservationsProcessorStep).rename_map.items()}
    return tuple(renamed.get(key, key) for key in keys)


def check_batch(batch: Mapping[str, Any], cameras: Sequence[str], state: str, config: PI05Config) -> None:
    """Raise DataError for a raw batch that the policy cannot read: a camera or the state is missing, a dimension is not
    the policy's, a number is not finite, an instruction is empty.

    Args:
        batch: what the pre-processor is to be given.
        cameras: its image keys, before any renaming.
        state: its state key, likewise.
        config: the policy's.
    """
    missing = [key for key in (*cameras, state) if key not in batch]
    if missing:
        raise DataError(f"the batch lacks {', '.join(missing)}; it holds {', '.join(sorted(batch))}")
    tasks = batch.get("task") or [""]
    empty = [i for i, task in enumerate([tasks] if isinstance(tasks, str) else tasks) if not str(task).strip()]
    if empty:
        raise DataError(
            f"row {empty[0]} of the batch has an empty instruction; pi0.5 is told in words what to do. Give the "
            'episodes a "task", or the environment a task description.'
        )
    sizes = {state: config.robot_state_feature, ACTION: config.action_feature}
    for key, feature in sizes.items():
        assert feature is not None
        if key in batch and batch[key].shape[-1] != feature.shape[0]:
            raise DataError(f'"{key}" has {batch[key].shape[-1]} dimensions, the policy knows {feature.shape[0]}')
    for key in (*cameras, state, ACTION):
        column = batch.get(key)
        if key in cameras and isinstance(column, Tensor) and not column.is_floating_point():
            raise DataError(
                f'"{key}" is {column.dtype}; LeRobot hands images over as float32 in [0, 1], and pi0.5 reads them so'
            )
        if isinstance(column, Tensor) and column.is_floating_point() and not torch.isfinite(column).all():
            row = 0 if batch[state].ndim == 1 else int((~torch.isfinite(column)).nonzero()[0, 0])
            raise DataError(f'"{key}" is NaN or infinite in row {row} of the batch')
        if key in cameras and isinstance(column, Tensor) and column.amax() > 1.01:
            raise DataError(f'"{key}" reaches {column.amax():.3g}; LeRobot hands images over in [0, 1]')


def check_prompts(processed: Mapping[str, Any], config: PI05Config) -> None:
    """Raise DataError for a prompt that LeRobot's tokenizer step may have cut off without a word."""
    full = processed[OBS_LANGUAGE_ATTENTION_MASK].all(dim=1)
    if full.any():
        raise DataError(
            f"the prompt of row {int(full.nonzero()[0])} fills all {config.tokenizer_max_length} tokens: its end may "
            "be cut off (the state is part of it): shorten the instruction, or give policy_options "
            f'{{"tokenizer_max_length": {2 * config.tokenizer_max_length}}}.'
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
    prepare = step_of(pipeline, Pi05PrepareStateTokenizerProcessorStep)
    words = step_of(pipeline, TokenizerProcessorStep)
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
                f'{{"tokenizer_max_length": {limit * (1 + longest // limit)}}}.'
            )
