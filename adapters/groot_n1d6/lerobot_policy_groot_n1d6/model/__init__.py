"""GR00T N1.6's network, written from a description of it. Weights stay under their owners' terms."""

from lerobot_policy_groot_n1d6.model.backbone import Encoded, VisionLanguage
from lerobot_policy_groot_n1d6.model.configuration import GrootSizes, HeadSizes, LanguageSizes, VisionSizes
from lerobot_policy_groot_n1d6.model.embodiment import Embodiment
from lerobot_policy_groot_n1d6.model.flow import rollout, sample_time, training_loss
from lerobot_policy_groot_n1d6.model.head import ActionHead
from lerobot_policy_groot_n1d6.model.network import GrootN1d6, random_weights
from lerobot_policy_groot_n1d6.model.tokens import Group, Tokens, sort_tokens
from lerobot_policy_groot_n1d6.model.transformer import Memory
from lerobot_policy_groot_n1d6.model.vision import ImageEncoder

__all__ = [
    "ActionHead",
    "Embodiment",
    "Encoded",
    "GrootN1d6",
    "GrootSizes",
    "Group",
    "HeadSizes",
    "ImageEncoder",
    "LanguageSizes",
    "Memory",
    "Tokens",
    "VisionLanguage",
    "VisionSizes",
    "random_weights",
    "rollout",
    "sample_time",
    "sort_tokens",
    "training_loss",
]
