"""The ``groot_n1d6`` LeRobot policy: loss, sampler, saving. Needs nothing but LeRobot.

Time runs from noise (t = 0) to action (t = 1); the network predicts action - noise.
"""

import builtins
from collections import deque
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION
from torch import Tensor

from lerobot_policy_groot_n1d6 import weights
from lerobot_policy_groot_n1d6.configuration_groot_n1d6 import GrootN1d6Config
from lerobot_policy_groot_n1d6.model import (
    Encoded,
    GrootN1d6,
    GrootSizes,
    rollout,
    sample_time,
    sort_tokens,
    training_loss,
)
from lerobot_policy_groot_n1d6.processing.normalization import pad_chunk
from lerobot_policy_groot_n1d6.processing.steps import (
    ATTENTION_MASK,
    EMBODIMENT_ID,
    INPUT_IDS,
    PIXEL_VALUES,
    REFERENCE,
    STATE,
    tag_chunk,
)


class GrootN1d6Policy(PreTrainedPolicy):
    """GR00T N1.6. Its state dict has the names of NVIDIA's checkpoints."""

    config_class = GrootN1d6Config  # pyright: ignore[reportAssignmentType] (LeRobot declares None)
    name = "groot_n1d6"  # pyright: ignore[reportAssignmentType]
    config: GrootN1d6Config

    def __init__(self, config: GrootN1d6Config, *, load_base: bool = True, **_: Any) -> None:
        super().__init__(config)
        config.validate_features()
        network = _base_network(config) if load_base and config.base_model_path else _new_network(config)
        config.mask_token = network.sizes.head.mask_token
        self.sizes = network.sizes
        if network.sizes != GrootSizes():
            config.sizes = asdict(network.sizes)  # a saved policy does without the checkpoint that told them
        self.backbone, self.action_head = network.backbone, network.action_head
        self.backbone.to(getattr(torch, config.dtype))
        self._freeze()
        if config.device:
            self.to(config.device)
        self.reset()

    # -- parts that the poco_vla adapter uses, too ----------------------------------------------------------------

    @property
    def compute(self) -> torch.dtype:
        return getattr(torch, self.config.compute)

    def encode(self, batch: Mapping[str, Any]) -> Encoded:
        """Features of every token of a processed batch: images state after state, each state's in the views' order."""
        views = [key for key in batch if key.startswith(PIXEL_VALUES)]
        language_model: Any = self.backbone["model"]
        device, dtype = self.device, next(self.backbone.parameters()).dtype
        columns = [batch[key].to(device, dtype) for key in views]
        images = [column[i : i + 1] for i in range(len(batch[INPUT_IDS])) for column in columns]
        frozen = self.config.tune_top_llm_layers == 0
        with torch.no_grad() if frozen else nullcontext():
            return language_model.encode(images, batch[INPUT_IDS].to(device), batch[ATTENTION_MASK].to(device))

    @property
    def device(self) -> torch.device:
        return self.action_head.position_embedding.weight.device

    @torch.no_grad()
    def sample(self, batch: Mapping[str, Any], noise: Tensor) -> Tensor:
        """The model's own sampler from noise [B, H, A]: everything that it denoises, padding too."""
        head: Any = self.action_head
        slots = batch[EMBODIMENT_ID]
        kv = head.cross_kv(sort_tokens(*self.encode(batch)), compute=self.compute)
        token = head.state_tokens(batch[STATE], slots, compute=self.compute)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return head.velocity(kv, token, x, t[:1], slots, compute=self.compute)  # `rollout` gives all one time

        return rollout(velocity, noise[:, None], self.sizes.head.flow_steps)[:, 0]

    # -- LeRobot's interface --------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Tensor], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """Flow-matching loss over valid steps and real dimensions; the network sees the padding's noise, too."""
        head, config = self.action_head, self.config
        assert config.action_feature is not None
        actions, mask = pad_chunk(
            batch[ACTION],
            horizon=config.max_action_horizon,
            width=config.max_action_dim,
            action_dim=config.action_feature.shape[0],
            is_pad=batch.get("action_is_pad"),
        )
        slots, state = batch[EMBODIMENT_ID], batch[STATE]
        kv = head.cross_kv(sort_tokens(*self.encode(batch)), compute=self.compute)
        dropped = None
        if self.training and self.sizes.head.state_dropout > 0:
            dropped = torch.rand(len(state), device=state.device) < self.sizes.head.state_dropout
        token = head.state_tokens(state, slots, dropped=dropped, compute=self.compute)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return head.velocity(kv, token, x[:, None], t[:, None], slots, compute=self.compute)[:, 0]

        noise = torch.randn_like(actions)
        t = sample_time((len(actions),), self.sizes.head).to(actions.device)
        loss, errors = training_loss(velocity, actions, mask, noise, t)
        if reduction == "none":
            rows = errors.sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp_min(1)
            return rows, {"flow_loss": loss.item()}
        return loss, {"flow_loss": loss.item()}

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Tensor], *, noise: Tensor | None = None, **_: Any) -> Tensor:
        """One sampled chunk [B, chunk_size, action_dim] per state, normalised, not clipped (the post-processor does).

        Args:
            batch: processed.
            noise: [B, max_action_horizon, max_action_dim]; drawn when None.
        """
        self.eval()
        config = self.config
        assert config.action_feature is not None
        if noise is None:
            shape = (len(batch[STATE]), config.max_action_horizon, config.max_action_dim)
            noise = torch.randn(shape, device=self.device)
        return self.sample(batch, noise)[:, : config.chunk_size, : config.action_feature.shape[0]]

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """Next action: `n_action_steps` of a chunk run open loop before the next is sampled. Relative ones carry the
        state that they refer to, for the post-processor."""
        if not self._queue:
            chunk = self.predict_action_chunk(batch, **kwargs)
            if REFERENCE in batch:
                chunk = tag_chunk(chunk, batch[REFERENCE], self.config.max_action_dim)
            self._queue.extend(chunk[:, : self.config.n_action_steps].unbind(dim=1))
        return self._queue.popleft()

    def reset(self) -> None:
        self._queue: deque[Tensor] = deque()

    def get_optim_params(self) -> Any:
        return [p for p in self.parameters() if p.requires_grad]

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: Any, **options: Any) -> Any:
        """LeRobot's own loader, strict; the base checkpoint is not needed any more."""
        settings: dict[str, Any] = options | {"strict": True, "load_base": False}
        return super().from_pretrained(pretrained_name_or_path, **settings)

    @classmethod
    def _load_as_safetensor(
        cls: builtins.type["GrootN1d6Policy"], model: Any, model_file: str, map_location: str, strict: bool
    ) -> Any:
        # LeRobot's default (strict=False) would return a half-random model on a mismatch.
        return super()._load_as_safetensor(model, model_file, map_location, True)

    def train(self, mode: bool = True) -> Any:
        """The frozen vision-language model stays in eval mode."""
        super().train(mode)
        if self.config.tune_top_llm_layers == 0:
            self.backbone.eval()
        return self

    def _freeze(self) -> None:
        self.requires_grad_(False)
        self.action_head.requires_grad_(True)
        if not self.config.tune_embodiment_encoders:
            for part in (
                self.action_head.state_encoder,
                self.action_head.action_encoder,
                self.action_head.action_decoder,
            ):
                part.requires_grad_(False)
        if self.sizes.head.mask_token and self.sizes.head.state_dropout == 0:
            self.action_head.mask_token.requires_grad_(False)  # nothing would give it a gradient
        count = self.config.tune_top_llm_layers
        if count:
            language: Any = self.backbone["model"]
            language.language_model.model.layers[-count:].requires_grad_(True)


def _base_network(config: GrootN1d6Config) -> GrootN1d6:
    """A checkpoint's network, at the widths that the configuration has."""
    assert config.base_model_path is not None
    folder = weights.locate(config.base_model_path, config.base_revision)
    described = weights.read_config(folder)
    sizes = weights.sizes_of(config.sizes) if config.sizes else GrootSizes.from_config(described)
    found = (sizes.head.state_dim, sizes.head.action_dim)
    if found != (config.max_state_dim, config.max_action_dim):
        raise weights.CheckpointError(
            f"{folder} has {found[0]} state and {found[1]} action dimensions: give max_state_dim and max_action_dim "
            f"these, found {config.max_state_dim} and {config.max_action_dim}"
        )
    return weights.load(folder, sizes, backbone=getattr(torch, config.dtype))


def _new_network(config: GrootN1d6Config) -> GrootN1d6:
    return GrootN1d6(network_sizes(config))


def network_sizes(config: GrootN1d6Config) -> GrootSizes:
    """Return the sizes of the network that a configuration without a base describes."""
    sizes = weights.sizes_of(config.sizes) if config.sizes else GrootSizes()
    head = replace(
        sizes.head, state_dim=config.max_state_dim, action_dim=config.max_action_dim, mask_token=config.mask_token
    )
    return replace(sizes, head=head)
