"""Load the adapter's policies: from a LeRobot folder, or one of NVIDIA's checkpoints and a dataset."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lerobot.configs.types import FeatureType
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import RenameObservationsProcessorStep
from lerobot.utils.constants import ACTION
from lerobot.utils.feature_utils import dataset_to_policy_features

from lerobot_policy_groot_n1d6 import weights
from lerobot_policy_groot_n1d6.configuration_groot_n1d6 import GrootN1d6Config
from lerobot_policy_groot_n1d6.model import GrootN1d6, HeadSizes
from lerobot_policy_groot_n1d6.modeling_groot_n1d6 import GrootN1d6Policy, network_sizes
from lerobot_policy_groot_n1d6.processing.embodiment import Embodiment, read_table
from lerobot_policy_groot_n1d6.processing.steps import DecodeStep, EncodeStep
from lerobot_policy_groot_n1d6.processor_groot_n1d6 import make_groot_n1d6_pre_post_processors
from poco_vla import PolicyError
from poco_vla.adapting import camera_names, naming, normalization, processors
from poco_vla.adapting import weights as weight_files
from poco_vla.adapting.lerobot_checkpoint import Checkpoint, check_horizon, kept_order
from poco_vla.pretrained import heads, policy_config

PROCESSED = {"embodiment", "tokenizer", "byte_ids", "letterbox", "exact_images", "augment_images"}
"""Options that the processors heed."""
ADAPTER = "groot_n1d6"
PREPROCESSOR = "policy_preprocessor.json"
_NUMBERS = {"max_state_dim": processors.whole_number(65_536, 1), "max_action_dim": processors.whole_number(65_536, 1)}
_EMBODIMENT = {"embodiment": processors.TABLE}
_RULES = dict.fromkeys(("use_percentiles", "clip_outliers", "clip_deviations"), processors.FLAG)
INPUT_STEPS: processors.Steps = {
    **processors.INPUT_STEPS,
    "groot_n1d6_images": _EMBODIMENT
    | {
        "shortest_edge": processors.whole_number(8192, 1),
        "crop_fraction": processors.number(1.0, 0.01),
        **dict.fromkeys(("letterbox", "exact", "augment"), processors.FLAG),
    },
    "groot_n1d6_encode": _EMBODIMENT | _NUMBERS | _RULES,
    "groot_n1d6_prompt": _EMBODIMENT
    | {
        "tokenizer": processors.TEXT,
        "formalize_language": processors.FLAG,
        "byte_ids": processors.optional(processors.list_of(processors.whole_number(16_000_000), most=16)),
    },
}
OUTPUT_STEPS: processors.Steps = {
    **processors.OUTPUT_STEPS,
    "groot_n1d6_decode": _EMBODIMENT | {"max_action_dim": _NUMBERS["max_action_dim"]} | _RULES,
}
NVIDIA_SIZES = {
    **policy_config.TRANSFORMERS_SIZES,
    **policy_config.SIZES,
    **dict.fromkeys(("backbone_embedding_dim", "input_embedding_dim", "output_dim"), 262_144),
    **dict.fromkeys(("max_seq_len", "max_num_embodiments", "num_timestep_buckets"), 1_000_000),
    **dict.fromkeys(("select_layer", "num_inference_timesteps", "attend_text_every_n_blocks"), 1000),
    **dict.fromkeys(("action_horizon", "attention_head_dim"), 8192),
}
"""Largest sizes of a checkpoint's config.json."""
LORA_TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
"""Every projection of the transformer's layers but AdaLN's."""


@dataclass(frozen=True)
class Data:
    """The dataset to fine-tune on: LeRobot's features, statistics and description of it, and options on its names."""

    features: Mapping[str, Any] | None
    stats: Mapping[str, Any] | None
    meta: Any
    cameras: camera_names.Cameras = None
    joints: naming.Joints = None


def locate(repo_or_path: str | Path, revision: str | None, base: str | Path | None, lora: Any) -> Checkpoint:
    try:
        return Checkpoint.locate(repo_or_path, revision, adapter=ADAPTER, base=base, lora=lora, targets=LORA_TARGETS)
    except PolicyError as error:
        if "the Hub" not in str(error):
            raise
        raise PolicyError(
            f"{error}. NVIDIA's N1.6 weights are gated: accept their licence on the model's page, then run `hf auth "
            "login`"
        ) from error


def policy_type(source: heads.Source) -> str | None:
    """Tell what kind of policy lies there, by its config.json."""
    file = source.folder / "config.json"
    return weights.read_object(file).get("type") if file.is_file() else None


def load_lerobot(
    source: heads.Source,
    base: heads.Source,
    horizon: int | None,
    device: str,
    data: "Data",
    statistics: str,
    options: Mapping[str, Any],
    moved: str | Path | None = None,
) -> tuple[GrootN1d6Policy, tuple[Any, Any], naming.VectorOrder]:
    """A LeRobot folder as it is, or fitted to a dataset; its weights from `base`, where a LoRA's base has `moved`."""
    folder = source.folder
    config = policy_config.load_policy_config(
        folder,
        ADAPTER,
        GrootN1d6Config.from_pretrained,
        fields=[field.name for field in fields(GrootN1d6Config)],
        name=source.name,
        limits={**policy_config.NETWORK_SIZES, "max_action_horizon": 4096},
    )
    check_horizon(horizon, config.max_action_horizon, source.name)
    config.chunk_size = config.n_action_steps = config.max_action_horizon = horizon or config.chunk_size
    config.device = device
    changed = sorted(name for name in PROCESSED & options.keys() if options[name] != getattr(config, name))
    if changed and statistics != "dataset":
        raise PolicyError(
            f"{source.name} keeps processors of its own, which {', '.join(changed)} would not reach: leave these "
            'options out, or build the processors anew with a dataset and statistics="dataset"'
        )
    _set_options(config, options)
    if statistics == "dataset":
        if data.features is None or data.stats is None:
            raise PolicyError('statistics="dataset" without a dataset: give features and stats')
        saved = camera_names.saved_cameras(folder / PREPROCESSOR, config.image_features)
        renames = _take_features(config, data, list(saved), source.name)
        config.base_model_path = None  # its statistics are not asked for, and it may be gone
        pipelines = make_groot_n1d6_pre_post_processors(config, data.stats, data.meta)
        processors.step_of(pipelines[0], RenameObservationsProcessorStep).rename_map = renames
        order = naming.new_order(data.features)
    else:
        processors.check_pipelines(folder, INPUT_STEPS, OUTPUT_STEPS)
        overrides = {"device_processor": {"device": device}}
        pipelines = make_pre_post_processors(config, pretrained_path=str(folder), preprocessor_overrides=overrides)
        encode = _check_inverse(pipelines, config, source.name)
        if data.features is not None:
            _check_features(config, encode.embodiment, data.features, source.name)
        check_horizon(config.chunk_size, encode.embodiment.horizon, source.name)
        views = [view.column for view in encode.embodiment.views]
        saved = camera_names.saved_cameras(folder / PREPROCESSOR, views)
        renames = camera_names.kept_renames(saved, data.features, data.cameras, where=source.name)
        if renames is not None:
            processors.step_of(pipelines[0], RenameObservationsProcessorStep).rename_map = renames
        order = kept_order(source, config, data.features, data.joints)
    config.action_feature_names = list(order.own[ACTION]) if ACTION in order.own else None
    if policy_type(base) != ADAPTER:
        config.base_model_path, config.base_revision = base.name, base.revision
        return GrootN1d6Policy(config).eval(), pipelines, order
    files = weight_files.weights_of(base, moved)
    with policy_config.describing(f"{source.name} describes no GR00T N1.6"):
        network = GrootN1d6.empty(network_sizes(config))  # takes no memory
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    heads.check_tensors(shapes, files.shapes(), files.where)
    policy = GrootN1d6Policy(config, load_base=False)
    policy.load_state_dict(files.tensors())
    return policy.eval(), pipelines, order


def _check_inverse(pipelines: tuple[Any, Any], config: GrootN1d6Config, where: str) -> EncodeStep:
    """Return the pre-processor's step for state and actions.

    Raises:
        PolicyError: the post-processor does not undo what the pre-processor does to actions.
    """
    processors.check_inverse(*pipelines, config, where)
    encode = next((step for step in pipelines[0].steps if isinstance(step, EncodeStep)), None)
    decode = next((step for step in pipelines[1].steps if isinstance(step, DecodeStep)), None)
    if encode is None or decode is None:
        raise PolicyError(f"the processors in {where} have lost the step that normalises, or the one that undoes it")
    tables = encode.state_dict(), decode.state_dict()
    if not all(tables):
        raise PolicyError(f"the processors in {where} have no statistics: fetch or export the policy again")
    heads.check_finite(tables[0], Path(where) / processors.PREPROCESSOR)
    same = tables[0].keys() == tables[1].keys() and all(torch.equal(t, tables[1][n]) for n, t in tables[0].items())
    if not same or encode.get_config() != decode.get_config() | {"max_state_dim": encode.max_state_dim}:
        raise PolicyError(
            f"the processors in {where} do not belong together: actions are normalised by other rules or statistics "
            "going in than coming out"
        )
    return encode


def load_nvidia(
    source: heads.Source,
    horizon: int | None,
    device: str,
    data: "Data",
    options: Mapping[str, Any],
) -> tuple[GrootN1d6Policy, tuple[Any, Any], naming.VectorOrder]:
    """NVIDIA's weights for a dataset's robot."""
    described = weights.read_config(source.folder)
    policy_config.check_sizes(described, NVIDIA_SIZES, source.folder / policy_config.CONFIG)
    if data.features is None or data.stats is None:
        raise PolicyError(
            f"{source.name} is a base model: which robot it is to move is said by a dataset's features and stats"
        )
    sizes = HeadSizes.from_config(described)
    steps = horizon or 16
    check_horizon(steps, sizes.horizon, source.name)
    config = GrootN1d6Config(
        base_model_path=source.name,
        base_revision=source.revision,
        chunk_size=steps,
        n_action_steps=steps,
        max_action_horizon=steps,
        max_state_dim=sizes.state_dim,
        max_action_dim=sizes.action_dim,
        device=device,
        push_to_hub=False,
    )
    _set_options(config, options)
    _take_features(config, data, [], source.name)
    pipelines = make_groot_n1d6_pre_post_processors(config, data.stats, data.meta)
    order = naming.new_order(data.features)
    config.action_feature_names = list(order.own[ACTION]) if ACTION in order.own else None
    return GrootN1d6Policy(config).eval(), pipelines, order


def _set_options(config: GrootN1d6Config, options: Mapping[str, Any]) -> None:
    known = set(vars(config))
    unknown = sorted(set(options) - known)
    if unknown:
        raise PolicyError(f"groot_n1d6 has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    for name, value in options.items():
        setattr(config, name, value)
    if config.embodiment is not None:  # a file's content, which goes where the policy goes
        config.embodiment = read_table(config.embodiment)
    config.__post_init__()
    if config.tune_top_llm_layers:
        raise PolicyError(
            "here the language model is frozen, so that features are computed once: tune_top_llm_layers=0"
        )


def _take_features(config: GrootN1d6Config, data: Data, own: Sequence[str], where: str) -> dict[str, str]:
    """Take a dataset's cameras, state and action into a configuration; the cameras' names there, where they change."""
    offered = dataset_to_policy_features(dict(data.features or {}))
    images = {key: feature for key, feature in offered.items() if feature.type is FeatureType.VISUAL}
    chosen = camera_names.camera_slots(own, list(images), data.cameras, where=where) if images or data.cameras else {}
    states = {key: ft for key, ft in offered.items() if ft.type is FeatureType.STATE}
    config.input_features = {slot or key: images[key] for key, slot in chosen.items()} | states
    config.output_features = {key: ft for key, ft in offered.items() if ft.type is FeatureType.ACTION}
    return camera_names.changed_slots(chosen)


def _check_features(config: GrootN1d6Config, embodiment: Embodiment, features: Mapping[str, Any], name: str) -> None:
    """Raise DataError unless a dataset has the columns that an embodiment reads, in the sizes that a policy knows."""
    read = {view.column for view in embodiment.views} | {key.column for key in embodiment.state}
    inputs = {key: feature for key, feature in (config.input_features or {}).items() if key in read}
    known = SimpleNamespace(input_features=inputs, output_features=config.output_features)
    normalization.check_features(known, features, name)
