"""``flow_mlp`` as a poco_vla adapter: the LeRobot policy behind :class:`poco_vla.FlowPolicy`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_STATE
from lerobot.utils.feature_utils import dataset_to_policy_features
from torch import Tensor

from lerobot_policy_flow_mlp.configuration_flow_mlp import FlowMlpConfig
from lerobot_policy_flow_mlp.modeling_flow_mlp import STATE_KEYS, FlowMlpPolicy
from lerobot_policy_flow_mlp.processor_flow_mlp import make_flow_mlp_pre_post_processors
from poco_vla import ActionSpec, FlowPolicy, PolicyError, heads, linear, whole_folder

OF_DATASET = frozenset({"input_features", "output_features", "chunk_size", "n_action_steps", "push_to_hub"})
"""Fields of FlowMlpConfig that :meth:`FlowMlp.from_dataset` sets itself."""


@dataclass(frozen=True)
class MlpPrefix:
    """The state's features; an MLP has no cache beside them."""

    features: Tensor

    def select(self, index: Any) -> Self:
        return type(self)(self.features[index])

    def to(self, device: Any) -> Self:
        return type(self)(self.features.to(device))


class FlowMlp(FlowPolicy):
    """A FlowMlpPolicy and its processors.

    Args:
        model: the LeRobot policy.
        preprocess: its pre-processor pipeline.
        postprocess: its post-processor pipeline.
    """

    def __init__(self, model: FlowMlpPolicy, preprocess: Any, postprocess: Any) -> None:
        super().__init__()
        config = model.config
        self.model = model.requires_grad_(False)
        self.head = model.net.requires_grad_(True)
        self.head.linear = linear
        self.preprocess, self.postprocess = preprocess, postprocess
        self.feature_dim = model.feature_dim
        self.input_keys = tuple(config.input_features or {})
        self.spec = ActionSpec(config.chunk_size, model.action_dim, model.action_dim, config.num_inference_steps)

    def encode(self, obs: Mapping[str, Any]) -> MlpPrefix:
        with torch.no_grad():
            return MlpPrefix(self.model.features(dict(obs)))

    def pack(self, prefix: Any) -> list[dict[str, Tensor]]:
        return [{"features": features} for features in prefix.features]

    def unpack(self, states: Sequence[Mapping[str, Tensor]]) -> MlpPrefix:
        return MlpPrefix(torch.stack([state["features"] for state in states]))

    def velocity(self, prefix: Any, x: Tensor, t: Tensor) -> Tensor:
        return self.model.velocity(prefix.features, x, t)

    def native_sample(self, obs: Mapping[str, Any], noise: Tensor) -> Tensor:
        return self.model.sample(self.model.features(dict(obs)), noise)

    @classmethod
    def option_names(cls, *, pretrained: bool) -> frozenset[str] | None:
        return None if pretrained else frozenset(f.name for f in fields(FlowMlpConfig)) - OF_DATASET

    @classmethod
    def from_pretrained(
        cls,
        repo_or_path: str | Path,
        *,
        horizon: int | None = None,
        device: str = "cpu",
        features: Mapping[str, Any] | None = None,
        stats: Mapping[str, Any] | None = None,
        statistics: Literal["auto", "dataset", "checkpoint"] = "auto",
        dataset_meta: Any = None,
        revision: str | None = None,
        **options: Any,
    ) -> Self:
        if statistics == "dataset":
            raise PolicyError("a pretrained flow_mlp keeps the statistics that it was trained with")
        if options:
            raise PolicyError(
                f"a pretrained flow_mlp takes no options, got {sorted(options)}: its config.json fixes them"
            )
        source = heads.locate(repo_or_path, revision)
        try:
            config = PreTrainedConfig.from_pretrained(str(source.folder))
        except (OSError, ValueError) as error:
            raise PolicyError(f"no LeRobot policy in {repo_or_path}: {error}") from error
        if not isinstance(config, FlowMlpConfig):
            raise PolicyError(f'{repo_or_path} holds a policy of type "{config.type}", expected "flow_mlp"')
        if horizon is not None and horizon != config.chunk_size:
            raise PolicyError(
                f"{repo_or_path} was trained with chunks of {config.chunk_size} steps, asked for {horizon}"
            )
        config.device = device
        folder = str(source.file(heads.POLICY_WEIGHTS).parent)
        try:
            model = FlowMlpPolicy.from_pretrained(folder, config=config, strict=True)
        except FileNotFoundError as error:
            raise PolicyError(f"{repo_or_path} holds no weights: {error}") from error
        except RuntimeError as error:
            raise PolicyError(f"the weights in {repo_or_path} do not fit its config.json: {error}") from error
        # The folder remembers the device it was trained on.
        overrides = {"device_processor": {"device": device}}
        return cls(
            model,
            *make_pre_post_processors(config, pretrained_path=folder, preprocessor_overrides=overrides),
        )

    @classmethod
    def from_dataset(
        cls, features: Mapping[str, Any], stats: Mapping[str, Any], *, horizon: int, **options: Any
    ) -> Self:
        """A fresh policy. Options are the fields of FlowMlpConfig, such as ``hidden_dims`` or ``activation``."""
        policy_features = dataset_to_policy_features(dict(features))
        outputs = {key: ft for key, ft in policy_features.items() if ft.type is FeatureType.ACTION}
        inputs = {key: ft for key, ft in policy_features.items() if key in STATE_KEYS or ft.type is FeatureType.VISUAL}
        settings: dict[str, Any] = {"device": "cpu"} | options
        try:
            config = FlowMlpConfig(
                input_features=inputs,
                output_features=outputs,
                chunk_size=horizon,
                n_action_steps=horizon,
                push_to_hub=False,
                **settings,
            )
            config.validate_features()
        except (TypeError, ValueError) as error:
            raise PolicyError(f"flow_mlp cannot be built: {error}") from error
        return cls(FlowMlpPolicy(config), *make_flow_mlp_pre_post_processors(config, dict(stats)))

    @classmethod
    def tiny(cls, seed: int = 0) -> Self:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = FlowMlpConfig(
                input_features={OBS_STATE: PolicyFeature(FeatureType.STATE, (6,))},
                output_features={ACTION: PolicyFeature(FeatureType.ACTION, (3,))},
                chunk_size=4,
                n_action_steps=4,
                hidden_dims=[32, 32],
                num_inference_steps=5,
                device="cpu",
            )
            unit = torch.ones
            stats = {
                OBS_STATE: {"mean": 0 * unit(6), "std": unit(6)},
                ACTION: {"min": -2 * unit(3), "max": 2 * unit(3)},
            }
            return cls(FlowMlpPolicy(config), *make_flow_mlp_pre_post_processors(config, stats))

    def example_obs(self, batch_size: int, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        inputs: Sequence[tuple[str, PolicyFeature]] = list((self.model.config.input_features or {}).items())
        return {
            key: (torch.rand if ft.type is FeatureType.VISUAL else torch.randn)(
                (batch_size, *ft.shape), generator=generator
            )
            for key, ft in inputs
        }

    def save_pretrained(self, path: str | Path) -> None:
        with whole_folder(path) as partial:
            self.model.save_pretrained(partial)
            heads.write_about(partial, adapter="flow_mlp")
            self.preprocess.save_pretrained(partial, config_filename="policy_preprocessor.json")  # pyright: ignore
            self.postprocess.save_pretrained(partial, config_filename="policy_postprocessor.json")  # pyright: ignore
