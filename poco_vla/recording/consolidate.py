"""Many files of one episode each -> few files of LeRobot's usual size."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from poco_vla.data.folder import TASKS, data_path, read_info, video_path
from poco_vla.errors import DataError
from poco_vla.files import recover_folder, replace_folder

MB = 1024**2


def consolidate(source: Path, root: Path) -> Path:
    """The same LeRobot dataset in `root`, in few files. It replaces an older one, whole or not at all.

    Args:
        source: dataset in which each episode has files of its own, as :class:`EpisodeRecorder` writes it; it may grow
            meanwhile.

    Raises:
        DataError: `source` is none, or `root` holds something else than a dataset.
    """
    from lerobot.datasets.io_utils import write_info

    if not (source / "meta" / "info.json").is_file():
        raise DataError(f"no LeRobot dataset in {source}: give the folder of a run that has recorded episodes")
    recover_folder(root)
    if root.exists() and (root.resolve() == source.resolve() or not (root / "meta" / "info.json").is_file()):
        raise DataError(f"{root} is not replaced: it is the source, or holds something else than a dataset")
    info = read_info(source)
    partial = root.with_name(f".{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "meta").mkdir(parents=True)
        table = _metadata(source, info)
        rows = {name: table[name].to_pylist() for name in table.column_names if name.startswith(("data/", "videos/"))}
        _join_data(source, partial, info, rows)
        for key, feature in info.features.items():
            if feature["dtype"] == "video":
                _join_videos(source, partial, info, rows, key)
        _write_metadata(partial, table, rows)
        write_info(info, partial)
        for name in (TASKS, "meta/stats.json"):
            shutil.copy(_there(source / name, source), partial / name)
        replace_folder(partial, root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def _metadata(source: Path, info: Any) -> pa.Table:
    """The episodes' metadata, in their order."""
    tables = []
    for i in range(info.total_episodes):
        chunk, file = divmod(i, info.chunks_size)
        path = source / f"meta/episodes/chunk-{chunk:03d}/file-{file:03d}.parquet"
        if not path.is_file():
            raise DataError(f"{source} has no {path.name} for one of its episodes: it is compact already, or damaged")
        tables.append(_read(path))
    if not tables:
        raise DataError(f"{source} holds no episode")
    # A video's statistics come in another order when it is a single picture.
    try:
        return pa.concat_tables([table.select(tables[0].column_names) for table in tables])
    except (ValueError, KeyError) as error:  # Arrow's own derive from these
        raise DataError(f"{source}/meta/episodes has other columns for some episodes than for others") from error


def _write_metadata(partial: Path, table: pa.Table, rows: dict[str, list[Any]]) -> None:
    path = partial / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    zeros = [0] * len(table)
    for name, values in (
        rows | dict.fromkeys(("meta/episodes/chunk_index", "meta/episodes/file_index"), zeros)
    ).items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.array(values, table.schema.field(place).type))
    pq.write_table(table, path)


def _read(path: Path) -> pa.Table:
    try:
        return pq.ParquetFile(path).read(use_threads=False)  # small files: threads cost more than they bring
    except (OSError, ValueError) as error:  # Arrow's own derive from these
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's
        raise DataError(f"{path} is damaged ({type(error).__name__}): put it back from a copy") from error


def _join_data(source: Path, partial: Path, info: Any, rows: dict[str, list[Any]]) -> None:
    """Tables one after the other, a row group per episode as LeRobot writes them."""
    paths = [_there(data_path(source, info, **place), source) for place in _places(rows, "data")]
    for number, group in enumerate(_groups(paths, info.data_files_size_in_mb)):
        target = data_path(partial, info, **_move(rows, "data", group, number, info))
        target.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(target, pq.read_schema(paths[group[0]])) as writer:
            for i in group:
                writer.write_table(_read(paths[i]))


def _join_videos(source: Path, partial: Path, info: Any, rows: dict[str, list[Any]], key: str) -> None:
    """One camera's videos one after the other, without encoding them again."""
    from lerobot.datasets.video_utils import concatenate_video_files

    tree = f"videos/{key}"
    paths = [_there(video_path(source, info, key, **place), source) for place in _places(rows, tree)]
    for number, group in enumerate(_groups(paths, info.video_files_size_in_mb)):
        place = _move(rows, tree, group, number, info)
        concatenate_video_files([paths[i] for i in group], video_path(partial, info, key, **place))
        begin = 0.0
        for i in group:
            length = rows[f"{tree}/to_timestamp"][i]
            rows[f"{tree}/from_timestamp"][i], rows[f"{tree}/to_timestamp"][i] = begin, begin + length
            begin += length


def _places(rows: dict[str, list[Any]], tree: str) -> list[dict[str, int]]:
    try:
        pairs = zip(rows[f"{tree}/chunk_index"], rows[f"{tree}/file_index"], strict=True)
        return [{"chunk_index": int(chunk), "file_index": int(file)} for chunk, file in pairs]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"meta/episodes does not say in which file of {tree}/ each episode is ({error!r})") from error


def _there(path: Path, source: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{source} lacks {path.relative_to(source)}: put it back, or consolidate another folder")
    return path


def _move(rows: dict[str, list[Any]], tree: str, group: Sequence[int], number: int, info: Any) -> dict[str, int]:
    """Note that these episodes are in the tree's file of that number; its place."""
    chunk, file = divmod(number, info.chunks_size)
    for i in group:
        rows[f"{tree}/chunk_index"][i], rows[f"{tree}/file_index"][i] = chunk, file
    return {"chunk_index": chunk, "file_index": file}


def _groups(paths: Sequence[Path], most: int) -> Iterator[list[int]]:
    """Indices of neighbouring files that have at most `most` MB together; a larger file is alone."""
    group: list[int] = []
    taken = 0.0
    for i, path in enumerate(paths):
        size = path.stat().st_size / MB
        if group and taken + size > most:
            yield group
            group, taken = [], 0.0
        group.append(i)
        taken += size
    yield group
