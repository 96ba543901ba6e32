"""Pre- and post-processing of ``flow_mlp``: LeRobot's default pipelines (batch axis, normalisation, device)."""

from typing import Any

import torch
from lerobot.processor import PolicyAction, PolicyProcessorPipeline, make_default_pre_post_processors

from lerobot_policy_flow_mlp.configuration_flow_mlp import FlowMlpConfig


def make_flow_mlp_pre_post_processors(
    config: FlowMlpConfig, dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]
]:
    """Pipelines built from the configuration's normalisation modes and a dataset's statistics."""
    return make_default_pre_post_processors(config, dataset_stats, normalizer_device=config.device)
