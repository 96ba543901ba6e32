"""LeRobot's SmolVLA network in two halves: the VLM once per state, the expert for N candidates of each.

Weights, norms and embeddings are LeRobot's own modules. What differs from its `sample_actions` and `denoise_step` is
only how they are run: candidates are an axis, and all N attend to the one set of keys and values of their state.

Shapes beside the library's legend: P prefix tokens, C expert width, G key heads, M query heads per key head, D head
width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from lerobot.policies.common.vla_utils import create_sinusoidal_pos_embedding, make_att_2d_masks
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, VLAFlowMatching
from lerobot.policies.smolvla.smolvlm_with_expert import apply_rope
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class SmolVlaPrefix:
    """B encoded states.

    Attributes:
        features: [B, D] what the critic sees: the mean of the VLM's last hidden states over valid tokens, as they are,
            and the normalised proprioceptive state. The paper does not say what its VLA critic sees: our choice.
        keys: the VLM's rotated keys, one [B, G, P, D] per layer.
        values: likewise.
        mask: [B, P] tokens that count: neither padded words nor cameras that are not there.
    """

    features: Float[Tensor, "B D"]
    keys: tuple[Float[Tensor, "B G P D"], ...]
    values: tuple[Float[Tensor, "B G P D"], ...]
    mask: Bool[Tensor, "B P"]

    def select(self, index: Any) -> Self:
        return self._each(lambda tensor: tensor[index])

    def to(self, device: Any) -> Self:
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Any) -> Self:
        keys, values = (tuple(map(change, column)) for column in (self.keys, self.values))
        return type(self)(change(self.features), keys, values, change(self.mask))

    def pack(self) -> list[dict[str, Tensor]]:
        """Each state by itself: `features` [D], and `kv` [layers, 2, G, valid tokens, D]."""
        kv = torch.stack([torch.stack(pair) for pair in zip(self.keys, self.values, strict=True)])
        order = self.mask.int().argsort(dim=1, descending=True, stable=True)  # valid tokens first
        kv = kv.gather(4, order[None, None, :, None, :, None].expand_as(kv))
        rows = enumerate(zip(self.features, self.mask.sum(dim=1).tolist(), strict=True))
        return [{"features": features, "kv": kv[:, :, row, :, :length]} for row, (features, length) in rows]

    @classmethod
    def unpack(cls, states: Sequence[Mapping[str, Tensor]]) -> Self:
        """Any states together again, each one's tokens from the first place on: attention does not mind, the keys are
        rotated already, and the chunk's positions count valid tokens alone."""
        lengths = [state["kv"].shape[3] for state in states]
        layers, _, groups, _, width = states[0]["kv"].shape
        kv = states[0]["kv"].new_zeros(layers, 2, len(states), groups, max(lengths), width)
        for row, state in enumerate(states):
            kv[:, :, row, :, : lengths[row]] = state["kv"]
        return cls(
            features=torch.stack([state["features"] for state in states]),
            keys=tuple(kv[:, 0]),
            values=tuple(kv[:, 1]),
            mask=torch.arange(max(lengths), device=kv.device) < torch.tensor(lengths, device=kv.device)[:, None],
        )


def inputs(policy: SmolVLAPolicy, obs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Processed observations as LeRobot's model takes them: images, their masks, tokens, their mask, padded state."""
    device = policy.model.state_proj.weight.device
    obs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in obs.items()}
    images, shown = policy.prepare_images(obs)
    words = obs[OBS_LANGUAGE_TOKENS], obs[OBS_LANGUAGE_ATTENTION_MASK].bool()
    return images, shown, *words, policy.prepare_state(obs)


@torch.no_grad()
def encode(policy: SmolVLAPolicy, obs: Mapping[str, Any]) -> SmolVlaPrefix:
    """SigLIP and the VLM over images, instruction and state: what `sample_actions` does before its first step."""
    model: Any = policy.model
    embedded, mask, blocks = model.embed_prefix(*inputs(policy, obs))
    (hidden, _), cache = model.vlm_with_expert.forward(
        attention_mask=make_att_2d_masks(mask, blocks),
        position_ids=mask.cumsum(dim=1) - 1,
        inputs_embeds=[embedded, None],
        use_cache=True,
    )
    counted = mask[..., None]
    pooled = (hidden.float() * counted).sum(dim=1) / counted.sum(dim=1)
    return SmolVlaPrefix(
        features=torch.cat([pooled, obs[OBS_STATE].to(pooled)], dim=-1),
        keys=tuple(layer.keys for layer in cache.layers),
        values=tuple(layer.values for layer in cache.layers),
        mask=mask,
    )


def velocity(
    model: VLAFlowMatching, prefix: SmolVlaPrefix, x: Float[Tensor, "B N H A"], time: Float[Tensor, "B N"]
) -> Float[Tensor, "B N H A"]:
    """SmolVLA's own velocity (noise - action) at its own time (1 is noise), in float32: `denoise_step`, N at once.

    A layer of the expert attends either to the prefix's keys and to the chunk's own earlier steps, or to the prefix
    alone, through projections of its own of the VLM's keys and values. Those train: they are made anew at every call,
    once per state, which costs a fiftieth of 16 candidates of 10 steps.
    """
    core: Any = model.vlm_with_expert
    hidden = _embed(model, x, time)
    steps = torch.arange(x.shape[2], device=x.device).repeat(x.shape[1])[None]  # [1, N H]
    after_prefix = prefix.mask.sum(dim=1, keepdim=True) + steps
    _, layers = core.get_model_layers([core.get_vlm_model().text_model, core.lm_expert])
    for index, layer in enumerate(layers):
        if layer is None:  # an expert with fewer layers than the VLM
            continue
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        keys, values = (kept[index].to(x.dtype) for kept in (prefix.keys, prefix.values))
        q = attention.q_proj(normed).unflatten(-1, (-1, attention.head_dim))
        if _attends_to_itself(core, index):
            k, v = (
                project(normed).unflatten(-1, (-1, attention.head_dim))
                for project in (attention.k_proj, attention.v_proj)
            )
            q, k = _rotate(q, after_prefix), _rotate(k, after_prefix)
            attended = _attend(q, keys, values, prefix.mask, own=(k, v))
        else:
            keys, values = _project(attention.k_proj, keys), _project(attention.v_proj, values)
            attended = _attend(_rotate(q, steps), keys, values, prefix.mask)
        hidden = hidden + attention.o_proj(attended)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.action_out_proj(core.lm_expert.norm(hidden))


def _embed(model: Any, x: Float[Tensor, "B N H A"], time: Float[Tensor, "B N"]) -> Float[Tensor, "B N H C"]:
    """`embed_suffix`: each step's action with its candidate's time."""
    config, action = model.config, model.action_in_proj(x)
    device: Any = x.device  # annotated as str
    periods = {"min_period": config.min_period, "max_period": config.max_period}
    embedded = create_sinusoidal_pos_embedding(time.flatten(), action.shape[-1], **periods, device=device)
    embedded = embedded.to(action.dtype).view(*time.shape, 1, -1).expand_as(action)
    return model.action_time_mlp_out(F.silu(model.action_time_mlp_in(torch.cat([action, embedded], dim=-1))))


def _attends_to_itself(core: Any, index: int) -> bool:
    every = core.self_attn_every_n_layers
    return "cross" not in core.attention_mode or (every > 0 and index % every == 0)


def _rotate(heads: Float[Tensor, "B N H heads D"], positions: Int[Tensor, "#B NH"]) -> Tensor:
    return apply_rope(heads.flatten(1, 2), positions).view_as(heads)


def _project(projection: Any, kept: Float[Tensor, "B G P D"]) -> Float[Tensor, "B G P D"]:
    """Keys or values of the VLM, all heads of a token together, through a layer of the expert."""
    return projection(kept.transpose(1, 2).flatten(2)).unflatten(-1, (-1, kept.shape[-1])).transpose(1, 2)


def _attend(
    q: Float[Tensor, "B N H GM D"],
    keys: Float[Tensor, "B G P D"],
    values: Float[Tensor, "B G P D"],
    mask: Bool[Tensor, "B P"],
    own: tuple[Float[Tensor, "B N H G D"], Float[Tensor, "B N H G D"]] | None = None,
) -> Float[Tensor, "B N H GMD"]:
    """Each candidate's steps attend to their state's prefix and, where `own` is given, to themselves and what came
    before, with one softmax over both. The sums run over the prefix as it is: nothing is copied per candidate.

    Args:
        q: queries; M of them share a key head.
        keys: of the prefix.
        values: likewise.
        mask: prefix tokens that count.
        own: keys and values of the chunk's own steps.
    """
    q = q.unflatten(3, (keys.shape[1], -1)) * q.shape[-1] ** -0.5
    lowest = torch.finfo(q.dtype).min
    logits = torch.einsum("bnhgmd,bgpd->bnhgmp", q, keys).masked_fill(~mask[:, None, None, None, None], lowest)
    if own is None:
        return torch.einsum("bnhgmp,bgpd->bnhgmd", logits.softmax(dim=-1), values).flatten(3)
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)[:, None, None]
    to_own = torch.einsum("bnhgmd,bnjgd->bnhgmj", q, own[0]).masked_fill(later, lowest)
    weights = torch.cat([logits, to_own], dim=-1).softmax(dim=-1)
    of_prefix, of_own = weights.split([keys.shape[2], q.shape[2]], dim=-1)
    attended = torch.einsum("bnhgmp,bgpd->bnhgmd", of_prefix, values)
    return (attended + torch.einsum("bnhgmj,bnjgd->bnhgmd", of_own, own[1])).flatten(3)
