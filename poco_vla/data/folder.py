"""Checks of a LeRobot dataset's folder, made before anything of it is read: one sentence says what is missing.

A folder that was given is never completed from the Hub, and nothing that its files name lies outside it.
"""

import json
import posixpath
import re
import shlex
import string
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from poco_vla.data.rename import name_in_files
from poco_vla.errors import ConfigError, DataError

INFO = "meta/info.json"
TASKS = "meta/tasks.parquet"
PLACES = {"chunk_index", "file_index", "video_key"}
"""Fields of a dataset's path templates."""
LISTED = 5
"""Most names that a message lists."""


def read_info(root: Path) -> Any:
    """Return LeRobot's description of a dataset, from its meta/info.json.

    Raises:
        DataError: it is not there, not readable, of another version of the format, or names files outside the folder.
    """
    from lerobot.datasets.utils import DatasetInfo

    values = _read_json(root)
    _check_version(root, values)
    try:
        info = DatasetInfo.from_dict(values)
        dtypes = {key: str(feature["dtype"]) for key, feature in info.features.items()}
        _ = [int(size) for feature in info.features.values() for size in feature["shape"]]
        _ = [int(number) for number in (info.total_episodes, info.total_frames, info.total_tasks)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(root, f"it does not describe a LeRobot dataset ({type(error).__name__}: {error})") from None
    data_path(root, info, chunk_index=0, file_index=0)
    for key, dtype in dtypes.items():
        if dtype == "video":
            video_path(root, info, key, chunk_index=0, file_index=0)
    return info


def data_path(root: Path, info: Any, *, chunk_index: int, file_index: int) -> Path:
    """Return the file of a dataset's rows at a place, inside its folder. Raises DataError for any other."""
    return _inside(root, info.data_path, "data_path", {"chunk_index": chunk_index, "file_index": file_index})


def video_path(root: Path, info: Any, key: str, *, chunk_index: int, file_index: int) -> Path:
    """Return the file of a camera's video at a place, inside its folder. Raises DataError for any other."""
    place = {"chunk_index": chunk_index, "file_index": file_index, "video_key": key}
    return _inside(root, info.video_path, "video_path", place)


def _inside(root: Path, template: Any, name: str, place: Mapping[str, Any]) -> Path:
    try:
        pieces = list(string.Formatter().parse(template))
        allowed = all(
            field is None
            or (field in PLACES and not conversion and spec in ("", "03d", "06d", "d", "02d", "04d", "05d"))
            for _, field, spec, conversion in pieces
        )
        path = template.format(**place) if allowed else ""
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{root / INFO}: {name} {template!r} is no path of a dataset's files") from error
    clean = PurePosixPath(posixpath.normpath(path.replace("\\", "/")))
    if not path or clean.is_absolute() or ".." in PurePosixPath(path.replace("\\", "/")).parts or clean.suffix == "":
        raise DataError(
            f"{root / INFO}: {name} {template!r} names files outside the dataset's folder, or none at all; nothing "
            "outside is read or written. Take LeRobot's own paths, or do not use this dataset."
        )
    return root / clean


def check_folder(root: Path) -> Any:
    """Check that a dataset's metadata and rows are in its folder, and return LeRobot's description of it.

    Raises:
        DataError: something is missing; the message says what.
    """
    if not (root / INFO).is_file():
        raise DataError(
            f"no LeRobot v3 dataset in {root}: meta/info.json is missing. Give dataset.root the folder that "
            "holds meta/ and data/, or leave it out and give dataset.repo_id a Hub id."
        )
    info = read_info(root)
    if info.total_episodes == 0:
        raise DataError(f"the dataset {root} holds no episode: record some, or give another folder")
    if not (root / TASKS).is_file():
        raise _missing(root, f"{TASKS} is missing, which maps each task_index to its instruction")
    for tree in ("meta/episodes", "data"):
        if not any((root / tree).glob("*/*.parquet")):
            raise _missing(root, f"{tree}/ has no parquet file, though meta/info.json counts {info.total_frames} rows")
    return info


def check_episodes(episodes: Sequence[int] | None, total: int, name: str) -> None:
    """Check that a choice of episodes is one of a dataset that holds `total` of them. Raises ConfigError."""
    if episodes is None:
        return
    holds = f"{name} holds {total} episodes, 0 to {total - 1}"
    if not episodes:
        raise ConfigError(f"dataset.episodes is empty: {holds}. Name some, or leave it out to use all.")
    outside = [number for number in episodes if not 0 <= number < total]
    if outside:
        listed = ", ".join(f"episode {number}" for number in outside[:LISTED])
        raise ConfigError(f"dataset.episodes names {listed}{_more(outside)}, but {holds}")
    twice = sorted(number for number, times in Counter(episodes).items() if times > 1)
    if twice:
        listed = ", ".join(f"episode {number}" for number in twice[:LISTED])
        raise ConfigError(f"dataset.episodes names {listed}{_more(twice)} more than once: name each once")


def check_rows(dataset: Any, name: str) -> None:
    """Check that every episode in use of an open dataset has the rows that its metadata promise.

    Raises:
        DataError: rows are missing, or lie in another order than the steps of an episode.
    """
    meta = dataset.meta
    used = range(meta.total_episodes) if dataset.episodes is None else dataset.episodes
    found: Collection[int] = set(dataset.hf_dataset.unique("episode_index"))
    missing = [number for number in used if number not in found]
    if not missing:
        return
    files = dict.fromkeys(_rows_file(dataset, number) for number in missing)
    gone = [str(file) for file in files if file is not None and not (dataset.root / file).is_file()]
    where = f"{', '.join(gone[:LISTED])}{_more(gone)} is missing" if gone else "its files in data/ do not hold them"
    raise DataError(
        f"{name} has no rows of episode {', '.join(map(str, missing[:LISTED]))}{_more(missing)}: {where}. Put the "
        "files back (a folder that was given is not completed from the Hub), or name the other episodes in "
        "dataset.episodes."
    )


def is_table(path: Path) -> bool:
    """True if a file is there and can be read as a parquet table."""
    from pyarrow.parquet import read_schema

    try:
        read_schema(path)
    except (OSError, ValueError):  # Arrow's own derive from these
        return False
    return True


def damaged_tables(root: Path) -> list[Path]:
    """Return the tables of a dataset that cannot be read."""
    files = [
        root / TASKS,
        *sorted((root / "meta/episodes").glob("*/*.parquet")),
        *sorted((root / "data").glob("*/*.parquet")),
    ]
    return [path for path in files if path.is_file() and not is_table(path)]


def missing_videos(dataset: Any, keys: Iterable[str]) -> list[tuple[int, str, Path]]:
    """Return episode, camera and file of each video that an open dataset lacks among these cameras'."""
    used = range(dataset.meta.total_episodes) if dataset.episodes is None else dataset.episodes
    gone, known = [], {}
    for key in keys:
        for number, path in zip(used, video_files(dataset, used, key), strict=True):
            if path not in known:
                known[path] = path.is_file()
            if not known[path]:
                gone.append((number, key, path))
    return gone


def check_videos(dataset: Any, keys: Sequence[str], name: str) -> None:
    """Check that the videos of these cameras are there. Raises DataError, with episode, camera and file."""
    gone = missing_videos(dataset, keys)
    if not gone:
        return
    number, key, path = gone[0]
    episodes = sorted({number for number, _, _ in gone})
    used = range(dataset.meta.total_episodes) if dataset.episodes is None else dataset.episodes
    whole = len(episodes) == len(used)
    others = (
        "Download or copy them"
        if whole
        else f"Episodes {', '.join(map(str, episodes[:LISTED]))}{_more(episodes)} lack videos: put the files there, or "
        "name the other episodes in dataset.episodes"
    )
    raise DataError(
        f'{name}, episode {number}: the video of camera "{key}" is missing ({path}); {len(episodes)} of {len(used)} '
        f"episodes lack one. {others}; cameras that are not needed can be left out with dataset.cameras."
    )


def video_file(dataset: Any, number: int, key: str) -> Path:
    """Return the video file of an episode's camera. Raises DataError where the metadata do not say it."""
    return video_files(dataset, [number], key)[0]


def video_files(dataset: Any, numbers: Sequence[int], key: str) -> list[Path]:
    """Return a camera's video file for each of these episodes. Raises DataError where the metadata do not say it."""
    key = name_in_files(dataset.meta, key)
    names = [f"videos/{key}/chunk_index", f"videos/{key}/file_index"]
    try:
        # Whole rows hold every column's statistics: reading them takes milliseconds each.
        rows = dataset.meta.episodes.select_columns(names).select(numbers)[:]
        places = [(int(chunk), int(file)) for chunk, file in zip(*(rows[name] for name in names), strict=True)]
    except (LookupError, TypeError, ValueError) as error:
        episodes = f"episode {numbers[0]}" if len(numbers) == 1 else f"episodes {numbers[0]} to {numbers[-1]}"
        raise DataError(
            f'{dataset.root}: meta/episodes does not say where the videos of camera "{key}" of {episodes} are: leave '
            "the camera out with dataset.cameras, or repair the dataset"
        ) from error
    return [
        video_path(dataset.root, dataset.meta.info, key, chunk_index=chunk, file_index=file) for chunk, file in places
    ]


def _rows_file(dataset: Any, number: int) -> Path | None:
    try:
        row = dataset.meta.episodes[number]
        chunk, file = int(row["data/chunk_index"]), int(row["data/file_index"])
    except (IndexError, KeyError, TypeError, ValueError):
        return None
    return data_path(dataset.root, dataset.meta.info, chunk_index=chunk, file_index=file).relative_to(dataset.root)


def _read_json(root: Path) -> dict[str, Any]:
    data = (root / INFO).read_bytes()
    if not data.strip(b"\0 \t\r\n"):
        raise _unreadable(root, f"it is {'empty' if not data else 'all zeros, as a power loss leaves files'}")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _unreadable(root, f"it is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise _unreadable(root, f"it holds a {type(values).__name__} instead of named values")
    return values


def _check_version(root: Path, values: Mapping[str, Any]) -> None:
    from lerobot.datasets.dataset_metadata import CODEBASE_VERSION

    said = values.get("codebase_version")
    found = re.fullmatch(r"v?(\d{1,6})(\.\d{1,6})*", str(said))
    if found is None:
        raise _unreadable(root, f"codebase_version is {said!r}")
    major, ours = int(found[1]), int(CODEBASE_VERSION.removeprefix("v").split(".")[0])
    if major < ours:
        raise DataError(f"the dataset {root} cannot be opened: {old_format(str(said), root.name, root)}")
    if major > ours:
        raise DataError(
            f"the dataset {root} cannot be opened: it is of LeRobot's format {said}, the installed LeRobot reads "
            f"{CODEBASE_VERSION}. Install a newer LeRobot, or give a dataset of {CODEBASE_VERSION}."
        )


def old_format(version: str, name: str, root: Path | None) -> str:
    """Return the message for a dataset of an older format, with LeRobot's conversion command."""
    where = "" if root is None else f" --root={shlex.quote(str(root.resolve()))} --push-to-hub=false"
    first = "" if version.startswith("v2.1") else " after LeRobot's older scripts have made v2.1 of it"
    return (
        f"it is of LeRobot's format {version}, v3.0 is needed. Convert it{first}: "
        f"python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id={name}{where}"
    )


def _unreadable(root: Path, why: str) -> DataError:
    return DataError(
        f"the dataset {root} cannot be opened: {INFO} cannot be used, {why}. Put it back from a copy or from where the "
        "dataset came from."
    )


def _missing(root: Path, what: str) -> DataError:
    return DataError(
        f"the dataset {root} cannot be opened: {what}. Put it back from a copy or from where the dataset came from; a "
        "folder that was given is not completed from the Hub."
    )


def _more(names: Collection[Any]) -> str:
    return f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
