"""A folder that holds one LeRobot v3 dataset, takes one episode at a time, and can be opened at any moment.

Each episode has files of its own: the i-th is at chunk i // 1000, file i % 1000 of data/, of meta/episodes/ and of
every camera. meta/info.json says how many count; it is replaced last, in one step.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from poco_vla.data.folder import TASKS, is_table, read_info
from poco_vla.errors import DataError
from poco_vla.files import sync

KEY = "poco/key"
"""Column of the episodes' metadata: the id by which a sender knows an episode, "" where there is none."""
INFO = "meta/info.json"
FIRST = "meta/info.first.json"
"""Copy of the description after the first episode: what a lost one is made from again, but for its counts."""
EPISODE_FILES = ("data/chunk-*/*.parquet", "meta/episodes/chunk-*/*.parquet", "videos/*/chunk-*/*.mp4")
"""Where files of single episodes lie."""


class GrowingDataset:
    """What is on disk, and the steps in which it changes. One process writes; others may read at any time.

    Attributes:
        info: LeRobot's meta/info.json, None while there is no episode.
        tasks: LeRobot's table of tasks.
        stats: LeRobot's statistics of all episodes.
        ends: per episode, the frames up to its end.
        keys: key of an episode that has one -> its index.
    """

    def __init__(self, root: Path, tell: Callable[[str], None]) -> None:
        """Find what is there, and put in order what a crash left.

        Raises:
            DataError: the folder holds something else, or files are missing.
        """
        self.root = root
        self._tell = tell
        self._stages = count()
        self._forget()
        self._clean_stages()
        if root.exists() and any(root.iterdir()):
            self._open()

    def _forget(self) -> None:
        self.info: Any = None
        self.tasks: Any = None
        self.stats: Any = None
        self.ends: list[int] = []
        self.keys: dict[str, int] = {}

    @contextmanager
    def stage(self) -> Iterator[Path]:
        """Name of a hidden folder beside the dataset; what is left of it goes away at the end."""
        self.root.parent.mkdir(parents=True, exist_ok=True)
        self._clean_stages()
        try:
            yield self.root.with_name(f"{self._stage_prefix}{next(self._stages)}")
        finally:
            self._clean_stages()

    @property
    def _stage_prefix(self) -> str:
        return f".{self.root.name}.stage."

    def _clean_stages(self) -> None:
        if self.root.parent.is_dir():
            for folder in self.root.parent.iterdir():
                if folder.name.startswith(self._stage_prefix):
                    shutil.rmtree(folder, ignore_errors=True)

    def place(self, meta: Any) -> None:
        """Make LeRobot's empty metadata those of a recording that goes on after the last episode here: its own writer
        then gives the next one its place."""
        if self.info is None:
            return
        last = len(self.ends) - 1
        meta.info, meta.tasks, meta.stats = deepcopy(self.info), self.tasks.copy(), self.stats
        trees = ["data", "meta/episodes", *(f"videos/{key}" for key in meta.video_keys)]
        chunk, file = divmod(last, self.info.chunks_size)
        places = {f"{tree}/chunk_index": chunk for tree in trees} | {f"{tree}/file_index": file for tree in trees}
        meta.episodes = [places | {"dataset_to_index": self.ends[-1]}]

    def commit(self, stage: Path, meta: Any, key: str) -> None:
        """Move one staged episode in. Before the last step the dataset is what it was, after it the episode is there.

        Args:
            stage: folder that LeRobot's writer filled after :meth:`place`.
            meta: LeRobot's metadata after it.
            key: of the episode, as in its metadata.
        """
        shutil.rmtree(stage / "images", ignore_errors=True)  # empty folders of pictures that are in the table
        files = [path for path in stage.rglob("*") if path.is_file()]
        for path in files:
            sync(path)
        if self.info is None:
            shutil.copyfile(stage / INFO, stage / FIRST)
            sync(stage / FIRST)
            # An empty folder may be there; nothing else may.
            stage.rename(self.root)
            sync(self.root.parent)
        else:
            self._move_in(stage, files)
        self.info, self.tasks, self.stats = meta.info, meta.tasks, meta.stats
        if key:
            self.keys[key] = len(self.ends)
        self.ends.append(meta.info.total_frames)

    def _move_in(self, stage: Path, files: Iterable[Path]) -> None:
        """Readers go by meta/info.json: it comes last."""
        names = sorted((path.relative_to(stage).as_posix() for path in files), key=lambda name: name == INFO)
        *others, info = names
        for name in others:
            self._put(stage / name, name)
        for folder in {(self.root / name).parent for name in others}:
            sync(folder)
        self._put(stage / info, info)
        sync(self.root / "meta")

    def _put(self, path: Path, name: str) -> None:
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)

    def cut(self, length: int, why: str) -> None:
        """Keep the first `length` episodes; the others go to the set-aside folder, and `why` is shown.

        Can be called again when it fails half-way.
        """
        if length == 0:
            if self.root.exists():
                place = self._aside()
                self.root.rename(place / self.root.name)
                self._tell(f"{why}: moved to {place}")
            self._forget()
            return
        self.info.total_episodes, self.info.total_frames = length, self.ends[length - 1]
        self.info.splits = {"train": f"0:{length}"}
        self._rewrite("info.json", self.info.to_dict())
        self._set_aside(self._beyond(length), why)
        self._sum_up(length)
        self.ends = self.ends[:length]
        self.keys = {key: index for key, index in self.keys.items() if index < length}

    def _rewrite(self, name: str, values: Any) -> None:
        with self.stage() as stage:
            stage.mkdir()
            (stage / name).write_text(json.dumps(values, indent=4))
            sync(stage / name)
            self._put(stage / name, f"meta/{name}")

    def _sum_up(self, length: int) -> None:
        """The statistics of the first `length` episodes, from their own."""
        from lerobot.datasets.compute_stats import aggregate_stats
        from lerobot.datasets.utils import serialize_dict

        self.stats = aggregate_stats([_read_stats(self._metadata(i)) for i in range(length)])
        self._rewrite("stats.json", serialize_dict(self.stats))

    def _metadata(self, index: int) -> Path:
        chunk, file = divmod(index, self.info.chunks_size)
        return self.root / f"meta/episodes/chunk-{chunk:03d}/file-{file:03d}.parquet"

    def _files(self) -> Iterator[tuple[int, Path]]:
        """Every file of an episode and that episode's index."""
        for pattern in EPISODE_FILES:
            for path in self.root.glob(pattern):
                if found := re.fullmatch(r".*/chunk-(\d+)/file-(\d+)\.\w+", path.as_posix()):
                    yield int(found[1]) * self.info.chunks_size + int(found[2]), path

    def _beyond(self, length: int) -> list[Path]:
        return [path for index, path in self._files() if index >= length]

    def _set_aside(self, paths: list[Path], why: str) -> None:
        if not paths:
            return
        place = self._aside()
        for path in paths:
            target = place / path.relative_to(self.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        self._tell(f"{why}: moved to {place}")

    def _aside(self) -> Path:
        """A new, empty folder beside the dataset."""
        place = self.root.with_name(f"{self.root.name}.set_aside")
        taken = [int(folder.name) for folder in place.glob("*") if folder.name.isdigit()]
        found = place / f"{max(taken, default=-1) + 1:03d}"
        found.mkdir(parents=True)
        return found

    def _open(self) -> None:
        from lerobot.datasets.io_utils import load_tasks

        if not (self.root / INFO).is_file():
            raise DataError(
                f"{self.root} holds something else than recorded episodes (no meta/info.json). Move it away, or give "
                "another output_dir."
            )
        self.info = self._read_info()
        self._refuse_other_paths()
        length = self.info.total_episodes
        self._refuse_gaps(length)
        self._set_aside(self._beyond(length), f"{self.root}: files of an episode that was not written to its end")
        self._read_metadata(length)
        if not is_table(self.root / TASKS):
            self._restore_tasks(length)
        self.tasks = load_tasks(self.root).iloc[: self.info.total_tasks]
        # A crash between the last two steps leaves statistics that know one episode more.
        self.stats = self._read_stats()
        if self.stats is None or int(self.stats["index"]["count"][0]) != self.info.total_frames:
            self._sum_up(length)

    def _read_info(self) -> Any:
        """LeRobot's description; one that cannot be read is made again from the first one and the files."""
        from lerobot.datasets.utils import DatasetInfo

        try:
            return read_info(self.root)
        except DataError as error:
            if not (self.root / FIRST).is_file():
                raise
            try:
                self.info = info = DatasetInfo.from_dict(json.loads((self.root / FIRST).read_bytes()))
            except (ValueError, KeyError, TypeError):
                raise error from None
        files = {index for index, path in self._files() if path.is_relative_to(self.root / "meta")}
        length = next(i for i in count() if i not in files)
        info.total_episodes = length
        info.splits = {"train": f"0:{length}"}
        info.total_frames = self._read_row(self._metadata(length - 1))["dataset_to_index"] if length else 0
        tasks = [task for i in range(length) for task in self._read_row(self._metadata(i))["tasks"]]
        info.total_tasks = len(set(tasks))
        self._rewrite("info.json", info.to_dict())
        self._tell(f"{self.root / INFO} could not be read; it was made again for the {length} episodes that are there")
        return read_info(self.root)

    def _read_stats(self) -> Any:
        from lerobot.datasets.io_utils import load_stats

        try:
            stats = load_stats(self.root)
            return stats if stats is not None and "count" in stats["index"] else None
        except (ValueError, KeyError, TypeError):  # torn: they are those of the episodes, summed up again
            return None

    def _restore_tasks(self, length: int) -> None:
        """Write the lost table of instructions again, from each episode's own and the numbers that its rows have."""
        found: dict[int, str] = {}
        for i in range(length):
            said = self._read_row(self._metadata(i))["tasks"]
            place = divmod(i, self.info.chunks_size)
            rows = self.root / f"data/chunk-{place[0]:03d}/file-{place[1]:03d}.parquet"
            numbers = set(pq.ParquetFile(rows).read(["task_index"], use_threads=False)["task_index"].to_pylist())
            if len(said) == len(numbers) == 1:
                found[numbers.pop()] = said[0]
        if set(found) != set(range(self.info.total_tasks)):
            raise DataError(
                f"{self.root / TASKS}, which maps each task_index to its instruction, is missing or damaged, and the "
                f"episodes tell {len(found)} of {self.info.total_tasks} instructions: put it back from a copy"
            )
        with self.stage() as stage:
            write_tasks([found[number] for number in sorted(found)], stage)
            sync(stage / TASKS)
            self._put(stage / TASKS, TASKS)
        self._tell(f"{self.root / TASKS} was missing or damaged; it was rebuilt from the episodes' own instructions")

    def _refuse_other_paths(self) -> None:
        from lerobot.datasets.utils import DEFAULT_DATA_PATH, DEFAULT_VIDEO_PATH

        paths = {self.info.data_path: DEFAULT_DATA_PATH, self.info.video_path: DEFAULT_VIDEO_PATH}
        for found, own in paths.items():
            if found not in (own, None):
                raise DataError(
                    f"{self.root} was not recorded by this library: its files are at {found!r}, not at {own!r}. Give "
                    "another output_dir."
                )

    def _refuse_gaps(self, length: int) -> None:
        trees = 2 + sum(feature["dtype"] == "video" for feature in self.info.features.values())
        num_files = sum(index < length for index, _ in self._files())
        if length == 0 or num_files != trees * length:
            raise DataError(
                f"{self.root} holds {num_files} files of episodes, {length} episodes recorded one by one have "
                f"{trees * length}: it is another dataset, or files were taken away. Put them back, or give another "
                "output_dir."
            )

    def _read_metadata(self, length: int) -> None:
        for i in range(length):
            row = self._read_row(self._metadata(i))
            self.ends.append(row["dataset_to_index"])
            if row[KEY]:
                self.keys[row[KEY]] = i

    @staticmethod
    def _read_row(path: Path) -> dict[str, Any]:
        try:
            (row,) = pq.ParquetFile(path).read(["dataset_to_index", "tasks", KEY], use_threads=False).to_pylist()
            return {"dataset_to_index": row["dataset_to_index"], "tasks": row["tasks"], KEY: row[KEY]}
        except (OSError, KeyError, ValueError) as error:
            raise DataError(f"{path} is not the metadata of a recorded episode: {error!r}") from error


def write_tasks(tasks: list[str], root: Path) -> None:
    """Write LeRobot's table of instructions, numbered in their order."""
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

    meta = LeRobotDatasetMetadata.create("local/episodes", fps=1, features={}, root=root, use_videos=False)
    meta.save_episode_tasks(tasks)


def _read_stats(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """LeRobot's statistics of one episode: feature -> statistic -> value."""
    stats: dict[str, dict[str, np.ndarray]] = {}
    for name, value in pq.ParquetFile(path).read(use_threads=False).to_pylist()[0].items():
        tree, _, rest = name.partition("/")
        if tree == "stats" and value is not None:
            feature, _, statistic = rest.rpartition("/")
            stats.setdefault(feature, {})[statistic] = np.atleast_1d(np.array(value))
    return stats
