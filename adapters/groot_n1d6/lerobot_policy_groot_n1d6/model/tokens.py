"""Vision-language tokens sorted into text and images, as the transformer's layers look at either (section 6).

Shapes: B states, S tokens of the longest prompt, L tokens of one kind in the state that has most, C width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor


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
        longest = max(1, *counts)  # attention needs one key, if only a masked one
        joined = states[0].new_zeros(len(states), longest, states[0].shape[-1])
        for row, tokens in enumerate(states):
            joined[row, : counts[row]] = tokens
        if min(counts) == longest:
            return cls(joined, None)
        lengths = torch.tensor(counts, device=joined.device)[:, None]
        return cls(joined, torch.arange(longest, device=joined.device) < lengths)


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
    """Splits features into text and images and leaves padding out. Reads the counts back from the accelerator."""
    return Tokens(text=_gather(features, mask & ~image_mask), image=_gather(features, mask & image_mask))


def _gather(features: Tensor, chosen: Bool[Tensor, "B S"]) -> Group:
    counts = chosen.sum(dim=1)
    longest = max(1, int(counts.max()))  # attention needs one key, if only a masked one
    order = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    tokens = features.gather(1, order[..., None].expand(-1, -1, features.shape[-1]))
    mask = torch.arange(longest, device=chosen.device) < counts[:, None]
    return Group(tokens, None if bool(mask.all()) else mask)
