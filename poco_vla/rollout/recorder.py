"""Episodes written back as LeRobot v3 datasets."""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from poco_vla.config import DatasetConfig
from poco_vla.data import Episode, open_dataset, read_episodes
from poco_vla.errors import DataError
from poco_vla.rollout.video import silent_stderr

SIGNALS = {
    "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    "next.done": {"dtype": "bool", "shape": (1,), "names": None},
    "next.truncated": {"dtype": "bool", "shape": (1,), "names": None},
    "next.success": {"dtype": "bool", "shape": (1,), "names": None},
}
"""Columns beside observations and action, by LeRobot's names (lerobot.utils.constants)."""
MIN_VIDEO_SIDE = 32
"""Pixels; below it the encoder (SVT-AV1 3.0) ends the whole process by a division by zero."""


def write_dataset(episodes: Iterable[Episode], root: Path, *, fps: int, repo_id: str, video: bool = False) -> Path:
    """A LeRobot v3 dataset of these episodes in `root`. It appears whole or not at all.

    When another process has put the same dataset there meanwhile, that one stays.

    Args:
        video: pictures as video by LeRobot's default encoder (AV1 in yuv420p: a few levels off); False stores PNG,
            which is exact.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root.parent.mkdir(parents=True, exist_ok=True)
    partial = root.with_name(f".{root.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    waiting = iter(episodes)
    first = next(waiting)
    features = _features(first, video=video)
    try:
        with silent_stderr(), _embedding_pictures_only(features):
            dataset = LeRobotDataset.create(repo_id, fps=fps, features=features, root=partial, use_videos=video)
            try:
                for episode in chain([first], waiting):
                    for frame in _frames(episode):
                        dataset.add_frame(frame)
                    # One camera after the other: LeRobot would fork this process, and with it OpenGL, CUDA and threads.
                    dataset.save_episode(parallel_encoding=False)
            finally:
                # LeRobot does so when the object goes away, too: after an error it would make the folder anew.
                dataset.finalize()
        if not root.exists():
            partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


class EpisodeRecorder:
    """Online episodes as a row of small LeRobot datasets, `root/part-00000` and so on, each written whole.

    Args:
        root: folder of the parts.
        fps: control steps per second.
    """

    def __init__(self, root: Path, fps: int) -> None:
        self.root = root
        self.fps = fps
        self.parts: list[str] = []
        self._pending: list[Episode] = []

    def add(self, episode: Episode) -> None:
        """Keep an episode for the next `flush`."""
        self._pending.append(episode)

    def flush(self) -> list[str]:
        """Write what is pending as the next part; give the names of all parts, oldest first."""
        if self._pending:
            name = f"part-{len(self.parts):05d}"
            # A part that a crash left behind a checkpoint is not in `parts`: its episodes are run again.
            shutil.rmtree(self.root / name, ignore_errors=True)
            # PNG, not video: a resumed run must see the pixels that the interrupted one saw.
            write_dataset(self._pending, self.root / name, fps=self.fps, repo_id=f"local/{name}", video=False)
            self.parts.append(name)
            self._pending = []
        return self.parts

    def load(self, parts: Sequence[str], obs_keys: Sequence[str]) -> list[Episode]:
        """The episodes of these parts, in the order they were recorded; further parts will follow them."""
        self.parts = list(parts)
        episodes: list[Episode] = []
        for name in parts:
            config = DatasetConfig(repo_id=f"local/{name}", root=self.root / name)
            episodes += read_episodes(open_dataset(config), config, obs_keys)
        return episodes

    def merge(self, root: Path) -> Path | None:
        """All parts as one LeRobot dataset in `root`; None when nothing was recorded."""
        from lerobot.datasets.aggregate import aggregate_datasets

        parts = self.flush()
        if not parts:
            return None
        shutil.rmtree(root, ignore_errors=True)
        with silent_stderr():
            aggregate_datasets(
                repo_ids=[f"local/{name}" for name in parts],
                aggr_repo_id=f"local/{root.name}",
                roots=[self.root / name for name in parts],
                aggr_root=root,
            )
        return root


def _features(episode: Episode, *, video: bool) -> dict[str, dict[str, Any]]:
    features: dict[str, dict[str, Any]] = {
        "action": {"dtype": "float32", "shape": episode.action.shape[1:], "names": None}
    }
    for key, column in episode.obs.items():
        if column.dtype == np.uint8:
            height, width = column.shape[1:3]
            if video and (min(height, width) < MIN_VIDEO_SIDE or height % 2 or width % 2):
                raise DataError(
                    f'"{key}" is {height} x {width} pixels; video needs even sides of at least {MIN_VIDEO_SIDE}. Make '
                    "the pictures larger, or store PNG (demonstrations.video = False)."
                )
            dtype = "video" if video else "image"
            features[key] = {"dtype": dtype, "shape": column.shape[1:], "names": ["height", "width", "channels"]}
        else:
            features[key] = {"dtype": "float32", "shape": column.shape[1:], "names": None}
    return features | SIGNALS


@contextmanager
def _embedding_pictures_only(features: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """LeRobot 0.6.1 sends each row through `datasets.map` to put pictures into the table, also where there are none:
    four fifths of the time that a dataset of states takes (1,500 instead of 8,000 frames a second)."""
    from lerobot.datasets import dataset_writer

    embed = dataset_writer.embed_images
    if all(feature["dtype"] != "image" for feature in features.values()):
        dataset_writer.embed_images = lambda dataset: dataset
    try:
        yield
    finally:
        dataset_writer.embed_images = embed


def _frames(episode: Episode) -> list[dict[str, Any]]:
    last = len(episode) - 1
    return [
        {key: column[k] for key, column in episode.obs.items()}
        | {
            "action": episode.action[k],
            "next.reward": episode.reward[k : k + 1],
            "next.done": np.array([k == last]),
            "next.truncated": np.array([k == last and not episode.terminal[k]]),
            "next.success": episode.success[k : k + 1],
            "task": episode.task,
        }
        for k in range(len(episode))
    ]
