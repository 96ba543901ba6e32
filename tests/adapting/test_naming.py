"""Names of joints: read in every form that LeRobot writes, compared, and brought from one order to another."""

import json
from pathlib import Path

import pytest
import torch

from poco_vla import PolicyError
from poco_vla.adapting.naming import (
    ACTION,
    STATE,
    VectorOrder,
    is_placeholder,
    match_names,
    matched_order,
    names_of,
    new_order,
    saved_order,
)
from poco_vla.errors import CheckpointError
from poco_vla.joint_names import check_same_names

ARM = ("shoulder.pos", "elbow.pos", "gripper.pos")
BACKWARDS = ARM[::-1]


def features(names=ARM, state=None, size=3):
    vector = {"dtype": "float32", "shape": (size,)}
    return {ACTION: vector | {"names": names}, STATE: vector | {"names": names if state is None else state}}


@pytest.mark.parametrize(
    "names",
    [
        list(ARM),
        [list(ARM)],
        {"motors": list(ARM)},
        {"axes": list(ARM)},
        {"gripper.pos": 2, "shoulder.pos": 0, "elbow.pos": 1},
    ],
    ids=["flat", "nested", "motors", "axes", "by index"],
)
def test_names_are_read_in_each_form_that_lerobot_writes(names):
    assert names_of({"shape": (3,), "names": names}) == ARM


@pytest.mark.parametrize(
    "names", [None, [], ["a"], ["a", "a", "b"], [None] * 3, ["a", "", "b"], {"motors": ["a"]}, "abc"]
)
def test_names_that_do_not_name_each_number_once_are_no_names(names):
    assert names_of({"shape": (3,), "names": names}) is None


@pytest.mark.parametrize(
    "names", [["action_0", "action_1"], ["motor_1"], ["0", "1"], ["None"], ["q3"], ["joint_2.pos"]]
)
def test_numbered_names_are_placeholders(names):
    assert is_placeholder(names)


@pytest.mark.parametrize("names", [["x", "y"], ["gripper"], ["joint_1", "gripper"], ["left_arm"]])
def test_names_that_say_something_are_no_placeholders(names):
    assert not is_placeholder(names)


def matched(given, own=ARM, joints=None):
    return match_names(given, own, key=ACTION, where=("the dataset", "the base"), joints=joints)


def test_the_same_names_in_another_order_are_reordered():
    index = matched(BACKWARDS)
    assert [BACKWARDS[i] for i in index] == list(ARM)


def test_the_same_order_needs_no_reordering():
    assert matched(ARM) == ()


def test_what_lerobots_versions_spell_otherwise_is_one_name():
    """SO-100 datasets of LeRobot 0.1 say main_shoulder, later ones shoulder.pos."""
    assert matched(("main_gripper", "main_elbow", "main_shoulder")) == matched(BACKWARDS)


def test_other_names_are_refused_with_both_lists_and_the_way_out():
    with pytest.raises(PolicyError, match=r'"action" is \[x, y, z\] in the dataset and \[shoulder\.pos, .*positional'):
        matched(("x", "y", "z"))


@pytest.mark.parametrize("given", [("motor_0", "motor_1", "motor_2"), ("1", "2", "3")])
def test_placeholders_are_positions(given):
    assert matched(given) == matched(ARM, own=given) == ()


def test_names_that_merely_differ_are_taken_by_position_or_by_a_map():
    assert matched(("x", "y", "z"), joints="positional") == ()
    index = matched(("hand", "mid", "base"), joints={"hand": ARM[2], "mid": ARM[1], "base": ARM[0]})
    assert index == (2, 1, 0)


def test_a_map_of_joints_that_the_dataset_does_not_have_is_refused():
    with pytest.raises(PolicyError, match=r"joints names \[hand\], which the dataset does not have; it has \[elbow"):
        matched_order(new_order(features()), features(), sizes={}, where="the base", joints={"hand": "gripper.pos"})


def test_states_and_actions_go_in_and_out_in_the_datas_order():
    """A number keeps its joint: into the policy's order and back, it is what it was."""
    order = matched_order(new_order(features()), features(BACKWARDS), sizes={ACTION: 3}, where="the base")
    raw = {STATE: torch.tensor([[3.0, 2.0, 1.0]]), ACTION: torch.tensor([[[3.0, 2.0, 1.0]]])}
    own = order.to_policy(raw)
    assert own[STATE].tolist() == [[1, 2, 3]]
    assert own[ACTION].tolist() == [[[1, 2, 3]]]
    assert order.to_data(own[ACTION]).equal(raw[ACTION])
    assert order.names[ACTION] == BACKWARDS
    assert order.own[ACTION] == ARM


def test_states_without_names_of_their_own_go_with_the_actions():
    """LeRobot's config.json names actions only. A state of other names, or of other joints, stays as it is."""
    saved = saved_order(Path("/nowhere"), list(ARM), {ACTION: 3})
    order = matched_order(saved, features(BACKWARDS), sizes={}, where="the base")
    assert order.index[STATE] == order.index[ACTION] == (2, 1, 0)
    assert order.own[STATE] == ARM
    for state in (ARM, ("x", "y", "z")):
        assert STATE not in matched_order(saved, features(BACKWARDS, state), sizes={}, where="the base").index


def test_an_order_that_is_no_swap_comes_back_too():
    """A cycle of three is not its own inverse."""
    given = (ARM[1], ARM[2], ARM[0])
    order = matched_order(new_order(features()), features(given), sizes={}, where="the base")
    raw = torch.tensor([[10.0, 20.0, 30.0]])
    assert order.to_policy({ACTION: raw})[ACTION].tolist() == [[30, 10, 20]]
    assert order.to_data(order.to_policy({ACTION: raw})[ACTION]).equal(raw)


def test_a_side_without_names_is_taken_by_position_and_gets_the_others_names():
    unnamed = features(names=None, state=[None] * 3)
    assert matched_order(new_order(features()), unnamed, sizes={}, where="x").names == {ACTION: ARM, STATE: ARM}
    order = matched_order(VectorOrder(), features(), sizes={}, where="x")
    assert order.names == order.own == {ACTION: ARM, STATE: ARM}
    assert not order.index


def test_another_number_of_numbers_is_refused():
    with pytest.raises(PolicyError, match='"action" has 3 numbers in the dataset, the base was trained with 5'):
        matched_order(VectorOrder(), features(), sizes={ACTION: 5}, where="the base")


def test_an_order_is_written_and_read_again(tmp_path):
    order = matched_order(new_order(features()), features(BACKWARDS), sizes={}, where="the base")
    about = {"format": 1, "adapter": "x", "options": {}, "names": order.to_json()}
    (tmp_path / "poco.json").write_text(json.dumps(about))
    again = saved_order(tmp_path, None, {ACTION: 3, STATE: 3})
    assert again.to_json() == order.to_json()
    assert dict(again.index) == dict(order.index)


def test_lerobots_own_names_of_actions_are_read_where_there_is_no_poco_json(tmp_path):
    assert saved_order(tmp_path, list(ARM), {ACTION: 3}).names == {ACTION: ARM}
    assert not saved_order(tmp_path, ["axes"], {ACTION: 3}).names


@pytest.mark.parametrize(
    "names", [["a"], {"data": {ACTION: ["a"]}, "policy": {}}, {"data": {}, "policy": {ACTION: [1, 2, 3]}}]
)
def test_damaged_names_in_a_downloaded_poco_json_are_refused(tmp_path, names):
    (tmp_path / "poco.json").write_text(json.dumps({"format": 1, "adapter": "x", "options": {}, "names": names}))
    with pytest.raises(PolicyError, match=r"poco\.json"):
        saved_order(tmp_path, None, {ACTION: 3})


def test_a_resume_on_data_in_another_order_is_refused():
    """The head that a checkpoint holds was trained in the order that the data had then."""
    check_same_names({ACTION: list(ARM)}, {ACTION: ARM}, "the checkpoint")
    check_same_names(None, {ACTION: ARM}, "the checkpoint")
    with pytest.raises(CheckpointError, match=r'"action" was \[shoulder.* and is \[gripper.*begin a new run'):
        check_same_names({ACTION: list(ARM)}, {ACTION: BACKWARDS}, "the checkpoint")
