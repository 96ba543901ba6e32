"""``smolvla`` as a poco_vla adapter: LeRobot's SmolVLAPolicy behind :class:`poco_vla.FlowPolicy`."""

import copy
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.common.vla_utils import resize_with_pad
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.processor import RenameObservationsProcessorStep, TokenizerProcessorStep
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from lerobot.utils.feature_utils import dataset_to_policy_features
from safetensors.torch import save_file
from torch import Tensor, nn

from poco_vla import ActionSpec, DataError, FlowPolicy, Lora, PolicyError, atomic_folder, inject_lora, merge_lora, raw
from poco_vla.adapting import camera_names, heads, naming, normalization, processors, weights
from poco_vla_smolvla import checkpoint, network
from poco_vla_smolvla.network import SmolVlaPrefix
from poco_vla_smolvla.vlm import Vlm, empty_policy, random_weights, tiny_vlm

ADAPTER = "smolvla"
EXPERT = "vlm_with_expert.lm_expert"
PROJECTIONS = ("action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out")
LORA_TARGETS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    *PROJECTIONS,
)
PEFT = heads.PeftLayout(modules=("lm_expert", *PROJECTIONS), idle="modality_projection.proj")
VLM_FOLDER = "vlm"
"""Beside the weights of a policy whose VLM is nowhere else: configuration and tokenizer."""


class SmolVla(FlowPolicy):
    """SmolVLA with a frozen VLM and a trainable action expert.

    The head is the expert and the four projections around it, in float32, or a LoRA on them. Everything else is frozen,
    `state_proj` with it, which LeRobot trains: it makes the state's token of the prefix, and a prefix is encoded once
    and does not change while the head trains.

    SmolVLA counts time from the action (1 is noise) and predicts noise - action; this class converts both. Chunks are
    not clipped, as in SmolVLA's own sampler: normalised by mean and deviation, actions have no fixed range.

    Args:
        policy: LeRobot's policy, `config.chunk_size` being the horizon. Its parameters' `requires_grad` are set.
        pipelines: its pre- and post-processor.
        source: the checkpoint that the frozen part came from; None when it came from nowhere.
        vlm: configuration and tokenizer of its VLM, if they are to be saved beside the weights; None where LeRobot
            finds them under `config.vlm_model_name`.
        lora: train this instead of the full head.
        order: of the data's states and actions against the policy's own; None takes them as they come.
    """

    def __init__(
        self,
        policy: SmolVLAPolicy,
        pipelines: tuple[Any, Any],
        *,
        source: heads.Source | None = None,
        vlm: Vlm | None = None,
        lora: Lora | None = None,
        order: naming.VectorOrder | None = None,
    ) -> None:
        super().__init__()
        self.order = order or naming.VectorOrder()
        self.names = self.order.names
        config, model = policy.config, policy.model
        core: Any = model.vlm_with_expert
        self.policy, self.source, self.vlm, self.lora = policy.requires_grad_(False), source, vlm, lora
        if lora is not None:
            inject_lora(model, lora, lambda name: name.startswith((EXPERT, *PROJECTIONS)), lambda _: torch.float32)
        self.head = nn.ModuleDict({"expert": core.lm_expert} | {name: getattr(model, name) for name in PROJECTIONS})
        if lora is None:
            self.head.float().requires_grad_(True)
        if source is not None:
            self.base = source.name
            self.base_version = f"{source.name}@{source.revision}:{heads.fingerprint(policy)}"
        assert config.action_feature is not None
        assert config.robot_state_feature is not None
        self.spec = ActionSpec(
            horizon=config.chunk_size,
            width=config.max_action_dim,
            action_dim=config.action_feature.shape[0],
            flow_steps=config.num_steps,
            clip=None,  # Deviation 9: SmolVLA's own sampler does not clip either
        )
        self.feature_dim = core.config.text_config.hidden_size + config.robot_state_feature.shape[0]
        self.preprocessor, self.postprocessor = pipelines
        cameras = checkpoint.cameras(config)
        renamed = {
            new: old for old, new in _step(self.preprocessor, RenameObservationsProcessorStep).rename_map.items()
        }
        self.input_keys = tuple(renamed.get(key, key) for key in (*cameras, OBS_STATE))

    # -- the contract -------------------------------------------------------------------------------------------

    def preprocess(self, batch: dict[str, Any]) -> dict[str, Any]:  # pyright: ignore
        """LeRobot's pre-processor; LeRobot would go on without a camera that is missing."""
        if missing := [key for key in (*self.input_keys, "task") if key not in batch]:
            raise DataError(f"the batch lacks {', '.join(missing)}; it holds {', '.join(sorted(batch))}")
        processed = self.preprocessor(self.order.to_policy(batch))
        checkpoint.check_instructions(processed, _step(self.preprocessor, TokenizerProcessorStep))
        return processed

    def check_prompts(self, tasks: Sequence[str]) -> None:
        """Raise DataError if an instruction is longer than the model reads."""
        words = _step(self.preprocessor, TokenizerProcessorStep)
        for task in dict.fromkeys(tasks):
            checkpoint.check_instruction(task, words)

    def postprocess(self, actions: Tensor) -> Tensor:  # pyright: ignore
        return self.order.to_data(self.postprocessor(actions))

    def resize_images(self, images: np.ndarray) -> np.ndarray:
        """Pictures at the model's resolution, by LeRobot's own letterbox, rounded to uint8."""
        size = self.policy.config.resize_imgs_with_padding
        if size is None or images.shape[1:3] == size[::-1]:
            return images
        tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        resized = resize_with_pad(tensor, size[1], size[0], pad_value=0).round().byte()
        return resized.permute(0, 2, 3, 1).contiguous().numpy()

    def encode(self, obs: Mapping[str, Any]) -> SmolVlaPrefix:
        """SigLIP and the VLM, once per state; see :func:`poco_vla_smolvla.network.encode`."""
        raw.refuse_raw(obs, (OBS_STATE, OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK))
        self.policy.model.vlm_with_expert.vlm.eval()
        with torch.autocast(self._device.type, enabled=False):  # acting and training are one function
            return network.encode(self.policy, obs)

    def pack(self, prefix: Any) -> list[dict[str, Tensor]]:
        return prefix.pack()

    def unpack(self, states: Sequence[Mapping[str, Tensor]]) -> SmolVlaPrefix:
        return SmolVlaPrefix.unpack(states)

    def preprocess_actions(self, batch: dict[str, Any]) -> Tensor:
        """LeRobot's pre-processor, which reads no pictures."""
        return self.preprocessor(self.order.to_policy(batch))[ACTION]

    def velocity(self, prefix: Any, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(self._device.type, enabled=False):
            return -network.velocity(self.policy.model, prefix, x, 1 - t)

    def sample_time(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """1 - (0.999 Beta(1.5, 1) + 0.001): SmolVLA's own training distribution, mirrored (most draws near noise).

        The distribution function of Beta(1.5, 1) is u^1.5, so that u^(2/3) draws from it.
        """
        u = torch.rand(tuple(shape), generator=generator, device=generator.device if generator else None)
        return 0.999 * (1 - u ** (2 / 3))

    def native_sample(self, obs: Mapping[str, Any], noise: Tensor) -> Tensor:
        return self.policy.model.sample_actions(*network.inputs(self.policy, obs), noise=noise)

    @property
    def _device(self) -> torch.device:
        return self.policy.model.state_proj.weight.device

    # -- loading and saving -------------------------------------------------------------------------------------

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
        statistics: Literal["auto", "dataset", "checkpoint"] = "auto",
        dataset_meta: Any = None,
        revision: str | None = None,
        dtype: Literal["bfloat16", "float32"] | None = None,
        cameras: camera_names.Cameras = None,
        joints: naming.Joints = None,
        tokenizer_max_length: int | None = None,
        normalization_mapping: Mapping[str, str] | None = None,
        vlm: str | Path | None = None,
        base: str | Path | None = None,
        lora: Any = None,
        **unknown: Any,
    ) -> Self:
        """Load a LeRobot ``smolvla`` folder or repository, or a head that this class saved.

        Args:
            repo_or_path: local folder or Hub id.
            horizon: H; the checkpoint's own chunk size when None. Shorter is exact: a step sees none after it.
            device: torch device.
            features: LeRobot features of the dataset to fine-tune on.
            stats: its statistics.
            statistics: whose features and statistics hold. "auto" takes the checkpoint's if it has any for actions that
                are not padded.
            dataset_meta: not needed here.
            revision: Hub revision.
            dtype: of the frozen VLM; the file's when None, or that which a saved head was trained on.
            cameras: the dataset's cameras to use, all of them when None; or {camera of the dataset: camera of the
                checkpoint}. A camera that the checkpoint knows keeps its slot.
            joints: "positional", or {name in the dataset: name in the checkpoint}, for numbers of states and actions
                whose names merely differ.
            tokenizer_max_length: tokens of the longest instruction.
            normalization_mapping: LeRobot's normalisation per kind of feature, where the default will not do.
            vlm: Hub id or folder of the VLM's configuration and tokenizer; the checkpoint's own when None.
            base: where the base of a saved head is now, if not where it was.
            lora: rank, or a mapping of rank, alpha and targets: train a LoRA instead of the full head.
            unknown: refused.

        Raises:
            PolicyError: anything but a complete match of weights, files that are missing or damaged, a horizon beyond
                the model's, unknown options.
            DataError: the dataset's features or statistics cannot be used.
        """
        if unknown:
            raise PolicyError(f"smolvla has no option {', '.join(sorted(unknown))}")
        _check_options(dtype=dtype, statistics=statistics, horizon=horizon, mapping=normalization_mapping or {})
        source = heads.locate(repo_or_path, revision)
        head = heads.read_head(source.folder, ADAPTER)
        frozen = source if head is None else heads.base_of(head, base)
        moved = base if head is None else None  # that of a LoRA of peft; a head's is found
        lora = heads.chosen_lora(Lora.of(lora, LORA_TARGETS), head)
        config = checkpoint.read_config(source)
        if horizon is not None and horizon > config.chunk_size:
            raise PolicyError(
                f"{source.name} was trained with chunks of {config.chunk_size} steps, asked for {horizon}: it never "
                "saw positions beyond. Choose a shorter horizon."
            )
        config.chunk_size = config.n_action_steps = horizon or config.chunk_size
        config.device, config.compile_model, config.rtc_config = device, False, None
        config.pretrained_path, config.use_peft = None, False
        changed = {kind: NormalizationMode(mode) for kind, mode in (normalization_mapping or {}).items()}
        config.normalization_mapping |= changed

        config.tokenizer_max_length = tokenizer_max_length or config.tokenizer_max_length
        own = _own_stats(source, config, moved, fresh=statistics == "dataset")
        normalization.take_sizes(config, own, OBS_STATE)
        adopted = _adopts(statistics, config, own, given=features is not None and stats is not None)
        saved = camera_names.saved_cameras(source.folder / checkpoint.PREPROCESSOR, checkpoint.cameras(config))
        if adopted:
            renames = _adopt(config, features or {}, cameras, saved, source.name)
        else:
            normalization.check_stats(config, own, source.name)
            renames = camera_names.kept_renames(saved, features, cameras, where=source.name)
        if config.robot_state_feature is None or config.action_feature is None:
            raise PolicyError(f"{source.name} has no {OBS_STATE} among its inputs, or no {ACTION} among its outputs")
        if adopted:
            used = normalization.usable_stats(config, stats or {}, "the dataset", features)
        else:
            used = own
            if features is not None:
                renaming = camera_names.saved_renames(source.folder / checkpoint.PREPROCESSOR)
                normalization.check_features(config, features, source.name, renaming)

        whole = weights.whole_source(frozen, moved).folder
        beside = (whole / VLM_FOLDER).is_dir() and vlm is None
        if vlm is not None:
            config.vlm_model_name = str(Path(vlm).resolve()) if Path(vlm).is_dir() else str(vlm)
        about_vlm = Vlm.load(whole / VLM_FOLDER if beside else config.vlm_model_name)
        kept_vlm = about_vlm if beside or Path(config.vlm_model_name).is_dir() else None
        policy = empty_policy(config, about_vlm)
        kept_dtype = dtype or heads.saved_dtype(source.folder)
        kept = getattr(torch, kept_dtype) if kept_dtype else None
        checkpoint.load_weights(policy, weights.weights_of(frozen, moved), device=device, dtype=kept)
        if adopted or not processors.are_saved(source.folder):
            pipelines = checkpoint.build_pipelines(config, used, about_vlm.tokenizer, renames=renames)
        else:
            pipelines = checkpoint.load_pipelines(
                source.folder, config, about_vlm.tokenizer, renames=renames, max_length=tokenizer_max_length
            )
        order = naming.new_order(features or {}) if adopted else _kept_order(source, config, features, joints)
        processors.check_inverse(*pipelines, config, "the dataset" if adopted else source.name)
        adapter = cls(policy.eval(), pipelines, source=frozen, vlm=kept_vlm, lora=lora, order=order)
        if head is not None:
            head.put_on(policy, source.folder)
        return adapter

    @classmethod
    def from_dataset(
        cls, features: Mapping[str, Any], stats: Mapping[str, Any], *, horizon: int, **options: Any
    ) -> Self:
        raise PolicyError(
            "smolvla starts from a pretrained base: give policy the folder or Hub id of one, such as "
            '"lerobot/smolvla_base"'
        )

    @classmethod
    def tiny(cls, seed: int = 0) -> Self:
        """LeRobot's own classes, small: two cameras, 6 state and 4 action dimensions (of 32), chunks of 50 steps."""
        images = {f"{OBS_IMAGES}.{name}": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for name in ("front", "wrist")}
        config = SmolVLAConfig(
            input_features=images | {OBS_STATE: PolicyFeature(FeatureType.STATE, (6,))},
            output_features={ACTION: PolicyFeature(FeatureType.ACTION, (4,))},
            resize_imgs_with_padding=(32, 32),
            num_vlm_layers=4,
            device="cpu",
        )
        vlm = tiny_vlm()
        policy = empty_policy(config, vlm)
        policy.load_state_dict(random_weights(policy, seed), assign=True)
        stats = {key: {"mean": torch.zeros(n), "std": torch.ones(n)} for key, n in ((OBS_STATE, 6), (ACTION, 4))}
        return cls(policy.eval(), checkpoint.build_pipelines(config, stats, vlm.tokenizer), vlm=vlm)

    def example_obs(self, batch_size: int, seed: int = 0) -> dict[str, Any]:
        """Pictures of noise, prompts of different lengths."""
        generator = torch.Generator().manual_seed(seed)
        config = self.policy.config
        assert config.robot_state_feature is not None
        obs: dict[str, Any] = {
            key: torch.rand((batch_size, *feature.shape), generator=generator)
            for key, feature in config.image_features.items()
        }
        mask = torch.arange(12) < 12 - 3 * (torch.arange(batch_size)[:, None] % 3)
        obs[OBS_LANGUAGE_TOKENS] = torch.randint(5, 200, mask.shape, generator=generator) * mask
        obs[OBS_STATE] = torch.randn((batch_size, config.robot_state_feature.shape[0]), generator=generator)
        return obs | {OBS_LANGUAGE_ATTENTION_MASK: mask}

    def save_pretrained(self, path: str | Path) -> None:
        """A plain LeRobot ``smolvla`` folder: merged weights, configuration, both processors, no plug-in needed.

        A VLM that is nowhere else is described beside the weights, and configuration and processors name its absolute
        path: LeRobot looks for it there.
        """
        tensors = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in merge_lora(self.policy.state_dict(), self.policy).items()
            if not (name == checkpoint.LANGUAGE_HEAD and checkpoint.tied(self.policy))
        }
        with atomic_folder(path) as partial:
            save_file(tensors, partial / heads.POLICY_WEIGHTS, metadata={"format": "pt"})
            heads.write_about(partial, adapter=ADAPTER, names=self.order.to_json())
            self._save_description(partial, Path(path))

    def save_head(self, path: str | Path) -> None:
        """What was trained, and where its base model is: `from_pretrained` puts the two together again."""
        dtypes = {str(p.dtype).removeprefix("torch.") for p in self.policy.model.vlm_with_expert.vlm.parameters()}
        with heads.head_folder(path) as partial:
            heads.write_head(
                partial,
                self.policy,
                self.source,
                adapter=ADAPTER,
                horizon=self.spec.horizon,
                lora=self.lora,
                options={"dtype": dtypes.pop()} if len(dtypes) == 1 else {},
                peft=PEFT,
                names=self.order.to_json(),
            )
            self._save_description(partial, Path(path))

    def _save_description(self, partial: Path, final: Path) -> None:
        """Configuration, processors, and a VLM's that is nowhere else."""
        config = copy.copy(self.policy.config)
        if self.vlm is not None:
            self.vlm.save(partial / VLM_FOLDER)
            config.vlm_model_name, config.load_vlm_weights = str(final.resolve() / VLM_FOLDER), False
        config._save_pretrained(partial)
        words = _step(self.preprocessor, TokenizerProcessorStep)
        words.tokenizer, words.tokenizer_name = None, config.vlm_model_name  # what it saves; it keeps what it uses
        self.preprocessor.save_pretrained(partial, config_filename=checkpoint.PREPROCESSOR)
        self.postprocessor.save_pretrained(partial, config_filename=checkpoint.POSTPROCESSOR)


def _check_options(*, dtype: str | None, statistics: str, horizon: int | None, mapping: Mapping[str, str]) -> None:
    def check(name: str, value: str | None, known: Sequence[str]) -> None:
        if value is not None and value not in known:
            raise PolicyError(f'{name} is "{value}"; expected one of {", ".join(known)}')

    check("dtype", dtype, ("bfloat16", "float32"))
    check("statistics", statistics, ("auto", "checkpoint", "dataset"))
    for kind, mode in mapping.items():
        check("a key of normalization_mapping", kind, ("ACTION", "STATE", "VISUAL"))
        check(f"normalization_mapping of {kind}", mode, [known.value for known in NormalizationMode])
    if horizon is not None and horizon < 1:
        raise PolicyError(f"horizon is {horizon}; a chunk has at least one step")


def _adopts(statistics: str, config: SmolVLAConfig, own: Mapping[str, Any], *, given: bool) -> bool:
    """Return True if a dataset's features and statistics take the place of the checkpoint's."""
    if statistics == "dataset" and not given:
        raise PolicyError('statistics="dataset" without a dataset: give features and stats')
    padded = config.action_feature is None or config.action_feature.shape[0] == config.max_action_dim
    return given and (statistics == "dataset" or (statistics == "auto" and (ACTION not in own or padded)))


def _own_stats(
    source: heads.Source, config: SmolVLAConfig, base: str | Path | None, *, fresh: bool
) -> Mapping[str, Mapping[str, Tensor]]:
    """Return the checkpoint's statistics: of its processors, or of its weights where it is older than those."""
    if fresh or processors.are_saved(source.folder):
        return normalization.saved_stats(source.folder)
    return weights.old_stats(source, config, base)


def _kept_order(
    source: heads.Source, config: SmolVLAConfig, features: Mapping[str, Any] | None, joints: naming.Joints
) -> naming.VectorOrder:
    """Return how a dataset's states and actions come into the order of a policy that keeps its own."""
    columns = {OBS_STATE: config.robot_state_feature, ACTION: config.action_feature}
    sizes = {key: feature.shape[0] for key, feature in columns.items() if feature is not None}
    order = naming.saved_order(source.folder, getattr(config, "action_feature_names", None), sizes)
    if features is None:
        return order
    return naming.matched_order(order, features, sizes=sizes, where=source.name, joints=joints)


def _adopt(
    config: SmolVLAConfig,
    features: Mapping[str, Any],
    cameras: camera_names.Cameras,
    saved: Mapping[str, str],
    where: str,
) -> dict[str, str]:
    """Take a dataset's cameras, state and action into a configuration; the cameras' names there, where they change."""
    offered = dataset_to_policy_features(camera_names.colour_features(features, cameras))
    images = {key: feature for key, feature in offered.items() if feature.type is FeatureType.VISUAL}
    chosen = camera_names.camera_slots(list(saved), list(images), cameras, where=where)
    for key, limit in ((OBS_STATE, config.max_state_dim), (ACTION, config.max_action_dim)):
        if key not in offered:
            raise PolicyError(f"smolvla needs {OBS_STATE} and {ACTION}; the dataset has {', '.join(sorted(offered))}")
        if offered[key].shape[0] > limit:
            raise PolicyError(f'"{key}" has {offered[key].shape[0]} dimensions, the checkpoint knows at most {limit}')
    config.input_features = {slot or key: images[key] for key, slot in chosen.items()} | {OBS_STATE: offered[OBS_STATE]}
    config.output_features = {ACTION: offered[ACTION]}
    config.empty_cameras = 0
    return {key: slot for key, slot in chosen.items() if slot not in (None, key)}


def _step(pipeline: Any, kind: type[Any]) -> Any:
    """A pipeline's step of a kind."""
    for step in pipeline.steps:
        if isinstance(step, kind):
            return step
    found = ", ".join(type(step).__name__ for step in pipeline.steps)
    raise PolicyError(f"the pre-processor has no {kind.__name__}; it holds {found}")
