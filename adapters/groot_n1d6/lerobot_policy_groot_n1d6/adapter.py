"""``groot_n1d6`` as a poco_vla adapter: GrootN1d6Policy behind :class:`poco_vla.FlowPolicy`."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any, Literal, Self

import torch
from draccus.utils import DraccusException
from lerobot.configs.types import FeatureType
from lerobot.utils.constants import ACTION
from safetensors import SafetensorError
from torch import Tensor

from lerobot_policy_groot_n1d6.adapter_loading import ADAPTER, Data, load_lerobot, load_nvidia, locate, policy_type
from lerobot_policy_groot_n1d6.configuration_groot_n1d6 import GrootN1d6Config
from lerobot_policy_groot_n1d6.model import GrootSizes, Group, Memory, Tokens, random_weights, sample_time, sort_tokens
from lerobot_policy_groot_n1d6.modeling_groot_n1d6 import GrootN1d6Policy
from lerobot_policy_groot_n1d6.processing.embodiment import Encoding
from lerobot_policy_groot_n1d6.processing.normalization import unencoded_columns
from lerobot_policy_groot_n1d6.processing.steps import (
    ATTENTION_MASK,
    EMBODIMENT_ID,
    INPUT_IDS,
    PIXEL_VALUES,
    STATE,
    EncodeStep,
    ImageStep,
    PromptStep,
)
from lerobot_policy_groot_n1d6.processor_groot_n1d6 import make_groot_n1d6_pre_post_processors
from poco_vla import ActionSpec, FlowPolicy, Lora, PolicyError, atomic_folder, inject_lora, merge_lora, raw
from poco_vla.adapting import camera_names, naming, normalization, processors
from poco_vla.adapting.lerobot_checkpoint import check_choice, tiny_features, tiny_stats
from poco_vla.adapting.rounding import rounded_weights
from poco_vla.pretrained import heads


@dataclass(frozen=True)
class GrootPrefix:
    """B encoded states.

    Attributes:
        features: [B, D] what the critic sees: the mean of the language model's features over valid tokens, as they are,
            and the normalised state. The paper does not say what its VLA critic sees: our choice.
        tokens: the features themselves, text and images apart, without padding; what keys and values are made of.
        memories: keys and values of the cross-attention layers under the weights at the time of encoding, for
            sampling. With gradients, `velocity` makes them anew: their projections train.
        state_token: [B, 1, C] likewise.
        state: [B, 1, S] normalised, padded.
    """

    features: Tensor
    tokens: Tokens
    memories: tuple[Memory, ...]
    state_token: Tensor
    state: Tensor

    def select(self, index: Any) -> Self:
        memories = tuple(memory.select(index) for memory in self.memories)
        states = self.state_token[index], self.state[index]
        return type(self)(self.features[index], self.tokens.select(index), memories, *states)

    def to(self, device: Any) -> Self:
        memories = tuple(memory.to(device) for memory in self.memories)
        states = self.state_token.to(device), self.state.to(device)
        return type(self)(self.features.to(device), self.tokens.to(device), memories, *states)


class GrootN1d6Adapter(FlowPolicy):
    """GR00T N1.6 with a frozen vision-language model and a trainable action head.

    The network denoises exactly the chunk's H steps: NVIDIA's own fine-tuning pads them with noise to 50. Its time
    convention is the library's. The head stays in eval mode: no dropout, no state dropout, in training as in acting.

    Args:
        policy: the LeRobot policy, `config.max_action_horizon` and `chunk_size` being the horizon.
        pipelines: its pre- and post-processor.
        source: the checkpoint that the frozen part came from; None when it came from nowhere.
        recompute: keep one tensor per layer for backward and compute the rest again.
        lora: train this on the transformer instead of the full head.
        order: of the data's states and actions against the policy's own; None takes them as they come.
    """

    takes_shared_time = True
    terms = (
        "Weights that derive from NVIDIA's GR00T N1.6 are under NVIDIA's licence of that model: non-commercial "
        "research and evaluation only. Whoever gets these gets them under the same terms."
    )

    def __init__(
        self,
        policy: GrootN1d6Policy,
        pipelines: tuple[Any, Any],
        *,
        source: heads.Source | None = None,
        recompute: bool = True,
        lora: Lora | None = None,
        order: naming.VectorOrder | None = None,
    ) -> None:
        super().__init__()
        self.order = order or naming.VectorOrder()
        self.names = self.order.names
        config = policy.config
        self.policy, self.source, self.recompute, self.lora = policy, source, recompute, lora
        if lora is not None:
            inject_lora(policy.action_head, lora, lambda name: True, lambda name: policy.compute)
        if source is not None:
            self.base = source.name
            self.base_version = f"{source.name}@{source.revision}:{heads.fingerprint(policy)}"
        self.head: Any = policy.action_head
        self.preprocess, self.postprocess = self._pipelines = pipelines
        if self.order.index:
            self.preprocess = naming.Reordered(pipelines[0], self.order)
            self.postprocess = naming.Reordered(pipelines[1], self.order, after=True)
        (encode,) = (step for step in pipelines[0].steps if isinstance(step, EncodeStep))
        self.embodiment = encode.embodiment
        self.head.train_slot(self.embodiment.slot)
        self.state_dim = self.embodiment.state_dim
        self.feature_dim = policy.sizes.language.width + self.state_dim
        columns = [view.column for view in self.embodiment.views] + [key.column for key in self.embodiment.state]
        self.input_keys = tuple(dict.fromkeys(processors.raw_keys(pipelines[0], columns)))
        self.spec = ActionSpec(
            horizon=config.chunk_size,
            width=config.max_action_dim,
            action_dim=self.embodiment.action_dim,
            flow_steps=policy.sizes.head.flow_steps,
            clip=(-1.0, 1.0) if _is_bounded(encode) else None,
        )

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: candidates are plain samples, the loss has no dropout."""
        return super().train(False)

    def encode(self, obs: Mapping[str, Any]) -> GrootPrefix:
        """The vision-language model, once per state."""
        raw.refuse_raw(obs, (STATE, INPUT_IDS, ATTENTION_MASK))
        with torch.no_grad(), torch.autocast(self.policy.device.type, enabled=False):
            encoded = self.policy.encode(obs)
            state = obs[STATE].to(self.policy.device)
            valid = encoded.mask[..., None]
            pooled = (encoded.features.float() * valid).sum(dim=1) / valid.sum(dim=1)
            features = torch.cat([pooled, state[:, 0, : self.state_dim].float()], dim=-1)
            return self._prefix(features, sort_tokens(*encoded), state)

    def _prefix(self, features: Tensor, tokens: Tokens, state: Tensor) -> GrootPrefix:
        """What the head makes of it is under the weights of now."""
        return GrootPrefix(
            features=features,
            tokens=tokens,
            memories=self.head.cross_kv(tokens, compute=self.policy.compute),
            state_token=self.head.state_tokens(state, self.embodiment.slot, compute=self.policy.compute),
            state=state,
        )

    @property
    def can_pack(self) -> bool:
        """Not where training sees augmented pictures."""
        return not any(step.augment for step in self._steps if isinstance(step, ImageStep))

    @property
    def _steps(self) -> Sequence[Any]:
        return self._pipelines[0].steps

    def pack(self, prefix: Any) -> list[dict[str, Tensor]]:
        """Features, tokens and state; no keys and values, whose weights train."""
        kinds = prefix.tokens.text.split(), prefix.tokens.image.split()
        columns = zip(prefix.features, *kinds, prefix.state[:, 0], strict=True)
        return [dict(zip(("features", "text", "image", "state"), column, strict=True)) for column in columns]

    def unpack(self, states: Sequence[Mapping[str, Tensor]]) -> GrootPrefix:
        tokens = Tokens(*(Group.join([state[kind] for state in states]) for kind in ("text", "image")))
        features, state = (torch.stack([state[name] for state in states]) for name in ("features", "state"))
        with torch.no_grad(), torch.autocast(self.policy.device.type, enabled=False):
            return self._prefix(features, tokens, state[:, None])

    def preprocess_actions(self, batch: dict[str, Any]) -> Tensor:
        """The pre-processor without its steps for pictures and prompts, of which actions know nothing."""
        steps = [step for step in self._steps if not isinstance(step, ImageStep | PromptStep)]
        return replace(self._pipelines[0], steps=steps)(self.order.to_policy(batch))[ACTION]

    def normalised_columns(self, batch: dict[str, Any]) -> list[normalization.NormalisedColumn]:
        """Return states and actions key by key, relative actions as such."""
        (encode,) = (step for step in self._steps if isinstance(step, EncodeStep))
        raw = self.order.to_policy(batch)
        return [
            normalization.NormalisedColumn(*column)
            for column in unencoded_columns(raw, encode.embodiment, encode.statistics, encode.rules)
        ]

    def velocity(self, prefix: Any, x: Tensor, t: Tensor) -> Tensor:
        compute, slot = self.policy.compute, self.embodiment.slot
        with torch.autocast(self.policy.device.type, enabled=False):
            memories, token = prefix.memories, prefix.state_token
            if torch.is_grad_enabled():
                memories = self.head.cross_kv(prefix.tokens, compute=compute)
                token = self.head.state_tokens(prefix.state, slot, compute=compute)
            return self.head.velocity(memories, token, x, t, slot, compute=compute, recompute=self.recompute)

    def sampling(self) -> AbstractContextManager[None]:
        return rounded_weights(self.head)

    def sample_time(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        return sample_time(shape, self.policy.sizes.head, generator)

    def native_sample(self, obs: Mapping[str, Any], noise: Tensor) -> Tensor:
        """The policy's own sampler, one candidate per row, keys and values made for it."""
        return self.policy.sample({**obs, EMBODIMENT_ID: self.embodiment.slot}, noise)

    # -- loading and saving ---------------------------------------------------------------------------------------

    option_record = GrootN1d6Config

    @classmethod
    def option_names(cls, *, pretrained: bool) -> frozenset[str]:
        settings = frozenset(f.name for f in fields(GrootN1d6Config))
        return settings | (frozenset(signature(cls.from_pretrained).parameters) - {"options"})

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
        base: str | Path | None = None,
        recompute: bool = True,
        lora: Any = None,
        cameras: camera_names.Cameras = None,
        joints: naming.Joints = None,
        **options: Any,
    ) -> Self:
        """Load a ``groot_n1d6`` LeRobot folder, a head that this class saved, or one of NVIDIA's N1.6 checkpoints
        together with a dataset.

        Args:
            repo_or_path: local folder or Hub id.
            horizon: H; a folder's own chunk size when None.
            device: torch device.
            features: LeRobot features of the dataset to fine-tune on; NVIDIA's checkpoints need them.
            stats: its statistics.
            dataset_meta: LeRobot's description of it; relative actions of a new embodiment need it.
            statistics: whose hold. "auto" keeps a LeRobot folder's own; NVIDIA's checkpoints take the dataset's unless
                `embodiment` names one that they describe.
            revision: Hub revision.
            base: where the base of a saved head is now, if not where it was.
            recompute: see the class.
            lora: rank, or a mapping of rank, alpha and targets: train a LoRA on the transformer instead of the head.
            cameras: the dataset's cameras to use, all of them when None; or {camera of the dataset: camera of the
                policy}. A camera that the policy knows keeps its slot.
            joints: "positional", or {name in the dataset: name in the policy}, for numbers of states and actions whose
                names merely differ.
            options: fields of GrootN1d6Config, such as `embodiment`, `tokenizer`, `letterbox`, `dtype`.

        Raises:
            PolicyError: files are missing or damaged, or do not fit together.
        """
        if horizon is not None and horizon < 1:
            raise PolicyError(f"horizon is {horizon}; a chunk has at least one step")
        check_choice("statistics", statistics, ("auto", "checkpoint", "dataset"))
        colours = None if features is None else camera_names.colour_features(features, cameras)
        data = Data(colours, stats, dataset_meta, cameras, joints)
        found = locate(repo_or_path, revision, base, lora)
        source = found.source
        try:
            if policy_type(source) == ADAPTER:
                policy, pipelines, order = load_lerobot(
                    source, found.frozen, horizon, device, data, statistics, options, found.moved
                )
            else:
                policy, pipelines, order = load_nvidia(source, horizon, device, data, options)
        except PolicyError:
            raise
        # LeRobot's loaders name no file.
        except (json.JSONDecodeError, RuntimeError, SafetensorError, DraccusException) as error:
            raise PolicyError(f"{source.name} cannot be loaded: {error}") from error
        except (ValueError, TypeError, OSError) as error:
            raise PolicyError(str(error)) from error
        heads.check_finite(policy.state_dict(), found.frozen.folder)
        adapter = cls(policy, pipelines, source=found.frozen, recompute=recompute, lora=found.lora, order=order)
        if found.head is not None:
            found.head.put_on(policy, source.folder)
        return adapter

    @classmethod
    def from_dataset(
        cls, features: Mapping[str, Any], stats: Mapping[str, Any], *, horizon: int, **options: Any
    ) -> Self:
        raise PolicyError(
            "groot_n1d6 starts from a pretrained base: give policy the folder or Hub id of an N1.6 checkpoint, such as "
            '"nvidia/GR00T-N1.6-3B", or of a groot_n1d6 policy'
        )

    @classmethod
    def tiny(cls, seed: int = 0) -> Self:
        """Every part of the real network, small: two cameras, 6 state and 4 action dimensions, a tokenizer of bytes."""
        sizes = GrootSizes.tiny()
        sizes = replace(
            sizes,
            language=replace(sizes.language, vocab=264, image_token=259),
            head=replace(sizes.head, state_dim=32, horizon=16, max_steps=64),
        )
        config = GrootN1d6Config(
            **tiny_features(),
            chunk_size=16,
            n_action_steps=16,
            max_action_horizon=16,
            max_state_dim=sizes.head.state_dim,
            max_action_dim=sizes.head.action_dim,
            dtype="float32",
            compute="float32",
            sizes=asdict(sizes),
            tokenizer="bytes",
            device="cpu",
        )
        policy = GrootN1d6Policy(config)
        policy.load_state_dict(random_weights(policy, seed))
        stats = tiny_stats(min=-2.0, max=2.0, mean=0.0, std=1.0, q01=-2.0, q99=2.0)
        return cls(policy.eval(), make_groot_n1d6_pre_post_processors(config, stats))

    def example_obs(self, batch_size: int, seed: int = 0) -> dict[str, Any]:
        """Pictures of noise and instructions of different lengths, through the pre-processor."""
        generator = torch.Generator().manual_seed(seed)
        features = self.policy.config.input_features or {}
        raw: dict[str, Any] = {
            key: (torch.rand if feature.type is FeatureType.VISUAL else torch.randn)(
                (batch_size, *feature.shape), generator=generator
            )
            for key, feature in features.items()
        }
        processed = self.preprocess(raw | {"task": [f"pick up{' the cube' * (i % 3)}" for i in range(batch_size)]})
        wanted = (STATE, EMBODIMENT_ID, INPUT_IDS, ATTENTION_MASK)
        return {k: v for k, v in processed.items() if k in wanted or k.startswith(PIXEL_VALUES)}

    def save_pretrained(self, path: str | Path) -> None:
        with atomic_folder(path) as partial:
            self.policy.save_pretrained(partial, state_dict=merge_lora(self.policy.state_dict(), self.policy))
            heads.write_about(partial, adapter=ADAPTER, names=self.order.to_json())
            self._save_processors(partial)

    def save_head(self, path: str | Path) -> None:
        """What was trained, and where its base model is: `from_pretrained` puts the two together again."""
        with heads.head_folder(path) as partial:
            horizon, lora = self.spec.horizon, self.lora
            names = self.order.to_json()
            heads.write_head(
                partial, self.policy, self.source, adapter=ADAPTER, horizon=horizon, lora=lora, names=names
            )
            self.policy.config._save_pretrained(partial)
            self._save_processors(partial)

    def _save_processors(self, folder: Path) -> None:
        self.preprocess.save_pretrained(folder, config_filename="policy_preprocessor.json")  # pyright: ignore
        self.postprocess.save_pretrained(folder, config_filename="policy_postprocessor.json")  # pyright: ignore


def _is_bounded(encode: EncodeStep) -> bool:
    """Return True if normalised actions lie in [-1, 1]: by range they do, by deviation where the rules say."""
    return all(key.encoding is Encoding.MIN_MAX or encode.rules.clips(key.encoding) for key in encode.embodiment.action)
