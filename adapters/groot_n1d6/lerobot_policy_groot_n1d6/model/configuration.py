"""All sizes of GR00T N1.6. Section numbers in this folder are those of our specification of the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self


@dataclass(frozen=True)
class VisionSizes:
    """SigLIP2-so400m (section 4). `grid`: side of the square of learned position embeddings."""

    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    patch: int = 14
    grid: int = 16
    norm_eps: float = 1e-6

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From the names of a SigLIP2 `config.json`.

        Raises:
            ValueError: it asks for something that GR00T N1.6's tower has not.
        """
        _only(config, use_rope=False, use_windows_attn=False, hidden_act="gelu_pytorch_tanh", num_channels=3)
        names = {
            "hidden_size": "width",
            "num_hidden_layers": "depth",
            "intermediate_size": "mlp_dim",
            "num_attention_heads": "num_heads",
            "patch_size": "patch",
            "layer_norm_eps": "norm_eps",
        }
        sizes = cls(**_renamed(config, names))
        patches = config.get("num_patches", sizes.grid**2)
        grid = round(patches**0.5)
        if grid**2 != patches:
            raise ValueError(f"num_patches is {patches}. Position embeddings lie on a square: expected a square number")
        return replace(sizes, grid=grid)


@dataclass(frozen=True)
class LanguageSizes:
    """Qwen3-1.7B, cut to its first `depth` layers (the checkpoint's `select_layer`, section 4).

    `image_token` is the id of the token that stands for one image feature.
    """

    width: int = 2048
    depth: int = 16
    mlp_dim: int = 6144
    num_heads: int = 16
    num_kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 151_680
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    image_token: int = 151_669


@dataclass(frozen=True)
class HeadSizes:
    """The action head (sections 2 and 5).

    Attributes:
        state_dim: width of the padded state.
        action_dim: width of the padded action.
        horizon: steps of a chunk, padding included.
        context: width of the vision-language features.
        hidden: inner width of the small embodiment networks, and width of what the transformer gives to the last.
        depth: layers of the transformer.
        num_heads: its heads.
        head_dim: width of each of them.
        num_embodiments: slots of the embodiment networks.
        max_steps: rows of the position embedding.
        text_every: of the cross-attention layers, every n-th looks at text and the others at images.
        dropout: in attention outputs and feed-forward layers, when training.
        state_dropout: probability that the mask token stands for the state in the training loss.
        mask_token: whether there is one. Only checkpoints trained with state dropout hold it: a loader decides by the
            checkpoint's keys (section 1).
        time_buckets: flow times are told apart this finely.
        flow_steps: Euler steps of the model's own sampler.
        time_alpha: training times are (1 - s) `time_scale` with s ~ Beta(time_alpha, 1).
        time_scale: see there.
    """

    state_dim: int = 128
    action_dim: int = 128
    horizon: int = 50
    context: int = 2048
    hidden: int = 1024
    depth: int = 32
    num_heads: int = 32
    head_dim: int = 48
    num_embodiments: int = 32
    max_steps: int = 1024
    text_every: int = 2
    dropout: float = 0.2
    state_dropout: float = 0.0
    mask_token: bool = False
    time_buckets: int = 1000
    flow_steps: int = 4
    time_alpha: float = 1.5
    time_scale: float = 0.999

    def __post_init__(self) -> None:
        if self.horizon > self.max_steps:
            raise ValueError(f"horizon is {self.horizon}: expected at most max_steps = {self.max_steps}")
        if self.width % 2:
            raise ValueError(f"num_heads * head_dim is {self.width}: expected an even number, half sines, half cosines")

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From the names of a checkpoint's `config.json`. What it leaves out is as in the base checkpoint; a mask token
        is expected where states are dropped.

        Raises:
            ValueError: it describes an action head that is not GR00T N1.6's.
        """
        _only(config, use_alternate_vl_dit=True, use_vlln=True, add_pos_embed=True, noise_beta_beta=1.0)
        names = {
            "max_state_dim": "state_dim",
            "max_action_dim": "action_dim",
            "action_horizon": "horizon",
            "backbone_embedding_dim": "context",
            "hidden_size": "hidden",
            "max_num_embodiments": "num_embodiments",
            "max_seq_len": "max_steps",
            "attend_text_every_n_blocks": "text_every",
            "state_dropout_prob": "state_dropout",
            "num_timestep_buckets": "time_buckets",
            "num_inference_timesteps": "flow_steps",
            "noise_beta_alpha": "time_alpha",
            "noise_s": "time_scale",
        }
        transformer = config.get("diffusion_model_cfg", {})
        _only(
            transformer,
            norm_type="ada_norm",
            final_dropout=True,
            interleave_self_attention=True,
            positional_embeddings=None,
            attention_bias=True,
            activation_fn="gelu-approximate",
            norm_elementwise_affine=False,
            norm_eps=1e-5,
        )
        of_transformer = {
            "num_layers": "depth",
            "num_attention_heads": "num_heads",
            "attention_head_dim": "head_dim",
            "dropout": "dropout",
        }
        sizes = cls(**_renamed(config, names), **_renamed(transformer, of_transformer))
        sizes = replace(sizes, mask_token=sizes.state_dropout > 0)
        for found, expected, name in (
            (config.get("input_embedding_dim", sizes.width), sizes.width, "input_embedding_dim"),
            (transformer.get("output_dim", sizes.hidden), sizes.hidden, "diffusion_model_cfg.output_dim"),
        ):
            if found != expected:
                raise ValueError(f"{name} is {found}: expected {expected}, as the rest of the configuration has it")
        return sizes


@dataclass(frozen=True)
class GrootSizes:
    """The whole network. The defaults are those of the base checkpoint."""

    vision: VisionSizes = field(default_factory=VisionSizes)
    language: LanguageSizes = field(default_factory=LanguageSizes)
    head: HeadSizes = field(default_factory=HeadSizes)

    def __post_init__(self) -> None:
        if self.head.context != self.language.width:
            raise ValueError(
                f"head.context is {self.head.context}: expected language.width, which is {self.language.width}"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From a checkpoint's `config.json`, which leaves out the sizes of the vision-language model (section 1)."""
        language = replace(LanguageSizes(), **_renamed(config, {"select_layer": "depth"}))
        return cls(language=language, head=HeadSizes.from_config(config))

    @classmethod
    def tiny(cls) -> Self:
        """Every part that the real model has (a layer for text, one for images, two of self-attention), small."""
        return cls(
            vision=VisionSizes(width=48, depth=2, mlp_dim=96, num_heads=4, grid=4),
            language=LanguageSizes(
                width=64, depth=2, mlp_dim=96, num_heads=4, num_kv_heads=2, head_dim=16, vocab=256, image_token=200
            ),
            head=HeadSizes(
                state_dim=16,
                action_dim=12,
                horizon=8,
                context=64,
                hidden=24,
                depth=4,
                num_heads=4,
                head_dim=8,
                max_steps=16,
            ),
        )


def _renamed(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


def _only(config: Mapping[str, Any], **expected: Any) -> None:
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{name} is {config[name]!r} in the model's configuration. This is GR00T N1.6 with {name} = {value!r}: "
                "use a checkpoint of that kind"
            )
