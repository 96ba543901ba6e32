"""The diffusion transformer over N candidates of each state (sections 5 and 6).

Even layers look at the vision-language tokens, in turn at text and at images; odd ones at the candidate's own tokens.
The vision-language tokens' keys and values depend on nothing that a candidate changes, so they exist once per state and
all N candidates' queries attend to them as one long row.

Shapes: B states, N candidates of each, T = 1 + H tokens of a candidate (state, steps), L tokens of one kind, C width, M
heads, D width of a head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lerobot_policy_groot_n1d6.model.configuration import HeadSizes
from lerobot_policy_groot_n1d6.model.layers import layer_norm, linear

TIME_CHANNELS = 256
NORM_EPS, OUT_NORM_EPS = 1e-5, 1e-6  # of the blocks, of the output: they differ


@dataclass(frozen=True)
class Memory:
    """Keys and values of one cross-attention layer.

    Attributes:
        keys: [B, M, L, D].
        values: likewise.
        mask: keys that count; None is all. All of a state's are open where it has none: see `absent`.
        absent: states without a token of this kind, None if every state has one. They attend to nothing: zeros.
    """

    keys: Float[Tensor, "B M L D"]
    values: Float[Tensor, "B M L D"]
    mask: Bool[Tensor, "B L"] | None
    absent: Bool[Tensor, " B"] | None

    def select(self, index: Any) -> Self:
        return self._each(lambda tensor: tensor[index])

    def to(self, device: Any) -> Self:
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Any) -> Self:
        mask, absent = (None if tensor is None else change(tensor) for tensor in (self.mask, self.absent))
        return type(self)(change(self.keys), change(self.values), mask, absent)


class Transformer(nn.Module):
    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.width
        embedder = {"linear_1": nn.Linear(TIME_CHANNELS, width), "linear_2": nn.Linear(width, width)}
        self.timestep_encoder = nn.ModuleDict({"timestep_embedder": nn.ModuleDict(embedder)})
        contexts = (width if kind == "self" else sizes.context for kind in self.kinds)
        self.transformer_blocks = nn.ModuleList(Block(sizes, context) for context in contexts)
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, sizes.hidden)

    @property
    def kinds(self) -> list[str]:
        """What each layer attends to: "text", "image" or "self"."""
        period = 2 * self.sizes.text_every
        return [
            "self" if i % 2 else "text" if i % period == 0 else "image"  # text: i % 4 == 0, image: i % 4 == 2
            for i in range(self.sizes.depth)
        ]

    def condition(self, buckets: Float[Tensor, "#B #N"], dtype: torch.dtype) -> Float[Tensor, "#B #N 1 C"]:
        """silu of the embedded time: what every AdaLN's projection takes."""
        embedder: Any = self.timestep_encoder["timestep_embedder"]
        hidden = F.silu(linear(embedder["linear_1"], time_channels(buckets)))
        return F.silu(linear(embedder["linear_2"], hidden)).to(dtype)[..., None, :]

    def forward(
        self,
        hidden: Float[Tensor, "B N T C"],
        buckets: Float[Tensor, "#B #N"],
        memories: Sequence[Memory],
        *,
        dtype: torch.dtype,
        recompute: bool,
    ) -> Float[Tensor, "B N T hidden"]:
        """Output features in float32, state token included.

        Args:
            hidden: embedded state and noisy steps.
            buckets: discretised time of each candidate, or one for all.
            memories: of the cross-attention layers, in their order.
            dtype: of the matrix products; residuals and norms are float32.
            recompute: keep one tensor per layer when gradients are recorded, compute the rest again in backward.
        """
        condition = self.condition(buckets, dtype)
        # Only dropout is random here: without it there is no generator state to keep.
        recomputed: Any = partial(checkpoint, use_reentrant=False, preserve_rng_state=self.training)
        recorded = recompute and torch.is_grad_enabled()
        remaining = iter(memories)
        for block, kind in zip(self.transformer_blocks, self.kinds, strict=True):
            memory = None if kind == "self" else next(remaining)
            hidden = recomputed(block, hidden, condition, memory) if recorded else block(hidden, condition, memory)
        # The output's AdaLN gives shift before scale; a block's gives scale before shift.
        shift, scale = linear(self.proj_out_1, condition).float().chunk(2, dim=-1)
        normed = layer_norm(hidden, eps=OUT_NORM_EPS) * (1 + scale) + shift
        return linear(self.proj_out_2, normed.to(dtype)).float()


class Block(nn.Module):
    def __init__(self, sizes: HeadSizes, context: int) -> None:
        super().__init__()
        width = sizes.width
        self.norm1 = nn.ModuleDict({"linear": nn.Linear(width, 2 * width)})
        self.attn1 = Attention(width, context, sizes.num_heads, sizes.dropout)
        self.ff = FeedForward(width, sizes.dropout)
        self.final_dropout = nn.Dropout(sizes.dropout)

    def forward(
        self, hidden: Float[Tensor, "B N T C"], condition: Float[Tensor, "#B #N 1 C"], memory: Memory | None
    ) -> Float[Tensor, "B N T C"]:
        dtype = condition.dtype
        # Scale before shift, the reverse of the output's AdaLN.
        scale, shift = linear(self.norm1["linear"], condition).float().chunk(2, dim=-1)
        normed = (layer_norm(hidden, eps=NORM_EPS) * (1 + scale) + shift).to(dtype)
        hidden = hidden + self.final_dropout(self.attn1(normed, memory))
        return hidden + self.ff(layer_norm(hidden, eps=NORM_EPS).to(dtype))


class Attention(nn.Module):
    def __init__(self, width: int, context: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(context, width)
        self.to_v = nn.Linear(context, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(dropout)])

    def forward(self, x: Float[Tensor, "B N T C"], memory: Memory | None) -> Float[Tensor, "B N T C"]:
        """To the memory of a state, or, without one, of each candidate to itself."""
        out, dropout = self.to_out
        if memory is None:
            rows = x.flatten(0, 1)
            keys, values = self.keys_values(rows)
            attended = F.scaled_dot_product_attention(self._heads(linear(self.to_q, rows)), keys, values)
        else:
            attended = attend(self._heads(linear(self.to_q, x.flatten(1, 2))), memory)
        return dropout(linear(out, attended.transpose(1, 2).reshape(x.shape)))

    def keys_values(self, context: Float[Tensor, "B L C2"]) -> tuple[Tensor, Tensor]:
        return self._heads(linear(self.to_k, context)), self._heads(linear(self.to_v, context))

    def _heads(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B M L D"]:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        first = nn.ModuleDict({"proj": nn.Linear(width, 4 * width)})
        self.net = nn.ModuleList([first, nn.Dropout(dropout), nn.Linear(4 * width, width), nn.Dropout(dropout)])

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        first, inner_dropout, second, dropout = self.net
        inner = F.gelu(linear(first["proj"], x), approximate="tanh")  # type: ignore[index]
        return dropout(linear(second, inner_dropout(inner)))


def attend(q: Float[Tensor, "B M Q D"], memory: Memory) -> Float[Tensor, "B M Q D"]:
    """All queries of a state attend to its one set of keys."""
    mask = None if memory.mask is None else memory.mask[:, None, None]
    attended = F.scaled_dot_product_attention(q, memory.keys.to(q.dtype), memory.values.to(q.dtype), mask)
    return attended if memory.absent is None else attended.masked_fill(memory.absent[:, None, None, None], 0)


def time_channels(buckets: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch channels"]:
    """Return [cos | sin] of bucket * 10000^(-k / 127), float32. The action encoder's sinusoids are [sin | cos] and
    divide by the half width itself."""
    half = TIME_CHANNELS // 2
    exponents = -math.log(10_000) * torch.arange(half, device=buckets.device).float() / (half - 1)
    angles = buckets.float()[..., None] * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
