"""Features as they are read: kinds of cameras, names of axes, columns named otherwise."""

import logging

import numpy as np
import pytest
from lerobot_on_disk import STATE_ONLY, random_columns, write
from PIL import Image

from poco_vla.config import DatasetConfig
from poco_vla.data import open_dataset, read_episodes
from poco_vla.data.dataset import describe_dataset
from poco_vla.data.features import feature_table
from poco_vla.errors import ConfigError, DataError, UnknownNameError

TOP, SIDE, DEPTH = (f"observation.images.{name}" for name in ("top", "side", "depth"))


def camera(shape=(16, 24, 3), names=("height", "width", "channels"), **more):
    return {"dtype": "image", "shape": shape, "names": names and list(names), **more}


class Described:
    """An open dataset's metadata alone."""

    def __init__(self, features, depth=()):
        self.meta, self.features, self.depth_keys = self, STATE_ONLY | features, list(depth)


def axes(shape, names):
    feature = feature_table(Described({TOP: camera(shape, names)}), "data")[TOP]
    assert feature["names"] == ["height", "width", "channels"]
    return feature["shape"]


@pytest.mark.parametrize("names", [None, ["height", "width", "channel"], ["height", "width", "rgb"], [[1]], {"a": 1}])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_axes_are_told_by_their_names_or_by_the_shape(names, channels):
    assert axes((16, 24, channels), names) == (16, 24, 3)


@pytest.mark.parametrize("names", [None, ["channels", "height", "width"], ["channel", "height", "width"]])
def test_channels_first_is_told_by_names_or_by_the_shape(names):
    assert axes((3, 16, 24), names) == (16, 24, 3)


def test_width_before_height_is_told_by_the_names():
    assert axes((24, 16, 3), ["width", "height", "channels"]) == (16, 24, 3)


def test_a_picture_without_a_channel_axis_is_grey():
    assert axes((16, 24), None) == (16, 24, 3)


@pytest.mark.parametrize("shape", [(16, 24, 7), (2, 3, 16, 24)])
def test_a_shape_that_is_no_pictures_is_refused_by_name(shape):
    with pytest.raises(DataError, match=f'camera "{TOP}" of data has shape'):
        axes(shape, None)


@pytest.mark.parametrize("names", [["a", "b", "c"], [["a", "b", "c"]], {"motors": ["a", "b", "c"]}])
def test_names_of_dimensions_are_one_flat_list(names):
    state = {"dtype": "float64", "shape": (3,), "names": names}
    feature = feature_table(Described({"observation.state": state}), "data")["observation.state"]
    assert feature["names"] == ["a", "b", "c"]
    assert feature["dtype"] == "float32"


def test_names_that_do_not_fit_the_width_stay_as_they_are():
    state = {"dtype": "float32", "shape": (2,), "names": [["a", "b", "c"]]}
    assert feature_table(Described({"observation.state": state}), "data")["observation.state"]["names"] == [
        ["a", "b", "c"]
    ]


def test_depth_is_left_out_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        table = feature_table(Described({TOP: camera(), DEPTH: camera((16, 24, 1))}, [DEPTH]), "data")
    assert TOP in table
    assert DEPTH not in table
    assert f"left out the depth camera {DEPTH}" in caplog.text


def test_cameras_that_are_named_are_used_in_that_order_without_a_word(caplog):
    described = Described({TOP: camera(), DEPTH: camera((16, 24, 1)), SIDE: camera()}, [DEPTH])
    table = feature_table(described, "data", (SIDE, TOP))
    assert [key for key in table if "images" in key] == [SIDE, TOP]
    assert set(STATE_ONLY) <= set(table)
    assert not caplog.text


def test_a_camera_that_is_not_there_or_is_depth_is_refused():
    described = Described({TOP: camera(), DEPTH: camera((16, 24, 1))}, [DEPTH])
    with pytest.raises(UnknownNameError, match=f'no camera named "{TOP}s".*Did you mean "{TOP}"'):
        feature_table(described, "data", (f"{TOP}s",))
    with pytest.raises(DataError, match="is a depth camera"):
        feature_table(described, "data", (DEPTH,))
    with pytest.raises(ConfigError, match=r"dataset.cameras is empty"):
        DatasetConfig(cameras=())


def with_pictures(root, pictures):
    """A dataset of one camera whose pictures are replaced in the table by these PIL images."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = random_columns(len(pictures), STATE_ONLY | {TOP: camera()})
    root = write(root, [columns], STATE_ONLY | {TOP: camera()})
    data = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "png") if isinstance(picture, Image.Image) else file.write(picture)
        data.append({"bytes": file.getvalue(), "path": None})
    (path,) = root.glob("data/*/*.parquet")
    table = pq.read_table(path)
    place = table.schema.get_field_index(TOP)
    pq.write_table(
        table.set_column(place, table.schema.field(place), pa.array(data, table.schema.field(place).type)), path
    )
    return root


def pictures_of(root):
    config = DatasetConfig("local/test", root)
    return read_episodes(open_dataset(config), config, (TOP,))[0].obs[TOP]


def test_grey_rgba_and_palette_pictures_are_read_as_colours(tmp_path):
    colours = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    rgb = Image.fromarray(colours)
    grey, rgba = rgb.convert("L"), rgb.convert("RGBA")
    rgba.putalpha(7)
    palette = Image.fromarray(colours // 128 * 255).quantize(8)
    found = pictures_of(with_pictures(tmp_path / "d", [grey, rgba, palette]))
    np.testing.assert_array_equal(found[0], np.asarray(grey)[..., None].repeat(3, 2))
    np.testing.assert_array_equal(found[1], colours)
    np.testing.assert_array_equal(found[2], np.asarray(palette.convert("RGB")))


def test_pictures_of_16_bits_and_damaged_ones_are_named_by_camera_and_step(tmp_path):
    good = Image.fromarray(np.zeros((16, 24, 3), np.uint8))
    deep = Image.fromarray(np.full((16, 24), 3000, np.uint16))
    with pytest.raises(DataError, match=rf'episode 0: camera "{TOP}": step 1 has no picture of 8 bits .*I;16'):
        pictures_of(with_pictures(tmp_path / "deep", [good, deep]))
    with pytest.raises(DataError, match=rf'episode 0: camera "{TOP}": the picture of step 1 cannot be read'):
        pictures_of(with_pictures(tmp_path / "torn", [good, b"no png"]))
    other = Image.fromarray(np.zeros((8, 24, 3), np.uint8))
    with pytest.raises(DataError, match=rf'camera "{TOP}": its pictures are 8x24, others 16x24'):
        pictures_of(with_pictures(tmp_path / "small", [good, other]))


def test_a_dataset_without_names_of_axes_builds_a_policys_features(tmp_path):
    from lerobot.utils.feature_utils import dataset_to_policy_features

    features = STATE_ONLY | {TOP: camera(names=None)}
    root = write(tmp_path / "d", [random_columns(2, STATE_ONLY | {TOP: camera()})], features)
    info = describe_dataset(open_dataset(DatasetConfig("local/test", root)))
    assert dataset_to_policy_features(dict(info.features))[TOP].shape == (3, 16, 24)


@pytest.mark.parametrize("shape", [(16, 24, 3), (3, 16, 24), (16, 24, 1), (4, 16, 24)])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_pictures_that_are_stored_as_numbers_are_cameras(tmp_path, shape, dtype):
    """Channels last or first, whole numbers to 255 or fractions to 1."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, *shape))
    columns = random_columns(3, STATE_ONLY) | {TOP: (pixels if dtype == "uint8" else pixels / 255).astype(dtype)}
    root = write(tmp_path / "d", [columns], STATE_ONLY | {TOP: {"dtype": dtype, "shape": shape, "names": None}})
    last = pixels if shape[2] < 5 else np.moveaxis(pixels, 1, -1)
    np.testing.assert_array_equal(pictures_of(root), last.repeat(3, -1) if last.shape[-1] == 1 else last[..., :3])
    feature = describe_dataset(open_dataset(DatasetConfig("local/test", root))).features[TOP]
    assert (feature["dtype"], feature["shape"]) == ("image", (16, 24, 3))


def test_numbers_that_are_no_pixels_are_refused_by_camera_and_step(tmp_path):
    columns = random_columns(3, STATE_ONLY) | {TOP: np.zeros((3, 16, 24, 3), "uint16")}
    columns[TOP][1] = 3000
    root = write(
        tmp_path / "d", [columns], STATE_ONLY | {TOP: {"dtype": "uint16", "shape": (16, 24, 3), "names": None}}
    )
    with pytest.raises(DataError, match=rf'camera "{TOP}": step 1 holds numbers that are neither 0 to 255 nor 0 to 1'):
        pictures_of(root)
