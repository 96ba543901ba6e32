"""The action expert over a shared prefix: N candidates of a state, each at a time of its own, attend to one KV cache.

Weights and norms are LeRobot's own modules. What differs from its `denoise_step` is only how they are run: candidates
are an axis, so that nothing of the prefix is copied, cloned or concatenated.

Shapes beside the library's legend: P prefix tokens, C expert width, M query heads, D head width.
"""

from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from lerobot.policies.common.vla_utils import create_sinusoidal_pos_embedding
from lerobot.policies.pi05.modeling_pi05 import PI05Pytorch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import rotate_half

from poco_vla.adapting.rounding import rounded_linear
from poco_vla_pi05.prefix import Pi05Prefix


def velocity(
    model: PI05Pytorch,
    prefix: Pi05Prefix,
    x: Float[Tensor, "B N H A"],
    time: Float[Tensor, "#B #N"],
    *,
    compute: torch.dtype = torch.float32,
    recompute: bool = True,
) -> Float[Tensor, "B N H A"]:
    """pi0.5's own velocity (noise - action) at its own time (1 is noise), in float32.

    Args:
        model: LeRobot's core model.
        prefix: B encoded states.
        x: noisy chunks, padded to the model's action width.
        time: one per candidate, or one [1, 1] for all: adaRMS modulations are then computed once.
        compute: dtype of the matrix products; residuals, norms and the four projections stay in float32.
        recompute: when gradients are recorded, keep one tensor per layer and compute the rest again in backward.
    """
    expert = cast("Any", model.paligemma_with_expert.gemma_expert.model)
    condition = _condition(model, time)
    hidden = model.action_in_proj(x)
    positions = prefix.lengths[:, None] + torch.arange(x.shape[2], device=x.device)
    cos, sin = (
        table[:, None] for table in expert.rotary_emb(torch.empty(0, dtype=compute, device=x.device), positions)
    )
    recorded = recompute and torch.is_grad_enabled()
    for layer, keys, values in zip(expert.layers, prefix.keys, prefix.values, strict=True):
        run = partial(_layer, layer, keys=keys, values=values, mask=prefix.mask, cos=cos, sin=sin, compute=compute)
        if recorded:
            # Nothing here is random: there is no generator state to keep.
            hidden = checkpoint(run, hidden, condition, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = run(hidden, condition)
    hidden, _ = _norm(expert.norm, cast("Tensor", hidden), condition)
    return model.action_out_proj(hidden)


def _condition(model: PI05Pytorch, time: Float[Tensor, "#B #N"]) -> Float[Tensor, "#B #N 1 C"]:
    """Return the adaRMS condition of each time: silu(W_out silu(W_in sincos(t)))."""
    config = model.config
    device: Any = time.device  # annotated as str
    embedded = create_sinusoidal_pos_embedding(
        time.flatten(), model.action_in_proj.out_features, config.min_period, config.max_period, device
    )
    hidden = F.silu(model.time_mlp_in(embedded.to(time.dtype)))
    return F.silu(model.time_mlp_out(hidden)).view(*time.shape, 1, -1)


def _layer(
    layer: Any,
    hidden: Float[Tensor, "B N H C"],
    condition: Float[Tensor, "#B #N 1 C"],
    *,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    compute: torch.dtype,
) -> Float[Tensor, "B N H C"]:
    """One decoder layer: attention and MLP, each with its adaptive norm and gated residual."""
    attention, mlp = layer.self_attn, layer.mlp
    normed, gate = _norm(layer.input_layernorm, hidden, condition)
    normed = normed.to(compute)
    q = rounded_linear(attention.q_proj, normed).unflatten(-1, (-1, attention.head_dim))
    k, v = rounded_linear(attention.k_proj, normed), rounded_linear(attention.v_proj, normed)
    q = q * cos[..., None, :] + rotate_half(q) * sin[..., None, :]
    k = k * cos + rotate_half(k) * sin
    attended = split_attention(q, k, v, keys.to(compute), values.to(compute), mask, attention.scaling)
    hidden = hidden + rounded_linear(attention.o_proj, attended) * gate

    normed, gate = _norm(layer.post_attention_layernorm, hidden, condition)
    normed = normed.to(compute)
    inner = mlp.act_fn(rounded_linear(mlp.gate_proj, normed)) * rounded_linear(mlp.up_proj, normed)
    return hidden + rounded_linear(mlp.down_proj, inner) * gate


def split_attention(
    q: Float[Tensor, "B N H M D"],
    k: Float[Tensor, "B N H D"],
    v: Float[Tensor, "B N H D"],
    prefix_k: Float[Tensor, "B P D"],
    prefix_v: Float[Tensor, "B P D"],
    mask: Bool[Tensor, "B P"] | None,
    scale: float,
) -> Float[Tensor, "B N H MD"]:
    """Each candidate's steps attend to the prefix and to themselves, with one softmax over both.

    All heads and candidates query the one key head of a state: its prefix logits are a single matrix product.

    Args:
        mask: prefix tokens that count; None is all.
        scale: of the logits, 1 / sqrt(D).
    """
    q = q * scale  # a power of two at D = 256: exact, and a tenth of the logits' numbers
    to_prefix = q.flatten(1, 3) @ prefix_k.mT
    if mask is not None:
        to_prefix = to_prefix.masked_fill(~mask[:, None], torch.finfo(to_prefix.dtype).min)
    to_self = q.flatten(2, 3) @ k.mT
    logits = torch.cat([to_prefix.view(*to_self.shape[:-1], -1), to_self], dim=-1)
    weights = logits.softmax(dim=-1)  # computed in float32 whatever the dtype
    of_prefix, of_self = weights.split([prefix_k.shape[1], k.shape[2]], dim=-1)
    attended = (of_prefix.flatten(1, 2) @ prefix_v).view(*to_self.shape[:-1], -1) + of_self @ v
    return attended.view(*q.shape[:3], -1)


def _norm(norm: Any, x: Float[Tensor, "B N H C"], condition: Tensor) -> tuple[Tensor, Tensor]:
    """LeRobot's adaptive norm and its gate, in two kernels instead of ten on a GPU. It broadcasts a condition [B N 1 C]
    rightly over 4-D hidden states."""
    return fused_norm(norm, x, condition) if x.is_cuda else norm(x, cond=condition)


def fused_norm(norm: Any, x: Float[Tensor, "B N H C"], condition: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same as LeRobot's adaptive norm of float32 numbers, but for rounding."""
    scale, shift, gate = norm.dense(condition).chunk(3, dim=-1)
    return torch.addcmul(shift, F.rms_norm(x, x.shape[-1:], eps=norm.eps), 1 + scale), gate
