"""Configuration of the ``flow_mlp`` LeRobot policy."""

from dataclasses import dataclass, field
from typing import Literal

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, NormalizationMode
from lerobot.optim.optimizers import AdamConfig

MAX_CHUNK, MAX_FLOW_STEPS = 4096, 1000
MAX_LAYERS, MAX_WIDTH = 256, 65_536
"""Sizes that no policy has: beyond them a number is a mistake, and would take memory before that is noticed."""
DEFAULT_MAPPING = {
    "VISUAL": NormalizationMode.IDENTITY,
    "STATE": NormalizationMode.MEAN_STD,
    "ENV": NormalizationMode.MEAN_STD,
    "ACTION": NormalizationMode.MIN_MAX,
}


@PreTrainedConfig.register_subclass("flow_mlp")
@dataclass
class FlowMlpConfig(PreTrainedConfig):
    """An MLP vector field v(features, chunk, t) over whole action chunks (POCO, arXiv 2604.01860, section 5).

    Attributes:
        chunk_size: H, control steps in a chunk.
        n_action_steps: steps executed before the next chunk is sampled.
        hidden_dims: widths of the hidden layers (paper: four of 512).
        activation: "silu" (paper) or "gelu" (tanh approximation, the authors' code).
        num_inference_steps: K, Euler steps of the sampler.
        vision_encoder: Hub id or folder of a frozen image encoder that `transformers.AutoModel` loads, used when the
            policy has image inputs. The default is LeRobot's own ResNet-10, which brings its modelling code with it:
            that runs only if the user trusts it (`trust_remote_code`, which is no field: no file can set it).
        clip: lowest and highest normalised action that is sampled. None is [-1, 1] where actions are normalised by
            their range (MIN_MAX), which bounds them, and no limit elsewhere.
        normalization_mapping: LeRobot's normalisation per kind of feature; kinds that it does not name keep their
            default. "STATE": "IDENTITY" suits observations that are scaled by design (OGBench's): a nearly constant
            dimension otherwise becomes noise of unit variance.
        optimizer_lr: learning rate for ``lerobot-train``.
        action_feature_names: names of the action's dimensions, in order, by which LeRobot sends them to a robot.
    """

    chunk_size: int = 5
    n_action_steps: int = 5
    hidden_dims: list[int] = field(default_factory=lambda: [512, 512, 512, 512])
    activation: Literal["silu", "gelu"] = "silu"
    num_inference_steps: int = 10
    vision_encoder: str = "lerobot/resnet10"
    optimizer_lr: float = 3e-4
    action_feature_names: list[str] | None = None
    clip: list[float] | None = None

    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=lambda: dict(DEFAULT_MAPPING))

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in self.normalization_mapping:
            if kind not in FeatureType.__members__:
                raise ValueError(f'normalization_mapping names "{kind}"; expected {", ".join(DEFAULT_MAPPING)}')
        self.normalization_mapping = DEFAULT_MAPPING | {
            kind: NormalizationMode(mode) for kind, mode in self.normalization_mapping.items()
        }
        if self.clip is not None and not (len(self.clip) == 2 and self.clip[0] < self.clip[1]):
            raise ValueError(f"clip is {self.clip}; expected the lowest and the highest normalised action")
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(
                f"n_action_steps is {self.n_action_steps}; it must lie in [1, chunk_size={self.chunk_size}]"
            )
        if not self.hidden_dims or min(self.hidden_dims) < 1:
            raise ValueError(f"hidden_dims is {self.hidden_dims}; it needs at least one positive width")
        if len(self.hidden_dims) > MAX_LAYERS or max(self.hidden_dims) > MAX_WIDTH:
            raise ValueError(
                f"hidden_dims has {len(self.hidden_dims)} layers of up to {max(self.hidden_dims)} units; at most "
                f"{MAX_LAYERS} layers of {MAX_WIDTH} are built"
            )
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}; it must be at least 1")
        for name, most in (("chunk_size", MAX_CHUNK), ("num_inference_steps", MAX_FLOW_STEPS)):
            if getattr(self, name) > most:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at most {most}")

    @property
    def action_clip(self) -> tuple[float, float] | None:
        """Range that sampled chunks are limited to, in normalised units; None: no limit."""
        if self.clip is not None:
            return self.clip[0], self.clip[1]
        return (-1.0, 1.0) if self.normalization_mapping["ACTION"] is NormalizationMode.MIN_MAX else None

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> AdamConfig:
        return AdamConfig(lr=self.optimizer_lr)

    def get_scheduler_preset(self) -> None:
        return None

    def validate_features(self) -> None:
        if self.action_feature is None:
            raise ValueError(f'no "action" among the output features: {sorted(self.output_features or {})}')
        if not (self.robot_state_feature or self.env_state_feature or self.image_features):
            raise ValueError(
                "flow_mlp needs observation.state, observation.environment_state or images among its input features; "
                f"found {sorted(self.input_features or {})}"
            )
