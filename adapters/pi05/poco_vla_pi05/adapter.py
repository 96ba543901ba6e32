"""``pi05`` as a poco_vla adapter: LeRobot's PI05Policy behind :class:`poco_vla.FlowPolicy`."""

import logging
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.common.vla_utils import resize_with_pad_torch
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.processor import TokenizerProcessorStep
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from lerobot.utils.feature_utils import dataset_to_policy_features
from torch import Tensor, nn

from poco_vla import ActionSpec, FlowPolicy, Lora, PolicyError, atomic_folder, inject_lora, merge_lora, raw
from poco_vla.adapting import camera_names, heads, naming, normalization, weights
from poco_vla_pi05 import checkpoint, expert, processors
from poco_vla_pi05.architecture import (
    ARCHITECTURE_FILE,
    PROJECTIONS,
    TINY,
    Architecture,
    empty_policy,
    in_head,
    random_weights,
)
from poco_vla_pi05.prefix import Pi05Prefix, encode
from poco_vla_pi05.tokenizer import DEFAULT, byte_tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

ADAPTER = "pi05"
TOKENIZER_FOLDER = "tokenizer"
NO_PROCESSORS = "this Pi05 was wrapped without processors: give Pi05.wrap(policy, pipelines) LeRobot's two"


class Pi05(FlowPolicy):
    """pi0.5 with a frozen backbone and a trainable action head.

    The head is the action expert without its language head and the four projections around it: 430,098,464 parameters
    in float32, or a LoRA on them. Everything else is frozen in the backbone's dtype.

    pi0.5 counts time from the action (1 is noise) and predicts noise - action; this class converts both. Chunks are not
    clipped, as in pi0.5's own sampler: quantile normalisation leaves 2 % of the demonstrated actions outside [-1, 1].

    Args:
        policy: LeRobot's policy, `config.chunk_size` being the horizon. Its parameters' `requires_grad` are set.
        pipelines: its pre- and post-processor; None for one that is only fed processed batches.
        source: the checkpoint that the frozen part came from; None when it came from nowhere.
        architecture: its sizes.
        compute: dtype of the head's matrix products; None is the VLM's dtype.
        recompute: keep one tensor per layer for backward and compute the rest again: the head's forward and backward
            take a third longer and an eighth of the memory.
        lora: train this instead of the full head.
        order: of the data's states and actions against the policy's own; None takes them as they come.
    """

    def __init__(
        self,
        policy: PI05Policy,
        pipelines: tuple[Any, Any] | None = None,
        *,
        source: heads.Source | None = None,
        architecture: Architecture | None = None,
        compute: torch.dtype | None = None,
        recompute: bool = True,
        lora: Lora | None = None,
        order: naming.VectorOrder | None = None,
    ) -> None:
        super().__init__()
        self.order = order or naming.VectorOrder()
        self.names = self.order.names
        config, model = policy.config, policy.model
        core: Any = model.paligemma_with_expert
        self._backbone_dtype = core.paligemma.model.language_model.layers[0].self_attn.q_proj.weight.dtype
        self.compute, self.recompute, self.lora = compute or self._backbone_dtype, recompute, lora
        self.policy = policy.requires_grad_(False)
        if lora is not None:
            for name, parameter in model.named_parameters():
                if in_head(name) and _in_layers(name):
                    parameter.data = parameter.data.to(self.compute)
            inject_lora(model, lora, in_head, lambda name: self.compute if _in_layers(name) else torch.float32)
        self.head = nn.ModuleDict({"expert": core.gemma_expert.model} | {n: getattr(model, n) for n in PROJECTIONS})
        if lora is None:
            self.head.requires_grad_(True).float()
        self.source, self.architecture = source, architecture or Architecture()
        if source is not None:
            self.base = source.name
            self.base_version = f"{source.name}@{source.revision}:{heads.fingerprint(self.policy)}"
        if self.architecture != Architecture():
            self.lerobot_arguments = ("--plugin.discover_packages_path=poco_vla_pi05.small",)
        assert config.action_feature is not None
        assert config.robot_state_feature is not None
        self.spec = ActionSpec(
            horizon=config.chunk_size,
            width=config.max_action_dim,
            action_dim=config.action_feature.shape[0],
            flow_steps=config.num_inference_steps,
            clip=None,  # Deviation 9: pi0.5's own sampler does not clip either
        )
        self.feature_dim = core.paligemma.config.text_config.hidden_size + config.robot_state_feature.shape[0]
        self.preprocessor, self.postprocessor = pipelines or (None, None)
        keys = (*checkpoint.cameras(config), OBS_STATE)
        self.input_keys = keys if pipelines is None else processors.raw_keys(self.preprocessor, keys)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """The frozen VLM stays in eval mode: LeRobot's gradient checkpointing would give no cache in train mode."""
        super().train(mode)
        core: Any = self.policy.model.paligemma_with_expert
        core.paligemma.eval()
        return self

    @property
    def _device(self) -> torch.device:
        return self.policy.model.action_in_proj.weight.device

    # -- the contract -------------------------------------------------------------------------------------------

    def preprocess(self, batch: dict[str, Any]) -> dict[str, Any]:  # pyright: ignore
        """LeRobot's pre-processor, on a batch that was checked first: see :func:`.processors.check_batch`."""
        if self.preprocessor is None:
            raise PolicyError(NO_PROCESSORS)
        *cameras, state = self.input_keys
        processors.check_batch(batch, cameras, state, self.policy.config)
        processed = self.preprocessor(self.order.to_policy(batch))
        processors.check_prompts(processed, self.policy.config)
        return processed

    def postprocess(self, actions: Tensor) -> Tensor:  # pyright: ignore
        if self.postprocessor is None:
            raise PolicyError(NO_PROCESSORS)
        return self.order.to_data(self.postprocessor(actions))

    def check_prompts(self, tasks: Sequence[str]) -> None:
        """Raise DataError if an instruction and the longest state there can be do not fit the prompt."""
        if self.preprocessor is not None:
            processors.check_longest_prompts(self.preprocessor, tasks, self.policy.config)

    def encode(self, obs: Mapping[str, Any]) -> Pi05Prefix:
        """SigLIP and the VLM, once per state; see :func:`poco_vla_pi05.prefix.encode`."""
        raw.refuse_raw(obs, (OBS_STATE, OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK))
        with torch.autocast(self._device.type, enabled=False):  # the dtypes are chosen here, for training and acting
            return encode(self.policy, obs)

    def pack(self, prefix: Any) -> list[dict[str, Tensor]]:
        return prefix.pack()

    def unpack(self, states: Sequence[Mapping[str, Tensor]]) -> Pi05Prefix:
        return Pi05Prefix.unpack(states)

    def preprocess_actions(self, batch: dict[str, Any]) -> Tensor:
        """LeRobot's pre-processor, which reads no pictures."""
        if self.preprocessor is None:
            raise PolicyError(NO_PROCESSORS)
        return self.preprocessor(self.order.to_policy(batch))[ACTION]

    def velocity(self, prefix: Any, x: Tensor, t: Tensor) -> Tensor:
        # A time that is expanded from one number, as `integrate` gives it, stays so.
        time = (1 - t[:1, :1]).expand_as(t) if t.stride() == (0, 0) else 1 - t
        with torch.autocast(self._device.type, enabled=False):
            return -expert.velocity(self.policy.model, prefix, x, time, compute=self.compute, recompute=self.recompute)

    def resize_images(self, images: np.ndarray) -> np.ndarray:
        """Pictures at the model's resolution, by LeRobot's own letterbox, rounded to uint8."""
        height, width = self.policy.config.image_resolution
        if images.shape[1:3] == (height, width):
            return images
        resized = resize_with_pad_torch(torch.from_numpy(images).permute(0, 3, 1, 2), height, width)
        return resized.permute(0, 2, 3, 1).contiguous().numpy()

    def sample_time(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """1 - (Beta(1.5, 1) * 0.999 + 0.001): pi0.5's own training distribution, mirrored (most draws near noise)."""
        config = self.policy.config
        alpha, beta = config.time_sampling_beta_alpha, config.time_sampling_beta_beta
        device = generator.device if generator else None

        def gamma(concentration: float) -> Tensor:  # torch.distributions takes no generator
            parameter = torch.full(tuple(shape), concentration, device=device)
            return torch._standard_gamma(parameter, generator=generator)  # pyright: ignore[reportPrivateImportUsage]

        first, second = gamma(alpha), gamma(beta)
        time = first / (first + second) * config.time_sampling_scale + config.time_sampling_offset
        return 1 - time

    def native_sample(self, obs: Mapping[str, Any], noise: Tensor) -> Tensor:
        images, masks = self.policy._preprocess_images(dict(obs))
        return self.policy.model.sample_actions(
            images, masks, obs[OBS_LANGUAGE_TOKENS], obs[OBS_LANGUAGE_ATTENTION_MASK], noise=noise
        )

    # -- loading ------------------------------------------------------------------------------------------------

    @classmethod
    def wrap(cls, policy: PI05Policy, pipelines: tuple[Any, Any] | None = None, **options: Any) -> Self:
        """An adapter around a policy that is in memory already.

        Its head becomes float32 and trainable, all else frozen; its horizon is its `config.chunk_size`. The policy
        stays usable by itself, but for LeRobot's joint training forward where the backbone is bfloat16.

        Args:
            policy: LeRobot's policy.
            pipelines: its pre- and post-processor.
            options: `compute`, `recompute`, `lora` of this class.
        """
        if "lora" in options:
            options["lora"] = Lora.of(options["lora"], LORA_TARGETS)
        return cls(policy, pipelines, **options)

    @classmethod
    def option_names(cls, *, pretrained: bool) -> frozenset[str]:
        return frozenset(signature(cls.from_pretrained).parameters) - {"unknown"}

    @classmethod
    def from_pretrained(
        cls,
        repo_or_path: str | Path,
        *,
        horizon: int | None = None,
        device: str = "cpu",
        features: Mapping[str, Any] | None = None,
        stats: Mapping[str, Any] | None = None,
        dataset_meta: Any = None,
        revision: str | None = None,
        dtype: Literal["bfloat16", "float32"] | None = None,
        statistics: Literal["auto", "dataset", "checkpoint"] = "auto",
        cameras: camera_names.Cameras = None,
        joints: naming.Joints = None,
        normalization_mapping: Mapping[str, str] | None = None,
        tokenizer: str | Path | None = None,
        tokenizer_max_length: int | None = None,
        asset: str | None = None,
        base: str | Path | None = None,
        lora: Any = None,
        recompute: bool = True,
        compute: Literal["bfloat16", "float32"] | None = None,
        **unknown: Any,
    ) -> Self:
        """Load a LeRobot pi05 folder or repository, an openpi PyTorch checkpoint, or a head that this class saved.

        Args:
            repo_or_path: local folder or Hub id.
            horizon: H; the checkpoint's own chunk size when None. Shorter is exact (no parameter depends on it).
            device: torch device.
            features: LeRobot features of the dataset to fine-tune on.
            stats: its statistics.
            dataset_meta: not needed here.
            revision: Hub revision.
            dtype: of the frozen backbone, SigLIP and norms left out (LeRobot's layout); the configuration's when None,
                or that which a saved head was trained on. "bfloat16" saves 7 GB.
            statistics: whose features and statistics hold: "dataset" as when fine-tuning a base model, "checkpoint" as
                when going on with a policy that was trained on this data, "auto" takes the checkpoint's if it has any
                for actions that are not padded.
            cameras: the dataset's cameras to use, all of them when None; or {camera of the dataset: camera of the
                checkpoint}. A camera that the checkpoint knows keeps its slot.
            joints: "positional", or {name in the dataset: name in the checkpoint}, for numbers of states and actions
                whose names merely differ.
            normalization_mapping: LeRobot's normalisation per kind of feature, where the default will not do.
            tokenizer: Hub id, folder or sentencepiece file; the checkpoint's own or LeRobot's default when None.
            tokenizer_max_length: tokens of the longest prompt.
            asset: openpi's dataset id, where a checkpoint has several.
            base: where the base of a saved head is now, if not where it was.
            lora: rank, or a mapping of rank, alpha and targets: train a LoRA instead of the full head.
            recompute: see the class.
            compute: see the class.
            unknown: refused.

        Raises:
            PolicyError: anything but a complete match of weights, files that are missing or damaged, a horizon beyond
                the model's, unknown options.
            DataError: the dataset's features or statistics cannot be used.
        """
        if unknown:
            raise PolicyError(f"pi05 has no option {', '.join(sorted(unknown))}")
        _check_options(dtype, compute, statistics, normalization_mapping, horizon)
        source = heads.locate(repo_or_path, revision)
        head = heads.read_head(source.folder, ADAPTER)
        frozen = source if head is None else heads.base_of(head, base)
        moved = base if head is None else None  # that of a LoRA of peft; a head's is found
        lora = heads.chosen_lora(Lora.of(lora, LORA_TARGETS), head)

        config, stats_used, use_dataset, renames = _configure(
            source,
            horizon=horizon,
            device=device,
            features=features,
            stats=stats,
            statistics=statistics,
            cameras=cameras,
            normalization_mapping=normalization_mapping,
            tokenizer_max_length=tokenizer_max_length,
            asset=asset,
            base=moved,
        )
        if processors.are_saved(source.folder):
            processors.check_saved(source.folder)
        words = load_tokenizer(tokenizer or _saved_tokenizer(source.folder))
        if processors.are_saved(source.folder):
            new_stats = stats_used if use_dataset else None
            remap = bool(normalization_mapping)
            pipelines = processors.load(
                source.folder,
                config,
                words,
                stats=new_stats,
                normalization=remap,
                max_length=tokenizer_max_length,
                renames=renames,
            )
        else:
            pipelines = processors.build(config, stats_used, words, renames=renames)
        processors.check_inverse(pipelines, config, "the dataset" if use_dataset else source.name)

        whole = weights.whole_source(frozen, moved)
        architecture = Architecture.of_folder(whole.folder)
        policy = empty_policy(config, architecture)
        checkpoint.load_weights(
            policy,
            weights.weights_of(frozen, moved),
            backbone=getattr(torch, dtype or heads.saved_dtype(source.folder) or config.dtype),
            head=[name for name, _ in policy.named_parameters() if in_head(name)],
            device=device,
        )
        adapter = cls(
            policy,
            pipelines,
            source=frozen,
            architecture=architecture,
            compute=getattr(torch, compute) if compute else None,
            recompute=recompute,
            lora=lora,
            order=_order(source, config, features, use_dataset, joints),
        )
        if head is not None:
            head.put_on(adapter.policy, source.folder)
        return adapter

    @classmethod
    def from_dataset(
        cls, features: Mapping[str, Any], stats: Mapping[str, Any], *, horizon: int, **options: Any
    ) -> Self:
        raise PolicyError(
            'pi05 starts from a pretrained base: give policy a LeRobot folder or Hub id, such as "lerobot/pi05_base", '
            "or the folder of an openpi PyTorch checkpoint"
        )

    @classmethod
    def tiny(cls, seed: int = 0) -> Self:
        """LeRobot's own classes at :data:`poco_vla_pi05.architecture.TINY`: two cameras, 6 state dimensions, 4 action
        dimensions (of 32), chunks of 50 steps, a tokenizer of bytes."""
        images = {f"{OBS_IMAGES}.{name}": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for name in ("front", "wrist")}
        config = PI05Config(
            input_features=images | {OBS_STATE: PolicyFeature(FeatureType.STATE, (6,))},
            output_features={ACTION: PolicyFeature(FeatureType.ACTION, (4,))},
            image_resolution=(TINY.image_size, TINY.image_size),
            device="cpu",
        )
        policy = empty_policy(config, TINY)
        checkpoint.drop_language_heads(policy)
        policy.load_state_dict(random_weights(policy, seed), assign=True)
        bounds = {"q01": -2.0, "q99": 2.0}
        sizes = {OBS_STATE: 6, ACTION: 4}
        stats = {key: {name: torch.full((n,), value) for name, value in bounds.items()} for key, n in sizes.items()}
        return cls(policy, processors.build(config, stats, byte_tokenizer()), architecture=TINY)

    def example_obs(self, batch_size: int, seed: int = 0) -> dict[str, Any]:
        """Pictures of noise, prompts of different lengths."""
        generator = torch.Generator().manual_seed(seed)
        config = self.policy.config
        assert config.robot_state_feature is not None
        images = {
            key: torch.rand((batch_size, *feature.shape), generator=generator)
            for key, feature in config.image_features.items()
        }
        length = config.tokenizer_max_length
        mask = torch.arange(length) < torch.randint(8, 40, (batch_size, 1), generator=generator)
        tokens = torch.randint(5, 200, (batch_size, length), generator=generator) * mask
        state = torch.randn((batch_size, config.robot_state_feature.shape[0]), generator=generator)
        return images | {OBS_STATE: state, OBS_LANGUAGE_TOKENS: tokens, OBS_LANGUAGE_ATTENTION_MASK: mask}

    # -- saving -------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path) -> None:
        """A plain LeRobot ``pi05`` folder: merged weights, configuration, both processors. It loads without a plug-in.

        A tokenizer that is not LeRobot's default lies beside the weights, and the processors name its absolute path.
        """
        weights = merge_lora(self.policy.state_dict(), self.policy)
        with atomic_folder(path) as partial:
            checkpoint.write_tensors(checkpoint.full_weights(self.policy, weights), partial / checkpoint.WEIGHTS)
            heads.write_about(partial, adapter=ADAPTER, options=self._options, names=self.order.to_json())
            self._save_description(partial, Path(path))

    def save_head(self, path: str | Path) -> None:
        """What was trained, and where its base model is: `from_pretrained` puts the two together again.

        The folder is :mod:`poco_vla.adapting.heads`'s, with configuration and processors.
        """
        with heads.head_folder(path) as partial:
            heads.write_head(
                partial,
                self.policy,
                self.source,
                adapter=ADAPTER,
                horizon=self.spec.horizon,
                lora=self.lora,
                options=self._options,
                peft=PEFT,
                names=self.order.to_json(),
            )
            self._save_description(partial, Path(path))

    @property
    def _options(self) -> dict[str, Any]:
        """What LeRobot's configuration has no field for: the dtype of the backbone that the head was trained on."""
        return {"dtype": str(self._backbone_dtype).removeprefix("torch.")}

    def _save_description(self, partial: Path, final: Path) -> None:
        """Configuration, processors, and whatever the real model's folder would not need."""
        if self.preprocessor is None or self.postprocessor is None:
            raise PolicyError(NO_PROCESSORS)
        self.policy.config._save_pretrained(partial)
        step = processors.step_of(self.preprocessor, TokenizerProcessorStep)
        name = getattr(step.input_tokenizer, "name_or_path", None)
        if name != DEFAULT:
            step.input_tokenizer.save_pretrained(partial / TOKENIZER_FOLDER)
            name = str(final.resolve() / TOKENIZER_FOLDER)
            logger.info("LeRobot will look for the tokenizer in %s: its own commands find it there only", name)
        step.tokenizer, step.tokenizer_name = None, name  # LeRobot saves the name of a tokenizer that it loaded itself
        self.preprocessor.save_pretrained(partial, config_filename=processors.PREPROCESSOR)
        self.postprocessor.save_pretrained(partial, config_filename=processors.POSTPROCESSOR)
        if self.architecture != Architecture():
            (partial / ARCHITECTURE_FILE).write_text(self.architecture.to_json() + "\n")


LORA_TARGETS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    *PROJECTIONS,
)
"""Every projection of the head but the adaRMS ones (`dense`). LeRobot 0.6.1's own default misses `time_mlp_*`."""

PEFT = heads.PeftLayout(modules=("gemma_expert.model", *PROJECTIONS), idle="multi_modal_projector.linear")


def _in_layers(name: str) -> bool:
    """Whether a part of the head works in the head's compute dtype: attention and MLP. The rest stays in float32."""
    return ".self_attn." in name or ".mlp." in name


def _check_options(
    dtype: str | None, compute: str | None, statistics: str, mapping: Mapping[str, str] | None, horizon: int | None
) -> None:
    def check(name: str, value: str | None, known: Sequence[str]) -> None:
        if value is not None and value not in known:
            raise PolicyError(f'{name} is "{value}"; expected one of {", ".join(sorted(known))}')

    check("dtype", dtype, ("bfloat16", "float32"))
    check("compute", compute, ("bfloat16", "float32"))
    check("statistics", statistics, ("auto", "checkpoint", "dataset"))
    for kind, mode in (mapping or {}).items():
        check("a key of normalization_mapping", kind, ("ACTION", "STATE", "VISUAL"))
        check(f"normalization_mapping of {kind}", mode, [known.value for known in NormalizationMode])
    if horizon is not None and horizon < 1:
        raise PolicyError(f"horizon is {horizon}; a chunk has at least one step")


def _configure(
    source: heads.Source,
    *,
    horizon: int | None,
    device: str,
    features: Mapping[str, Any] | None,
    stats: Mapping[str, Any] | None,
    statistics: str,
    cameras: camera_names.Cameras,
    normalization_mapping: Mapping[str, str] | None,
    tokenizer_max_length: int | None,
    asset: str | None,
    base: str | Path | None = None,
) -> tuple[PI05Config, Mapping[str, Any], bool, dict[str, str] | None]:
    """Return the checkpoint's configuration as it is asked for, the statistics in use, whether they are the
    dataset's, and what cameras are renamed to, where that is not as it was saved."""
    config, from_openpi = checkpoint.read_config(source)
    own = _own_stats(source, config, from_openpi, asset, given=stats is not None, statistics=statistics, base=base)
    if horizon is not None and horizon > config.chunk_size:
        raise PolicyError(
            f"{source.name} was trained with chunks of {config.chunk_size} steps, asked for {horizon}: it never "
            "saw positions beyond. Choose a shorter horizon."
        )
    config.chunk_size = config.n_action_steps = horizon or config.chunk_size
    config.device, config.compile_model, config.gradient_checkpointing = device, False, False
    config.pretrained_path, config.use_peft = None, False
    config.normalization_mapping |= {k: NormalizationMode(mode) for k, mode in (normalization_mapping or {}).items()}
    config.tokenizer_max_length = tokenizer_max_length or config.tokenizer_max_length
    # openpi's configuration speaks of padded widths only.
    normalization.take_sizes(config, own, *((OBS_STATE, ACTION) if from_openpi else (OBS_STATE,)))
    use_dataset = _use_dataset(statistics, config, own, features, stats)
    where = "the dataset" if use_dataset else source.name
    if not use_dataset:
        normalization.check_stats(config, own, where)
    slots = checkpoint.cameras(config)
    if not use_dataset and not slots:
        raise PolicyError(
            f"{source.name} names no camera among its input_features: pi0.5 acts on pictures. Restore its config.json"
        )
    saved = camera_names.saved_cameras(source.folder / processors.PREPROCESSOR, slots)
    if use_dataset:
        assert features is not None
        assert stats is not None
        renames = _adopt(config, features, cameras, saved, source.name)
    else:
        # openpi names its slots, not cameras: which of the data's they are is for the user to say.
        known = None if from_openpi and cameras is None else features
        renames = camera_names.kept_renames(saved, known, cameras, where=source.name)
    if use_dataset and stats is not None:
        used = normalization.usable_stats(config, stats, where, features)
    else:
        used = own
        if features is not None:
            renaming = camera_names.saved_renames(source.folder / processors.PREPROCESSOR)
            normalization.check_features(config, features, source.name, renaming)
    logger.info("pi05: features and statistics of %s", where)
    return config, used, use_dataset, renames


def _order(
    source: heads.Source, config: PI05Config, features: Mapping[str, Any] | None, adopted: bool, joints: naming.Joints
) -> naming.VectorOrder:
    """Return how the data's states and actions come into the policy's order; the configuration names its actions."""
    if adopted:
        order = naming.new_order(features or {})
    else:
        sizes = checkpoint.sizes(config)
        order = naming.saved_order(source.folder, config.action_feature_names, sizes)
        if features is not None:
            order = naming.matched_order(order, features, sizes=sizes, where=source.name, joints=joints)
    config.action_feature_names = list(order.own[ACTION]) if ACTION in order.own else None
    return order


def _saved_tokenizer(folder: Path) -> str | Path | None:
    """Return the tokenizer that lies in a folder, or else that its pre-processor names."""
    file = folder / processors.PREPROCESSOR
    if (folder / TOKENIZER_FOLDER).is_dir():
        return folder / TOKENIZER_FOLDER
    if not file.is_file():
        return None
    for step in heads.read_object(file).get("steps", []):
        told = step.get("config") if isinstance(step, dict) else None
        name = told.get("tokenizer_name") if isinstance(told, dict) else None
        if isinstance(name, str):
            return name
    return None


def _own_stats(
    source: heads.Source,
    config: PI05Config,
    from_openpi: bool,
    asset: str | None,
    *,
    given: bool,
    statistics: str,
    base: str | Path | None,
) -> Mapping[str, Mapping[str, Tensor]]:
    """Return the checkpoint's statistics. openpi's base models have those of many datasets; they matter only where
    none is given."""
    folder = source.folder
    if not from_openpi:
        if processors.are_saved(folder) or (given and statistics == "dataset"):
            return normalization.saved_stats(folder)
        return weights.old_stats(source, config, base)
    several = asset is None and checkpoint.num_assets(folder) > 1
    if given and (statistics == "dataset" or (statistics == "auto" and several)):
        return {}
    return checkpoint.openpi_stats(folder, asset)


def _use_dataset(statistics: str, config: PI05Config, own: Mapping[str, Any], features: Any, stats: Any) -> bool:
    if features is None or stats is None:
        if statistics == "dataset":
            raise PolicyError('statistics="dataset" without a dataset: give features and stats')
        return False
    if statistics == "auto":
        assert config.action_feature is not None
        return ACTION not in own or config.action_feature.shape[0] == config.max_action_dim
    return statistics == "dataset"


def _adopt(
    config: PI05Config, features: Mapping[str, Any], cameras: camera_names.Cameras, saved: Mapping[str, str], where: str
) -> dict[str, str]:
    """Take a dataset's cameras, state and action into a configuration; the cameras' names there, where they change."""
    offered = dataset_to_policy_features(camera_names.colour_features(features, cameras))
    images = {key: feature for key, feature in offered.items() if feature.type is FeatureType.VISUAL}
    chosen = camera_names.camera_slots(list(saved), list(images), cameras, where=where)
    if OBS_STATE not in offered or ACTION not in offered:
        raise PolicyError(f"pi05 needs {OBS_STATE} and {ACTION}; the dataset has {', '.join(sorted(offered))}")
    for key, limit in ((OBS_STATE, config.max_state_dim), (ACTION, config.max_action_dim)):
        if offered[key].shape[0] > limit:
            raise PolicyError(f'"{key}" has {offered[key].shape[0]} dimensions, the checkpoint knows at most {limit}')
    if config.use_relative_actions:
        raise PolicyError(
            "this checkpoint acts relative to the state, and a dataset's own statistics are of absolute actions: "
            'recompute them for relative actions and use statistics="checkpoint", or start from an absolute base'
        )
    config.input_features = {slot or key: images[key] for key, slot in chosen.items()} | {OBS_STATE: offered[OBS_STATE]}
    config.output_features = {ACTION: offered[ACTION]}
    config.empty_cameras = 0
    return {key: slot for key, slot in chosen.items() if slot not in (None, key)}
