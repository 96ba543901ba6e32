"""The ``flow_mlp`` LeRobot policy: vector field, sampler, loss. Needs nothing but LeRobot.

Time runs from noise (t = 0) to action (t = 1); the network learns v = action - noise.
"""

import builtins
import os
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
from lerobot.configs.types import FeatureType
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE
from torch import Tensor, nn
from torch.nn import functional as F

from lerobot_policy_flow_mlp.configuration_flow_mlp import FlowMlpConfig

STATE_KEYS = (OBS_STATE, OBS_ENV_STATE)
MAX_ENCODER_SIZE = 65_536
"""Most channels of a layer of an image encoder, and most layers."""
TRUST_VARIABLE = "POCO_VLA_TRUST_REMOTE_CODE"
"""Environment variable: 1 lets an image encoder's repository run its own code. No file can say so."""


class VectorField(nn.Module):
    """v(features, chunk, t): Linear -> activation, no normalisation (POCO's actor), over [features, flat chunk, t].

    The first layer's share of the features is computed once per state and added to every candidate's.

    Attributes:
        linear: what computes a dense layer from its input, weight, bias and activation, the last two of which may be
            left out or None; poco_vla puts a faster one here.
    """

    linear: Callable[..., Tensor]

    def __init__(self, feature_dim: int, chunk_dim: int, hidden: list[int], activation: str) -> None:
        super().__init__()
        widths = [feature_dim + chunk_dim + 1, *hidden, chunk_dim]
        self.feature_dim = feature_dim
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.linear = _linear
        self.activation = nn.SiLU() if activation == "silu" else nn.GELU(approximate="tanh")

    def forward(self, features: Tensor, chunk: Tensor, t: Tensor) -> Tensor:
        """Velocity [B, N, chunk_dim] from features [B, D], chunks [B, N, chunk_dim] and times [B, N]."""
        first, *inner, last = (cast("nn.Linear", layer) for layer in self.layers)
        of_state, of_chunk = first.weight.split([self.feature_dim, chunk.shape[-1] + 1], dim=1)
        noisy = torch.cat([chunk, t[..., None]], dim=-1)
        h = self.activation(self.linear(features, of_state, first.bias)[:, None] + self.linear(noisy, of_chunk))
        for layer in inner:
            h = self.linear(h, layer.weight, layer.bias, self.activation)
        return self.linear(h, last.weight, last.bias)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    y = F.linear(x, weight, bias)
    return y if activation is None else activation(y)


class FlowMlpPolicy(PreTrainedPolicy):
    """LeRobot policy over :class:`VectorField`, state inputs and optionally images through a frozen encoder."""

    config_class = FlowMlpConfig  # pyright: ignore[reportAssignmentType] (LeRobot declares None)
    name = "flow_mlp"  # pyright: ignore[reportAssignmentType]
    config: FlowMlpConfig

    def __init__(self, config: FlowMlpConfig, *, trust_remote_code: bool = False, **_: Any) -> None:
        super().__init__(config)
        config.validate_features()
        self.vision_encoder, image_dim = None, 0
        if config.image_features:
            self.vision_encoder, image_dim = self._load_vision_encoder(trust_remote_code or code_is_trusted())
        state_dim = sum(
            feature.shape[0]
            for key, feature in (config.input_features or {}).items()
            if key in STATE_KEYS and feature.type is not FeatureType.VISUAL
        )
        self.feature_dim = state_dim + image_dim * len(config.image_features)
        assert config.action_feature is not None
        self.action_dim = config.action_feature.shape[0]
        self.net = VectorField(
            self.feature_dim, config.chunk_size * self.action_dim, config.hidden_dims, config.activation
        )
        self.reset()

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, D]: states, then the spatial mean of each image's feature map. No gradient reaches the encoder."""
        inputs = self.config.input_features or {}
        parts = [batch[key] for key in STATE_KEYS if key in inputs]
        if self.vision_encoder is not None:
            self.vision_encoder.eval()
            with torch.no_grad():
                for key in self.config.image_features:
                    parts.append(self.vision_encoder(batch[key]).last_hidden_state.mean(dim=(-2, -1)))
        return torch.cat(parts, dim=-1)

    def velocity(self, features: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Velocity of chunks x [B, N, H, action_dim] at times t [B, N]."""
        return self.net(features, x.flatten(-2), t).unflatten(-1, x.shape[-2:])

    def sample(self, features: Tensor, noise: Tensor) -> Tensor:
        """Euler integration from noise [B, H, action_dim] to a chunk, not clipped."""
        x, steps = noise[:, None], self.config.num_inference_steps
        for k in range(steps):
            t = torch.full(x.shape[:2], k / steps, dtype=x.dtype, device=x.device)
            x = x + self.velocity(features, x, t) / steps
        return x[:, 0]

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float] | None]:
        """Flow-matching loss, mean over the entries that are not padding."""
        action = batch[ACTION]
        noise = torch.randn_like(action)
        t = torch.rand(action.shape[0], dtype=action.dtype, device=action.device)
        x = torch.lerp(noise, action, t[:, None, None])
        v = self.velocity(self.features(batch), x[:, None], t[:, None])[:, 0]
        error = (v - (action - noise)).square().mean(dim=-1)
        valid = ~batch["action_is_pad"] if "action_is_pad" in batch else torch.ones_like(error, dtype=torch.bool)
        loss = (error * valid).sum() / valid.sum()
        return loss, {"flow_loss": loss.item()}

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], *, noise: Tensor | None = None, **_: Any) -> Tensor:
        """One sampled chunk [B, H, action_dim] per state, limited to the range of normalised actions."""
        self.eval()
        features = self.features(batch)
        if noise is None:
            shape = (features.shape[0], self.config.chunk_size, self.action_dim)
            noise = torch.randn(shape, dtype=features.dtype, device=features.device)
        chunk, clip = self.sample(features, noise), self.config.action_clip
        return chunk if clip is None else chunk.clamp(*clip)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """Next action [B, action_dim]: `n_action_steps` of a chunk run open loop before the next is sampled."""
        if not self._queue:
            chunk = self.predict_action_chunk(batch, **kwargs)
            self._queue.extend(chunk[:, : self.config.n_action_steps].unbind(dim=1))
        return self._queue.popleft()

    def reset(self) -> None:
        self._queue: deque[Tensor] = deque()

    def get_optim_params(self) -> Any:
        return self.net.parameters()

    @classmethod
    def _load_as_safetensor(
        cls: builtins.type["FlowMlpPolicy"], model: Any, model_file: str, map_location: str, strict: bool
    ) -> Any:
        # LeRobot's default (strict=False) would return a half-random model on a mismatch.
        return super()._load_as_safetensor(model, model_file, map_location, True)

    def _load_vision_encoder(self, trust_remote_code: bool) -> tuple[nn.Module, int]:
        """The frozen encoder and its feature width, safetensors only; a repository's own code runs if it is trusted.

        Raises:
            ValueError: the encoder needs code that is not trusted, or cannot be loaded.
        """
        from transformers import AutoConfig, AutoModel

        name = self.config.vision_encoder
        described = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        if "/" in str(getattr(described, "_attn_implementation", None)):  # a repository of compiled code
            raise ValueError(f'the image encoder "{name}" asks for an attention kernel from the Hub, which is not run')
        sizes = [*getattr(described, "hidden_sizes", ()), *getattr(described, "depths", ())]
        if any(not isinstance(size, int) or size > MAX_ENCODER_SIZE for size in sizes):
            raise ValueError(
                f'the image encoder "{name}" has layers of up to {max(map(int, sizes))} channels: none is real'
            )
        # Never None: transformers would then ask at the terminal.
        encoder = AutoModel.from_pretrained(
            name, config=described, trust_remote_code=trust_remote_code, use_safetensors=True
        )
        encoder.requires_grad_(False).eval()
        return encoder, encoder.config.hidden_sizes[-1]


def code_is_trusted() -> bool:
    """Return True if the user has set :data:`TRUST_VARIABLE`: for commands that have no option for it."""
    return os.environ.get(TRUST_VARIABLE, "").lower() in ("1", "true", "yes")
