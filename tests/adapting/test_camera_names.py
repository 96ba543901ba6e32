"""A checkpoint's cameras keep their slots; depth is no colour camera."""

import json
import logging

import pytest

from poco_vla import DataError, PolicyError
from poco_vla.adapting.camera_names import (
    all_renames,
    camera_slots,
    colour_features,
    is_depth,
    kept_renames,
    saved_cameras,
)

FRONT, WRIST, SIDE, TOP = (f"observation.images.{name}" for name in ("front", "wrist", "side", "top"))
OWN = (FRONT, WRIST)


def picture(channels=3, info=None, dtype="image"):
    return {"dtype": dtype, "shape": (8, 8, channels), "names": ["height", "width", "channels"], "info": info}


@pytest.mark.parametrize("offered", [(FRONT, WRIST), (WRIST, FRONT)])
@pytest.mark.parametrize("cameras", [None, [FRONT, WRIST], [WRIST, FRONT]])
def test_known_cameras_keep_their_slots_in_whatever_order_they_are_listed(offered, cameras):
    assert list(camera_slots(OWN, offered, cameras)) == [FRONT, WRIST]


def test_a_camera_that_is_new_takes_a_free_slot_and_is_told(caplog):
    with caplog.at_level(logging.INFO):
        assert list(camera_slots(OWN, (WRIST, SIDE), where="the base")) == [SIDE, WRIST]
    assert f"{SIDE} is not among the cameras of the base ({FRONT}, {WRIST})" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING
    assert "maps them" in caplog.text


def test_cameras_beyond_the_slots_come_last():
    assert list(camera_slots(OWN, (SIDE, WRIST, TOP, FRONT))) == [FRONT, WRIST, SIDE, TOP]


def test_a_base_that_knows_none_of_the_cameras_takes_them_in_the_datasets_order(caplog):
    with caplog.at_level(logging.INFO):
        assert list(camera_slots(OWN, (TOP, SIDE))) == [TOP, SIDE]
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_a_map_places_a_camera_and_the_others_keep_their_slots():
    assert camera_slots(OWN, (WRIST, SIDE), {SIDE: FRONT}) == {SIDE: FRONT, WRIST: None}
    assert camera_slots(OWN, (FRONT, WRIST), {FRONT: WRIST, WRIST: FRONT}) == {WRIST: FRONT, FRONT: WRIST}


@pytest.mark.parametrize(
    ("cameras", "words"),
    [
        ([TOP], rf"the dataset has no camera {TOP}; its cameras: {FRONT}, {WRIST}"),
        ({TOP: FRONT}, rf"the dataset has no camera {TOP}"),
        ({FRONT: TOP}, rf"the checkpoint has no camera {TOP}; its cameras: {FRONT}, {WRIST}"),
        ({FRONT: WRIST, WRIST: WRIST}, "two cameras are mapped to one"),
        ([], "no camera at all"),
    ],
)
def test_cameras_that_are_not_there_are_refused(cameras, words):
    with pytest.raises(PolicyError, match=words):
        camera_slots(OWN, OWN, cameras)


def test_a_trained_policy_reads_its_cameras_under_the_names_that_are_mapped():
    saved = {FRONT: FRONT, WRIST: WRIST}
    data = {WRIST: picture(), SIDE: picture()}
    assert kept_renames(saved, data, {SIDE: FRONT}, where="the policy") == {SIDE: FRONT}
    assert kept_renames(saved, {FRONT: picture(), WRIST: picture()}, None, where="the policy") is None


def test_a_dataset_that_lacks_a_trained_policys_camera_is_refused_with_the_way_out():
    saved = {FRONT: FRONT, WRIST: WRIST}
    with pytest.raises(
        DataError, match=rf"trained with the cameras {FRONT}, {WRIST}, and the dataset has no {FRONT}; .*\"cameras\""
    ):
        kept_renames(saved, {WRIST: picture(), SIDE: picture()}, None, where="the policy")
    with pytest.raises(DataError, match=rf"no {FRONT} \({FRONT} is a depth camera\)"):
        kept_renames(saved, {FRONT: picture(1), WRIST: picture()}, None, where="the policy")
    with pytest.raises(PolicyError, match=rf"{WRIST} is not among"):
        kept_renames(saved, None, [FRONT], where="the policy")


def test_renames_that_were_saved_are_read_and_kept(tmp_path):
    table = {TOP: FRONT, "observation.joints": "observation.state"}
    step = {"registry_name": "rename_observations_processor", "config": {"rename_map": table}}
    file = tmp_path / "policy_preprocessor.json"
    file.write_text(json.dumps({"steps": [step]}))
    assert saved_cameras(file, OWN) == {TOP: FRONT, WRIST: WRIST}
    assert all_renames(file, {SIDE: FRONT}, OWN) == {SIDE: FRONT, "observation.joints": "observation.state"}


@pytest.mark.parametrize("steps", [3, [7], [{"config": [1]}], [{"config": {"rename_map": 1}}]])
def test_renames_that_are_damaged_are_left_to_the_check_of_the_pipeline(tmp_path, steps):
    (tmp_path / "policy_preprocessor.json").write_text(json.dumps({"steps": steps}))
    assert saved_cameras(tmp_path / "policy_preprocessor.json", OWN) == {FRONT: FRONT, WRIST: WRIST}


@pytest.mark.parametrize(
    "feature",
    [
        picture(1),
        picture(info={"is_depth_map": True}),
        picture(dtype="video", info={"video.is_depth_map": True}),
        {"dtype": "video", "shape": (1, 8, 8), "names": ["channels", "height", "width"]},
    ],
)
def test_depth_is_known_by_its_mark_or_its_one_channel(feature):
    assert is_depth(feature)


def test_depth_cameras_are_left_out_with_a_message_and_refused_where_they_are_asked_for(caplog):
    data = {FRONT: picture(), TOP: picture(1), "observation.state": {"dtype": "float32", "shape": (1,)}}
    with caplog.at_level(logging.INFO):
        assert list(colour_features(data)) == [FRONT, "observation.state"]
    assert f"depth cameras are left out: {TOP}" in caplog.text
    with pytest.raises(PolicyError, match=f"{TOP} is a depth camera"):
        colour_features(data, [FRONT, TOP])


def test_a_dataset_without_depth_is_not_spoken_of(caplog):
    with caplog.at_level(logging.INFO):
        assert list(colour_features({FRONT: picture()})) == [FRONT]
    assert not caplog.text
