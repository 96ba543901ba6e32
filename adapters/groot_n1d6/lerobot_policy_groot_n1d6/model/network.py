"""GR00T N1.6: the vision-language model and the action head, under the checkpoint's names (section 3)."""

from typing import Self

import torch
from torch import Tensor, nn

from lerobot_policy_groot_n1d6.model.backbone import VisionLanguage
from lerobot_policy_groot_n1d6.model.configuration import GrootSizes
from lerobot_policy_groot_n1d6.model.head import ActionHead


class GrootN1d6(nn.Module):
    """Its state dict is the checkpoint's, tensor for tensor, those that nothing uses included.

    `load_state_dict(..., assign=True)` fills a model of `empty` with a checkpoint's own tensors. A checkpoint may mix
    dtypes within the vision-language model: give that one dtype afterwards, `network.backbone.to(torch.bfloat16)`. The
    head may keep any, or several.
    """

    def __init__(self, sizes: GrootSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.backbone = nn.ModuleDict({"model": VisionLanguage(sizes.vision, sizes.language)})
        self.action_head = ActionHead(sizes.head)

    @classmethod
    def empty(cls, sizes: GrootSizes) -> Self:
        """On the meta device: no memory, no random numbers."""
        with torch.device("meta"):
            return cls(sizes)

    @classmethod
    def random(cls, sizes: GrootSizes, seed: int = 0) -> Self:
        """In evaluation mode, with weights of :func:`random_weights`."""
        network = cls.empty(sizes)
        network.load_state_dict(random_weights(network, seed), assign=True)
        return network.eval()

    @property
    def vision_language(self) -> VisionLanguage:
        return self.backbone["model"]  # type: ignore[return-value]


def random_weights(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Small random float32 weights for every tensor, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in module.state_dict().items():
        # Embodiments' weights are [slot, in, out], all other matrices [out, in].
        fan_in = tensor.shape[-2] if name.endswith(".W") else tensor.shape[-1]
        scale = fan_in**-0.5 if tensor.ndim > 1 else 0.1
        drawn = torch.randn(tensor.shape, generator=generator) * scale
        weights[name] = 1 + drawn if "norm" in name and name.endswith("weight") and tensor.ndim == 1 else drawn
    return weights
