"""Pictures of environments in the forms that people have, brought to uint8 [height, width, 3]."""

import gymnasium as gym
import numpy as np
import pytest

from poco_vla.errors import ConfigError, DataError, NonFiniteError
from poco_vla.simulators.observations import ObservationReader, as_picture, flat_observation, require_pictures

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
KEY = "observation.images.top"


def reader(space):
    return ObservationReader(gym.spaces.Dict(pixels=gym.spaces.Dict(top=space)), "the toy")


def box(high, shape, dtype):
    return gym.spaces.Box(0, high, shape, dtype)


@pytest.mark.parametrize(
    ("picture", "space"),
    [
        (PIXELS, box(255, (8, 10, 3), np.uint8)),
        (PIXELS.transpose(2, 0, 1), box(255, (3, 8, 10), np.uint8)),
        ((PIXELS / 255).astype("f4"), box(1, (8, 10, 3), np.float32)),
        (PIXELS / 255, box(np.inf, (8, 10, 3), np.float64)),
        ((PIXELS / 255).astype("f4").transpose(2, 0, 1), box(255, (3, 8, 10), np.float32)),
        (PIXELS.astype("f4"), box(255, (8, 10, 3), np.float32)),
        (PIXELS.astype(np.uint16) * 257, box(65535, (8, 10, 3), np.uint16)),
        (PIXELS.astype(np.int64), box(255, (8, 10, 3), np.int64)),
        (np.concatenate([PIXELS, PIXELS[..., :1]], axis=2), box(255, (8, 10, 4), np.uint8)),
    ],
    ids=[
        "as it is",
        "channels first",
        "float 1",
        "float64 unbounded",
        "float chw",
        "float 255",
        "uint16",
        "int64",
        "rgba",
    ],
)
def test_a_picture_in_another_form_is_the_same_picture(picture, space):
    read = reader(space)
    found = read.read({"pixels": {"top": picture}})[KEY]
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, PIXELS)
    assert read.space[KEY].contains(found)
    assert bool(read.converted) == (picture is not PIXELS)


@pytest.mark.parametrize("shape", [(8, 10), (8, 10, 1), (1, 8, 10)])
def test_a_grey_picture_becomes_three_channels(shape):
    grey = PIXELS[..., 0]
    found = reader(box(255, shape, np.uint8)).read({"pixels": {"top": grey.reshape(shape)}})[KEY]
    np.testing.assert_array_equal(found, grey[..., None].repeat(3, axis=2))


def test_a_dark_frame_of_a_camera_from_0_to_255_stays_dark():
    dark = np.ones((8, 10, 3), np.float32)
    assert as_picture(dark, 255.0).max() == 1
    assert as_picture(dark, 1.0).max() == 255


@pytest.mark.parametrize(
    "depth", [np.full((8, 10, 1), 2.5, "f4"), np.full((8, 10), 900, np.uint16), np.full((8, 10, 3), -1, "f4")]
)
def test_what_is_no_picture_is_left_as_it_is_and_refused_where_a_policy_reads_it(depth):
    assert as_picture(depth) is depth
    obs = {KEY: depth[None]}
    require_pictures(obs, ["observation.state"], "the toy")
    with pytest.raises(DataError, match=r'the toy gives the picture "observation.images.top" as .* expected uint8'):
        require_pictures(obs, [KEY], "the toy")


def test_demonstrations_see_the_same_pictures():
    found = flat_observation({"pixels": {"top": (PIXELS / 255).astype("f4").transpose(2, 0, 1)}, "agent_pos": [1.0]})
    np.testing.assert_array_equal(found[KEY], PIXELS)
    assert found["observation.state"].dtype == np.float32


def test_an_observation_that_is_not_what_the_space_declares_is_named():
    read = ObservationReader(gym.spaces.Dict(agent_pos=gym.spaces.Box(-1, 1, (3,))), "the toy")
    with pytest.raises(ConfigError, match="the toy returns a list as its observation"):
        read.read([1, 2, 3])
    with pytest.raises(ConfigError, match=r"shape \(2,\); its observation space declares \(3,\)"):
        read.read({"agent_pos": np.zeros(2)})
    with pytest.raises(NonFiniteError, match='non-finite "agent_pos"'):
        read.read({"agent_pos": np.array([0, np.inf, 0])})
