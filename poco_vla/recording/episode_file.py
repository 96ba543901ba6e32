"""One episode as a safetensors file: what waits on a robot's disk, and what is set aside."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from poco_vla.data.episode import Episode
from poco_vla.errors import DataError

_OBS = "obs/"
_COLUMNS = ("action", "reward", "success", "terminal")
_NOTED = ("policy_version", "interventions")


def encoded(episode: Episode) -> bytes:
    """Return an episode as the bytes of a safetensors file."""
    columns = {f"{_OBS}{key}": value for key, value in episode.obs.items()}
    columns |= {name: getattr(episode, name) for name in _COLUMNS}
    columns |= {name: value for name in _NOTED if (value := getattr(episode, name)) is not None}
    facts: dict[str, Any] = {"task": episode.task, "seed": episode.seed}
    facts |= {"step_tasks": episode.step_tasks} if episode.step_tasks is not None else {}
    metadata = {"episode": json.dumps(facts)}
    return save({name: np.ascontiguousarray(column) for name, column in columns.items()}, metadata)


def decoded(path: Path) -> Episode:
    """Read the episode of a file.

    Raises:
        DataError: it is no episode, or a torn one.
        SafetensorError, OSError: it cannot be read at all.
    """
    with safe_open(path, "np") as file:
        columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        said = (file.metadata() or {}).get("episode")
    missing = [name for name in _COLUMNS if name not in columns]
    if said is None or missing or len({len(column) for column in columns.values()}) != 1:
        raise DataError(f"{path} is no episode: {missing or 'its columns'} are missing or of unlike length")
    try:
        notes = json.loads(said)
        task, seed, steps = notes["task"], notes["seed"], notes.get("step_tasks")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not say its task: {error!r}") from error
    obs = {name.removeprefix(_OBS): column for name, column in columns.items() if name.startswith(_OBS)}
    noted = {name: columns[name] for name in _NOTED if name in columns}
    episode = Episode(
        obs,
        **{name: columns[name] for name in _COLUMNS},
        **noted,
        task=task,
        seed=seed,
        step_tasks=steps and tuple(steps),
    )
    episode.check(str(path))
    return episode
