"""LeRobot's pre- and post-processor of ``groot_n1d6``, from a configuration and a dataset."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
    make_policy_processor_pipelines,
)

from lerobot_policy_groot_n1d6.processing import statistics as stats
from lerobot_policy_groot_n1d6.processing.checkpoint import PROCESSOR, CheckpointProcessing, read_checkpoint
from lerobot_policy_groot_n1d6.processing.embodiment import NEW, Embodiment, read_table
from lerobot_policy_groot_n1d6.processing.errors import ProcessingError
from lerobot_policy_groot_n1d6.processing.images import ImageRules
from lerobot_policy_groot_n1d6.processing.normalization import Rules
from lerobot_policy_groot_n1d6.processing.prompt import QWEN
from lerobot_policy_groot_n1d6.processing.steps import DecodeStep, EncodeStep, ImageStep, PromptStep
from lerobot_policy_groot_n1d6.weights import locate

logger = logging.getLogger(__name__)

type Pipelines = tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]
]

IDENTITY = dict.fromkeys(FeatureType, NormalizationMode.IDENTITY)


@dataclass(frozen=True)
class Processing:
    """Everything that the processors of one policy do.

    Attributes:
        embodiment: the robot.
        statistics: of its data; None where they are to be loaded later.
        rules: of normalisation.
        images: of the camera frames.
        formalize_language: lower-case instructions without punctuation.
    """

    embodiment: Embodiment
    statistics: stats.Statistics | None = None
    rules: Rules = field(default_factory=Rules)
    images: ImageRules = field(default_factory=ImageRules)
    formalize_language: bool = True


def make_groot_n1d6_pre_post_processors(
    config: Any, dataset_stats: Mapping[str, Mapping[str, Any]] | None = None, dataset_meta: Any | None = None
) -> Pipelines:
    """The pipelines of a policy.

    Args:
        config: the policy's. Read are ``device``, ``input_features``, ``output_features``, ``chunk_size``,
            ``max_state_dim``, ``max_action_dim`` and, where it has them, ``embodiment`` (an Embodiment, its description
            or a JSON file of one; None is `Embodiment.plain`), ``base_model_path`` (a checkpoint's folder),
            ``tokenizer``, ``byte_ids``, ``letterbox``, ``exact_images``, ``augment_images``.
        dataset_stats: LeRobot's statistics of the dataset.
        dataset_meta: LeRobot's description of the dataset, from whose files statistics of relative actions are
            computed. `make_policy` leaves it on the configuration.

    Raises:
        ProcessingError: these do not fit together, or the tokenizer cannot be had.
    """
    dataset_meta = dataset_meta or getattr(config, "_runtime_dataset_meta", None)
    return make_pipelines(config, resolve(config, dataset_stats, dataset_meta))


def make_pipelines(config: Any, processing: Processing) -> Pipelines:
    """Rename, batch axis, device, images, state and actions, prompt; and back: actions, then the CPU."""
    embodiment = processing.embodiment
    shared: dict[str, Any] = {
        "max_action_dim": config.max_action_dim,
        "use_percentiles": processing.rules.use_percentiles,
        "clip_outliers": processing.rules.clip_outliers,
        "clip_deviations": processing.rules.clip_deviations,
        "statistics": processing.statistics,
    }
    encode = EncodeStep(embodiment, config.max_state_dim, **shared)
    images, augment = processing.images, getattr(config, "augment_images", False)
    prompts = PromptStep(
        embodiment,
        getattr(config, "tokenizer", None) or QWEN,
        processing.formalize_language,
        getattr(config, "byte_ids", None),
    )
    _ = prompts.tokenizer  # an error now, not after the model has been loaded
    return make_policy_processor_pipelines(
        [
            RenameObservationsProcessorStep(rename_map={}),
            AddBatchDimensionProcessorStep(),
            # Frames are resized on the policy's device.
            DeviceProcessorStep(device=config.device or "cpu"),
            # Does nothing; lerobot-train overrides a step of this name when it starts from a saved policy.
            NormalizerProcessorStep(features={}, norm_map=IDENTITY),
            ImageStep(embodiment, images.shortest_edge, images.crop_fraction, images.letterbox, images.exact, augment),
            encode,
            prompts,
        ],
        [
            DecodeStep(embodiment, encode=encode, **shared),
            UnnormalizerProcessorStep(features={}, norm_map=IDENTITY),  # likewise
            DeviceProcessorStep(device="cpu"),
        ],
    )


def resolve(
    config: Any, dataset_stats: Mapping[str, Mapping[str, Any]] | None = None, dataset_meta: Any | None = None
) -> Processing:
    """Embodiment, statistics and rules from what a configuration, a checkpoint and a dataset say.

    An embodiment that the checkpoint describes keeps the checkpoint's statistics: its weights know those units. Any
    other one takes the dataset's.

    Raises:
        ProcessingError: these do not fit together.
    """
    letterbox, exact = getattr(config, "letterbox", False), getattr(config, "exact_images", False)
    checkpoint = _checkpoint(getattr(config, "base_model_path", None), getattr(config, "base_revision", None))
    rules = Rules() if checkpoint is None else checkpoint.rules
    images = ImageRules(letterbox=letterbox, exact=exact)
    formal = True
    if checkpoint is not None:
        images = checkpoint.image_rules(letterbox=letterbox, exact=exact)
        formal = checkpoint.formalize_language
    described = _described(config, checkpoint)
    if described is not None:
        embodiment, statistics = described
        logger.info('statistics of embodiment "%s" are those of the checkpoint', embodiment.tag)
    else:
        embodiment = _own(config)
        statistics = _statistics(embodiment, dataset_stats, dataset_meta)
        rules = replace(rules, clip_deviations=False)
    _check(embodiment, config)
    return Processing(embodiment, statistics, rules, images, formal)


def _checkpoint(path: str | Path | None, revision: str | None) -> CheckpointProcessing | None:
    if path is None:
        return None
    folder = locate(str(path), revision)
    return read_checkpoint(folder) if (folder / PROCESSOR).is_file() else None


def _described(config: Any, checkpoint: CheckpointProcessing | None) -> tuple[Embodiment, stats.Statistics] | None:
    """The embodiment that a checkpoint describes, where the configuration asks for one of its."""
    source = getattr(config, "embodiment", None)
    if checkpoint is None or source is None or isinstance(source, Embodiment):
        return None
    table = read_table(source)
    tag = table.get("tag", NEW)
    if tag in checkpoint.embodiments or not table.get("action"):
        return checkpoint.embodiment(tag, table)
    return None


def _own(config: Any) -> Embodiment:
    source = getattr(config, "embodiment", None)
    if source is None:
        return Embodiment.plain(config.input_features or {}, config.output_features or {}, horizon=config.chunk_size)
    return Embodiment.parse(source, horizon=config.chunk_size)


def _statistics(
    embodiment: Embodiment, dataset_stats: Mapping[str, Mapping[str, Any]] | None, dataset_meta: Any | None
) -> stats.Statistics | None:
    if any(key.is_relative for key in embodiment.action) and dataset_meta is not None:
        return stats.from_metadata(embodiment, dataset_meta)
    return stats.from_dataset_stats(embodiment, dataset_stats) if dataset_stats else None


def _check(embodiment: Embodiment, config: Any) -> None:
    features: dict[str, PolicyFeature] = {**(config.input_features or {}), **(config.output_features or {})}
    embodiment.check_columns(
        {key: None if feature.type is FeatureType.VISUAL else feature.shape[0] for key, feature in features.items()}
    )
    if config.chunk_size > embodiment.horizon:
        raise ProcessingError(
            f'chunk_size is {config.chunk_size}, but embodiment "{embodiment.tag}" and its statistics have a horizon '
            f"of {embodiment.horizon} steps. Expected at most that."
        )
