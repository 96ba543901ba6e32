"""LeRobot's processor pipelines in a policy's folder: checked before anything of them runs, and again when they are
built.

A pipeline's file names its steps and what they are called with. Some of LeRobot's steps load a tokenizer by name and
run the code that comes with it; others leave a column as it is, without a word, where their statistics are missing. So
each adapter states which steps its pipelines have, and with which arguments (:func:`check_pipelines`), and what is
normalised going in must be un-normalised coming out (:func:`check_inverse`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poco_vla.adapting.normalization import NEEDED
from poco_vla.errors import DataError, PolicyError
from poco_vla.joint_names import ACTION
from poco_vla.pretrained.sources import read_object
from poco_vla.pretrained.tensor_files import read_tensors

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
MAX_TEXT = 4096
"""Longest text of an argument, in characters."""


@dataclass(frozen=True)
class Argument:
    """Describe the values that a step's argument may have.

    Attributes:
        expected: in words, for the message.
        holds: True for a value that may be given.
    """

    expected: str
    holds: Callable[[Any], bool]


type Steps = Mapping[str, Mapping[str, Argument]]
"""Registered name of a step -> names of the arguments that a file may give it."""


def whole_number(most: int, least: int = 0) -> Argument:
    """Return an argument that is a whole number between two bounds, both included."""
    return Argument(
        f"a whole number from {least} to {most}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most,
    )


def number(most: float, least: float = 0.0) -> Argument:
    """Return an argument that is a number between two bounds, both included."""
    return Argument(
        f"a number from {least:g} to {most:g}",
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most,
    )


def one_of(*choices: Any) -> Argument:
    """Return an argument that is one of some values."""
    return Argument(
        f"one of {', '.join(map(str, choices))}",
        lambda value: any(type(value) is type(choice) and value == choice for choice in choices),
    )


def optional(argument: Argument) -> Argument:
    """Return the argument, or null."""
    return Argument(f"{argument.expected}, or null", lambda value: value is None or argument.holds(value))


def list_of(argument: Argument, most: int = 4096) -> Argument:
    """Return an argument that is a list."""
    return Argument(
        f"a list, each {argument.expected}",
        lambda value: isinstance(value, list) and len(value) <= most and all(map(argument.holds, value)),
    )


def table_of(argument: Argument, most: int = 4096) -> Argument:
    """Return an argument that is an object of named values."""
    return Argument(
        f"an object, each value {argument.expected}",
        lambda value: isinstance(value, dict) and len(value) <= most and all(map(argument.holds, value.values())),
    )


FLAG = Argument("true or false", lambda value: isinstance(value, bool))
TEXT = Argument("a text", lambda value: isinstance(value, str) and len(value) <= MAX_TEXT)
TABLE = Argument("an object", lambda value: isinstance(value, dict))
_SHAPE = list_of(whole_number(1_000_000), most=8)
_FEATURE = Argument(
    "of a type and a shape",
    lambda value: (
        isinstance(value, dict)
        and value.keys() == {"type", "shape"}
        and TEXT.holds(value["type"])
        and _SHAPE.holds(value["shape"])
    ),
)
_NORMALIZER = {
    "eps": number(1e-2),
    "features": table_of(_FEATURE),
    "norm_map": table_of(one_of("IDENTITY", *NEEDED)),
    "normalize_observation_keys": optional(list_of(TEXT)),
}
INPUT_STEPS: Steps = {
    "rename_observations_processor": {"rename_map": table_of(TEXT)},
    "to_batch_processor": {},
    "device_processor": {"device": TEXT, "float_dtype": optional(TEXT)},
    "normalizer_processor": _NORMALIZER,
}
"""Steps of LeRobot's default pre-processor."""
OUTPUT_STEPS: Steps = {
    "unnormalizer_processor": _NORMALIZER,
    "device_processor": {"device": TEXT, "float_dtype": optional(TEXT)},
}
"""Steps of LeRobot's default post-processor."""
TOKENIZER_STEP: Steps = {
    "tokenizer_processor": {
        "tokenizer_name": TEXT,
        "max_length": whole_number(65_536, 1),
        "task_key": TEXT,
        "padding_side": one_of("left", "right"),
        "padding": one_of("longest", "max_length", "do_not_pad", True, False),
        "truncation": FLAG,
    }
}
"""LeRobot's step that makes tokens of instructions. An adapter hands it a tokenizer; the name alone loads none."""


def are_saved(folder: Path) -> bool:
    """Return True if a folder holds both pipelines."""
    return all((folder / name).is_file() for name in (PREPROCESSOR, POSTPROCESSOR))


def check_pipelines(folder: Path, inputs: Steps, outputs: Steps) -> None:
    """Raise PolicyError unless both pipelines in a folder hold nothing but what an adapter's lists allow.

    Args:
        folder: holds both files, and the files of the steps' states.
        inputs: steps of the pre-processor, each at most once.
        outputs: steps of the post-processor, likewise.
    """
    for name, steps in ((PREPROCESSOR, inputs), (POSTPROCESSOR, outputs)):
        if not (folder / name).is_file():
            raise PolicyError(
                f"the policy in {folder} has no {name}. A checkpoint of an older LeRobot keeps its statistics in its "
                "weights: LeRobot's migrate_policy_normalization script makes the processors of them"
            )
        _check_pipeline(folder / name, steps)


def _check_pipeline(file: Path, steps: Steps) -> None:
    values = read_object(file)
    listed = values.get("steps")
    if not isinstance(listed, list) or not all(isinstance(step, dict) for step in listed):
        raise PolicyError(f'{file} is damaged: expected a list of "steps", each an object')
    if values.keys() - {"name", "steps"} or not isinstance(values.get("name", ""), str):
        raise PolicyError(f"{file} is damaged: expected a name and steps, found {', '.join(sorted(values))}")
    seen: set[str] = set()
    for step in listed:
        name = step.get("registry_name", step.get("class"))
        if not isinstance(name, str) or "class" in step or name not in steps:
            raise PolicyError(
                f"the processors in {file.parent} cannot be loaded: {file.name} names the step {str(name)[:200]!r}, "
                f"which is not run. This adapter's steps are {', '.join(steps)}, each by its registered name"
            )
        if name in seen:
            raise PolicyError(f"{file} is damaged: it names the step {name} twice")
        if unknown := step.keys() - {"registry_name", "config", "state_file"}:
            raise PolicyError(f"{file} is damaged: the step {name} holds {', '.join(sorted(unknown))}")
        seen.add(name)
        _check_arguments(file, name, step.get("config", {}), steps[name])
        if "state_file" in step:
            read_tensors(state_path(file, name, step["state_file"]))  # LeRobot's error would name no file


def _check_arguments(file: Path, step: str, given: Any, allowed: Mapping[str, Argument]) -> None:
    if not isinstance(given, dict):
        raise PolicyError(f"{file} is damaged: the config of the step {step} is no object")
    for name, value in given.items():
        if name not in allowed:
            raise PolicyError(
                f"{file} gives the step {step} the argument {name!r}, which is not taken from a file; it has "
                f"{', '.join(allowed) or 'none'}"
            )
        if not allowed[name].holds(value):
            raise PolicyError(f"{file}: {name} of the step {step} is {value!r:.100}, expected {allowed[name].expected}")


def state_path(file: Path, step: str, name: Any) -> Path:
    """Return the file that holds the state of a step, which lies beside the pipeline's own.

    Raises:
        PolicyError: the name leads elsewhere, or nothing is there.
    """
    folder = file.parent.resolve()
    if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name or "\0" in name:
        raise PolicyError(
            f"{file}: the state of the step {step} is in {name!r:.200}, expected the name of a file beside it"
        )
    path = file.parent / name
    if not path.is_file():
        raise PolicyError(f"{file.parent} is not whole: {name}, which holds the state of the step {step}, is missing")
    # The Hub's cache keeps links to files in the folder `blobs` of the same repository.
    if path.resolve().parent not in (folder, folder.parent.parent / "blobs"):
        raise PolicyError(f"{path} is a link to another folder, and is not read: put a copy of the file in its place")
    return path


# -- steps of a pipeline -----------------------------------------------------------------------------------------------


def step_of[T](pipeline: Any, kind: type[T]) -> T:
    """Return a pipeline's first step of a class.

    Raises:
        PolicyError: it has none.
    """
    for step in pipeline.steps:
        if isinstance(step, kind):
            return step
    found = ", ".join(type(step).__name__ for step in pipeline.steps)
    raise PolicyError(f"the pre-processor has no {kind.__name__}; it holds {found}")


def raw_keys(pipeline: Any, keys: Iterable[str]) -> tuple[str, ...]:
    """Return the names that `keys` have before a pre-processor renames them."""
    step = _registered(pipeline, "rename_observations_processor")
    renamed = {} if step is None else {new: old for old, new in step.rename_map.items()}
    return tuple(renamed.get(key, key) for key in keys)


def _registered(pipeline: Any, name: str) -> Any:
    """Return the step of a registered name; None where a pipeline has none."""
    return next(
        (step for step in getattr(pipeline, "steps", ()) if getattr(type(step), "_registry_name", None) == name), None
    )


# -- a batch that is to be processed -----------------------------------------------------------------------------------


def check_batch(batch: Mapping[str, Any], cameras: Sequence[str], state: str, config: Any, model: str) -> None:
    """Raise DataError for a raw batch that a policy cannot read: a camera, the state or the instruction is missing, a
    dimension is not the policy's, a number is not finite, a picture is not in [0, 1].

    Args:
        batch: what the pre-processor is to be given.
        cameras: its image keys, before any renaming.
        state: its state key, likewise.
        config: LeRobot's configuration of the policy.
        model: its name, for messages.
    """
    if missing := [key for key in (*cameras, state, "task") if key not in batch]:
        raise DataError(f"the batch lacks {', '.join(missing)}; it holds {', '.join(sorted(batch))}")
    tasks = batch["task"] or [""]
    empty = [i for i, task in enumerate([tasks] if isinstance(tasks, str) else tasks) if not str(task).strip()]
    if empty:
        raise DataError(
            f"row {empty[0]} of the batch has an empty instruction; {model} is told in words what to do. Give the "
            'episodes a "task", or the environment a task description.'
        )
    for key, feature in ((state, config.robot_state_feature), (ACTION, config.action_feature)):
        if key in batch and batch[key].shape[-1] != feature.shape[0]:
            raise DataError(f'"{key}" has {batch[key].shape[-1]} dimensions, the policy knows {feature.shape[0]}')
    for key in (*cameras, state, ACTION):
        column = batch.get(key)
        if not isinstance(column, Tensor) or (key in cameras and column.is_cuda):
            continue  # on a GPU it was made of uint8, and a look at it would make the host wait
        if key in cameras and not column.is_floating_point():
            raise DataError(
                f'"{key}" is {column.dtype}; LeRobot hands images over as float32 in [0, 1], and {model} reads them so'
            )
        if column.is_floating_point() and not torch.isfinite(column).all():
            row = 0 if batch[state].ndim == 1 else int((~torch.isfinite(column)).nonzero()[0, 0])
            raise DataError(f'"{key}" is NaN or infinite in row {row} of the batch')
        if key in cameras and column.amax() > 1.01:
            raise DataError(f'"{key}" reaches {column.amax():.3g}; LeRobot hands images over in [0, 1]')


# -- both pipelines together -------------------------------------------------------------------------------------------


def check_inverse(preprocessor: Any, postprocessor: Any, config: Any, where: str | Path) -> None:
    """Raise PolicyError unless what is normalised going in is un-normalised coming out, with the same statistics.

    LeRobot's normalisers leave a column as it is where a step, a feature or a statistic is missing: actions would then
    reach the robot in the network's units.

    Args:
        preprocessor: LeRobot's pipeline, whose step "normalizer_processor" is looked at.
        postprocessor: likewise "unnormalizer_processor".
        config: of the policy: its features and `normalization_mapping`.
        where: they come from, for the message.
    """
    going_in = _Normalizer.of(preprocessor, "normalizer_processor")
    coming_out = _Normalizer.of(postprocessor, "unnormalizer_processor")
    modes = {str(kind): getattr(mode, "value", mode) for kind, mode in config.normalization_mapping.items()}
    for key, feature in {**(config.input_features or {}), **(config.output_features or {})}.items():
        kind = feature.type.value
        mode = modes.get(kind, "IDENTITY")
        if kind == "VISUAL" or (mode == "IDENTITY" and going_in is None and coming_out is None):
            continue
        is_action = key in (config.output_features or {})
        sides = [("pre-processor", going_in)] + ([("post-processor", coming_out)] if is_action else [])
        found = [_statistics_of(side, key, kind, mode, feature.shape, name, where) for name, side in sides]
        if is_action and any(not torch.equal(found[0][name], found[1][name]) for name in found[0]):
            raise PolicyError(
                f'the processors in {where} do not belong together: "{key}" is normalised by other statistics going '
                "in than coming out"
            )
    _check_relative(preprocessor, postprocessor, getattr(config, "use_relative_actions", False), where)


def _check_relative(preprocessor: Any, postprocessor: Any, expected: bool, where: str | Path) -> None:
    """Raise PolicyError unless actions are made relative going in and absolute coming out, or neither."""
    sides = (preprocessor, "relative_actions_processor"), (postprocessor, "absolute_actions_processor")
    steps = [_registered(pipeline, name) for pipeline, name in sides]
    going_in, coming_out = (step is not None and step.enabled for step in steps)
    if (going_in, coming_out) != (expected, expected):
        raise PolicyError(
            f"the processors in {where} do not belong together: use_relative_actions is {expected}, and actions are "
            f"{'' if going_in else 'not '}made relative going in, {'' if coming_out else 'not '}made absolute coming "
            "out"
        )


@dataclass(frozen=True)
class _Normalizer:
    """A normalising step: modes by kind of feature, names of its features, statistics by "column.kind"."""

    modes: Mapping[str, str]
    features: frozenset[str]
    state: Mapping[str, Tensor]

    @classmethod
    def of(cls, pipeline: Any, name: str) -> "_Normalizer | None":
        step = _registered(pipeline, name)
        if step is None:
            return None
        told = step.get_config()
        chosen = told.get("normalize_observation_keys")
        features = {
            key
            for key, feature in told["features"].items()
            if chosen is None or key in chosen or feature["type"] == "ACTION"
        }
        return cls(told["norm_map"], frozenset(features), step.state_dict())


def _statistics_of(
    step: _Normalizer | None, key: str, kind: str, mode: str, shape: Any, side: str, where: str | Path
) -> dict[str, Tensor]:
    """Return the statistics by which a pipeline normalises a column; empty where it leaves it as it is."""
    used = "IDENTITY" if step is None else step.modes.get(kind, "IDENTITY")
    if used != mode:
        without = "does not normalise" if used == "IDENTITY" else f"normalises by {used}"
        raise PolicyError(
            f'the {side} in {where} {without} "{key}", and the policy\'s config.json says {mode}: its step or its '
            "statistics were changed or lost; fetch or export the policy again"
        )
    if step is None or mode not in NEEDED:
        return {}
    names = [f"{key}.{name}" for name in NEEDED[mode]]
    if missing := [name for name in names if name not in step.state or key not in step.features]:
        raise PolicyError(
            f'the {side} in {where} has no statistics of "{key}" ({", ".join(missing)}), and would leave it in the '
            "network's units: fetch or export the policy again"
        )
    values = {name: step.state[name].detach().cpu().float() for name in names}
    for name, value in values.items():
        if value.numel() != shape[0] or not torch.isfinite(value).all():
            problem = f"{value.numel()} numbers" if value.numel() != shape[0] else "NaN or infinite numbers"
            raise PolicyError(f"the {side} in {where} has {problem} for {name}, expected {shape[0]} finite ones")
    return values
