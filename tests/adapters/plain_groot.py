"""The action head as its specification reads (section 5): one candidate per row, nothing shared, nothing saved.

It runs the weights of an :class:`ActionHead` in their own dtype. The head's fast path is held against it.

Shapes: R rows, S tokens of the longest prompt, H steps, A width of an action, T = 1 + H, C width.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from lerobot_policy_groot_n1d6.model.embodiment import CategoryLinear, time_code
from lerobot_policy_groot_n1d6.model.head import ActionHead
from lerobot_policy_groot_n1d6.model.transformer import NORM_EPS, OUT_NORM_EPS, time_channels
from torch import Tensor
from torch.nn import functional as F


def plain_velocity(
    head: ActionHead,
    features: Float[Tensor, "R S C2"],
    image_mask: Bool[Tensor, "R S"],
    mask: Bool[Tensor, "R S"],
    state: Float[Tensor, "R 1 state_dim"],
    x: Float[Tensor, "R H A"],
    t: Float[Tensor, " R"],
    embodiment: Int[Tensor, " R"],
    *,
    state_token: Float[Tensor, "R 1 C"] | None = None,
) -> Float[Tensor, "R H A"]:
    """action - noise at time t (0 is noise). `features` are those before `vlln`; a `state_token` replaces the state's
    own."""
    context = head.vlln(features)
    bucket = (t.float() * head.sizes.time_buckets).floor()
    if state_token is None:
        state_token = _mlp(head.state_encoder, state, embodiment)
    hidden = torch.cat([state_token, _steps(head, x, bucket, embodiment)], dim=1)

    embedder: Any = head.model.timestep_encoder["timestep_embedder"]
    channels = time_channels(bucket).to(embedder["linear_1"].weight.dtype)
    condition = F.silu(embedder["linear_2"](F.silu(embedder["linear_1"](channels))))
    width = hidden.shape[-1:]
    blocks: Any = head.model.transformer_blocks
    for i, block in enumerate(blocks):
        scale, shift = block.norm1["linear"](condition)[:, None].chunk(2, dim=-1)
        y = F.layer_norm(hidden, width, eps=NORM_EPS) * (1 + scale) + shift
        if i % 2:
            attended = _attention(block.attn1, y, y, None)
        else:
            text = i % (2 * head.sizes.text_every) == 0
            attended = _attention(block.attn1, y, context, mask & (~image_mask if text else image_mask))
        hidden = hidden + block.final_dropout(attended)
        hidden = hidden + block.ff(F.layer_norm(hidden, width, eps=NORM_EPS))

    shift, scale = head.model.proj_out_1(condition)[:, None].chunk(2, dim=-1)
    out = head.model.proj_out_2(F.layer_norm(hidden, width, eps=OUT_NORM_EPS) * (1 + scale) + shift)
    return _mlp(head.action_decoder, out, embodiment)[:, 1:]


def _linear(layer: CategoryLinear, x: Tensor, embodiment: Tensor) -> Tensor:
    every = len(embodiment)  # a layer that trains one slot has no other
    weight, bias = (p[embodiment] if layer.W.ndim == 3 else p.expand(every, *p.shape) for p in (layer.W, layer.b))
    return torch.bmm(x, weight) + bias[:, None]


def _mlp(mlp: Any, x: Tensor, embodiment: Tensor) -> Tensor:
    return _linear(mlp.layer2, F.relu(_linear(mlp.layer1, x, embodiment)), embodiment)


def _steps(head: ActionHead, x: Tensor, bucket: Tensor, embodiment: Tensor) -> Float[Tensor, "R H C"]:
    encoder = head.action_encoder
    actions = _linear(encoder.W1, x, embodiment)
    code = time_code(bucket, actions.shape[-1]).to(x.dtype)[:, None].expand_as(actions)
    inner = F.silu(_linear(encoder.W2, torch.cat([actions, code], dim=-1), embodiment))
    return _linear(encoder.W3, inner, embodiment) + head.position_embedding.weight[: x.shape[1]]


def _attention(attention: Any, y: Tensor, context: Tensor, mask: Bool[Tensor, "R S"] | None) -> Float[Tensor, "R T C"]:
    """Softmax attention written out; a row without any key attends to nothing."""
    q, k, v = (
        projection(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for projection, x in ((attention.to_q, y), (attention.to_k, context), (attention.to_v, context))
    )
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], float("-inf"))
    weights = logits.softmax(dim=-1)
    if mask is not None:
        weights = torch.where(mask[:, None, None], weights, 0)
    out, dropout = attention.to_out
    return dropout(out((weights @ v).transpose(1, 2).flatten(2)))
