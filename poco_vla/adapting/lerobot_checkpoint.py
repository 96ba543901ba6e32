"""Load a checkpoint of a LeRobot policy for a dataset: configuration, statistics, names, processors, weights."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from lerobot.utils.feature_utils import dataset_to_policy_features
from torch import Tensor, nn

from poco_vla.adapting import camera_names, naming, normalization, processors, weights
from poco_vla.adapting.normalization import Stats
from poco_vla.errors import PolicyError
from poco_vla.pretrained import heads, policy_config
from poco_vla.pretrained.lora import Lora

logger = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float32")
"""Dtypes that a user may ask for."""


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Raise PolicyError unless an option is None or one of `known`."""
    if value is not None and value not in known:
        raise PolicyError(f'{name} is "{value}"; expected one of {", ".join(sorted(known))}')


def check_horizon(horizon: int | None, longest: int, where: str) -> None:
    """Raise PolicyError if a chunk is longer than a policy was trained for."""
    if horizon is not None and horizon > longest:
        raise PolicyError(
            f"{where} was trained with chunks of {longest} steps, asked for {horizon}: it never saw positions beyond. "
            "Choose a shorter horizon."
        )


@dataclass(frozen=True)
class LoadOptions:
    """Options of `from_pretrained` that all LeRobot policies have; see :meth:`.lerobot_vla.LeRobotVla.from_pretrained`.

    Raises:
        PolicyError: one of them has a value that is not known.
    """

    horizon: int | None = None
    device: str = "cpu"
    features: Mapping[str, Any] | None = None
    stats: Mapping[str, Any] | None = None
    statistics: str = "auto"
    dtype: str | None = None
    cameras: camera_names.Cameras = None
    joints: naming.Joints = None
    normalization_mapping: Mapping[str, str] = field(default_factory=dict)
    tokenizer_max_length: int | None = None

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("statistics", self.statistics, ("auto", "checkpoint", "dataset"))
        for kind, mode in self.normalization_mapping.items():
            check_choice("a key of normalization_mapping", kind, ("ACTION", "STATE", "VISUAL"))
            check_choice(f"normalization_mapping of {kind}", mode, [known.value for known in NormalizationMode])
        if self.horizon is not None and self.horizon < 1:
            raise PolicyError(f"horizon is {self.horizon}; a chunk has at least one step")
        if self.statistics == "dataset" and (self.features is None or self.stats is None):
            raise PolicyError('statistics="dataset" without a dataset: give features and stats')


@dataclass(frozen=True)
class Checkpoint:
    """Locate the parts of a checkpoint.

    Attributes:
        source: what was asked for; its configuration and processors hold.
        frozen: whose frozen weights are loaded: `source`, or the base of a head.
        head: the head in `source`; None where a whole policy lies there.
        moved: where the base of a LoRA of peft is now, if not where it was.
        lora: what trains in the place of the full head.
    """

    source: heads.Source
    frozen: heads.Source
    head: heads.Head | None = None
    moved: str | Path | None = None
    lora: Lora | None = None

    @classmethod
    def locate(
        cls,
        repo_or_path: str | Path,
        revision: str | None,
        *,
        adapter: str,
        base: str | Path | None = None,
        lora: Any = None,
        targets: tuple[str, ...] = (),
    ) -> "Checkpoint":
        """Find a checkpoint, and the base of a head.

        Args:
            repo_or_path: local folder or Hub id.
            revision: Hub revision.
            adapter: name of the adapter that a head must be of.
            base: where the base is now, if not where it was.
            lora: option of the user (:meth:`.Lora.of`).
            targets: layers of a LoRA that names none.

        Raises:
            PolicyError: a part cannot be had, or they contradict each other.
        """
        source = heads.locate(repo_or_path, revision)
        head = heads.read_head(source.folder, adapter)
        chosen = heads.chosen_lora(Lora.of(lora, targets), head)
        if head is None:
            return cls(source, source, moved=base, lora=chosen)
        return cls(source, heads.base_of(head, base), head=head, lora=chosen)

    @property
    def weights(self) -> weights.Weights:
        """Return the frozen weights, fetched now where they are on the Hub."""
        return weights.weights_of(self.frozen, self.moved)

    @property
    def whole(self) -> heads.Source:
        """Return where whole weights are, under any LoRA."""
        return weights.whole_source(self.frozen, self.moved)

    def stats(self, config: Any, options: LoadOptions) -> Stats:
        """Return the statistics that the checkpoint normalises by: of its processors, or, where it is older than those,
        of its weights; empty where it has none."""
        if processors.are_saved(self.source.folder) or options.statistics == "dataset":
            return normalization.saved_stats(self.source.folder)
        return weights.old_stats(self.source, config, self.moved)


@dataclass(frozen=True)
class Described:
    """Hold what a checkpoint says of itself.

    Attributes:
        config: LeRobot's configuration of the policy; :func:`fit` changes it.
        stats: its statistics, by column and kind.
        padded: columns whose size in `config` may be another than that of their statistics.
        names_cameras: False where it numbers its cameras, so that a dataset's are not compared by name.
    """

    config: Any
    stats: Stats
    padded: tuple[str, ...] = (OBS_STATE,)
    names_cameras: bool = True


@dataclass(frozen=True)
class Fitted:
    """A checkpoint's configuration for a dataset.

    Attributes:
        config: LeRobot's configuration of the policy.
        stats: to normalise by.
        adopted: True if features and statistics are the dataset's.
        renames: cameras of the data that have another name in the policy; None keeps the saved ones.
        order: of the data's states and actions against the policy's own.
        where: what the statistics are of, for messages.
    """

    config: Any
    stats: Stats
    adopted: bool
    renames: Mapping[str, str] | None
    order: naming.VectorOrder
    where: str


def read_config[C](
    source: heads.Source, config_class: type[C], *, model: str, limits: Mapping[str, int] | None = None
) -> C:
    """Read the configuration of a LeRobot folder.

    Args:
        source: where it is.
        config_class: LeRobot's class of it, registered under a policy type.
        model: its name, for messages.
        limits: largest sizes of its own fields.

    Raises:
        PolicyError: there is none, it is damaged, or of another model.
    """
    loaded: Any = config_class
    config = policy_config.load_policy_config(
        source.folder,
        loaded.get_choice_name(loaded),
        loaded.from_pretrained,
        fields=[one.name for one in fields(loaded)],
        name=source.name,
        limits=limits,
    )
    with policy_config.describing(f"{source.folder / policy_config.CONFIG} describes no {model}"):
        config.validate_features()
    return config


def cameras_of(config: Any) -> list[str]:
    """Return a policy's cameras in the order of its slots, without LeRobot's empty ones."""
    return [key for key in config.image_features if not key.startswith(f"{OBS_IMAGES}.empty_camera")]


def sizes_of(config: Any) -> dict[str, int]:
    """Return how many numbers each of a policy's columns has; pictures are left out."""
    columns = {**(config.input_features or {}), **(config.output_features or {})}
    return {key: feature.shape[0] for key, feature in columns.items() if feature.type is not FeatureType.VISUAL}


def fit(described: Described, source: heads.Source, options: LoadOptions, *, model: str) -> Fitted:
    """Return a checkpoint's configuration as it is asked for, with the dataset's features or its own.

    Args:
        described: the checkpoint.
        source: where it is.
        options: what was asked for.
        model: its name, for messages.

    Raises:
        PolicyError: the horizon is longer than the model's; cameras, joints or sizes do not fit.
        DataError: statistics are missing or unusable, or the dataset has other columns.
    """
    config, own = described.config, described.stats
    check_horizon(options.horizon, config.chunk_size, source.name)
    config.chunk_size = config.n_action_steps = options.horizon or config.chunk_size
    config.device, config.compile_model, config.rtc_config = options.device, False, None
    config.pretrained_path, config.use_peft = None, False
    config.normalization_mapping |= {k: NormalizationMode(mode) for k, mode in options.normalization_mapping.items()}
    config.tokenizer_max_length = options.tokenizer_max_length or config.tokenizer_max_length
    normalization.take_sizes(config, own, *described.padded)
    adopted = _adopts(options, config, own)
    chosen = _of_dataset if adopted else _of_checkpoint
    fitted = chosen(described, source, options, model)
    if hasattr(config, "action_feature_names"):
        names = fitted.order.own.get(ACTION)
        config.action_feature_names = None if names is None else list(names)
    logger.info("%s: features and statistics of %s", model, fitted.where)
    return fitted


def _adopts(options: LoadOptions, config: Any, own: Stats) -> bool:
    """Return True if a dataset's features and statistics take the place of the checkpoint's."""
    if options.features is None or options.stats is None or options.statistics == "checkpoint":
        return False
    padded = config.action_feature is None or config.action_feature.shape[0] == config.max_action_dim
    return options.statistics == "dataset" or ACTION not in own or padded


def _of_dataset(described: Described, source: heads.Source, options: LoadOptions, model: str) -> Fitted:
    config, features, where = described.config, options.features or {}, "the dataset"
    renames = _adopt(config, features, options.cameras, _saved_cameras(source, config), source.name, model)
    stats = normalization.usable_stats(config, options.stats or {}, where, features)
    return Fitted(config, stats, True, renames, naming.new_order(features), where)


def _of_checkpoint(described: Described, source: heads.Source, options: LoadOptions, model: str) -> Fitted:
    config, features, where = described.config, options.features, source.name
    normalization.check_stats(config, described.stats, where)
    if not cameras_of(config):
        raise PolicyError(
            f"{where} names no camera among its input_features: {model} acts on pictures. Restore its config.json"
        )
    if config.robot_state_feature is None or config.action_feature is None:
        raise PolicyError(f"{where} has no {OBS_STATE} among its inputs, or no {ACTION} among its outputs")
    known = features if described.names_cameras or options.cameras is not None else None
    renames = camera_names.kept_renames(_saved_cameras(source, config), known, options.cameras, where=where)
    if features is not None:
        renaming = camera_names.saved_renames(source.folder / processors.PREPROCESSOR)
        normalization.check_features(config, features, where, renaming)
    order = kept_order(source, config, features, options.joints)
    return Fitted(config, described.stats, False, renames, order, where)


def _saved_cameras(source: heads.Source, config: Any) -> dict[str, str]:
    return camera_names.saved_cameras(source.folder / processors.PREPROCESSOR, cameras_of(config))


def kept_order(
    source: heads.Source, config: Any, features: Mapping[str, Any] | None, joints: naming.Joints
) -> naming.VectorOrder:
    """Return how a dataset's states and actions come into the order of a policy that keeps its own."""
    sizes = sizes_of(config)
    order = naming.saved_order(source.folder, getattr(config, "action_feature_names", None), sizes)
    if features is None:
        return order
    return naming.matched_order(order, features, sizes=sizes, where=source.name, joints=joints)


def _adopt(
    config: Any,
    features: Mapping[str, Any],
    cameras: camera_names.Cameras,
    saved: Mapping[str, str],
    where: str,
    model: str,
) -> dict[str, str]:
    """Take a dataset's cameras, state and action into a configuration; return the cameras' names there, where they
    change."""
    offered = dataset_to_policy_features(camera_names.colour_features(features, cameras))
    images = {key: feature for key, feature in offered.items() if feature.type is FeatureType.VISUAL}
    chosen = camera_names.camera_slots(list(saved), list(images), cameras, where=where)
    for key, limit in ((OBS_STATE, config.max_state_dim), (ACTION, config.max_action_dim)):
        if key not in offered:
            raise PolicyError(f"{model} needs {OBS_STATE} and {ACTION}; the dataset has {', '.join(sorted(offered))}")
        if offered[key].shape[0] > limit:
            raise PolicyError(f'"{key}" has {offered[key].shape[0]} dimensions, the checkpoint knows at most {limit}')
    if getattr(config, "use_relative_actions", False):
        raise PolicyError(
            "this checkpoint acts relative to the state, and a dataset's own statistics are of absolute actions: "
            'recompute them for relative actions and use statistics="checkpoint", or start from an absolute base'
        )
    config.input_features = {slot or key: images[key] for key, slot in chosen.items()} | {OBS_STATE: offered[OBS_STATE]}
    config.output_features = {ACTION: offered[ACTION]}
    config.empty_cameras = 0
    return camera_names.changed_slots(chosen)


def load_pipelines(folder: Path, fitted: Fitted, tokenizer: Any, options: LoadOptions) -> tuple[Any, Any]:
    """Return the pipelines saved in `folder`, changed where it is asked for.

    Args:
        folder: holds both; :func:`.processors.check_pipelines` has read them.
        fitted: the configuration that they belong to.
        tokenizer: to use.
        options: what was asked for.

    Raises:
        PolicyError: LeRobot cannot build them.
    """
    config = fitted.config
    overrides: dict[str, dict[str, Any]] = {
        "tokenizer_processor": {"tokenizer": tokenizer, "tokenizer_name": None},
        "device_processor": {"device": config.device},
    }
    after: dict[str, dict[str, Any]] = {}
    if options.tokenizer_max_length is not None:
        overrides["tokenizer_processor"]["max_length"] = options.tokenizer_max_length
    if options.normalization_mapping:
        overrides["normalizer_processor"] = after["unnormalizer_processor"] = {"norm_map": config.normalization_mapping}
    if fitted.renames is not None:
        table = camera_names.all_renames(folder / processors.PREPROCESSOR, fitted.renames, config.image_features)
        overrides["rename_observations_processor"] = {"rename_map": table}
    try:
        return make_pre_post_processors(
            config, pretrained_path=str(folder), preprocessor_overrides=overrides, postprocessor_overrides=after
        )
    except Exception as error:  # LeRobot raises KeyError, ValueError, TypeError, its own ... on what does not fit
        raise PolicyError(f"the processors in {folder} cannot be loaded: {type(error).__name__}: {error}") from error


def fill_policy(
    policy: nn.Module,
    opened: weights.Weights,
    *,
    names: Callable[[Iterable[str]], Mapping[str, str]],
    dtype_of: Callable[[str], torch.dtype | None],
    device: str,
) -> None:
    """Fill a policy without memory from a checkpoint; nothing is read before all names and shapes are compared.

    Args:
        policy: its parameters are on the device "meta".
        opened: the tensors.
        names: of the tensors there -> name in the policy: name there.
        dtype_of: a parameter's dtype, by its name in the policy; None is the file's.
        device: where they go.

    Raises:
        PolicyError: a file is missing or damaged, or names or shapes differ.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in policy.named_parameters(remove_duplicate=False)}
    tensors: dict[str, Tensor] = {}
    with opened as handle:
        found = names(handle.keys())
        heads.check_tensors(wanted, {name: handle.shape(key) for name, key in found.items()}, handle.where)
        first: dict[str, Tensor] = {}  # tied parameters are one tensor
        for name, key in found.items():
            dtype = dtype_of(name)
            if key not in first:
                first[key] = handle.tensor(key, as_stored=dtype is None).to(device, dtype)
            tensors[name] = first[key]
    policy.load_state_dict(tensors, strict=False, assign=True)
    policy.to(device)  # buffers


# -- small policies ----------------------------------------------------------------------------------------------------


TINY_SIZES = {OBS_STATE: 6, ACTION: 4}


def tiny_features() -> dict[str, Any]:
    """Return input and output features of a small policy: two cameras, 6 state and 4 action dimensions."""
    images = {f"{OBS_IMAGES}.{name}": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for name in ("front", "wrist")}
    state = {OBS_STATE: PolicyFeature(FeatureType.STATE, (TINY_SIZES[OBS_STATE],))}
    return {
        "input_features": images | state,
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (TINY_SIZES[ACTION],))},
    }


def tiny_stats(**kinds: float) -> dict[str, dict[str, Tensor]]:
    """Return statistics for :func:`tiny_features`: the same number in every dimension, by kind."""
    return {key: {kind: torch.full((n,), value) for kind, value in kinds.items()} for key, n in TINY_SIZES.items()}
