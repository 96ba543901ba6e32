"""GR00T N1.6's data side as LeRobot processor steps.

They write what the network reads under ``observation.groot.``: ``state`` [B, 1, max_state_dim], ``embodiment_id`` [B],
``pixel_values.<view>`` [B, 3, h, w], ``input_ids`` and ``attention_mask`` [B, S], and ``reference`` [B, R] where
actions are relative. ``action`` becomes [B, H, max_action_dim], normalised.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lerobot.lerobot_types import EnvTransition, TransitionKey
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    ProcessorStep,
    ProcessorStepRegistry,
    RelativeActionsProcessorStep,
)
from torch import Tensor
from torch.nn.functional import pad

from lerobot_policy_groot_n1d6.processing import prompt
from lerobot_policy_groot_n1d6.processing.embodiment import Embodiment
from lerobot_policy_groot_n1d6.processing.errors import ProcessingError
from lerobot_policy_groot_n1d6.processing.images import Augmentation, ImageRules, num_tokens, transform_images
from lerobot_policy_groot_n1d6.processing.normalization import (
    Rules,
    decode_action,
    encode_action,
    encode_state,
    references_of,
)
from lerobot_policy_groot_n1d6.processing.statistics import Statistics, check_statistics, flatten, unflatten

UNLINKED = "is not linked: load both with LeRobot's make_pre_post_processors, or set relative_step to its EncodeStep"
PREFIX = "observation.groot."
STATE = PREFIX + "state"
EMBODIMENT_ID = PREFIX + "embodiment_id"
REFERENCE = PREFIX + "reference"
INPUT_IDS = PREFIX + "input_ids"
ATTENTION_MASK = PREFIX + "attention_mask"
PIXEL_VALUES = PREFIX + "pixel_values."

type Description = Embodiment | Mapping[str, Any]


def tag_chunk(actions: Tensor, reference: Tensor, max_action_dim: int) -> Tensor:
    """A chunk whose steps carry what their decoding needs, so that they can be decoded one at a time, later.

    A relative action refers to the state at which its chunk was predicted, and its statistics are those of its step. A
    policy that queues the steps of a chunk queues these, and DecodeStep reads them from the tensor itself.

    Args:
        actions: normalised, [B, H, D].
        reference: the batch's ``observation.groot.reference``, [B, R].
        max_action_dim: the network's width.

    Returns:
        [B, H, max_action_dim + R + 1] float32: actions padded with zeros, reference, number of the step.
    """
    batch_size, steps, dims = actions.shape
    wide = pad(actions.float(), (0, max_action_dim - dims))
    references = reference.float().to(wide.device)[:, None].expand(-1, steps, -1)
    numbers = torch.arange(steps, device=wide.device, dtype=wide.dtype)[None, :, None].expand(batch_size, -1, -1)
    return torch.cat([wide, references, numbers], dim=-1)


def _replaced(transition: EnvTransition, changes: Mapping[TransitionKey, Any]) -> Any:
    return {**transition, **changes}


class _WithStatistics:
    """What the steps share that go between raw numbers and the network's: an embodiment and its statistics."""

    def _configure(
        self, embodiment: Description, max_action_dim: int, rules: Rules, statistics: Statistics | None
    ) -> None:
        self.embodiment = Embodiment.parse(embodiment)
        self.max_action_dim = max_action_dim
        self.rules = rules
        self.statistics = statistics
        if self.embodiment.action_dim > max_action_dim:
            raise ProcessingError(
                f'embodiment "{self.embodiment.tag}" has {self.embodiment.action_dim} action dimensions, the network '
                f"max_action_dim = {max_action_dim}"
            )
        if statistics is not None:
            check_statistics(statistics, self.embodiment, rules)

    def _known(self) -> Statistics:
        if self.statistics is None:
            raise ProcessingError(
                "the processors have no statistics of the data. Build them with a dataset (lerobot-train does), or "
                "load them from a folder that a trained policy was saved to."
            )
        return self.statistics

    def _config(self) -> dict[str, Any]:
        return {
            "embodiment": self.embodiment.to_dict(),
            "max_action_dim": self.max_action_dim,
            "use_percentiles": self.rules.use_percentiles,
            "clip_outliers": self.rules.clip_outliers,
            "clip_deviations": self.rules.clip_deviations,
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.statistics is None else flatten(self.statistics)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        statistics = unflatten(state)
        check_statistics(statistics, self.embodiment, self.rules)
        self.statistics = statistics


# LeRobot links a post-processor's AbsoluteActionsProcessorStep to the pre-processor's RelativeActionsProcessorStep when
# it loads a policy, and so these two are of those classes.
@ProcessorStepRegistry.register(name="groot_n1d6_encode")
class EncodeStep(_WithStatistics, RelativeActionsProcessorStep):
    """State and actions, normalised and padded; remembers the raw state that actions are relative to.

    Args:
        embodiment: or its description.
        max_state_dim: width of the network's state.
        max_action_dim: width of its actions.
        use_percentiles: see Rules.
        clip_outliers: likewise.
        clip_deviations: likewise.
        statistics: of the embodiment's data; None where they are to be loaded.
    """

    def __init__(
        self,
        embodiment: Description,
        max_state_dim: int = 128,
        max_action_dim: int = 128,
        use_percentiles: bool = False,
        clip_outliers: bool = True,
        statistics: Statistics | None = None,
        clip_deviations: bool = True,
    ) -> None:
        # LeRobot's own conversion is off: these fields are what its other code looks at.
        self.enabled, self.exclude_joints, self.action_names = False, [], None
        self._last_state: Tensor | None = None
        rules = Rules(use_percentiles, clip_outliers, clip_deviations)
        self._configure(embodiment, max_action_dim, rules, statistics)
        self.max_state_dim = max_state_dim
        if self.embodiment.state_dim > max_state_dim:
            raise ProcessingError(
                f'embodiment "{self.embodiment.tag}" has {self.embodiment.state_dim} state dimensions (sines and '
                f"cosines count twice), the network max_state_dim = {max_state_dim}"
            )

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        observation: dict[str, Any] = dict(transition.get(TransitionKey.OBSERVATION) or {})
        columns = {key.column: self._column(observation, key.column) for key in self.embodiment.state}
        observation |= self._observed(columns, observation)
        if self.embodiment.references:
            self._last_state = observation[REFERENCE] = references_of(columns, self.embodiment).float()
        action: Any = transition.get(TransitionKey.ACTION)
        if action is not None:
            action = self._encoded(action, observation.get(REFERENCE))
        return _replaced(transition, {TransitionKey.OBSERVATION: observation, TransitionKey.ACTION: action})

    def _column(self, observation: Mapping[str, Any], name: str) -> Tensor:
        if name not in observation:
            raise ProcessingError(
                f'the batch lacks {name}, which embodiment "{self.embodiment.tag}" reads; it holds '
                f"{', '.join(sorted(observation)) or 'no observation'}"
            )
        column: Tensor = observation[name]
        last = max(key.stop for key in self.embodiment.state if key.column == name)
        if column.ndim < 2:  # LeRobot gives only observation.state a batch axis, and keeps single numbers bare
            column = column.reshape(-1, 1) if last == 1 else column.reshape(1, -1)
        if column.ndim == 3 and column.shape[1] == 1:
            column = column[:, 0]
        if column.ndim != 2 or column.shape[1] < last:
            raise ProcessingError(f"{name} has shape {tuple(column.shape)}: expected [B, D], D at least {last}")
        return column.float()

    def _observed(self, columns: Mapping[str, Tensor], observation: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors = [*columns.values(), *(value for value in observation.values() if isinstance(value, Tensor))]
        if not tensors:
            raise ProcessingError("the batch holds no observation")
        batch_size, device = len(tensors[0]), tensors[0].device
        if self.embodiment.state:
            state = encode_state(columns, self.embodiment, self._known(), self.rules)
        else:
            state = torch.zeros(batch_size, 0, device=device)
        return {
            STATE: pad(state, (0, self.max_state_dim - state.shape[-1]))[:, None],
            EMBODIMENT_ID: torch.full((batch_size,), self.embodiment.slot, device=device),
        }

    def _encoded(self, action: Tensor, references: Tensor | None) -> Tensor:
        one = action.ndim == 2
        chunk = action[:, None] if one else action
        if chunk.ndim != 3 or chunk.shape[-1] != self.embodiment.action_dim:
            raise ProcessingError(
                f"action has shape {tuple(action.shape)}: expected [B, H, {self.embodiment.action_dim}], the columns "
                f'of embodiment "{self.embodiment.tag}"'
            )
        if chunk.shape[1] > self.embodiment.horizon:
            raise ProcessingError(
                f"a chunk of {chunk.shape[1]} steps, but the horizon of embodiment "
                f'"{self.embodiment.tag}" and its statistics is {self.embodiment.horizon}'
            )
        steps = torch.arange(chunk.shape[1], device=chunk.device)
        encoded = encode_action(chunk.float(), references, steps, self.embodiment, self._known(), self.rules)
        encoded = pad(encoded, (0, self.max_action_dim - encoded.shape[-1]))
        return encoded[:, 0] if one else encoded

    def get_config(self) -> dict[str, Any]:
        return self._config() | {"max_state_dim": self.max_state_dim}


@ProcessorStepRegistry.register(name="groot_n1d6_decode")
class DecodeStep(_WithStatistics, AbsoluteActionsProcessorStep):
    """Normalised actions -> the robot's units and the dataset's columns.

    It takes [B, H, D] chunks, where relative actions refer to the state of the last batch that the linked EncodeStep
    has seen, and [B, D] single steps; relative ones of these only as `tag_chunk` makes them. Steps beyond the
    embodiment's horizon and dimensions beyond its own are padding, and are cut off.

    Args:
        embodiment: or its description.
        max_action_dim: width of the network's actions.
        use_percentiles: see Rules.
        clip_outliers: likewise.
        clip_deviations: likewise.
        statistics: as in EncodeStep.
        encode: the pre-processor's step; LeRobot links the two when it loads a policy.
    """

    def __init__(
        self,
        embodiment: Description,
        max_action_dim: int = 128,
        use_percentiles: bool = False,
        clip_outliers: bool = True,
        statistics: Statistics | None = None,
        encode: Any = None,
        clip_deviations: bool = True,
    ) -> None:
        self.enabled, self.relative_step = True, encode
        rules = Rules(use_percentiles, clip_outliers, clip_deviations)
        self._configure(embodiment, max_action_dim, rules, statistics)

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        action = transition.get(TransitionKey.ACTION)
        return transition if action is None else _replaced(transition, {TransitionKey.ACTION: self._decoded(action)})

    def _decoded(self, action: Any) -> Tensor:
        if not isinstance(action, Tensor) or action.ndim not in (2, 3) or action.shape[-1] < self.embodiment.action_dim:
            found = f"shape {tuple(action.shape)}" if isinstance(action, Tensor) else type(action).__name__
            raise ProcessingError(
                f"action has {found}: expected [B, H, D] or [B, D], D at least {self.embodiment.action_dim}"
            )
        if action.ndim == 3:
            action = action[:, : self.embodiment.horizon]
        steps, references = self._steps(action), None
        if self.embodiment.references:
            if self._is_tagged(action):
                references, numbers = action[..., self.max_action_dim : -1], action[..., -1].round().long()
                references = references[:, 0] if action.ndim == 3 else references
                steps = numbers[0] if action.ndim == 3 else numbers
            else:
                references = self._cached(action)
        return decode_action(action, references, steps, self.embodiment, self._known(), self.rules)

    def _steps(self, action: Tensor) -> Tensor:
        return torch.arange(action.shape[1] if action.ndim == 3 else 1, device=action.device)

    def _is_tagged(self, action: Tensor) -> bool:
        return action.shape[-1] == self.max_action_dim + self.embodiment.reference_dim + 1

    def _cached(self, action: Tensor) -> Tensor:
        if action.ndim == 2:
            raise ProcessingError(
                "one step of a chunk of relative actions cannot be decoded by itself: which step it is and the state "
                "that it refers to are unknown. Decode the whole chunk, or queue what tag_chunk returns."
            )
        state = None if self.relative_step is None else self.relative_step.get_cached_state()
        if state is None:
            raise ProcessingError(
                "relative actions refer to a state, and the pre-processor "
                + ("has not seen one yet" if self.relative_step else UNLINKED)
            )
        if len(state) != len(action):
            raise ProcessingError(
                f"{len(action)} chunks of relative actions, but the last batch that the pre-processor saw has "
                f"{len(state)} states. Decode a chunk before the next observation is processed."
            )
        return state

    def get_config(self) -> dict[str, Any]:
        return self._config()


@ProcessorStepRegistry.register(name="groot_n1d6_images")
class ImageStep(ProcessorStep):
    """Each view's frames, resized, cropped and scaled; the raw ones are dropped.

    Args:
        embodiment: or its description.
        shortest_edge: see ImageRules, as for the next three.
        crop_fraction: share of each side.
        letterbox: pad to a square first.
        exact: OpenCV and PIL.
        augment: draw crops and colours anew for batches that carry actions, which only training has.
    """

    def __init__(
        self,
        embodiment: Description,
        shortest_edge: int = 256,
        crop_fraction: float = 0.95,
        letterbox: bool = False,
        exact: bool = False,
        augment: bool = False,
    ) -> None:
        self.embodiment = Embodiment.parse(embodiment)
        self.rules = ImageRules(shortest_edge, crop_fraction, letterbox, exact)
        self.augment = augment

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        observation: dict[str, Any] = dict(transition.get(TransitionKey.OBSERVATION) or {})
        columns = [view.column for view in self.embodiment.views]
        missing = [column for column in columns if column not in observation]
        if missing:
            raise ProcessingError(
                f'the batch lacks {", ".join(missing)}, which embodiment "{self.embodiment.tag}" sees; it holds '
                f"{', '.join(sorted(observation)) or 'no observation'}"
            )
        training = self.augment and transition.get(TransitionKey.ACTION) is not None
        draw = Augmentation.draw(len(observation[columns[0]])) if training and columns else None
        for view in self.embodiment.views:
            observation[PIXEL_VALUES + view.name] = transform_images(observation[view.column], self.rules, draw)
        kept = {key: value for key, value in observation.items() if key not in columns}
        return _replaced(transition, {TransitionKey.OBSERVATION: kept})

    def get_config(self) -> dict[str, Any]:
        return {
            "embodiment": self.embodiment.to_dict(),
            "shortest_edge": self.rules.shortest_edge,
            "crop_fraction": self.rules.crop_fraction,
            "letterbox": self.rules.letterbox,
            "exact": self.rules.exact,
            "augment": self.augment,
        }

    def transform_features(self, features: Any) -> Any:
        return features


@ProcessorStepRegistry.register(name="groot_n1d6_prompt")
class PromptStep(ProcessorStep):
    """The instruction and the places of the images as token ids, padded on the left. Comes after ImageStep.

    A tokenizer that was loaded is saved with the policy, which then needs no network.

    Args:
        embodiment: or its description.
        tokenizer: local folder, Hub id, or "bytes".
        formalize_language: lower case and no punctuation.
        byte_ids: ids of the special tokens of "bytes", in the order of SpecialIds; None takes those after the bytes.
    """

    def __init__(
        self,
        embodiment: Description,
        tokenizer: str = prompt.QWEN,
        formalize_language: bool = True,
        byte_ids: list[int] | None = None,
    ) -> None:
        self.embodiment = Embodiment.parse(embodiment)
        self.source = str(tokenizer)
        self.formalize_language = formalize_language
        self.byte_ids = prompt.BYTE_IDS if byte_ids is None else prompt.SpecialIds(*byte_ids)
        self._tokenizer: prompt.Tokenizer | None = None

    @property
    def tokenizer(self) -> prompt.Tokenizer:
        """Loaded when first needed.

        Raises:
            ProcessingError: it cannot be had.
        """
        if self._tokenizer is None:
            self._tokenizer = prompt.load_tokenizer(self.source, byte_ids=self.byte_ids)
        return self._tokenizer

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        observation: dict[str, Any] = dict(transition.get(TransitionKey.OBSERVATION) or {})
        images = [observation[PIXEL_VALUES + view.name] for view in self.embodiment.views]
        tasks = self._tasks((transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}).get("task"))
        counts = [num_tokens(*image.shape[-2:]) for image in images]
        rows = [prompt.prompt_ids(self.tokenizer, task, counts) for task in tasks]
        if images and len(images[0]) != len(rows):
            raise ProcessingError(f"the batch has {len(rows)} instructions and {len(images[0])} images per view")
        ids, mask = prompt.collate(rows, self.tokenizer.special.pad)
        like = next((value for value in observation.values() if isinstance(value, Tensor)), ids)
        observation[INPUT_IDS], observation[ATTENTION_MASK] = ids.to(like.device), mask.to(like.device)
        return _replaced(transition, {TransitionKey.OBSERVATION: observation})

    def _tasks(self, tasks: Any) -> list[str]:
        if isinstance(tasks, str):
            tasks = [tasks]
        if not tasks or not all(isinstance(task, str) for task in tasks):
            raise ProcessingError(
                f'the batch has no instruction: "task" is {tasks!r}, expected one text per row (it may be empty)'
            )
        return [prompt.formalize_language(task) for task in tasks] if self.formalize_language else list(tasks)

    def state_dict(self) -> dict[str, Tensor]:
        loaded = self._tokenizer
        return {"tokenizer": loaded.to_tensor()} if isinstance(loaded, prompt.QwenTokenizer) else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._tokenizer = prompt.QwenTokenizer.from_tensor(state["tokenizer"])

    def get_config(self) -> dict[str, Any]:
        special = self.byte_ids
        ids = [special.pad, special.turn_start, special.turn_end, special.image, special.image_start, special.image_end]
        return {
            "embodiment": self.embodiment.to_dict(),
            "tokenizer": self.source,
            "formalize_language": self.formalize_language,
            "byte_ids": ids,
        }

    def transform_features(self, features: Any) -> Any:
        return features
