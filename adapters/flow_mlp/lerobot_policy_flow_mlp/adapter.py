"""``flow_mlp`` as a poco_vla adapter: the LeRobot policy behind :class:`poco_vla.FlowPolicy`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

import torch
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import RenameObservationsProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE
from lerobot.utils.feature_utils import dataset_to_policy_features
from torch import Tensor

from lerobot_policy_flow_mlp.configuration_flow_mlp import MAX_WIDTH, FlowMlpConfig
from lerobot_policy_flow_mlp.modeling_flow_mlp import STATE_KEYS, TRUST_VARIABLE, FlowMlpPolicy
from lerobot_policy_flow_mlp.processor_flow_mlp import make_flow_mlp_pre_post_processors
from poco_vla import ActionSpec, FlowPolicy, PolicyError, atomic_folder, linear, raw
from poco_vla.adapting import camera_names, naming, normalization, processors, weights
from poco_vla.adapting.lerobot_checkpoint import kept_order
from poco_vla.pretrained import heads, policy_config

OF_DATASET = frozenset(
    {"input_features", "output_features", "chunk_size", "n_action_steps", "push_to_hub", "action_feature_names"}
)
"""Fields of FlowMlpConfig that :meth:`FlowMlp.from_dataset` sets itself."""

FAR, NEAR = 20.0, 4.0
"""Deviations from the mean: no batch of normalised states lies beyond the first, all of its rows within the second."""


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
        order: of the data's states and actions against the policy's own; None takes them as they come.
    """

    def __init__(
        self, model: FlowMlpPolicy, preprocess: Any, postprocess: Any, order: naming.VectorOrder | None = None
    ) -> None:
        super().__init__()
        config = model.config
        self.order = order or naming.VectorOrder()
        self.names = self.order.names
        self._pipeline = preprocess
        if self.order.index:
            preprocess = naming.Reordered(preprocess, self.order)
            postprocess = naming.Reordered(postprocess, self.order, after=True)
        self.model = model.requires_grad_(False)
        self.head = model.net.requires_grad_(True)
        self.head.linear = linear
        self.preprocess, self.postprocess = preprocess, postprocess
        self.feature_dim = model.feature_dim
        self.input_keys = processors.raw_keys(self._pipeline, config.input_features or {})
        self.spec = ActionSpec(
            config.chunk_size, model.action_dim, model.action_dim, config.num_inference_steps, config.action_clip
        )

    def encode(self, obs: Mapping[str, Any]) -> MlpPrefix:
        raw.refuse_raw(obs, tuple(self.model.config.input_features or {}))
        with torch.no_grad():
            if self._looks_raw(obs.get(OBS_STATE)):
                raise PolicyError(f"encode takes what preprocess gives, and this is a raw observation: {raw.HOW}")
            return MlpPrefix(self.model.features(dict(obs)))

    def _looks_raw(self, state: Tensor | None) -> bool:
        """Return True if no state is of a normalised size, and all would be once they were normalised."""
        if state is None or state.is_cuda or not state.numel() or state.ndim != 2:
            return False
        if float(state.abs().amax(dim=1).min()) <= FAR:
            return False
        normalised = self._pipeline({OBS_STATE: state.clone(), "task": [""] * len(state)})[OBS_STATE]
        return float(normalised.abs().max()) <= NEAR

    def pack(self, prefix: Any) -> list[dict[str, Tensor]]:
        return [{"features": features} for features in prefix.features]

    def unpack(self, states: Sequence[Mapping[str, Tensor]]) -> MlpPrefix:
        return MlpPrefix(torch.stack([state["features"] for state in states]))

    def velocity(self, prefix: Any, x: Tensor, t: Tensor) -> Tensor:
        return self.model.velocity(prefix.features, x, t)

    def native_sample(self, obs: Mapping[str, Any], noise: Tensor) -> Tensor:
        return self.model.sample(self.model.features(dict(obs)), noise)

    option_record = FlowMlpConfig

    @classmethod
    def option_names(cls, *, pretrained: bool) -> frozenset[str] | None:
        if pretrained:
            return None
        return frozenset(f.name for f in fields(FlowMlpConfig)) - OF_DATASET | {"trust_remote_code", "cameras"}

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
        trust_remote_code: bool = False,
        cameras: camera_names.Cameras = None,
        joints: naming.Joints = None,
        base: str | Path | None = None,
        **options: Any,
    ) -> Self:
        """Load a ``flow_mlp`` folder or repository.

        Args:
            repo_or_path: local folder or Hub id.
            horizon: H, the policy's own.
            device: torch device.
            features: LeRobot features of the dataset to go on with.
            stats: its statistics.
            statistics: "dataset" normalises by `stats` from now on; else the checkpoint's own are kept.
            dataset_meta: not needed here.
            revision: Hub revision.
            cameras: {camera of the dataset: camera of the policy}, where they have other names.
            joints: "positional", or {name in the dataset: name in the policy}, for numbers of states and actions whose
                names merely differ.
            base: where the base of a LoRA is, if not where the LoRA says.
            options: refused.

        Raises:
            PolicyError: files are missing or damaged, or do not fit together.
            DataError: the dataset has other dimensions than the checkpoint, or unusable statistics.
        """
        if options:
            raise PolicyError(
                f"a pretrained flow_mlp takes no options, got {sorted(options)}: its config.json fixes them"
            )
        source = heads.locate(repo_or_path, revision)
        if heads.read_head(source.folder, "flow_mlp") is not None:
            raise PolicyError(f"{repo_or_path} holds a head that belongs on a base, which no flow_mlp has")
        config = policy_config.load_policy_config(
            source.folder,
            "flow_mlp",
            FlowMlpConfig.from_pretrained,
            fields=[field.name for field in fields(FlowMlpConfig)],
            name=str(repo_or_path),
            limits={"hidden_dims": MAX_WIDTH},
        )
        with policy_config.describing(f"{source.folder / policy_config.CONFIG} describes no flow_mlp"):
            config.validate_features()
        if horizon is not None and horizon != config.chunk_size:
            raise PolicyError(
                f"{repo_or_path} was trained with chunks of {config.chunk_size} steps, asked for {horizon}"
            )
        config.device = device
        mapping = heads.read_object(source.folder / "config.json").get("normalization_mapping", {})
        # An earlier version left kinds that its mapping did not name as they are.
        config.normalization_mapping |= dict.fromkeys(
            config.normalization_mapping.keys() - mapping.keys(), NormalizationMode.IDENTITY
        )
        if features is not None:
            normalization.check_features(config, features, str(repo_or_path))
        processors.check_pipelines(source.folder, processors.INPUT_STEPS, processors.OUTPUT_STEPS)
        files = weights.weights_of(source, base)
        saved = camera_names.saved_cameras(source.folder / "policy_preprocessor.json", list(config.image_features))
        renames = camera_names.kept_renames(saved, features, cameras, where=source.name)
        order = kept_order(source, config, features, joints)
        if statistics == "dataset":
            if features is None or stats is None:
                raise PolicyError('statistics="dataset" without a dataset: give features and stats')
            config.clip = None
            in_order = normalization.in_order(stats, order.index)
            pipelines = _pipelines(config, {} if order.index else features, in_order, renames)
            return cls(_load_model(config, files, trust_remote_code), *pipelines, order)
        if config.action_clip is None:  # a folder of an earlier version does not say it
            _set_clip(config, normalization.saved_stats(source.folder))
        model = _load_model(config, files, trust_remote_code)
        # The folder remembers the device it was trained on.
        overrides: dict[str, Any] = {"device_processor": {"device": device}}
        if renames is not None:
            overrides["rename_observations_processor"] = {"rename_map": renames}
        with policy_config.describing(f"the processors in {repo_or_path} cannot be loaded"):
            pipelines = make_pre_post_processors(
                config, pretrained_path=str(source.folder), preprocessor_overrides=overrides
            )
        processors.check_inverse(*pipelines, config, source.name)
        return cls(model, *pipelines, order)

    @classmethod
    def from_dataset(
        cls, features: Mapping[str, Any], stats: Mapping[str, Any], *, horizon: int, **options: Any
    ) -> Self:
        """A fresh policy. Options are the fields of FlowMlpConfig, such as ``hidden_dims`` or ``activation``, and
        ``trust_remote_code``: whether an image encoder's repository may run its own code, and ``cameras``: those to use
        of the dataset's (all but depth cameras when left out)."""
        trusted = options.pop("trust_remote_code", False) is True
        cameras = options.pop("cameras", None)
        offered = camera_names.colour_features(features, cameras)
        if cameras is not None:
            pictures = [key for key, feature in offered.items() if camera_names.is_picture(feature)]
            chosen = camera_names.camera_slots([], pictures, cameras) if cameras else {}
            offered = {key: ft for key, ft in offered.items() if key in chosen or key not in pictures}
        policy_features = dataset_to_policy_features(offered)
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
        order = naming.new_order(features)
        config.action_feature_names = list(order.own[ACTION]) if ACTION in order.own else None
        pipelines = _pipelines(config, features, stats)
        return cls(_built(config, trusted), *pipelines, order)

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
        with atomic_folder(path) as partial:
            self.model.save_pretrained(partial)
            heads.write_about(partial, adapter="flow_mlp", names=self.order.to_json())
            self.preprocess.save_pretrained(partial, config_filename="policy_preprocessor.json")  # pyright: ignore
            self.postprocess.save_pretrained(partial, config_filename="policy_postprocessor.json")  # pyright: ignore


def _built(config: FlowMlpConfig, trust_remote_code: bool) -> FlowMlpPolicy:
    """Build a policy with random weights.

    Raises:
        PolicyError: its image encoder cannot be loaded, or needs code that the user does not trust.
    """
    try:
        return FlowMlpPolicy(config, trust_remote_code=trust_remote_code)
    except OSError as error:  # of transformers, some sixty lines long
        raise PolicyError(
            f'the image encoder "{config.vision_encoder}" is neither in the cache nor a folder, and cannot be fetched '
            f"now ({str(error).strip().splitlines()[0][:150]}): fetch it once where there is a network (hf download "
            f'{config.vision_encoder}), or name a folder with policy_options {{"vision_encoder": ...}}'
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise PolicyError(f"the policy cannot be built: {' '.join(str(error).split())[:300]}") from error
        raise PolicyError(
            f'the image encoder "{config.vision_encoder}" brings code of its own, which runs only if you trust it: '
            f'give policy_options {{"trust_remote_code": true}}, or set {TRUST_VARIABLE}=1 where a command has no such '
            'option, or name the folder or repository of a class that transformers has with "vision_encoder"'
        ) from error


def _load_model(config: FlowMlpConfig, files: weights.Weights, trust_remote_code: bool) -> FlowMlpPolicy:
    """Build a policy with a checkpoint's weights, whose shapes are compared before memory is taken.

    Raises:
        PolicyError: they are damaged, or not this policy's.
    """
    file = files.where
    shapes = files.shapes()
    of_net = {name: shape for name, shape in shapes.items() if name.startswith("net.")}
    _check_fit(_net_shapes(config, of_net), of_net, file)
    model = _built(config, trust_remote_code)
    _check_fit({name: tuple(one.shape) for name, one in model.state_dict().items()}, shapes, file)
    tensors = files.tensors()
    heads.check_finite(tensors, file)
    model.load_state_dict(tensors)
    return model.to(config.device).eval()


def _check_fit(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], file: Path) -> None:
    try:
        heads.check_tensors(wanted, found, file)
    except PolicyError as error:
        raise PolicyError(f"the weights in {file.parent} do not fit its config.json: {error}") from error


def _net_shapes(config: FlowMlpConfig, found: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the vector field that a configuration describes, by name. The width of an image encoder's
    features, which it does not say, is taken from the file."""
    inputs = config.input_features or {}
    features = sum(inputs[key].shape[0] for key in STATE_KEYS if key in inputs)
    assert config.action_feature is not None
    chunk = config.chunk_size * config.action_feature.shape[0]
    if config.image_features:
        features = found.get("net.layers.0.weight", (0, chunk + 1))[-1] - chunk - 1
    widths = [features + chunk + 1, *config.hidden_dims, chunk]
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (inner, outer) in enumerate(pairwise(widths)):
        shapes |= {f"net.layers.{i}.weight": (outer, inner), f"net.layers.{i}.bias": (outer,)}
    return shapes


def _pipelines(
    config: FlowMlpConfig,
    features: Mapping[str, Any],
    stats: Mapping[str, Any],
    renames: Mapping[str, str] | None = None,
) -> tuple[Any, Any]:
    """Return the pipelines of a policy for a dataset, and let the policy sample in the range of its actions."""
    usable = normalization.usable_stats(config, stats, "the dataset", features)
    if config.clip is None:
        _set_clip(config, usable)
    pipelines: tuple[Any, Any] = make_flow_mlp_pre_post_processors(config, usable)
    for step in pipelines[0].steps:
        if renames and isinstance(step, RenameObservationsProcessorStep):
            step.rename_map = dict(renames)
    return pipelines


def _set_clip(config: FlowMlpConfig, stats: Mapping[str, Any]) -> None:
    mode = config.normalization_mapping["ACTION"]
    clip = normalization.action_range(mode.value, stats.get(ACTION, {}))
    if mode is not NormalizationMode.MIN_MAX and clip is not None:
        config.clip = list(clip)
