"""Recorded episodes after a power loss or in hostile hands: repaired from what is there, or refused in one sentence."""

import json
import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from killed import FPS, episode

from poco_vla.config import DatasetConfig
from poco_vla.data import open_dataset, read_episodes
from poco_vla.data.fingerprint import content_hash
from poco_vla.errors import DataError
from poco_vla.recording.consolidate import consolidate
from poco_vla.recording.recorder import EpisodeRecorder

STATE = ("observation.state",)
MIXED = ("task 1", "task 1", "task 9")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Three episodes, in the second of which the instruction changes."""
    recorder = EpisodeRecorder(tmp_path_factory.mktemp("recorded") / "episodes", FPS)
    for one in played():
        recorder.add(one)
    return recorder.root


@pytest.fixture
def root(recorded, tmp_path):
    return shutil.copytree(recorded, tmp_path / "episodes")


def played():
    return [episode(0), replace(episode(1), step_tasks=MIXED), episode(2)]


def read(root):
    config = DatasetConfig("local/test", root)
    return read_episodes(open_dataset(config), config, STATE)


def test_instructions_that_change_within_an_episode_are_recorded_read_and_consolidated(root, tmp_path):
    assert [one.step_tasks for one in read(root)] == [None, MIXED, None]
    assert content_hash(read(consolidate(root, tmp_path / "all"))) == content_hash(played())


def test_a_recorder_that_is_rewound_takes_an_episode_of_other_instructions_for_another(root):
    told = []
    recorder = EpisodeRecorder(root, FPS, tell=told.append)
    recorder.rewind(1)
    recorder.add(replace(episode(1), step_tasks=MIXED))
    assert told == []
    recorder.rewind(1)
    recorder.add(episode(1))
    assert "is not what it was" in told[0]


@pytest.mark.parametrize("content", [bytes(500), b"", b'{"codebase_version": "v3'], ids=["zeros", "empty", "torn"])
def test_a_lost_description_is_made_again_for_the_episodes_that_are_there(root, content):
    before = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_bytes(content)
    told = []
    recorder = EpisodeRecorder(root, FPS, tell=told.append)
    assert recorder.num_episodes == 3
    assert told == [f"{root}/meta/info.json could not be read; it was made again for the 3 episodes that are there"]
    assert json.loads((root / "meta/info.json").read_text()) == before
    recorder.add(episode(3))
    assert content_hash(read(root)) == content_hash([*played(), episode(3)])


def test_without_the_copy_a_lost_description_is_refused_in_one_sentence(root):
    (root / "meta/info.first.json").unlink()
    (root / "meta/info.json").write_bytes(bytes(500))
    with pytest.raises(DataError, match="all zeros, as a power loss leaves files"):
        EpisodeRecorder(root, FPS)


@pytest.mark.parametrize("content", [None, bytes(500)], ids=["gone", "zeros"])
def test_a_lost_table_of_instructions_is_made_again(tmp_path, content):
    root = tmp_path / "episodes"
    recorder = EpisodeRecorder(root, FPS)
    for i in (1, 0, 1):
        recorder.add(episode(i))
    file = root / "meta/tasks.parquet"
    file.unlink() if content is None else file.write_bytes(content)
    told = []
    EpisodeRecorder(root, FPS, tell=told.append).add(episode(2))
    assert "rebuilt from the episodes' own instructions" in told[0]
    assert [one.task for one in read(root)] == ["task 1", "task 0", "task 1", "task 2"]


def test_instructions_that_no_episode_tells_are_asked_for(root):
    """Two instructions in one episode: which of them has which number cannot be told."""
    (root / "meta/tasks.parquet").unlink()
    with pytest.raises(DataError, match=r"the episodes tell 2 of 4 instructions: put it back from a copy"):
        EpisodeRecorder(root, FPS)


@pytest.mark.parametrize("content", [bytes(500), b"{"])
def test_lost_statistics_are_summed_up_again(root, content):
    (root / "meta/stats.json").write_bytes(content)
    EpisodeRecorder(root, FPS)
    assert json.loads((root / "meta/stats.json").read_text())["index"]["count"] == [9]


def rewritten(root, **values):
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | values))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", ["data_path", "video_path"])
def test_consolidating_neither_reads_nor_writes_outside_its_folders(root, tmp_path, relative, name):
    victim = tmp_path / "victim-0-0.parquet"
    victim.write_text("mine")
    path = str(tmp_path / "victim-{chunk_index}-{file_index}.parquet")
    rewritten(root, **{name: "../victim-{chunk_index}-{file_index}.parquet" if relative else path})
    if name == "video_path":
        features = json.loads((root / "meta/info.json").read_text())["features"]
        rewritten(root, features=features | {"observation.images.x": {"dtype": "video", "shape": [32, 32, 3]}})
    with pytest.raises(DataError, match="outside the dataset's folder"):
        consolidate(root, tmp_path / "all")
    assert victim.read_text() == "mine"
    assert not (tmp_path / "all").exists()


def test_a_recorder_does_not_write_to_paths_that_a_description_names(root, tmp_path):
    rewritten(root, data_path="data/other-{chunk_index}-{file_index}.parquet")
    with pytest.raises(DataError, match="was not recorded by this library"):
        EpisodeRecorder(root, FPS)


def test_consolidating_counts_no_further_than_the_files_there_are(root, tmp_path):
    rewritten(root, total_episodes=10**12)
    with pytest.raises(DataError, match=r"has no file-003.parquet for one of its episodes"):
        consolidate(root, tmp_path / "all")


@pytest.mark.parametrize("lost", ["data/chunk-000/file-001.parquet", "meta/tasks.parquet", "meta/stats.json"])
def test_consolidating_names_the_file_that_is_missing(root, tmp_path, lost):
    (root / lost).unlink()
    with pytest.raises(DataError, match=f"lacks {lost}: put it back"):
        consolidate(root, tmp_path / "all")


def test_consolidating_names_the_file_that_is_damaged(root, tmp_path):
    (root / "data/chunk-000/file-001.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"file-001.parquet is damaged"):
        consolidate(root, tmp_path / "all")


def test_places_that_are_no_numbers_are_refused(root, tmp_path):
    file = root / "meta/episodes/chunk-000/file-001.parquet"
    table = pq.read_table(file)
    place = table.schema.get_field_index("data/chunk_index")
    pq.write_table(table.set_column(place, "data/chunk_index", pa.array(["../../x"])), file)
    with pytest.raises(DataError, match="has other columns for some episodes"):
        consolidate(root, tmp_path / "all")
    assert not (tmp_path / "all").exists()
