"""LeRobot's vision-language-action policies with a frozen backbone: what their adapters share.

A subclass of :class:`LeRobotVla` has what is the model's own: its network, its prompts and tokenizer, the names of its
parts.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import TokenizerProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE
from safetensors.torch import save_file
from torch import Tensor, nn

from poco_vla.adapting import camera_names, naming, processors
from poco_vla.adapting.lerobot_checkpoint import (
    Checkpoint,
    Described,
    LoadOptions,
    cameras_of,
    fit,
    load_pipelines,
)
from poco_vla.adapting.weights import Weights
from poco_vla.errors import PolicyError
from poco_vla.files import atomic_folder
from poco_vla.policy import FlowPolicy
from poco_vla.pretrained import heads
from poco_vla.pretrained.lora import Lora, inject_lora, merge_lora
from poco_vla.types import ActionSpec

TRANSFORMER_LAYERS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
"""Ends of the names of the linear layers in a transformer: usual targets of a LoRA."""

type Pipelines = tuple[Any, Any]
"""LeRobot's pre- and post-processor."""


@dataclass(frozen=True)
class NoOptions:
    """The options of an adapter that has none of its own."""


class LeRobotVla(FlowPolicy):
    """A LeRobot policy whose backbone is frozen and whose action head is trained, in full or by a LoRA.

    Attributes:
        adapter: registered name of the adapter.
        model: its name in messages.
        example: a base that it starts from, for messages.
        backbone: name in `policy.model` of the frozen part, which stays in eval mode.
        head_modules: the head's part -> its name in `policy.model`.
        lora_targets: layers of a LoRA that names none.
        peft: how peft can carry the head.
        input_steps: steps that a saved pre-processor may have.
        output_steps: likewise of a post-processor.
        options_class: a frozen dataclass of options that only this adapter has.

    Args:
        policy: LeRobot's policy, `config.chunk_size` being the horizon. Its parameters' `requires_grad` are set.
        pipelines: its pre- and post-processor; None for one that is only fed processed batches.
        flow_steps: Euler steps of the model's own sampler.
        width: of the backbone's features.
        source: the checkpoint that the frozen part came from; None when it came from nowhere.
        lora: train this instead of the full head.
        lora_dtype: the dtype that a layer of the head is fed, by its name; float32 when None.
        order: of the data's states and actions against the policy's own; None takes them as they come.
    """

    adapter: ClassVar[str]
    model: ClassVar[str]
    example: ClassVar[str]
    backbone: ClassVar[str]
    head_modules: ClassVar[Mapping[str, str]]
    lora_targets: ClassVar[tuple[str, ...]]
    peft: ClassVar[heads.PeftLayout]
    input_steps: ClassVar[processors.Steps]
    output_steps: ClassVar[processors.Steps] = processors.OUTPUT_STEPS
    options_class: ClassVar[type] = NoOptions

    policy: Any

    def __init__(
        self,
        policy: PreTrainedPolicy,
        pipelines: Pipelines | None,
        *,
        flow_steps: int,
        width: int,
        source: heads.Source | None = None,
        lora: Lora | None = None,
        lora_dtype: Callable[[str], torch.dtype] | None = None,
        order: naming.VectorOrder | None = None,
    ) -> None:
        super().__init__()
        self.order = order or naming.VectorOrder()
        self.names = self.order.names
        self.policy, self.source, self.lora = policy.requires_grad_(False), source, lora
        network, config = self.policy.model, self.policy.config
        if lora is not None:
            inject_lora(network, lora, self.in_head, lora_dtype or (lambda _: torch.float32))
        self.head = nn.ModuleDict({part: network.get_submodule(name) for part, name in self.head_modules.items()})
        if lora is None:
            self.head.requires_grad_(True).float()
        if source is not None:
            self.base = source.name
            self.base_version = f"{source.name}@{source.revision}:{heads.fingerprint(policy)}"
        self.spec = ActionSpec(
            horizon=config.chunk_size,
            width=config.max_action_dim,
            action_dim=config.action_feature.shape[0],
            flow_steps=flow_steps,
            clip=None,  # Deviation 9: the models' own samplers do not clip either
        )
        self.feature_dim = width + config.robot_state_feature.shape[0]
        self.preprocessor, self.postprocessor = pipelines or (None, None)
        keys = (*cameras_of(config), OBS_STATE)
        self.input_keys = keys if pipelines is None else processors.raw_keys(self.preprocessor, keys)

    def train(self, mode: bool = True) -> "LeRobotVla":
        """Set the mode of the head; the frozen backbone stays in eval mode."""
        super().train(mode)
        self.policy.model.get_submodule(self.backbone).eval()
        return self

    @property
    def device(self) -> torch.device:
        return next(self.policy.parameters()).device

    @classmethod
    def in_head(cls, name: str) -> bool:
        """Return True if a parameter or module of `policy` or `policy.model` belongs to the head, by its name."""
        inner = name.removeprefix("model.")
        return any(inner == part or inner.startswith(f"{part}.") for part in cls.head_modules.values())

    @property
    def pipelines(self) -> Pipelines:
        """Return the pre- and the post-processor.

        Raises:
            PolicyError: the adapter was built without them.
        """
        if self.preprocessor is None or self.postprocessor is None:
            name = type(self).__name__
            raise PolicyError(
                f"this {name} was wrapped without processors: give {name}.wrap(policy, pipelines) LeRobot's two"
            )
        return self.preprocessor, self.postprocessor

    @property
    def tokenizer_step(self) -> TokenizerProcessorStep:
        """Return the pre-processor's step that makes tokens of an instruction."""
        return processors.step_of(self.pipelines[0], TokenizerProcessorStep)

    # -- processing -----------------------------------------------------------------------------------------------

    def preprocess(self, batch: dict[str, Any]) -> dict[str, Any]:  # pyright: ignore
        """Run LeRobot's pre-processor on a batch that is checked first: :func:`.processors.check_batch`."""
        preprocessor, _ = self.pipelines
        *cameras, state = self.input_keys
        processors.check_batch(batch, cameras, state, self.policy.config, self.model)
        processed = preprocessor(self.order.to_policy(batch))
        self.check_processed(processed)
        return processed

    def check_processed(self, processed: Mapping[str, Any]) -> None:
        """Raise DataError if the pre-processor has cut off an instruction."""

    def postprocess(self, actions: Tensor) -> Tensor:  # pyright: ignore
        return self.order.to_data(self.pipelines[1](actions))

    def preprocess_actions(self, batch: dict[str, Any]) -> Tensor:
        """Run LeRobot's pre-processor, which reads no pictures."""
        return self.pipelines[0](self.order.to_policy(batch))[ACTION]

    def pack(self, prefix: Any) -> list[dict[str, Tensor]]:
        return prefix.pack()

    # -- loading --------------------------------------------------------------------------------------------------

    @classmethod
    def wrap(cls, policy: Any, pipelines: Pipelines | None = None, **options: Any) -> "LeRobotVla":
        """Return an adapter around a policy that is in memory already.

        Its head becomes float32 and trainable, all else frozen; its horizon is its `config.chunk_size`.

        Args:
            policy: LeRobot's policy.
            pipelines: its pre- and post-processor.
            options: further arguments of the class, such as `lora`.
        """
        if "lora" in options:
            options["lora"] = Lora.of(options["lora"], cls.lora_targets)
        return cls(policy, pipelines, **options)

    @classmethod
    def option_names(cls, *, pretrained: bool) -> frozenset[str]:
        own = {field.name for field in fields(cls.options_class)}
        return frozenset(signature(cls.from_pretrained).parameters) - {"own"} | own

    @classmethod
    def from_dataset(
        cls, features: Mapping[str, Any], stats: Mapping[str, Any], *, horizon: int, **options: Any
    ) -> "LeRobotVla":
        raise PolicyError(f"{cls.adapter} starts from a pretrained base: give policy {cls.example}")

    @classmethod
    def from_pretrained(
        cls,
        repo_or_path: str | Path,
        *,
        horizon: int | None = None,
        device: str = "cpu",
        features: Mapping[str, Any] | None = None,
        stats: Mapping[str, Any] | None = None,
        statistics: str = "auto",
        dataset_meta: Any = None,
        revision: str | None = None,
        dtype: str | None = None,
        cameras: camera_names.Cameras = None,
        joints: naming.Joints = None,
        normalization_mapping: Mapping[str, str] | None = None,
        tokenizer_max_length: int | None = None,
        base: str | Path | None = None,
        lora: Any = None,
        **own: Any,
    ) -> "LeRobotVla":
        """Load a LeRobot folder or repository of this model, or a head that this class saved.

        Args:
            repo_or_path: local folder or Hub id.
            horizon: H; the checkpoint's own chunk size when None.
            device: torch device.
            features: LeRobot features of the dataset to fine-tune on.
            stats: its statistics.
            statistics: whose features and statistics hold: "dataset" as when fine-tuning a base model, "checkpoint" as
                when going on with a policy that was trained on this data, "auto" takes the checkpoint's if it has any
                for actions that are not padded.
            dataset_meta: not needed here.
            revision: Hub revision.
            dtype: "bfloat16" or "float32", of the frozen backbone; when None the checkpoint's, or that which a saved
                head was trained on.
            cameras: the dataset's cameras to use, all of them when None; or {camera of the dataset: camera of the
                checkpoint}. A camera that the checkpoint knows keeps its slot.
            joints: "positional", or {name in the dataset: name in the checkpoint}, for numbers of states and actions
                whose names merely differ.
            normalization_mapping: LeRobot's normalisation per kind of feature, where the default will not do.
            tokenizer_max_length: tokens of the longest prompt.
            base: where the base of a saved head is now, if not where it was.
            lora: rank, or a mapping of rank, alpha and targets: train a LoRA instead of the full head.
            own: fields of `options_class`.

        Raises:
            PolicyError: anything but a complete match of weights, files that are missing or damaged, a horizon beyond
                the model's, unknown options.
            DataError: the dataset's features or statistics cannot be used.
        """
        if unknown := sorted(own.keys() - {field.name for field in fields(cls.options_class)}):
            raise PolicyError(f"{cls.adapter} has no option {', '.join(unknown)}")
        own_options = cls.options_class(**own)
        options = LoadOptions(
            horizon=horizon,
            device=device,
            features=features,
            stats=stats,
            statistics=statistics,
            dtype=dtype,
            cameras=cameras,
            joints=joints,
            normalization_mapping=normalization_mapping or {},
            tokenizer_max_length=tokenizer_max_length,
        )
        found = Checkpoint.locate(
            repo_or_path, revision, adapter=cls.adapter, base=base, lora=lora, targets=cls.lora_targets
        )
        folder = found.source.folder
        fitted = fit(cls.describe(found, options, own_options), found.source, options, model=cls.model)
        saved = processors.are_saved(folder)
        if saved:
            processors.check_pipelines(folder, cls.input_steps, cls.output_steps)
        parts = cls.load_parts(found, fitted.config, own_options)
        if saved and not fitted.adopted:
            pipelines = load_pipelines(folder, fitted, parts.tokenizer, options)
        else:
            pipelines = cls.build_pipelines(fitted.config, fitted.stats, parts.tokenizer, renames=fitted.renames)
        processors.check_inverse(*pipelines, fitted.config, fitted.where)
        policy = cls.load_policy(fitted.config, parts, found.weights, dtype or heads.saved_dtype(folder), device)
        kept = {"source": found.frozen, "lora": found.lora, "order": fitted.order}
        adapter = cls.assemble(policy, pipelines, parts, own_options, **kept)
        if found.head is not None:
            found.head.put_on(adapter.policy, folder)
        return adapter

    # -- what a model has of its own ------------------------------------------------------------------------------

    @classmethod
    def describe(cls, found: Checkpoint, options: LoadOptions, own: Any) -> Described:
        """Return a checkpoint's configuration and statistics."""
        raise NotImplementedError

    @classmethod
    def load_parts(cls, found: Checkpoint, config: Any, own: Any) -> Any:
        """Return what a policy needs beside its configuration and weights: an object with a `tokenizer`."""
        raise NotImplementedError

    @classmethod
    def build_pipelines(
        cls, config: Any, stats: Mapping[str, Any], tokenizer: Any, *, renames: Mapping[str, str] | None = None
    ) -> Pipelines:
        """Return new pipelines, step for step LeRobot's; `renames` are of cameras."""
        raise NotImplementedError

    @classmethod
    def load_policy(cls, config: Any, parts: Any, opened: Weights, dtype: str | None, device: str) -> Any:
        """Return LeRobot's policy, filled: :func:`.lerobot_checkpoint.fill_policy`."""
        raise NotImplementedError

    @classmethod
    def assemble(cls, policy: Any, pipelines: Pipelines, parts: Any, own: Any, **kept: Any) -> "LeRobotVla":
        """Return the adapter; `kept` are `source`, `lora` and `order` of the class."""
        return cls(policy, pipelines, **kept)

    @property
    def backbone_dtype(self) -> torch.dtype | None:
        """Return the dtype of the frozen part, which is saved beside a head; None where it has several."""
        raise NotImplementedError

    def saved_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the whole policy as LeRobot's strict loader wants them."""
        return tensors

    def save_parts(self, config: Any, partial: Path, final: Path) -> str:
        """Write beside the weights what LeRobot does not find elsewhere; return the name of the tokenizer.

        Args:
            config: LeRobot's configuration, a copy that is written afterwards.
            partial: folder to write to.
            final: where it will be.
        """
        raise NotImplementedError

    # -- saving ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path) -> None:
        """Write a plain LeRobot folder: merged weights, configuration, both processors. It loads without a plug-in.

        What is nowhere else, such as a tokenizer, is written beside the weights, and the processors name its absolute
        path: LeRobot looks for it there.
        """
        merged = merge_lora(self.policy.state_dict(), self.policy)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.saved_tensors(merged).items()}
        with atomic_folder(path) as partial:
            save_file(tensors, partial / heads.POLICY_WEIGHTS, metadata={"format": "pt"})
            heads.write_about(partial, adapter=self.adapter, options=self._about, names=self.order.to_json())
            self._save_description(partial, Path(path))

    def save_head(self, path: str | Path) -> None:
        """Write what was trained, and where its base model is: `from_pretrained` puts the two together again."""
        with heads.head_folder(path) as partial:
            heads.write_head(
                partial,
                self.policy,
                self.source,
                adapter=self.adapter,
                horizon=self.spec.horizon,
                lora=self.lora,
                options=self._about,
                peft=self.peft,
                names=self.order.to_json(),
            )
            self._save_description(partial, Path(path))

    @property
    def _about(self) -> dict[str, Any]:
        """Return what LeRobot's configuration has no field for: the dtype of the backbone under the head."""
        dtype = self.backbone_dtype
        return {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}

    def _save_description(self, partial: Path, final: Path) -> None:
        """Write configuration, processors, and what LeRobot does not find elsewhere."""
        preprocessor, postprocessor = self.pipelines
        config = copy.copy(self.policy.config)
        step = self.tokenizer_step
        # LeRobot saves the name of a tokenizer that it loaded itself; the step keeps what it uses.
        step.tokenizer, step.tokenizer_name = None, self.save_parts(config, partial, final)
        config._save_pretrained(partial)
        preprocessor.save_pretrained(partial, config_filename=processors.PREPROCESSOR)
        postprocessor.save_pretrained(partial, config_filename=processors.POSTPROCESSOR)
