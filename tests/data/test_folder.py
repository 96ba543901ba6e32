"""A dataset's folder is read as it is: what it lacks is said in one sentence, and nobody is asked for it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from lerobot.datasets import utils
from lerobot_on_disk import STATE_ONLY, random_columns, write
from packaging.version import Version

from poco_vla.config import DatasetConfig
from poco_vla.data import open_dataset, read_episodes
from poco_vla.data.dataset import _explain, describe_dataset
from poco_vla.data.folder import check_videos, video_file, video_files
from poco_vla.errors import ConfigError, DataError

STATE, TOP, SIDE = "observation.state", "observation.images.top", "observation.images.side"
VIDEO = {"dtype": "video", "shape": (32, 32, 3), "names": ["height", "width", "channels"]}
FEATURES = STATE_ONLY | {TOP: VIDEO, SIDE: VIDEO}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three episodes with two cameras, a video file each."""
    root = tmp_path_factory.mktemp("whole") / "data"
    return write(root, [random_columns(6, FEATURES, seed) for seed in range(3)], FEATURES)


@pytest.fixture
def root(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "data")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Whoever asks the Hub for files, by whatever function of LeRobot, fails the test."""
    from lerobot.datasets import dataset_metadata, lerobot_dataset

    def asked(*args, **_):
        pytest.fail(f"the Hub was asked for {args}")

    for module in (dataset_metadata, lerobot_dataset):
        monkeypatch.setattr(module, "snapshot_download", asked)
        monkeypatch.setattr(module, "get_safe_version", asked)


def opened(root, **options):
    return open_dataset(DatasetConfig("local/test", root, **options))


def read(root, keys=(STATE,), **options):
    config = DatasetConfig("local/test", root, **options)
    return read_episodes(open_dataset(config), config, keys)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("data", "data/ has no parquet file, though meta/info.json counts 18 rows"),
        ("meta/tasks.parquet", "meta/tasks.parquet is missing, which maps each task_index"),
        ("meta/episodes", "meta/episodes/ has no parquet file"),
    ],
)
def test_a_folder_that_lacks_something_is_refused_and_not_filled_from_the_hub(root, lost, said):
    path = root / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError, match=f"the dataset {root} cannot be opened: {said}.*not completed from the Hub"):
        opened(root)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "it is empty"),
        (bytes(300), "it is all zeros, as a power loss leaves files"),
        (b'{"codebase_version": "v3.0", "fps"', "it is not JSON"),
        (b"[1]", "it holds a list"),
        (b'{"codebase_version": "v3.0", "fps": 0, "features": {}}', "fps must be positive"),
        (b'{"codebase_version": "v3.0"}', "it does not describe a LeRobot dataset"),
        (b'{"codebase_version": "v3.0", "fps": 10, "features": {"action": {}}}', "KeyError: 'dtype'"),
        (b'{"codebase_version": "new"}', "codebase_version is 'new'"),
        (b"[" * 100_000, "it is not JSON"),
    ],
    ids=["empty", "zeros", "torn", "list", "no rate", "no features", "no dtype", "no version", "deep"],
)
def test_a_description_that_cannot_be_used_is_one_sentence(root, text, said):
    (root / "meta/info.json").write_bytes(text)
    with pytest.raises(DataError, match=f"cannot be opened: meta/info.json cannot be used, .*{said}") as caught:
        opened(root)
    assert "\n" not in str(caught.value)


def rewritten(root, **values):
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | values))
    return root


def test_an_older_format_is_refused_with_lerobots_own_conversion(root):
    with pytest.raises(DataError, match=rf"convert_dataset_v21_to_v30 --repo-id=data --root={root} --push-to"):
        opened(rewritten(root, codebase_version="v2.1"))


def test_a_newer_format_asks_for_a_newer_lerobot(root):
    with pytest.raises(DataError, match=r"of LeRobot's format v4.0, the installed LeRobot reads v3.0"):
        opened(rewritten(root, codebase_version="v4.0"))


@pytest.mark.parametrize("name", ["data_path", "video_path"])
@pytest.mark.parametrize(
    "template",
    [
        *("/etc/{file_index}.mp4", "../../{video_key}/{file_index}.mp4", "a/../../{chunk_index:03d}.mp4", "{x}.mp4"),
        *("..\\..\\{file_index}.mp4", "{chunk_index.__class__}.mp4", "{file_index:999999999d}.mp4", "", 3),
    ],
)
def test_paths_that_lead_out_of_the_folder_are_refused(root, name, template):
    with pytest.raises(DataError, match=rf"info.json: {name} .* (outside the dataset's folder|is no path)"):
        opened(rewritten(root, **{name: template}))


def test_a_cameras_name_does_not_lead_out_of_the_folder(root):
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["../../../observation.images.top"] = features[TOP]
    with pytest.raises(DataError, match="outside the dataset's folder"):
        opened(rewritten(root, features=features))


@pytest.mark.parametrize(
    ("episodes", "said"),
    [
        ((7,), "dataset.episodes names episode 7, but .* holds 3 episodes, 0 to 2"),
        ((0, 99, -1), "names episode 99, episode -1, but"),
        ((1, 1), "names episode 1 more than once"),
        ((), "dataset.episodes is empty"),
    ],
)
def test_a_choice_of_episodes_is_checked_against_how_many_there_are(root, episodes, said):
    with pytest.raises(ConfigError, match=said):
        opened(root, episodes=episodes)


def test_missing_rows_are_named_by_episode_and_file(root):
    (file,) = root.glob("data/*/*.parquet")
    meta = root / "meta/episodes/chunk-000/file-000.parquet"
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(meta)
    place = table.schema.get_field_index("data/file_index")
    pq.write_table(table.set_column(place, "data/file_index", pa.array([0, 0, 1])), meta)
    rows = pq.read_table(file)
    pq.write_table(rows.filter(pa.array(np.array(rows["episode_index"]) < 2)), file)
    with pytest.raises(DataError, match=r"has no rows of episode 2: data/chunk-000/file-001.parquet is missing"):
        opened(root)
    assert len(read(root, episodes=(0, 1))) == 2


def test_a_missing_video_is_named_by_episode_camera_and_file_where_the_camera_is_used(root):
    (file,) = root.glob(f"videos/{TOP}/*/*.mp4")
    file.unlink()
    assert len(read(root)) == 3
    assert set(read(root, (SIDE,))[0].obs) == {SIDE}
    with pytest.raises(DataError, match=rf'episode 0: the video of camera "{TOP}" is missing \({file}\); 3 of 3'):
        read(root, (STATE, TOP))


def test_a_damaged_video_is_named_by_episode_camera_and_file(root):
    (file,) = root.glob(f"videos/{SIDE}/*/*.mp4")
    file.write_bytes(b"no video")
    with pytest.raises(DataError, match=rf'episode 0: camera "{SIDE}" \({file}\): the video cannot be decoded'):
        read(root, (SIDE,))


def test_a_camera_of_which_the_metadata_say_no_file_is_named(root):
    dataset = opened(root)
    assert video_files(dataset, [2, 0], SIDE) == [video_file(dataset, 2, SIDE), video_file(dataset, 0, SIDE)]
    dataset.meta.episodes = dataset.meta.episodes.remove_columns([f"videos/{SIDE}/file_index"])
    with pytest.raises(DataError, match=rf'where the videos of camera "{SIDE}" of episodes 0 to 2 are'):
        check_videos(dataset, [SIDE], "data")


@pytest.mark.parametrize("late", [0.002, 0.04])
def test_frames_that_are_off_their_rows_are_told_with_the_option_that_accepts_them(root, late):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (file,) = root.glob("data/*/*.parquet")
    table = pq.read_table(file)
    stamps = pa.array(np.array(table["timestamp"]) + np.float32(late), pa.float32())
    pq.write_table(table.set_column(table.schema.get_field_index("timestamp"), "timestamp", stamps), file)
    with pytest.raises(DataError, match=rf'episode 0: camera "{TOP}".*up to {late} s away') as caught:
        read(root, (TOP,))
    advised = re.search(r"tolerance_s ([\d.]+) accepts", str(caught.value))
    assert advised is not None
    assert len(read(root, (TOP,), tolerance_s=float(advised[1]))) == 3


def test_a_name_for_a_local_folder_without_the_folder_is_not_looked_for_on_the_hub():
    with pytest.raises(DataError, match=r'"local/nowhere" names a local folder.*give dataset.root'):
        open_dataset(DatasetConfig("local/nowhere"))


def test_a_recording_in_lerobots_own_folder_is_not_completed_from_the_hub(root, monkeypatch, tmp_path):
    from lerobot.utils import constants

    monkeypatch.setattr(constants, "HF_LEROBOT_HOME", tmp_path)
    shutil.move(root, tmp_path / "me/recorded")
    assert describe_dataset(open_dataset(DatasetConfig("me/recorded"))).fps == 10
    shutil.rmtree(tmp_path / "me/recorded/data")
    with pytest.raises(DataError, match=r"data/ has no parquet file"):
        open_dataset(DatasetConfig("me/recorded"))


def test_columns_that_the_description_does_not_have_are_named(root):
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["observation.velocity"] = features.pop(STATE)
    with pytest.raises(DataError, match=r"the columns of data/ are not those that meta/info.json describes"):
        opened(rewritten(root, features=features))


@pytest.mark.parametrize("tree", ["data", "meta/episodes", "meta"])
def test_a_damaged_table_is_named(root, tree):
    file = next((root / tree).rglob("*.parquet")) if tree != "meta" else root / "meta/tasks.parquet"
    file.write_bytes(bytes(100))
    with pytest.raises(DataError, match=f"the dataset {root} cannot be opened: {file} is damaged"):
        opened(root)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            utils.BackwardCompatibilityError("you/x_1.0", Version("2.1")),
            "format v2.1, v3.0 is needed. Convert it: python -m",
        ),
        (utils.ForwardCompatibilityError("you/x_1.0", Version("4.0")), "Install a newer LeRobot"),
        (
            RuntimeError(utils.MISSING_VERSION_TAG_MESSAGE.format(repo_id="you/x_1.0")),
            'create_tag("you/x_1.0", tag="v3.0"',
        ),
    ],
    ids=["older", "newer", "untagged"],
)
def test_lerobots_own_remedies_for_formats_on_the_hub_are_kept(error, said):
    assert said in _explain(error, DatasetConfig("you/x_1.0"), None)


def test_a_folder_in_the_home_folder_is_found(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    assert len(opened(Path("~/data"))) == 18
