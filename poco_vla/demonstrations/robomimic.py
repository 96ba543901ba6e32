"""RoboMimic's low_dim files (.hdf5) as LeRobot datasets."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from poco_vla.data import Episode
from poco_vla.demonstrations.official import no_report, reading_errors, refuse_existing, report_each, take_first
from poco_vla.errors import ConfigError, DataError
from poco_vla.recording.recorder import write_dataset
from poco_vla.simulators import robosuite_gym

ROBOMIMIC_REPO = "robomimic/robomimic_datasets"
"""Hub repository of the files (robomimic/__init__.py, `HF_REPO_ID`)."""
ROBOMIMIC_FILES = {
    **{
        f"{task}-{who}": f"v1.5/{task}/{who}/low_dim_v15.hdf5"
        for task in ("lift", "can", "square")
        for who in ("ph", "mh")
    },
    **{f"{task}-mg": f"v1.5/{task}/mg/low_dim_sparse_v15.hdf5" for task in ("lift", "can")},
    "can-paired": "v1.5/can/paired/low_dim_v15.hdf5",
}
"""Task and who showed it -> path in the repository. ph: one proficient human; mh: six of mixed skill; mg: a machine."""
LOW_DIM = (*robosuite_gym.PROPRIOCEPTION, "object")
"""RoboMimic's observations that make up the state, in this order (so, too, Q-chunking's envs/robomimic_utils.py)."""


def import_robomimic(
    source: Path,
    task: str,
    root: Path,
    *,
    episodes: int | None = None,
    filter_key: str | None = None,
    keys: Sequence[str] = LOW_DIM,
    on_episode: Callable[[int], None] = no_report,
) -> Path:
    """A RoboMimic low_dim file as a LeRobot dataset in `root`, whole or not at all.

    RoboMimic's rewards already are those of the state after the action (robomimic/scripts/dataset_states_to_obs.py:
    "our tasks use reward r(s'), reward AFTER transition") and are kept: 0 or 1, success = terminal = reward > 0.
    Demonstrations that go on after success are kept to their end, and each further step that is a success ends by
    itself. So do the released codes of Q-chunking (ColinQiyangLi/qc) and POCO (DRL-CASIA/poco_test), both in
    envs/robomimic_utils.py: every row, mask = 1 - done, and RoboMimic's files say done wherever s' is a success. They
    also say so at the end of a demonstration that failed; here, as in every dataset, that is a time limit.

    Args:
        source: the .hdf5.
        task: "Lift", "Can" or "Square", or the same in lower case.
        episodes: how many demonstrations, by number from the first; None takes all. POCO's released run on Can uses
            30 of can-mh.
        filter_key: one of the file's own splits, e.g. "train" or "20_percent".
        keys: observations that make up the state, in this order.
        on_episode: told after each written episode.

    Raises:
        ConfigError: h5py is not installed.
        DataError: a damaged file, another task's, without these observations, with shaped rewards, numbers that are not
            finite; no such filter key; fewer than `episodes` demonstrations; `root` exists.
    """
    refuse_existing(root)
    name = robosuite_gym.checked_task(task)
    with _hdf5(source) as file:
        fps = _rate(file, source, name)
        demos = (_demonstration(file, demo, source, name, keys) for demo in _demos(file, source, filter_key))
        made = report_each(take_first(demos, episodes, source), on_episode)
        return write_dataset(made, root, fps=fps, repo_id=f"local/{root.name}")


@contextmanager
def _hdf5(path: Path) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as error:
        raise ConfigError('h5py is not installed: pip install "poco-vla[robomimic]"') from error
    if not path.is_file():
        raise DataError(f"{path} is no file; expected a RoboMimic low_dim .hdf5 ({ROBOMIMIC_REPO} on the Hub)")
    with reading_errors(path):
        file = h5py.File(path, "r")
    with file:
        yield file


def _rate(file: Any, path: Path, task: str) -> int:
    """Control steps per second. Raises DataError when the file is of another task."""
    with reading_errors(path):
        about = json.loads(file["data"].attrs["env_args"]) if "env_args" in file.get("data", file).attrs else {}
    wanted, found = robosuite_gym.TASKS[task].simulator, about.get("env_name")
    if found != wanted:
        raise DataError(f"{path} was recorded in {found or 'no environment that it names'}; {task} is {wanted}")
    return int(about.get("env_kwargs", {}).get("control_freq", robosuite_gym.FPS))


def _demos(file: Any, path: Path, filter_key: str | None) -> list[str]:
    """Names of the demonstrations, or of those of one split, by number."""
    splits = file.get("mask", {})
    if filter_key is not None and filter_key not in splits:
        raise DataError(f'{path} has no filter key "{filter_key}"; its keys: {", ".join(sorted(splits)) or "none"}')
    with reading_errors(path):
        names = list(file["data"]) if filter_key is None else [name.decode() for name in splits[filter_key][...]]
        names.sort(key=lambda name: int(name.removeprefix("demo_")))
    if not names:
        raise DataError(f"{path} holds no demonstration")
    return names


def _demonstration(file: Any, name: str, path: Path, task: str, keys: Sequence[str]) -> Episode:
    where = f"{path}, {name}"
    with reading_errors(path):
        group = file["data"][name]
        found = group.get("obs", {})
    missing = [key for key in keys if key not in found]
    if missing:
        raise DataError(
            f"{where} has no observation {', '.join(missing)}; it has {', '.join(sorted(found)) or 'none'}. Take the "
            "low_dim file: the others hold pictures, or (demo_v15.hdf5) no observations."
        )
    with reading_errors(path):
        columns = {key: found[key][...] for key in keys}
        action, reward = group["actions"][...], group["rewards"][...]
    _check_demonstration(where, task, columns | {"actions": action, "rewards": reward})
    state = np.concatenate(list(columns.values()), axis=1).astype(np.float32)
    success = reward > 0
    episode = Episode(
        obs={"observation.state": state},
        action=action.astype(np.float32),
        reward=reward.astype(np.float32),
        success=success,
        terminal=success.copy(),
        task=robosuite_gym.TASKS[task].sentence,
    )
    episode.check(where)
    return episode


def _check_demonstration(where: str, task: str, columns: Mapping[str, np.ndarray]) -> None:
    """Raise DataError when the columns do not fit each other, or the task."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1 or not lengths["actions"]:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"{where}: the columns' lengths do not fit ({listed}); the file is damaged")
    widths = {"actions": robosuite_gym.ACTION_DIM, "object": robosuite_gym.TASKS[task].object_dim}
    for name, width in widths.items():
        shape = columns[name].shape[1:] if name in columns else (width,)
        if shape != (width,):
            raise DataError(f'{where}: "{name}" has {list(shape)} numbers per step, {task} has [{width}]')
    odd = set(np.unique(columns["rewards"]).tolist()) - {0.0, 1.0}
    if odd:
        raise DataError(
            f"{where}: the rewards are not only 0 and 1 but also {min(odd):g}; of a shaped reward success cannot be "
            "told. Take the low_dim_sparse file."
        )
