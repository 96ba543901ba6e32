"""Vision-language tokens sorted into text and images, as the transformer's layers look at either (section 6).

Shapes: B states, S tokens of the longest prompt, L tokens of one kind in the state that has most, C width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

TILE = 64
"""Number of tokens to whose multiples a GPU pads prompts that differ in length: few shapes, whole tiles."""


@dataclass(frozen=True)
class Group:
    """The tokens of one kind.

    Attributes:
        tokens: each state's in their order, from the first place on.
        mask: places that hold one; None when all do. A state that has none has no True.
    """

    tokens: Float[Tensor, "B L C"]
    mask: Bool[Tensor, "B L"] | None

    def select(self, index: Any) -> Self:
        return self._each(lambda tensor: tensor[index])

    def to(self, device: Any) -> Self:
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(change(self.tokens), None if self.mask is None else change(self.mask))

    def split(self) -> list[Float[Tensor, "L C"]]:
        """Each state's tokens, without padding."""
        if self.mask is None:
            return list(self.tokens)
        return [tokens[:count] for tokens, count in zip(self.tokens, self.mask.sum(dim=1).tolist(), strict=True)]

    @classmethod
    def join(cls, states: Sequence[Float[Tensor, "_ C"]]) -> Self:
        """Any states' tokens, padded with zeros to the longest."""
        counts = [len(tokens) for tokens in states]
        size = _size(min(counts), max(counts), states[0].device)
        joined = states[0].new_zeros(len(states), size, states[0].shape[-1])
        for row, tokens in enumerate(states):
            joined[row, : counts[row]] = tokens
        if min(counts) == size:
            return cls(joined, None)
        lengths = torch.tensor(counts, device=joined.device)[:, None]
        return cls(joined, torch.arange(size, device=joined.device) < lengths)


@dataclass(frozen=True)
class Tokens:
    """The two kinds, without padding."""

    text: Group
    image: Group

    def select(self, index: Any) -> Self:
        return type(self)(self.text.select(index), self.image.select(index))

    def to(self, device: Any) -> Self:
        return type(self)(self.text.to(device), self.image.to(device))


def sort_tokens(features: Float[Tensor, "B S C"], image_mask: Bool[Tensor, "B S"], mask: Bool[Tensor, "B S"]) -> Tokens:
    """Split features into text and images and leave padding out. The host waits once, for the counts of both."""
    kinds = mask & ~image_mask, mask & image_mask
    counts = [chosen.sum(dim=1) for chosen in kinds]
    extremes = torch.stack([torch.stack([count.min(), count.max()]) for count in counts]).tolist()
    text, image = (_gather(features, *kind) for kind in zip(kinds, counts, extremes, strict=True))
    return Tokens(text, image)


def _gather(features: Tensor, chosen: Bool[Tensor, "B S"], counts: Tensor, extremes: tuple[int, int]) -> Group:
    size = _size(*extremes, features.device)
    order = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :size]
    tokens = features.gather(1, order[..., None].expand(-1, -1, features.shape[-1]))
    if extremes[0] == size:
        return Group(tokens, None)
    if size > tokens.shape[1]:
        tokens = F.pad(tokens, (0, 0, 0, size - tokens.shape[1]))
    return Group(tokens, torch.arange(size, device=chosen.device) < counts[:, None])


def tile_on(device: torch.device) -> int:
    """Return the number to whose multiples prompts are padded on a device."""
    return TILE if device.type == "cuda" else 1


def _size(fewest: int, most: int, device: torch.device) -> int:
    """Return L: attention needs one key, if only a masked one, and whole tiles where keys are masked."""
    tile = tile_on(device) if fewest != most else 1
    return max(1, -(-most // tile) * tile)
