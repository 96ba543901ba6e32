"""The vision-language model: images and an instruction to one feature per token (section 4).

Shapes: B states, S tokens of the longest prompt, C width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from lerobot_policy_groot_n1d6.model.configuration import LanguageSizes, VisionSizes
from lerobot_policy_groot_n1d6.model.layers import Stored
from lerobot_policy_groot_n1d6.model.vision import Image, ImageEncoder


class Encoded(NamedTuple):
    """What the action head sees of B states.

    Attributes:
        features: after the language model's last norm, before the head's. Those of padding mean nothing.
        image_mask: tokens that are images; the marks around an image are text.
        mask: tokens that are not padding.
    """

    features: Float[Tensor, "B S C"]
    image_mask: Bool[Tensor, "B S"]
    mask: Bool[Tensor, "B S"]


class VisionLanguage(ImageEncoder):
    """SigLIP2 and the first layers of Qwen3."""

    def __init__(self, vision: VisionSizes, language: LanguageSizes) -> None:
        super().__init__(vision, language.width)
        self.image_token = language.image_token
        self.language_model = nn.Module()
        self.language_model.model = _qwen3(language)
        self.language_model.lm_head = Stored({"weight": (language.vocab, language.width)})

    def encode(
        self, images: Sequence[Image], input_ids: Int[Tensor, "B S"], attention_mask: Int[Tensor, "B S"]
    ) -> Encoded:
        """Features of every token.

        Args:
            images: of all states, state after state, each [1, 3, height, width] in [-1, 1].
            input_ids: prompts, with as many image tokens as the images have.
            attention_mask: 1 where a token is not padding.

        Raises:
            ValueError: the prompts' image tokens are not as many as the images'.
        """
        language: Qwen3Model = self.language_model.model  # type: ignore[assignment]
        image_mask, mask = input_ids == self.image_token, attention_mask == 1
        embedded = language.embed_tokens(input_ids)
        if images:
            tokens = torch.cat(self.image_tokens(images)).to(embedded.dtype)
        else:
            tokens = embedded.new_empty(0, embedded.shape[-1])
        if (expected := int(image_mask.sum())) != len(tokens):
            raise ValueError(
                f"{len(images)} images make {len(tokens)} tokens, the prompts have {expected}: "
                "build the prompts from the sizes of these images"
            )
        embedded = embedded.masked_scatter(image_mask[..., None], tokens)
        hidden = language(inputs_embeds=embedded, attention_mask=_causal(mask), use_cache=False).last_hidden_state
        return Encoded(hidden, image_mask, mask)


def _causal(mask: Bool[Tensor, "B S"]) -> Any:
    """Qwen3's attention mask. Every token sees itself, so that padding on the left gives no NaN.

    Positions count padding too: rotary embeddings only know differences.
    """
    if bool(mask.all()):
        return {"full_attention": None}  # plain causal attention, without a mask in memory
    seen = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
    itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return {"full_attention": ((seen & mask[:, None]) | itself)[:, None]}


def _qwen3(sizes: LanguageSizes) -> Qwen3Model:
    build: Any = Qwen3Config  # its dataclass decorator hides the parameters from type checkers
    config = build(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_dim,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        rms_norm_eps=sizes.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        attn_implementation="sdpa",
    )
    model = Qwen3Model(config)
    rotary: Any = Rotary(sizes.head_dim, sizes.rope_theta)
    model.rotary_emb = rotary
    return model


class Rotary(nn.Module):
    """Qwen3's rotary angles, computed at each call.

    transformers' own module keeps frequencies in a buffer, which `.to(torch.bfloat16)` rounds and which a model built
    on the meta device never gets.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta

    def forward(self, x: Tensor, position_ids: Int[Tensor, "B S"]) -> tuple[Tensor, Tensor]:
        even = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=x.device)
        angles = position_ids[..., None].float() / self.theta ** (even / self.head_dim)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)
