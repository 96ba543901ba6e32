"""The official data sets of OGBench (.npz) and RoboMimic (low_dim .hdf5) as LeRobot v3 datasets."""

import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from http.client import HTTPException
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np

from poco_vla.data import Episode
from poco_vla.errors import ConfigError, DataError, UnknownNameError
from poco_vla.recording.recorder import write_dataset
from poco_vla.simulators import robosuite_gym
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
ATTEMPTS = 5
"""Connections that a download may use up; each goes on where the one before broke off."""
DOWNLOAD_BLOCK = 2**20
"""Bytes read at once."""


def _nothing(done: int) -> None:
    """Do nothing after an episode."""


def _no_bytes(done: int, total: int | None) -> None:
    """Do nothing after a block of bytes."""


def import_ogbench(
    source: Path,
    task: str,
    root: Path,
    *,
    kind: Literal["play", "noisy"] = "play",
    episodes: int | None = None,
    on_episode: Callable[[int], None] = _nothing,
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
    made = (relabelled(task, one) for one in _first(trajectories, episodes, source))
    return write_dataset(_told(made, on_episode), root, fps=FPS, repo_id=f"local/{root.name}")


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
    with _reading(path), _npz(path) as file:
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
        _check_finite(f"{path}, {name}", column)
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


def import_robomimic(
    source: Path,
    task: str,
    root: Path,
    *,
    episodes: int | None = None,
    filter_key: str | None = None,
    keys: Sequence[str] = LOW_DIM,
    on_episode: Callable[[int], None] = _nothing,
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
        made = _told(_first(demos, episodes, source), on_episode)
        return write_dataset(made, root, fps=fps, repo_id=f"local/{root.name}")


@contextmanager
def _hdf5(path: Path) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as error:
        raise ConfigError('h5py is not installed: pip install "poco-vla[robomimic]"') from error
    if not path.is_file():
        raise DataError(f"{path} is no file; expected a RoboMimic low_dim .hdf5 ({ROBOMIMIC_REPO} on the Hub)")
    with _reading(path):
        file = h5py.File(path, "r")
    with file:
        yield file


def _rate(file: Any, path: Path, task: str) -> int:
    """Control steps per second. Raises DataError when the file is of another task."""
    with _reading(path):
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
    with _reading(path):
        names = list(file["data"]) if filter_key is None else [name.decode() for name in splits[filter_key][...]]
        names.sort(key=lambda name: int(name.removeprefix("demo_")))
    if not names:
        raise DataError(f"{path} holds no demonstration")
    return names


def _demonstration(file: Any, name: str, path: Path, task: str, keys: Sequence[str]) -> Episode:
    where = f"{path}, {name}"
    with _reading(path):
        group = file["data"][name]
        found = group.get("obs", {})
    missing = [key for key in keys if key not in found]
    if missing:
        raise DataError(
            f"{where} has no observation {', '.join(missing)}; it has {', '.join(sorted(found)) or 'none'}. Take the "
            "low_dim file: the others hold pictures, or (demo_v15.hdf5) no observations."
        )
    with _reading(path):
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


def download(
    kind: str,
    name: str,
    folder: Path,
    *,
    host: str | None = None,
    on_bytes: Callable[[int, int | None], None] = _no_bytes,
) -> Path:
    """An official file on this machine, fetched when it is not there yet. Told twice, a broken download goes on.

    Args:
        kind: whose, "ogbench" or "robomimic".
        name: OGBench: the data set (:func:`ogbench_file`); RoboMimic: a key of `ROBOMIMIC_FILES`.
        folder: where it is put.
        host: another address than the official one: of the folder of OGBench's files, or of the Hub.
        on_bytes: told how many bytes are there, and of how many where that is known.

    Raises:
        DataError: it cannot be fetched.
    """
    if kind == "ogbench":
        path = folder / f"{name}.npz"
        return path if path.is_file() else _fetch(f"{host or OGBENCH_URL}/{path.name}", path, on_bytes)
    if kind == "robomimic":
        return _fetch_from_hub(name, folder, host, on_bytes)
    raise UnknownNameError("kind of official data set", kind, ("ogbench", "robomimic"))


def _fetch(url: str, path: Path, on_bytes: Callable[[int, int | None], None]) -> Path:
    """The file at `url`, under a temporary name until it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    reason = ""
    for _ in range(ATTEMPTS):
        try:
            total = _append(url, partial, on_bytes)
        except (OSError, HTTPException) as error:
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, HTTPError) and error.code == 416:  # what is here is no beginning of what is there
                partial.unlink(missing_ok=True)
            elif isinstance(error, HTTPError) and error.code < 500:
                break
        else:
            size = partial.stat().st_size
            if total in (None, size):
                return partial.rename(path)
            reason = f"the connection broke off after {size} of {total} bytes"
    raise _unreachable(url, reason)


def _append(url: str, partial: Path, on_bytes: Callable[[int, int | None], None]) -> int | None:
    """Add to `partial` what it lacks, as far as the connection lasts; the whole file's size where it is known."""
    done = partial.stat().st_size if partial.is_file() else 0
    headers = {"Range": f"bytes={done}-"} if done else {}
    with urlopen(Request(url, headers=headers), timeout=30) as response:
        if response.status != 206:  # the server sends the whole file, asked or not
            done = 0
        length = response.headers["Content-Length"]
        total = done + int(length) if length else None
        with partial.open("ab" if done else "wb") as file:
            while block := response.read(DOWNLOAD_BLOCK):
                file.write(block)
                done += len(block)
                on_bytes(done, total)
    return total


def _fetch_from_hub(name: str, folder: Path, host: str | None, on_bytes: Callable[[int, int | None], None]) -> Path:
    from huggingface_hub import hf_hub_download

    if name not in ROBOMIMIC_FILES:
        raise UnknownNameError("RoboMimic data set", name, ROBOMIMIC_FILES)
    path = ROBOMIMIC_FILES[name]
    if (folder / path).is_file():
        return folder / path
    options: dict[str, Any] = {"local_dir": folder, "endpoint": host, "tqdm_class": _hub_bar(on_bytes)}
    try:
        return Path(hf_hub_download(ROBOMIMIC_REPO, path, repo_type="dataset", **options))
    except Exception as error:  # the Hub's client, its HTTP library and the network each raise their own
        url = f"{host or 'https://huggingface.co'}/datasets/{ROBOMIMIC_REPO}/resolve/main/{path}"
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise _unreachable(url, f"{type(error).__name__}: {reason}") from error


def _hub_bar(on_bytes: Callable[[int, int | None], None]) -> type:
    """A progress bar for the Hub's client that shows nothing and tells `on_bytes`."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))
            self.done, self.size = int(options.get("initial") or 0), options.get("total")

        def update(self, n: int | float | None = 1) -> None:
            self.done += int(n or 0)
            on_bytes(self.done, self.size)

    return Bar


def _unreachable(url: str, reason: str) -> DataError:
    return DataError(f"{url} cannot be fetched ({reason}). Try again, or download it elsewhere and give --path.")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise as DataError what a damaged file makes its reader raise."""
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}: {error}): it is truncated, damaged or something else. "
            "Download it again."
        ) from None


def refuse_existing(root: Path) -> None:
    """Raise DataError when there is something in the dataset's place."""
    if root.exists():
        raise DataError(f"{root} exists already; remove it, or choose another folder")


def _first[T](found: Iterable[T], count: int | None, source: Path) -> Iterator[T]:
    """The first `count`, or all. Raises DataError when there are fewer."""
    if count is not None and count < 1:
        raise DataError(f"{count} episodes are asked for; at least 1")
    taken = 0
    for one in islice(found, count):
        taken += 1
        yield one
    if count is not None and taken < count:
        raise DataError(f"{source} holds {taken} episodes, {count} are asked for")


def _told(episodes: Iterable[Episode], on_episode: Callable[[int], None]) -> Iterator[Episode]:
    """The same episodes; whoever asks for the next one has written the one before."""
    for done, episode in enumerate(episodes, 1):
        yield episode
        on_episode(done)


def _check_finite(where: str, column: np.ndarray) -> None:
    bad = ~np.isfinite(column.reshape(len(column), -1)).all(axis=1)
    if bad.any():
        raise DataError(
            f"{where} is not finite in row {int(bad.argmax())}; {int(bad.sum())} of {len(column)} rows are affected"
        )
