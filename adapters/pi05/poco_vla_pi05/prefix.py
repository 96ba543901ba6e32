"""What of pi0.5 does not depend on the noisy action: images, instruction and state through SigLIP and the VLM, once."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

TILE = 64
"""Number of tokens to whose multiples prefixes that differ in length are padded on a GPU: few shapes, whole tiles."""


@dataclass(frozen=True)
class Pi05Prefix:
    """B encoded states. P is the longest state's number of valid tokens: padding is left out before the VLM runs. On a
    GPU, of states that differ in length, it is the next multiple of `TILE`.

    Attributes:
        features: [B, D] what the critic sees: the mean of the VLM's last hidden states over valid tokens, as they are,
            and the normalised proprioceptive state. The paper does not say what its VLA critic sees: our choice.
        keys: the VLM's rotated keys, one [B, P, head width] per layer.
        values: likewise.
        lengths: [B] valid tokens; the chunk's positions begin there.
        mask: [B, P] tokens that count; None when all states have the same length.
    """

    features: Float[Tensor, "B D"]
    keys: tuple[Float[Tensor, "B P C"], ...]
    values: tuple[Float[Tensor, "B P C"], ...]
    lengths: Int[Tensor, " B"]
    mask: Bool[Tensor, "B P"] | None

    def select(self, index: Any) -> Self:
        return self._each(lambda tensor: tensor[index])

    def to(self, device: Any) -> Self:
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Any) -> Self:
        mask = None if self.mask is None else change(self.mask)
        keys, values = (tuple(map(change, column)) for column in (self.keys, self.values))
        return type(self)(change(self.features), keys, values, change(self.lengths), mask)

    def pack(self) -> list[dict[str, Tensor]]:
        """Each state by itself: `features` [D], and `kv` [layers, 2, valid tokens, head width]."""
        kv = torch.stack([torch.stack(pair) for pair in zip(self.keys, self.values, strict=True)])
        return [
            {"features": features, "kv": kv[:, :, row, :length]}
            for row, (features, length) in enumerate(zip(self.features, self.lengths.tolist(), strict=True))
        ]

    @classmethod
    def unpack(cls, states: Sequence[Mapping[str, Tensor]]) -> Self:
        """Any states together again, padded with zeros to the longest."""
        lengths = [state["kv"].shape[2] for state in states]
        layers, _, _, width = states[0]["kv"].shape
        device, dtype = states[0]["kv"].device, states[0]["kv"].dtype
        same, size = min(lengths) == max(lengths), padded_length(lengths, tile_on(device))
        make = torch.empty if same else torch.zeros
        kv = make(layers, 2, len(states), size, width, dtype=dtype, device=device)
        for row, state in enumerate(states):
            kv[:, :, row, : lengths[row]] = state["kv"]
        on_device = torch.tensor(lengths, device=kv.device)
        return cls(
            features=torch.stack([state["features"] for state in states]),
            keys=tuple(kv[:, 0]),
            values=tuple(kv[:, 1]),
            lengths=on_device,
            mask=None if same else torch.arange(size, device=kv.device) < on_device[:, None],
        )


def tile_on(device: torch.device) -> int:
    """Return the number to whose multiples prefixes are padded on a device."""
    return TILE if device.type == "cuda" else 1


def padded_length(lengths: Sequence[int], tile: int) -> int:
    """Return P of states of these lengths: as it is where all are the same, since then nothing is masked."""
    longest = max(lengths)
    return longest if min(lengths) == longest else -(-longest // tile) * tile


@torch.no_grad()
def encode(policy: PI05Policy, obs: Mapping[str, Any], *, tile: int | None = None) -> Pi05Prefix:
    """SigLIP and the VLM over the valid tokens of each state.

    Cameras of the policy that `obs` lacks are left out; `<camera>_is_pad` [B] says in which states one that is there
    shows nothing. Both count as LeRobot's masked cameras do: their tokens neither attend nor advance positions. `tile`
    is what states that differ in length are padded to; None chooses by the device.
    """
    model: Any = policy.model  # LeRobot's annotations are narrower than what it takes
    device = next(policy.parameters()).device
    obs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in obs.items()}
    cameras = [key for key in policy.config.image_features if key in obs]
    images, present = (column[: len(cameras)] for column in policy._preprocess_images(dict(obs)))
    present = [
        shown & ~obs[f"{key}_is_pad"].bool() if f"{key}_is_pad" in obs else shown
        for key, shown in zip(cameras, present, strict=True)
    ]
    language_model: Any = model.paligemma_with_expert.paligemma.model.language_model
    with _tf32(language_model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16):
        embedded, valid, _ = model.embed_prefix(
            images, present, obs[OBS_LANGUAGE_TOKENS], obs[OBS_LANGUAGE_ATTENTION_MASK]
        )
    tile = tile_on(device) if tile is None else tile
    embedded, lengths, mask, same = _without_padding(embedded, valid, tile)

    # LeRobot sets "eager" by itself where it wants it. On a GPU a mask rules the fastest kernels out.
    language_model.config._attn_implementation = UNMASKED if same and tile > 1 else "sdpa"
    (hidden, _), cache = model.paligemma_with_expert.forward(
        inputs_embeds=[embedded, None],
        attention_mask=mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1),  # every token sees every valid one
        position_ids=torch.arange(mask.shape[1], device=mask.device).expand_as(mask),
        use_cache=True,
    )
    pooled = (hidden.float() * mask[..., None]).sum(dim=1) / lengths[:, None]
    return Pi05Prefix(
        features=torch.cat([pooled, obs[OBS_STATE].float()], dim=-1),
        keys=tuple(layer.keys[:, 0] for layer in cache.layers),
        values=tuple(layer.values[:, 0] for layer in cache.layers),
        lengths=lengths,
        mask=None if same else mask,
    )


def _attend_to_all(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """transformers' attention, where the mask that the model insists on leaves nothing out."""
    attended = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return attended.transpose(1, 2).contiguous(), None


UNMASKED = "poco_vla_unmasked"
AttentionInterface.register(UNMASKED, _attend_to_all)


@contextmanager
def _tf32(wanted: bool) -> Iterator[None]:
    """SigLIP is float32 in LeRobot's bfloat16 layout. On CUDA its products may then run in TF32, whose 10 bits are
    still more than the VLM keeps of them; strict float32 would take longer than the whole VLM."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = wanted or before
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _without_padding(embedded: Tensor, valid: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Return each state's valid tokens first, in their order, cut to the longest state or padded to a multiple of
    `tile`, with their numbers, mask, and True if all numbers are the same. Attention does not mind their place:
    positions count valid tokens only, here as in LeRobot."""
    lengths = valid.sum(dim=1)
    extremes = torch.stack([lengths.min(), lengths.max()]).tolist()  # the one time that the host waits for the device
    size = padded_length(extremes, tile)
    order = valid.int().argsort(dim=1, descending=True, stable=True)[:, :size]
    packed = embedded.gather(1, order[..., None].expand(-1, -1, embedded.shape[-1]))
    if size > packed.shape[1]:
        packed = F.pad(packed, (0, 0, 0, size - packed.shape[1]))
    mask = torch.arange(size, device=valid.device) < lengths[:, None]
    return packed, lengths, mask, extremes[0] == extremes[1]
