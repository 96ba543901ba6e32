"""A LeRobot v3 dataset -> episodes as column arrays, read once, not frame by frame."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from poco_vla.config import DatasetConfig
from poco_vla.data.episode import Episode
from poco_vla.data.features import check_columns, feature_table, is_picture
from poco_vla.data.folder import check_episodes, check_folder, check_rows, damaged_tables, old_format
from poco_vla.data.numbers import read_column, read_columns
from poco_vla.data.pictures import read_pictures
from poco_vla.data.rename import name_in_files, rename_columns
from poco_vla.data.signals import DONE, REWARD, SUCCESS, TRUNCATED, read_signals
from poco_vla.data.statistics import vector_statistics
from poco_vla.errors import DataError, PocoError

# LeRobot tries to load torchcodec at import and logs a traceback per FFmpeg version when FFmpeg is absent; it then
# decodes with PyAV, which is installed.
logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)

logger = logging.getLogger(__name__)

POLICY_VERSION = "complementary_info.policy_version"
"""Column of :attr:`Episode.policy_version`, by LeRobot's prefix for what else a step is to be known by."""
INTERVENTION = "complementary_info.is_intervention"
"""Column of :attr:`Episode.interventions`, by the name of LeRobot's event."""
SIGNALS = (REWARD, SUCCESS, DONE, TRUNCATED)
INDICES = ("episode_index", "frame_index", "task_index", "timestamp")
LOCAL = "main"
"""Revision by which a folder is opened: LeRobot asks the Hub for the versions of any that looks like one."""
FRAMES_PER_CALL = 256
"""Video frames decoded at once: enough that seeking costs nothing, few enough for memory."""


@dataclass(frozen=True)
class DatasetInfo:
    """Description of a dataset, from which a policy is built.

    Attributes:
        features: LeRobot's feature table: key -> dtype, shape, names.
        stats: LeRobot's statistics: key -> min, max, mean, std, quantiles.
        fps: control steps per second.
    """

    repo_id: str
    features: Mapping[str, Any]
    stats: Mapping[str, Any]
    fps: int


def open_dataset(config: DatasetConfig, rename_map: Mapping[str, str] | None = None) -> Any:
    """Open the LeRobotDataset that `config` names, from a local folder or the Hub.

    A folder is read as it is and never completed from the Hub: neither `dataset.root`, nor a recording in LeRobot's
    own folder of datasets.

    Args:
        config: the dataset.
        rename_map: columns that get other names, name in the dataset -> name that policies read.

    Raises:
        ConfigError: `dataset.episodes` names episodes that it does not have, or `rename_map` two columns alike.
        UnknownNameError: `rename_map` names a column that it does not have.
        DataError: it is not there or cannot be read; the message says where it was looked for.
    """
    if config.root is None and not config.repo_id:
        raise DataError("no dataset: give dataset.root a local folder, or dataset.repo_id a Hub id")
    root = _find_folder(config)
    name = str(root or f'"{config.repo_id}" on the Hub')
    if root is not None:
        check_episodes(config.episodes, check_folder(root).total_episodes, name)
    try:
        dataset = _open(config, root, name)
    except PocoError:
        raise
    except Exception as error:  # LeRobot, datasets, the Hub client and the network each raise their own
        raise DataError(f"the dataset {name} cannot be opened: {_explain(error, config, root)}") from error
    check_rows(dataset, name)
    if rename_map:
        rename_columns(dataset, rename_map)
    dataset.cameras = config.cameras
    return dataset


def _find_folder(config: DatasetConfig) -> Path | None:
    """Return the local folder that is meant; None where the Hub is."""
    from lerobot.datasets.utils import has_legacy_hub_download_metadata
    from lerobot.utils.constants import HF_LEROBOT_HOME

    if config.root is not None:
        return config.root.expanduser()  # no shell does so in --dataset.root=~/data
    recorded = HF_LEROBOT_HOME / config.repo_id
    if (recorded / "meta" / "info.json").is_file() and not has_legacy_hub_download_metadata(recorded):
        return recorded
    if config.repo_id.startswith("local/"):
        raise DataError(
            f'dataset.repo_id "{config.repo_id}" names a local folder, not one of the Hub: give dataset.root the folder'
        )
    return None


def _open(config: DatasetConfig, root: Path | None, name: str) -> Any:
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    class LocalDataset(LeRobotDataset):
        """Download nothing: LeRobot would fetch the files that a folder lacks, unused videos too."""

        def _download(self, *_: Any, **__: Any) -> None:
            logger.debug("%s is not completed from the Hub", name)

    kind, revision = (LeRobotDataset, config.revision) if root is None else (LocalDataset, LOCAL)
    if root is None and config.episodes is not None:
        meta = LeRobotDatasetMetadata(config.repo_id, None, revision)
        check_episodes(config.episodes, meta.total_episodes, name)
    return kind(
        config.repo_id or "local/dataset",
        root=root,
        revision=revision,
        episodes=list(config.episodes) if config.episodes is not None else None,
        tolerance_s=config.tolerance_s,
        return_uint8=True,
    )


def _explain(error: Exception, config: DatasetConfig, root: Path | None) -> str:
    """Return the cause of an error of LeRobot or the Hub client, and its remedy."""
    from lerobot.datasets.utils import BackwardCompatibilityError, ForwardCompatibilityError

    reason = str(error).strip().split("\n")[0].rstrip(".")
    if isinstance(error, BackwardCompatibilityError | NotImplementedError):
        old = "v2.1" if isinstance(error, BackwardCompatibilityError) else "v2.0 or older"
        return old_format(old, config.repo_id, root)
    if isinstance(error, ForwardCompatibilityError):
        return "it is of a newer format than the installed LeRobot reads. Install a newer LeRobot."
    if "must be tagged" in reason:
        return (
            "the repository has no tag that says its format. If it is of v3.0, give dataset.revision its branch, such "
            f'as main, or tag it: huggingface_hub.HfApi().create_tag("{config.repo_id}", tag="v3.0", '
            'repo_type="dataset")'
        )
    if root is not None and (damaged := damaged_tables(root)):
        return f"{damaged[0]} is damaged ({type(error).__name__}). Copy or download it again."
    if "corresponds to no data" in reason:
        return "data/ holds no row of the episodes that are asked for. Put its files back, or name other episodes."
    if reason.startswith(("Couldn't cast", "An error occurred while generating")):
        cause = str(error.__cause__ or error).strip().replace("\n", "; ")[:200]
        return (
            f"the columns of data/ are not those that meta/info.json describes ({type(error).__name__}: {cause}). "
            "Correct the features of meta/info.json, or write the dataset again."
        )
    return (
        f"{type(error).__name__}: {reason}. Give dataset.repo_id a Hub id that you can read, or dataset.root a local "
        "folder."
    )


def describe_dataset(dataset: Any) -> DatasetInfo:
    """Return features, statistics and frame rate of an open dataset.

    Vectors' statistics are of the episodes in use, images' of the whole dataset.
    """
    subset = dataset.episodes is not None
    stats = vector_statistics(read_columns(dataset), dataset.meta.stats, subset=subset, name=str(dataset.root))
    features = feature_table(dataset, str(dataset.root), getattr(dataset, "cameras", None))
    stats = {key: value for key, value in stats.items() if key in features or key not in dataset.meta.features}
    return DatasetInfo(dataset.repo_id, features, stats, dataset.meta.fps)


def read_episodes(
    dataset: Any,
    config: DatasetConfig,
    obs_keys: Sequence[str],
    *,
    horizon: int = 1,
    fps: int | None = None,
    resize_images: Callable[[np.ndarray], np.ndarray] = lambda images: images,
    say: Callable[[str], None] = logger.info,
) -> list[Episode]:
    """Read all episodes of an open LeRobotDataset.

    Args:
        dataset: from :func:`open_dataset`.
        config: how success is recognised where the dataset does not record it.
        obs_keys: observation columns to read; images are decoded to uint8.
        horizon: H; a dataset without one episode of that length is refused.
        fps: control rate that the data must have; None accepts any.
        resize_images: maps pictures [T, height, width, 3] to the size that is kept, applied while they are decoded.
        say: receives how success is recognised, and how many episodes succeed.

    Raises:
        DataError: no action column, missing observation columns, another rate, no numbers, NaN, a convention of success
            that is not recognised, too few steps, too many images, damaged or missing files.
    """
    features = dataset.meta.features
    name = str(dataset.root if config.root else dataset.repo_id)
    check_columns(features, ("action", *obs_keys), name)
    if fps is not None and dataset.meta.fps != fps:
        raise DataError(
            f"{name} was recorded at {dataset.meta.fps} fps, the environment runs at {fps}: a chunk would last another "
            "time. Use data of the same rate."
        )
    image_keys = [key for key in obs_keys if is_picture(key, features[key])]
    notes = [key for key in (*SIGNALS, POLICY_VERSION, INTERVENTION) if key in features]
    numbers = [key for key in obs_keys if key not in image_keys]
    columns = read_columns(dataset, ("action", *numbers, *INDICES, *notes))
    bounds = _bounds(columns, name)
    tasks = _read_tasks(dataset, columns, name)
    last = np.isin(np.arange(len(columns["action"])), bounds[1:] - 1)
    signals = read_signals(columns, last, config, name, _reward_reader(dataset))
    columns |= read_pictures(dataset, image_keys, columns, config.max_image_bytes, name, resize_images, FRAMES_PER_CALL)

    episodes = []
    for begin, end in pairwise(bounds.tolist()):
        rows = {key: column[begin:end] for key, column in columns.items()}
        said = tuple(tasks[begin:end])
        episode = Episode(
            obs={key: rows[key] for key in obs_keys},
            action=rows["action"],
            reward=signals.reward[begin:end],
            success=signals.success[begin:end],
            terminal=signals.terminal[begin:end],
            task=said[0],
            policy_version=_optional_column(rows, POLICY_VERSION, np.int64),
            interventions=_optional_column(rows, INTERVENTION, np.bool_),
            step_tasks=said if len(set(said)) > 1 else None,
            has_reward=signals.has_reward,
        )
        episode.check(f"{name}, episode {int(rows['episode_index'][0])}")
        episodes.append(episode)
    longest = max(map(len, episodes), default=0)
    if longest < horizon:
        raise DataError(
            f"{name} holds {len(episodes)} episodes, the longest of {longest} steps: fewer than one chunk of {horizon}"
        )
    succeeded = sum(episode.succeeded for episode in episodes)
    say(f"{succeeded} of {len(episodes)} episodes succeed ({signals.rule})")
    return episodes


def _bounds(columns: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Return each episode's first step, and the number of all steps. Raises DataError for rows out of order."""
    episodes, frames = columns["episode_index"], columns["frame_index"]
    bounds = np.flatnonzero(np.diff(episodes, prepend=-1, append=-1))
    numbers = episodes[bounds[:-1]]
    twice = len(set(numbers.tolist())) < len(numbers)
    inside = np.diff(episodes) == 0
    back = inside & (np.diff(frames) <= 0)
    if twice or back.any():
        where = int(episodes[1:][back][0]) if back.any() else int(numbers[np.unique(numbers, return_index=True)[1][0]])
        raise DataError(
            f"{name}: the rows of episode {where} are not one behind the other by frame_index: two steps that are "
            "neighbours in the table are not in time. Sort the rows by episode_index and frame_index."
        )
    return bounds


def _read_tasks(dataset: Any, columns: Mapping[str, np.ndarray], name: str) -> list[str]:
    """Return the instruction of each step."""
    table = dataset.meta.tasks
    tasks = {} if table is None else {int(row.task_index): str(task) for task, row in table.iterrows()}
    numbers = columns["task_index"]
    unknown = sorted(set(np.unique(numbers).tolist()) - tasks.keys())
    if unknown:
        step = int(np.flatnonzero(numbers == unknown[0])[0])
        raise DataError(
            f"{name}, episode {int(columns['episode_index'][step])}: frame {int(columns['frame_index'][step])} has "
            f"task_index {unknown[0]}, of which meta/tasks.parquet has no instruction (it has {len(tasks)}): put the "
            "file back, or add the instruction"
        )
    return [tasks[number] for number in numbers.tolist()]


def _reward_reader(dataset: Any) -> Callable[[], np.ndarray] | None:
    """Return a function that reads next.reward of all rows on disk; None if all episodes are in use."""
    if dataset.episodes is None:
        return None

    def read() -> np.ndarray:
        from pyarrow import concat_tables
        from pyarrow.parquet import read_table

        files = sorted((dataset.root / "data").glob("*/*.parquet"))
        name = name_in_files(dataset.meta, REWARD)
        table = concat_tables([read_table(file, columns=[name]) for file in files], promote_options="permissive")
        return read_column(table, name, dataset.meta.features[REWARD])

    return read


def _optional_column(rows: dict[str, np.ndarray], name: str, dtype: type[np.generic]) -> np.ndarray | None:
    return rows[name].reshape(-1).astype(dtype) if name in rows else None
