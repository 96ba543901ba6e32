"""OGBench's official data sets (.npz) as LeRobot datasets."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from poco_vla.demonstrations.official import (
    check_finite,
    no_report,
    reading_errors,
    refuse_existing,
    report_each,
    take_first,
)
from poco_vla.errors import DataError
from poco_vla.recording.recorder import write_dataset
from poco_vla.simulators.ogbench_play import Trajectory, relabelled, task_simulator
from poco_vla.simulators.ogbench_tasks import FPS

OGBENCH_URL = "https://rail.eecs.berkeley.edu/datasets/ogbench"
"""Folder of the files (ogbench/utils.py, `DATASET_URL`)."""
OGBENCH_WIDTHS = {
    **{f"cube-{name}": (19 + 9 * n, 14 + 7 * n) for name, n in (("single", 1), ("double", 2), ("triple", 3))},
    **{f"cube-{name}": (19 + 9 * n, 14 + 7 * n) for name, n in (("quadruple", 4), ("octuple", 8))},
    "scene": (40, 25),
    **{f"puzzle-{name}": (19 + 4 * n, 14 + n) for name, n in (("3x3", 9), ("4x4", 16), ("4x5", 20), ("4x6", 24))},
}
"""Environment -> width of its state and of its qpos: it tells which environment a file is of."""


def import_ogbench(
    source: Path,
    task: str,
    root: Path,
    *,
    kind: Literal["play", "noisy"] = "play",
    episodes: int | None = None,
    on_episode: Callable[[int], None] = no_report,
) -> Path:
    """An official OGBench data set with the rewards of one task, as a LeRobot dataset in `root`, whole or not at all.

    In memory are one trajectory and what is needed of one file (0.3 GB per million steps).

    Args:
        source: the .npz; or a folder with the task's :func:`ogbench_file` in it, or else with the parts of one data
            set (the 100M sets have many), in the order of their names. Files for validation (-val.npz) are left out.
        task: OGBench id of a single task, as in :func:`relabelled`.
        kind: which of the task's sets to look for in a folder.
        episodes: how many trajectories, from the first; None takes all.
        on_episode: told after each written episode.

    Raises:
        DataError: nothing there, a damaged file, arrays that are missing, do not fit together, are of another
            environment or not finite; fewer than `episodes` trajectories; `root` exists.
    """
    refuse_existing(root)
    trajectories = chain.from_iterable(_trajectories(path, task) for path in _npz_files(source, task, kind))
    made = (relabelled(task, one) for one in take_first(trajectories, episodes, source))
    return write_dataset(report_each(made, on_episode), root, fps=FPS, repo_id=f"local/{root.name}")


def ogbench_file(task: str, kind: Literal["play", "noisy"] = "play") -> str:
    """Name of a task's official data set: "cube-double-singletask-task2-v0" -> "cube-double-play-v0"."""
    return f"{task.split('-singletask')[0]}-{kind}-v0"


def _npz_files(source: Path, task: str, kind: Literal["play", "noisy"]) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(
            f"{source} does not exist; expected {ogbench_file(task, kind)}.npz (from {OGBENCH_URL}) or its folder"
        )
    official = source / f"{ogbench_file(task, kind)}.npz"
    if official.is_file():
        return [official]
    others = {ogbench_file(task, "play"), ogbench_file(task, "noisy")}
    files = sorted(p for p in source.glob("*.npz") if not p.stem.endswith("-val") and p.stem not in others)
    if not files:
        raise DataError(f"{source} holds no .npz; expected {ogbench_file(task, kind)}.npz (from {OGBENCH_URL})")
    return files


def _trajectories(path: Path, task: str) -> Iterator[Trajectory]:
    """The trajectories of one file. `terminals` marks the last row of each; rows after the last mark are one more."""
    columns = _columns(path, task)
    last = columns.pop("terminals").astype(bool)
    if not last.any():
        raise DataError(f"{path}: terminals marks no row of {len(last)}; it must mark the last one of each trajectory")
    last[-1] = True
    for begin, end in pairwise([0, *(np.flatnonzero(last) + 1)]):
        yield Trajectory(**{name: column[begin:end] for name, column in columns.items()})


def _columns(path: Path, task: str) -> dict[str, np.ndarray]:
    """The arrays that relabelling needs, checked."""
    widths = _widths(task)
    with reading_errors(path), _npz(path) as file:
        names = list(file.files)
        columns = {name: file[name] for name in (*widths, "terminals") if name in names}
    _check_widths(path, task, columns, widths)
    missing = [name for name in (*widths, "terminals") if name not in columns]
    if missing:
        why = " Without the simulator's qpos no task's reward can be computed." if "qpos" in missing else ""
        raise DataError(f"{path} holds no {', '.join(missing)}. Its arrays: {', '.join(names) or 'none'}.{why}")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"{path}: the arrays differ in length ({listed}); the file is damaged")
    for name, column in columns.items():
        check_finite(f"{path}, {name}", column)
    return columns


def _npz(path: Path) -> Any:
    file = np.load(path, allow_pickle=False)
    if isinstance(file, np.ndarray):
        raise ValueError("it holds a single array and is no .npz")  # noqa: TRY004 (a damaged file to the caller)
    return file


@cache
def _widths(task: str) -> Mapping[str, int]:
    """Numbers per row of each array that relabelling needs."""
    simulator = task_simulator(task)
    widths = {"observations": simulator.observation_space.shape[0], "actions": simulator.action_space.shape[0]}
    widths["qpos"] = simulator.model.nq
    if hasattr(simulator, "_cur_button_states"):  # so does OGBench tell (data_gen_scripts/generate_manipspace.py)
        widths["button_states"] = len(simulator._cur_button_states)
    return widths


def _check_widths(path: Path, task: str, columns: Mapping[str, np.ndarray], widths: Mapping[str, int]) -> None:
    found = {name: columns[name].shape[1:] for name in widths if name in columns}
    wrong = [name for name, shape in found.items() if shape != (widths[name],)]
    if not wrong:
        return
    shapes = ", ".join(f"{name} {list(found[name])} instead of [{widths[name]}]" for name in wrong)
    fits = [
        family
        for family, (state, qpos) in OGBENCH_WIDTHS.items()
        if found.get("observations") == (state,) and found.get("qpos", (qpos,)) == (qpos,)
    ]
    guess = f"OGBench's {' or '.join(fits)} has these" if fits else "No state-based OGBench manipulation task has these"
    raise DataError(f"{path} is not of {task}: per row it holds {shapes}. {guess}.")
