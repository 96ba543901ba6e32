"""The processing part of a GR00T N1.6 checkpoint: three JSON files beside its weights (section 1)."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lerobot.utils.constants import OBS_STATE

from lerobot_policy_groot_n1d6.processing.embodiment import (
    NEW,
    SLOTS,
    ActionKey,
    Embodiment,
    Encoding,
    Format,
    Kind,
    Representation,
    StateKey,
    View,
    choice,
    parse_action_key,
    parse_state_key,
    read_table,
)
from lerobot_policy_groot_n1d6.processing.errors import ProcessingError
from lerobot_policy_groot_n1d6.processing.images import ImageRules
from lerobot_policy_groot_n1d6.processing.normalization import Rules
from lerobot_policy_groot_n1d6.processing.statistics import Statistics, check_statistics, from_json

logger = logging.getLogger(__name__)

PROCESSOR, STATISTICS, SLOT_TABLE = "processor_config.json", "statistics.json", "embodiment_id.json"
OTHERS = {
    "gr00t_n1_5": 'GR00T N1.5, which LeRobot up to 0.5.1 runs with policy.type "groot"',
    "gr00tn1d7": 'GR00T N1.7, which LeRobot from 0.6 on runs with policy.type "groot"',
}


@dataclass(frozen=True)
class CheckpointProcessing:
    """What a checkpoint says about its data.

    Attributes:
        folder: it was read from.
        kwargs: its ``processor_kwargs``.
        statistics: by embodiment, as stored.
        slots: by embodiment.
    """

    folder: Path
    kwargs: Mapping[str, Any]
    statistics: Mapping[str, Any]
    slots: Mapping[str, int]

    @property
    def rules(self) -> Rules:
        return Rules(self.kwargs.get("use_percentiles", False), self.kwargs.get("clip_outliers", True))

    @property
    def formalize_language(self) -> bool:
        return self.kwargs.get("formalize_language", True)

    def image_rules(self, *, letterbox: bool = False, exact: bool = False) -> ImageRules:
        edge, fraction = self.kwargs.get("shortest_image_edge"), self.kwargs.get("crop_fraction")
        return ImageRules(
            edge or 256, fraction or 0.95, letterbox or self.kwargs.get("letter_box_transform", False), exact
        )

    @property
    def embodiments(self) -> list[str]:
        """Those that the checkpoint describes in full, with statistics."""
        return sorted(set(self.kwargs.get("modality_configs", {})) & set(self.statistics))

    def embodiment(self, tag: str, mapping: Mapping[str, Any] | None = None) -> tuple[Embodiment, Statistics]:
        """A described embodiment and its statistics.

        Args:
            tag: its name.
            mapping: where a dataset holds its keys: ``{"views": {name: image key}, "state": {name: [start, stop]},
                "action": {name: [start, stop]}}``. What it leaves out has the names of the checkpoint
                (``observation.images.<view>``) and lies side by side in the order of the keys.

        Raises:
            ProcessingError: the checkpoint does not describe it (the message lists the ones it does), or the mapping
                does not fit.
        """
        if tag not in self.embodiments:
            raise ProcessingError(
                f'{self.folder} does not describe embodiment "{tag}". It knows '
                f"{', '.join(self.embodiments) or 'none'}. "
                f'For another robot, take "{NEW}" and describe its keys.'
            )
        modes, table, mapping = self.kwargs["modality_configs"][tag], self.statistics[tag], mapping or {}
        statistics = from_json(table)
        self._check_mapping(tag, mapping, modes)
        state = self._state_keys(modes["state"], statistics, mapping.get("state", {}))
        embodiment = Embodiment(
            tag=tag,
            slot=self.slots.get(tag, SLOTS.get(tag, SLOTS[NEW])),
            views=tuple(
                View(name, mapping.get("views", {}).get(name, f"observation.images.{name}"))
                for name in modes["video"]["modality_keys"]
            ),
            state=state,
            action=self._action_keys(modes["action"], statistics, mapping.get("action", {})),
            horizon=len(modes["action"]["delta_indices"]),
        )
        check_statistics(statistics, embodiment, self.rules)
        return embodiment, statistics

    def _state_keys(
        self, mode: Mapping[str, Any], statistics: Statistics, mapping: Mapping[str, Any]
    ) -> tuple[StateKey, ...]:
        turned = (
            set(mode.get("sin_cos_embedding_keys") or []) if self.kwargs.get("apply_sincos_state_encoding") else set()
        )
        spread = set(mode.get("mean_std_embedding_keys") or [])
        keys, start = [], 0
        for name in mode["modality_keys"]:
            encoding = _encoding(name, turned, spread)
            if name in mapping:
                place = parse_state_key(name, mapping[name])
                bounds, column = (place.start, place.stop), place.column
            else:
                bounds, column = (start, start + _dim(statistics, "state", name)), OBS_STATE
            keys.append(StateKey(name, *bounds, column=column, encoding=encoding))
            start = bounds[1]
        return tuple(keys)

    def _action_keys(
        self, mode: Mapping[str, Any], statistics: Statistics, mapping: Mapping[str, Any]
    ) -> tuple[ActionKey, ...]:
        names: Sequence[str] = mode["modality_keys"]
        configs = mode.get("action_configs") or [{}] * len(names)
        spread = set(mode.get("mean_std_embedding_keys") or [])
        if len(configs) != len(names):
            raise ProcessingError(
                f"{self.folder / PROCESSOR} has {len(configs)} action_configs for the {len(names)} action keys {names}"
            )
        keys, start = [], 0
        for name, config in zip(names, configs, strict=True):
            relative = self._representation(name, config)
            group = "relative_action" if relative is Representation.RELATIVE else "action"
            if name in mapping:
                place = parse_action_key(name, mapping[name])
                bounds = place.start, place.stop
            else:
                bounds = start, start + _dim(statistics, group, name)
            kind = choice(Kind, config.get("type", Kind.NON_EEF), f'type of action "{name}"')
            form = choice(Format, config.get("format", Format.DEFAULT), f'format of action "{name}"')
            encoding = _encoding(name, set(), spread)
            keys.append(ActionKey(name, *bounds, relative, kind, form, config.get("state_key"), encoding))
            start = bounds[1]
        return tuple(keys)

    def _representation(self, name: str, config: Mapping[str, Any]) -> Representation:
        found = choice(Representation, config.get("rep", Representation.ABSOLUTE), f'representation of action "{name}"')
        return found if self.kwargs.get("use_relative_action") else Representation.ABSOLUTE

    def _check_mapping(self, tag: str, mapping: Mapping[str, Any], modes: Mapping[str, Any]) -> None:
        for group, mode in (("views", "video"), ("state", "state"), ("action", "action")):
            unknown = sorted(set(mapping.get(group, {})) - set(modes[mode]["modality_keys"]))
            if unknown:
                raise ProcessingError(
                    f'the mapping names {group} {", ".join(unknown)}, which embodiment "{tag}" of {self.folder} has '
                    f"not. It has {', '.join(modes[mode]['modality_keys'])}."
                )


def read_checkpoint(folder: str | Path) -> CheckpointProcessing:
    """The processing part of a checkpoint's folder.

    Raises:
        ProcessingError: a file is missing or damaged, or the checkpoint is another model's; the message says whose.
    """
    folder = Path(folder).expanduser()
    if (folder / "config.json").is_file():
        check_generation(read_table(folder / "config.json"), folder)
    processor = read_table(folder / PROCESSOR)
    check_generation({"model_type": str(processor.get("processor_class", "")).removesuffix("Processor")}, folder)
    kwargs = processor.get("processor_kwargs")
    if not isinstance(kwargs, dict):
        raise ProcessingError(f'{folder / PROCESSOR} has no "processor_kwargs"; it holds {sorted(processor)}')
    slots = read_table(folder / SLOT_TABLE) if (folder / SLOT_TABLE).is_file() else {}
    return CheckpointProcessing(folder, kwargs, read_table(folder / STATISTICS), {**SLOTS, **slots})


def check_generation(config: Mapping[str, Any], where: Path | str) -> None:
    """Raise ProcessingError if a checkpoint's ``config.json`` is that of another GR00T."""
    found = str(config.get("model_type", "")).lower()
    if found in OTHERS:
        raise ProcessingError(f"{where} is {OTHERS[found]}. This is GR00T N1.6: take nvidia/GR00T-N1.6-3B.")


def _encoding(name: str, turned: set[str], spread: set[str]) -> Encoding:
    if name in turned:
        return Encoding.SIN_COS
    return Encoding.MEAN_STD if name in spread else Encoding.MIN_MAX


def _dim(statistics: Statistics, group: str, name: str) -> int:
    kinds = statistics.get(group, {}).get(name, {})
    if not kinds:
        raise ProcessingError(
            f'{STATISTICS} has no {group} key "{name}", and the mapping does not say which columns it has. It has '
            f"{sorted(statistics.get(group, {}))}."
        )
    return next(iter(kinds.values())).shape[-1]
