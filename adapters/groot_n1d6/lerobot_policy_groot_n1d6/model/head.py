"""The action head: features, a state and noisy actions to a velocity (sections 5 and 6).

Shapes: B states, N candidates of each, H steps, A width of an action, C width of the transformer.

The model's time is t in [0, 1): 0 is noise, 1 is the action, and its velocity is action - noise. That is poco_vla's
convention too. The network only tells `time_buckets` times apart: it sees floor(1000 t).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lerobot_policy_groot_n1d6.model.configuration import HeadSizes
from lerobot_policy_groot_n1d6.model.embodiment import ActionEncoder, CategoryLinear, CategoryMlp, Embodiment
from lerobot_policy_groot_n1d6.model.layers import layer_norm
from lerobot_policy_groot_n1d6.model.tokens import Group, Tokens
from lerobot_policy_groot_n1d6.model.transformer import Attention, Memory, Transformer


class ActionHead(nn.Module):
    """In the order of use: `cross_kv` and `state_tokens` once per state, `velocity` at every flow step."""

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        self.sizes = sizes
        slots, width = sizes.num_embodiments, sizes.width
        self.state_encoder = CategoryMlp(slots, sizes.state_dim, sizes.hidden, width)
        self.action_encoder = ActionEncoder(slots, sizes.action_dim, width)
        self.action_decoder = CategoryMlp(slots, sizes.hidden, sizes.hidden, sizes.action_dim)
        self.position_embedding = nn.Embedding(sizes.max_steps, width)
        self.vlln = nn.LayerNorm(sizes.context)
        self.model = Transformer(sizes)
        if sizes.mask_token:
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))

    def train_slot(self, slot: int) -> None:
        """Leave one embodiment's weights to be trained, if those of all of them are."""
        for layer in self.modules():
            if isinstance(layer, CategoryLinear) and layer.W.requires_grad:
                layer.train_slot(slot)

    def condition(self, features: Float[Tensor, "*batch C2"]) -> Float[Tensor, "*batch C2"]:
        """The head's own norm of vision-language features, in float32. Token by token: sort before or after."""
        return layer_norm(features, self.vlln)

    def cross_kv(self, tokens: Tokens, *, compute: torch.dtype = torch.float32) -> tuple[Memory, ...]:
        """Keys and values of every cross-attention layer.

        They hold the weights of `vlln`, `to_k` and `to_v`: drop them when these change. Gradients reach all three.

        Args:
            tokens: as the vision-language model gives them; `condition` is applied here.
            compute: dtype of the projections and of what comes out.
        """
        masked = {"text": _attendable(tokens.text), "image": _attendable(tokens.image)}
        contexts = {
            "text": self.condition(tokens.text.tokens).to(compute),
            "image": self.condition(tokens.image.tokens).to(compute),
        }
        memories = []
        for kind, block in zip(self.model.kinds, self.model.transformer_blocks, strict=True):
            if kind == "self":
                continue
            attention: Attention = block.attn1  # type: ignore[assignment]
            memories.append(Memory(*attention.keys_values(contexts[kind]), *masked[kind]))
        return tuple(memories)

    def state_tokens(
        self,
        state: Float[Tensor, "B 1 state_dim"],
        embodiment: Embodiment,
        *,
        dropped: Bool[Tensor, " B"] | None = None,
        compute: torch.dtype = torch.float32,
    ) -> Float[Tensor, "B 1 C"]:
        """The token of each state.

        Args:
            state: normalised and padded.
            embodiment: slot of each state, or one int for all.
            dropped: states that the mask token stands for: the original's training loss draws them with probability
                `state_dropout`; it samples actions without.
            compute: dtype of the first layer.

        Raises:
            ValueError: the embodiment has no slot, or there is no mask token.
        """
        self._check(embodiment)
        token = self.state_encoder(state, embodiment, compute)
        if dropped is None:
            return token
        if not self.sizes.mask_token:
            raise ValueError("`dropped` needs a mask token and this head has none: leave it out, or load with one")
        return torch.where(dropped[:, None, None], self.mask_token.to(token.dtype), token)

    def velocity(
        self,
        kv: tuple[Memory, ...],
        state_tokens: Float[Tensor, "B 1 C"],
        x: Float[Tensor, "B N H A"],
        t: Float[Tensor, "#B #N"],
        embodiment: Embodiment,
        *,
        compute: torch.dtype = torch.float32,
        recompute: bool = True,
    ) -> Float[Tensor, "B N H A"]:
        """action - noise, in float32.

        Args:
            kv: from `cross_kv`, one set per state that all N candidates attend to.
            state_tokens: from `state_tokens`.
            x: noisy chunks, all padded steps and dimensions included; the caller slices after denoising.
            t: time of each candidate, in float32, or one [1, 1] for all: it is then embedded, and AdaLN's modulations
                computed, once.
            embodiment: slot of each state, or one int for all.
            compute: dtype of the matrix products; residuals, norms and what touches actions stay in float32.
            recompute: when gradients are recorded, keep one tensor per layer and compute the rest again in backward.

        Raises:
            ValueError: the embodiment has no slot, or the chunks are longer than the position embedding.
        """
        self._check(embodiment)
        buckets = self.buckets(t)
        hidden = self._embed(state_tokens, x, buckets, embodiment, compute)
        hidden = self.model(hidden, buckets, kv, dtype=compute, recompute=recompute)
        return self.action_decoder(hidden[:, :, 1:], embodiment, compute)

    def buckets(self, t: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """floor(1000 t), the time that the network knows."""
        return (t.float() * self.sizes.time_buckets).floor()

    def _embed(
        self,
        state_tokens: Float[Tensor, "B 1 C"],
        x: Float[Tensor, "B N H A"],
        buckets: Float[Tensor, "#B #N"],
        embodiment: Embodiment,
        compute: torch.dtype,
    ) -> Float[Tensor, "B N T C"]:
        """The state's token, then the steps'."""
        if x.shape[2] > self.sizes.max_steps:
            raise ValueError(f"chunks have {x.shape[2]} steps: expected at most {self.sizes.max_steps}")
        steps = self.action_encoder(x, buckets, embodiment, compute).float()
        steps = steps + self.position_embedding.weight[: x.shape[2]].float()
        return torch.cat([state_tokens.float()[:, None].expand(-1, x.shape[1], -1, -1), steps], dim=2)

    def _check(self, embodiment: Embodiment) -> None:
        if isinstance(embodiment, int) and not 0 <= embodiment < self.sizes.num_embodiments:
            raise ValueError(f"embodiment is {embodiment}: expected a slot from 0 to {self.sizes.num_embodiments - 1}")


def _attendable(group: Group) -> tuple[Tensor | None, Tensor | None]:
    """Mask and absent states of a `Memory`. A row without any key would give NaN: it is opened, its result dropped."""
    if group.mask is None:
        return None, None
    absent = ~group.mask.any(dim=1)
    return group.mask | absent[:, None], absent
