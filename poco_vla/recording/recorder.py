"""Episodes written back as LeRobot v3 datasets."""

import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from threading import Lock, RLock
from typing import Any

import numpy as np

from poco_vla.config import DatasetConfig
from poco_vla.data import Episode, open_dataset, read_episodes
from poco_vla.data.dataset import INTERVENTION, POLICY_VERSION
from poco_vla.errors import DataError
from poco_vla.files import discard_partial_of_dead, partial_of_process, wait_for_space
from poco_vla.recording.admission import Admission
from poco_vla.recording.consolidate import consolidate
from poco_vla.recording.encoding import keep_scheduling, silent_stderr
from poco_vla.recording.growing import KEY, GrowingDataset

logger = logging.getLogger(__name__)

SIGNALS = {
    "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    "next.done": {"dtype": "bool", "shape": (1,), "names": None},
    "next.truncated": {"dtype": "bool", "shape": (1,), "names": None},
    "next.success": {"dtype": "bool", "shape": (1,), "names": None},
}
"""Columns beside observations and action, by LeRobot's names (lerobot.utils.constants)."""
NOTES: dict[str, np.generic] = {POLICY_VERSION: np.int64(-1), INTERVENTION: np.bool_(False)}
"""Columns that not every sender has, and what they hold where it has none: no policy that is known, no intervention."""
MIN_VIDEO_SIDE = 32
"""Pixels; below it the encoder (SVT-AV1 3.0) ends the whole process by a division by zero."""
ONLINE_ENCODER = {"vcodec": "h264", "preset": "ultrafast", "crf": 20}
"""LeRobot's settings for pictures of online episodes. Two cameras of 224 x 224 take 8 ms a step on two cores, LeRobot's
default (AV1, over PNG files) 17 ms; 1.5 dB more and 1.7 times the size (a film made up, with noise)."""
_PATCHING = RLock()


def write_dataset(episodes: Iterable[Episode], root: Path, *, fps: int, repo_id: str, video: bool = False) -> Path:
    """A LeRobot v3 dataset of these episodes in `root`. It appears whole or not at all.

    When another process has put the same dataset there meanwhile, that one stays.

    Args:
        video: pictures as video by LeRobot's default encoder (AV1 in yuv420p: a few levels off); False stores PNG,
            which is exact.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root.parent.mkdir(parents=True, exist_ok=True)
    discard_partial_of_dead(root)
    partial = partial_of_process(root)
    shutil.rmtree(partial, ignore_errors=True)
    waiting = iter(episodes)
    first = next(waiting)
    features = _features(first, video=video)
    try:
        with silent_stderr(), keep_scheduling():
            dataset = LeRobotDataset.create(repo_id, fps=fps, features=features, root=partial, use_videos=video)
            try:
                for episode in chain([first], waiting):
                    _save(dataset, episode)
            finally:
                # LeRobot does so when the object goes away, too: after an error it would make the folder anew.
                dataset.finalize()
        if not root.exists():
            partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


class EpisodeRecorder:
    """Online episodes as one LeRobot v3 dataset in `root` that can be opened at any moment; no kill loses more than the
    episode being written. One process writes it, by any of its threads.

    Args:
        root: folder of the dataset. What is recorded there already is taken up; files of an episode that was not
            written to its end are moved to ``<root>.set_aside/``, and `tell` says so.
        fps: control steps per second.
        video: pictures as video (ONLINE_ENCODER); False stores PNG, which is exact.
        tell: gets a message about each thing that somebody should know: files set aside, a full disk.
        give_up: True ends the waiting for room on a full disk.
        admission: decides which episodes are recorded; None records each that is finite.

    Raises:
        DataError: `root` holds something else, files are missing, or the rate is another.
    """

    def __init__(
        self,
        root: Path,
        fps: int,
        *,
        video: bool = False,
        tell: Callable[[str], None] = logger.warning,
        give_up: Callable[[], bool] = lambda: False,
        admission: Admission | None = None,
    ) -> None:
        self.root = root
        self.fps = fps
        self.video = video
        self._tell = tell
        self._give_up = give_up
        self._admission = admission
        self._lock = Lock()
        self._disk = GrowingDataset(root, tell)
        self._accounted = len(self._disk.ends)
        self._ahead: list[Episode] = []
        if self._disk.info is not None and self._disk.info.fps != fps:
            raise DataError(f"{root} was recorded at {self._disk.info.fps} fps, this run has {fps}: record elsewhere")

    @property
    def num_episodes(self) -> int:
        """Episodes on disk; after :meth:`rewind`, those that were run before or have been run again."""
        return self._accounted

    @property
    def num_steps(self) -> int:
        """Control steps of these episodes."""
        return self._disk.ends[self._accounted - 1] if self._accounted else 0

    def has(self, key: str) -> bool:
        """Return True if an episode of this key is recorded. "" is no key."""
        return self._disk.keys.get(key, self._accounted) < self._accounted

    def add(self, episode: Episode, key: str = "") -> None:
        """Put an episode on disk; it is there when this returns. While the disk is full, wait.

        Versions of weights and interventions are columns of every recording: an episode that does not say them gets
        `NOTES`' neutral values, so that whoever comes first settles nothing for the others.

        Args:
            key: by which who sends it knows it; one that is on disk is not written again. "" for none.

        Raises:
            SetAsideError: the `admission` does not let it in.
            DataError: other columns than the first episode's, or a number that is not finite. Nothing is written.
            PocoError: the disk is full and `give_up`; the episode is lost.
        """
        with self._lock:
            if self.has(key):
                return
            if self._admission is not None:
                self._admission.require(episode, key)
            episode = self._completed(episode)
            episode.check("the episode to record")
            features = _features(episode, video=self.video)
            self._refuse_other(features)
            if self._ahead and _same(self._ahead[0], episode):
                self._ahead.pop(0)
                self._accounted += 1
                return
            wait_for_space(
                lambda: self._write(episode, features, key),
                what=f"episode {self._accounted} ({len(episode)} steps)",
                where=self.root,
                tell=self._tell,
                give_up=self._give_up,
            )

    def load(self, obs_keys: Sequence[str], first: int = 0) -> list[Episode]:
        """The episodes from index `first` on, in the order they were recorded; seeds are not kept."""
        return self._read(obs_keys, first, self._accounted)

    def rewind(self, count: int) -> None:
        """Go back to the first `count` episodes, because those after them will be run again, bit for bit.

        They stay on disk, and each that `add` brings is compared with the one in its place: when equal, nothing is
        written. At the first that differs, what is on disk from there on goes to the set-aside folder. Episodes that
        nobody runs again stay in the dataset: they were played.

        Raises:
            DataError: fewer are recorded.
        """
        with self._lock:
            if not 0 <= count <= self._accounted:
                raise DataError(f"{self.root} holds {self._accounted} episodes, not {count}: put the others back")
            total = len(self._disk.ends)
            self._ahead = self._read(self._exact_keys(), count, total) if count < total else []
            self._accounted = count

    def consolidate(self, root: Path) -> Path | None:
        """All episodes on disk as one compact LeRobot dataset in `root`, which replaces an older one; None when there
        are none. Time is linear in the frames."""
        with self._lock:
            return consolidate(self.root, root) if self._disk.ends else None

    def _write(self, episode: Episode, features: dict[str, dict[str, Any]], key: str) -> None:
        if self._accounted < len(self._disk.ends):
            lost = len(self._disk.ends) - self._accounted
            why = f"{self.root}: episode {self._accounted}, run again, is not what it was; {lost} older episodes"
            self._disk.cut(self._accounted, why)
            self._ahead = []
        if self._disk.info is not None:
            features = self._disk.info.features  # they say how the videos are encoded, too
        with self._disk.stage() as stage:
            meta = _stage_episode(episode, stage, self.fps, features, self._disk.place, key)
            self._disk.commit(stage, meta, key)
        self._accounted += 1

    def _completed(self, episode: Episode) -> Episode:
        """Return an episode with the columns of the recording: numbers as float32, and `NOTES`, of which recordings of
        older versions lack some."""
        given = _notes(episode)
        known = NOTES if self._disk.info is None else [name for name in NOTES if name in self._disk.info.features]
        notes = {name: given.get(name, np.full(len(episode), NOTES[name])) for name in known}
        return replace(
            episode,
            obs={key: _as_stored(column) for key, column in episode.obs.items()},
            action=_as_stored(episode.action),
            reward=_as_stored(episode.reward),
            policy_version=notes.get(POLICY_VERSION),
            interventions=notes.get(INTERVENTION),
        )

    def _refuse_other(self, features: Mapping[str, Mapping[str, Any]]) -> None:
        if self._disk.info is None:
            return
        from lerobot.datasets.feature_utils import DEFAULT_FEATURES

        settled = {key: _kind(f) for key, f in self._disk.info.features.items() if key not in DEFAULT_FEATURES}
        found = {key: _kind(f) for key, f in features.items()}
        keys = sorted(key for key in settled | found if settled.get(key) != found.get(key))
        if keys:
            differences = "; ".join(
                f'"{key}" is {found.get(key, "not there")} instead of {settled.get(key, "not there")}' for key in keys
            )
            raise DataError(
                f"an episode has other columns than those in {self.root}: {differences}. Record into another folder."
            )

    def _exact_keys(self) -> list[str]:
        features = self._disk.info.features
        return [key for key, f in features.items() if key.startswith("observation.") and f["dtype"] != "video"]

    def _read(self, obs_keys: Sequence[str], first: int, end: int) -> list[Episode]:
        if first >= end:
            return []
        # They were in memory before; no limit keeps a run from going on.
        config = DatasetConfig(
            repo_id="local/episodes", root=self.root, episodes=tuple(range(first, end)), max_image_bytes=sys.maxsize
        )
        return read_episodes(open_dataset(config), config, obs_keys)


def _stage_episode(
    episode: Episode,
    stage: Path,
    fps: int,
    features: dict[str, dict[str, Any]],
    place: Callable[[Any], None],
    key: str,
) -> Any:
    """Write one episode by LeRobot's own writer; gives LeRobot's metadata after it.

    Args:
        place: puts the metadata to where this episode follows.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    video = any(feature["dtype"] == "video" for feature in features.values())
    dataset = LeRobotDataset.create(
        "local/episodes",
        fps=fps,
        features=features,
        root=stage,
        video_backend="pyav",
        **_encoding(episode, video=video),
    )
    try:
        place(dataset.meta)
        dataset.clear_episode_buffer()  # it knew the place before
        _save(dataset, episode)
        _amend(dataset.meta._metadata_buffer[-1], key)  # not yet in the file
        dataset.finalize()
    except BaseException:
        dataset.clear_episode_buffer()  # ends encoding threads
        dataset.meta._metadata_buffer.clear()  # LeRobot would write it when the object goes away
        raise
    return dataset.meta


def _amend(row: dict[str, list[Any]], key: str) -> None:
    """A column of ours beside LeRobot's, and one type for each of its own, so that tables can be joined: it writes some
    statistics of a single step as whole numbers."""
    for name, value in row.items():
        if name.startswith("stats/") and not name.endswith("/count"):
            row[name] = [np.asarray(value[0], np.float64)]
    row[KEY] = [key]


def _encoding(episode: Episode, *, video: bool) -> dict[str, Any]:
    if not video:
        return {"use_videos": False}
    import av.logging
    from lerobot.configs.video import RGBEncoderConfig

    av.logging.set_libav_level(av.logging.ERROR)  # else the encoder's figures go to stderr, past everyone
    return {
        "rgb_encoder": RGBEncoderConfig(**ONLINE_ENCODER),
        # Without a detour through PNG files. LeRobot drops pictures that find the queue full, and has no statistics of
        # a single one.
        "streaming_encoding": len(episode) > 1,
        "encoder_queue_maxsize": len(episode) + 1,
    }


def _save(dataset: Any, episode: Episode) -> None:
    for frame in _frames(episode):
        dataset.add_frame(frame)
    with _quick_embedding():
        # One camera after the other: LeRobot would fork this process, and with it OpenGL, CUDA and threads.
        dataset.save_episode(parallel_encoding=False)


def _same(a: Episode, b: Episode) -> bool:
    """Return True if two runs of an episode are one, by what both have: `a` has no pictures that video has changed."""
    return (
        len(a) == len(b)
        and a.task == b.task
        and a.step_tasks == b.step_tasks
        and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("action", "reward", "success"))
        and all(np.array_equal(column, b.obs[key]) for key, column in a.obs.items())
    )


def _as_stored(column: np.ndarray) -> np.ndarray:
    return column if column.dtype == np.uint8 else column.astype(np.float32, copy=False)


def _kind(feature: Mapping[str, Any]) -> str:
    return f"{feature['dtype']} {tuple(feature['shape'])}"


def can_be_video(shape: Sequence[int]) -> bool:
    """Return True if the encoders take pictures of this shape (height, width, 3)."""
    height, width = shape[:2]
    return min(height, width) >= MIN_VIDEO_SIDE and height % 2 == width % 2 == 0


def _features(episode: Episode, *, video: bool) -> dict[str, dict[str, Any]]:
    features: dict[str, dict[str, Any]] = {
        "action": {"dtype": "float32", "shape": episode.action.shape[1:], "names": None}
    }
    for key, column in episode.obs.items():
        if column.dtype == np.uint8:
            if video and not can_be_video(column.shape[1:]):
                height, width = column.shape[1:3]
                raise DataError(
                    f'"{key}" is {height} x {width} pixels; video needs even sides of at least {MIN_VIDEO_SIDE}. Make '
                    "the pictures larger, or store PNG (demonstrations.video = False; online: interaction.images png)."
                )
            dtype = "video" if video else "image"
            features[key] = {"dtype": dtype, "shape": column.shape[1:], "names": ["height", "width", "channels"]}
        else:
            features[key] = {"dtype": "float32", "shape": column.shape[1:], "names": None}
    dtypes = {POLICY_VERSION: "int64", INTERVENTION: "bool"}
    notes = {name: {"dtype": dtypes[name], "shape": (1,), "names": None} for name in _notes(episode)}
    return features | SIGNALS | notes


def _notes(episode: Episode) -> dict[str, np.ndarray]:
    """The columns that not every episode has, [T] each."""
    notes = {POLICY_VERSION: episode.policy_version, INTERVENTION: episode.interventions}
    return {name: column for name, column in notes.items() if column is not None}


@contextmanager
def _quick_embedding() -> Iterator[None]:
    """LeRobot 0.6.1 sends row after row through `datasets.map` to put pictures into the table, also where there are
    none, and shows a bar: four fifths of the time that a dataset of states takes. Here the table goes as a whole."""
    from lerobot.datasets import dataset_writer

    with _PATCHING:
        embed = dataset_writer.embed_images
        dataset_writer.embed_images = _embed
        try:
            yield
        finally:
            dataset_writer.embed_images = embed


def _embed(dataset: Any) -> Any:
    from datasets.table import embed_table_storage

    # `datasets` would hash the whole table for a name in its cache, which a dataset in memory has no use for.
    return type(dataset)(embed_table_storage(dataset.with_format("arrow")[:]), fingerprint="embedded")


def _frames(episode: Episode) -> list[dict[str, Any]]:
    last, notes = len(episode) - 1, _notes(episode)
    return [
        {key: column[k] for key, column in episode.obs.items()}
        | {
            "action": episode.action[k],
            "next.reward": episode.reward[k : k + 1],
            "next.done": np.array([k == last]),
            "next.truncated": np.array([k == last and not episode.terminal[k]]),
            "next.success": episode.success[k : k + 1],
            "task": episode.task_at(k),
        }
        | {name: column[k : k + 1] for name, column in notes.items()}
        for k in range(len(episode))
    ]
