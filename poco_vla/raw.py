"""Raw observations, as robots and environments give them: in LeRobot's form, and told from processed ones."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from poco_vla.errors import DataError, PolicyError

HOW = "give policy.act(observation, task), or policy.encode(policy.preprocess(observation))"
PICTURE_AXES = 3
VECTORS = ("observation.state", "observation.environment_state")
"""Observations that have a batch axis and one of numbers; an adapter's own may have fewer."""
BRIGHTEST = 1.01
"""Largest value of float pictures."""


def raw_batch(observation: Mapping[str, Any], keys: Sequence[str], task: str | Sequence[str] | None) -> dict[str, Any]:
    """Return B raw observations as pre-processors take them: float32, pictures [B, 3, height, width] in [0, 1].

    Args:
        observation: arrays or tensors by LeRobot's names, of one state or of B; pictures of either axis order, uint8 or
            in [0, 1].
        keys: the observations that the policy reads.
        task: the instruction of all states, or of each; None takes the observation's own "task".

    Raises:
        DataError: an observation is missing, or there are more or fewer instructions than states.
    """
    if missing := [key for key in keys if key not in observation]:
        raise DataError(f"the observation lacks {', '.join(missing)}; it holds {', '.join(sorted(observation))}")
    batch: dict[str, Any] = {key: _numbers(key, observation[key]) for key in keys}
    size = len(next(iter(batch.values())))
    told = observation.get("task", "") if task is None else task
    tasks = [told] * size if isinstance(told, str) else list(told)
    if len(tasks) != size or any(len(column) != size for column in batch.values()):
        sizes = ", ".join(f"{key} {len(column)}" for key, column in batch.items())
        raise DataError(f"the observation holds different numbers of states: {sizes}, {len(tasks)} instructions")
    return batch | {"task": tasks}


def refuse_raw(obs: Mapping[str, Any], needed: Sequence[str] = ()) -> None:
    """Raise PolicyError for observations that were not processed: arrays, bytes, no batch axis, no tokens.

    Args:
        obs: what `encode` is given.
        needed: keys that processed observations have.
    """
    columns = {key: value for key, value in obs.items() if key.startswith("observation.")}
    if missing := [key for key in needed if key not in obs]:
        _refuse(f"it lacks {', '.join(missing)}")
    for key, value in columns.items():
        if not isinstance(value, Tensor):
            if value is not None:
                _refuse(f'"{key}" is a {type(value).__name__}, no tensor')
        elif value.dtype == torch.uint8:
            _refuse(f'"{key}" holds bytes')
        elif value.ndim < 2 and key in VECTORS:
            _refuse(f'"{key}" has no batch axis')


def _refuse(why: str) -> None:
    raise PolicyError(f"encode takes what preprocess gives, and this is a raw observation ({why}): {HOW}")


def _numbers(key: str, value: Any) -> Tensor:
    """Return a column [B, ...] of float32; pictures with their channels first, in [0, 1]."""
    try:
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f'"{key}" holds no numbers: {error}') from error
    picture = tensor.ndim >= PICTURE_AXES
    tensor = tensor[None] if tensor.ndim in (1, PICTURE_AXES) else tensor
    if not picture:
        return tensor.float()
    if tensor.shape[1] != 3 and tensor.shape[-1] == 3:
        tensor = tensor.permute(0, 3, 1, 2)
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    if tensor.numel() and tensor.max() > BRIGHTEST:
        raise DataError(f'"{key}" reaches {tensor.max():.3g}; pictures are uint8, or numbers in [0, 1]')
    return tensor.float()
