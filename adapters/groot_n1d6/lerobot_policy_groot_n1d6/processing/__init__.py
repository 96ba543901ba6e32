"""The data side of GR00T N1.6: embodiments, statistics, normalisation, images, prompts.

Importing this registers the processor steps, which LeRobot looks up by name when it loads a saved policy.
"""

from lerobot_policy_groot_n1d6.processing.checkpoint import CheckpointProcessing, read_checkpoint
from lerobot_policy_groot_n1d6.processing.embodiment import Embodiment
from lerobot_policy_groot_n1d6.processing.errors import ProcessingError
from lerobot_policy_groot_n1d6.processing.normalization import Rules, pad_chunk
from lerobot_policy_groot_n1d6.processing.steps import DecodeStep, EncodeStep, ImageStep, PromptStep, tag_chunk

__all__ = [
    "CheckpointProcessing",
    "DecodeStep",
    "Embodiment",
    "EncodeStep",
    "ImageStep",
    "ProcessingError",
    "PromptStep",
    "Rules",
    "pad_chunk",
    "read_checkpoint",
    "tag_chunk",
]
