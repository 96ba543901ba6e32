"""Configuration of the ``groot_n1d6`` LeRobot policy."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import CosineDecayWithWarmupSchedulerConfig


@PreTrainedConfig.register_subclass("groot_n1d6")
@dataclass
class GrootN1d6Config(PreTrainedConfig):
    """GR00T N1.6: a frozen vision-language model and a diffusion transformer over action chunks.

    Attributes:
        base_model_path: folder or Hub id of a GR00T N1.6 checkpoint to start from (``nvidia/GR00T-N1.6-3B`` is gated);
            None starts from random weights.
        base_revision: its Hub revision.
        embodiment: the robot: a table of tag, slot, horizon, views, state and action keys (see the README), or a JSON
            file of one; None takes state, action and cameras as the dataset has them, absolute, as a new embodiment.
        chunk_size: H, control steps of a chunk that are supervised and may be executed.
        n_action_steps: steps executed before the next chunk is sampled.
        max_action_horizon: steps that the network denoises; those beyond `chunk_size` are padding (checkpoints: 50).
        max_state_dim: width of the network's state.
        max_action_dim: width of its actions.
        dtype: of the frozen vision-language model; the head is float32.
        compute: dtype of the head's matrix products.
        tune_top_llm_layers: last layers of the language model to train with the head. NVIDIA's fine-tuning trains 4
            without saying so; here none by default, so that features can be computed once.
        tune_embodiment_encoders: whether the state and action networks of the embodiments train.
        mask_token: whether the weights hold one; set from the checkpoint.
        sizes: sizes of a network that is not the published one; None is.
        tokenizer: folder or Hub id of Qwen3's tokenizer, or "bytes"; None is the public one.
        byte_ids: ids of the six special tokens where it is "bytes".
        letterbox: pad pictures to squares first, as checkpoints made after February 2026 were trained.
        exact_images: resize with OpenCV and PIL themselves (a CPU's business), not in torch.
        augment_images: random crops and colours while training.
        optimizer_lr: learning rate for ``lerobot-train``, as for the next two (NVIDIA's fine-tuning values).
        action_feature_names: names of the action's dimensions, in order, by which LeRobot sends them to a robot.
    """

    base_model_path: str | None = None
    base_revision: str | None = None
    embodiment: dict[str, Any] | None = None
    chunk_size: int = 16
    n_action_steps: int = 16
    max_action_horizon: int = 50
    max_state_dim: int = 128
    max_action_dim: int = 128
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    compute: Literal["bfloat16", "float32"] = "bfloat16"
    tune_top_llm_layers: int = 0
    tune_embodiment_encoders: bool = True
    mask_token: bool = False
    sizes: dict[str, Any] | None = None
    tokenizer: str | None = None
    byte_ids: list[int] | None = None
    letterbox: bool = False
    exact_images: bool = False
    augment_images: bool = False
    optimizer_lr: float = 1e-4
    optimizer_weight_decay: float = 1e-5
    scheduler_warmup_steps: int = 500
    scheduler_decay_steps: int = 10_000
    action_feature_names: list[str] | None = None

    # The processors normalise by embodiment keys, which LeRobot's own normalisation does not know.
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ENV", "ACTION"), NormalizationMode.IDENTITY)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_action_steps <= self.chunk_size <= self.max_action_horizon:
            raise ValueError(
                f"n_action_steps is {self.n_action_steps}, chunk_size {self.chunk_size}, max_action_horizon "
                f"{self.max_action_horizon}; expected 1 <= n_action_steps <= chunk_size <= max_action_horizon"
            )
        for name in ("dtype", "compute"):
            if getattr(self, name) not in ("bfloat16", "float32"):
                raise ValueError(f'{name} is "{getattr(self, name)}": expected bfloat16 or float32')
        if any(
            NormalizationMode(mode) is not NormalizationMode.IDENTITY for mode in self.normalization_mapping.values()
        ):
            raise ValueError("groot_n1d6 normalises by embodiment keys: normalization_mapping must stay IDENTITY")

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(lr=self.optimizer_lr, weight_decay=self.optimizer_weight_decay)

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        return CosineDecayWithWarmupSchedulerConfig(
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
            peak_lr=self.optimizer_lr,
            decay_lr=0.0,
        )

    def validate_features(self) -> None:
        if self.action_feature is None:
            raise ValueError(f'no "action" among the output features: {sorted(self.output_features or {})}')
        if not self.image_features:
            raise ValueError(f"groot_n1d6 sees through cameras; input features: {sorted(self.input_features or {})}")
