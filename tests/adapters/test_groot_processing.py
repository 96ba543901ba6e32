"""GR00T N1.6's data side: every rule by hand, both ways, saved and loaded by LeRobot alone."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline, batch_to_transition, transition_to_batch
from lerobot.utils.constants import ACTION, OBS_STATE
from lerobot_on_disk import write
from lerobot_policy_groot_n1d6.processing import prompt, statistics
from lerobot_policy_groot_n1d6.processing.checkpoint import read_checkpoint
from lerobot_policy_groot_n1d6.processing.embodiment import Embodiment, Encoding, Format, choice
from lerobot_policy_groot_n1d6.processing.errors import ProcessingError
from lerobot_policy_groot_n1d6.processing.images import (
    Augmentation,
    ImageRules,
    area_weights,
    crop_box,
    exact_frame,
    jitter,
    smart_size,
    transform_images,
)
from lerobot_policy_groot_n1d6.processing.normalization import (
    Rules,
    decode_action,
    denormalise,
    encode_action,
    encode_state,
    normalise,
    pad_chunk,
    references_of,
)
from lerobot_policy_groot_n1d6.processing.poses import absolute_pose, from_rotvec, relative_pose, to_matrix, to_rotvec
from lerobot_policy_groot_n1d6.processing.steps import PIXEL_VALUES, DecodeStep, EncodeStep, PromptStep, tag_chunk
from lerobot_policy_groot_n1d6.processor_groot_n1d6 import make_groot_n1d6_pre_post_processors, resolve
from tokenizers import Tokenizer, models
from torch.testing import assert_close

ARM = {
    "horizon": 3,
    "views": {"front": "observation.images.front"},
    "state": {"arm": [0, 2], "gripper": {"slice": [2, 3], "encoding": "MEAN_STD"}},
    "action": {"gripper": [2, 3], "arm": {"slice": [0, 2], "representation": "RELATIVE"}},
}
FRONT = "observation.images.front"
DATA = {
    OBS_STATE: {"dtype": "float32", "shape": (3,), "names": None},
    ACTION: {"dtype": "float32", "shape": (3,), "names": None},
}
IMAGE = {FRONT: {"dtype": "image", "shape": (64, 96, 3), "names": ["height", "width", "channels"]}}


def config(**changes):
    """What the factory reads of a policy's configuration."""
    fields = {
        "type": "groot_n1d6",
        "device": "cpu",
        "input_features": {
            FRONT: PolicyFeature(FeatureType.VISUAL, (3, 64, 96)),
            OBS_STATE: PolicyFeature(FeatureType.STATE, (3,)),
        },
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (3,))},
        "chunk_size": 3,
        "max_state_dim": 8,
        "max_action_dim": 6,
        "tokenizer": "bytes",
        "embodiment": None,
    }
    return SimpleNamespace(**fields | changes)


def random_episodes(lengths=(5, 8), dims=(3, 3), seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(rng.normal(size=(n, d)).astype(np.float32) for d in dims) for n in lengths]


def of_range(low, high):
    low, high = torch.tensor(low), torch.tensor(high)
    return {"min": low, "max": high, "mean": (low + high) / 2, "std": (high - low) / 4, "q01": low, "q99": high}


@pytest.fixture
def arm():
    embodiment = Embodiment.parse(ARM)
    return embodiment, statistics.from_episodes(embodiment, random_episodes())


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return {
        OBS_STATE: torch.randn(2, 3),
        FRONT: torch.rand(2, 3, 64, 96),
        ACTION: torch.randn(2, 3, 3),
        "task": ["Pick up the pen!", "Stop."],
    }


# embodiments


def test_a_description_survives_json():
    embodiment = Embodiment.parse(ARM)
    assert Embodiment.parse(json.loads(json.dumps(embodiment.to_dict()))) == embodiment
    assert (embodiment.slot, embodiment.action_dim, embodiment.state_dim) == (10, 3, 3)
    assert embodiment.order == [2, 0, 1]  # the gripper comes first in this description
    assert [key.name for key in embodiment.references] == ["arm"]


def test_a_description_may_be_a_file(tmp_path):
    (tmp_path / "robot.json").write_text(json.dumps(ARM))
    assert Embodiment.parse(tmp_path / "robot.json") == Embodiment.parse(ARM)
    with pytest.raises(ProcessingError, match=r"no file .*nothing\.json"):
        Embodiment.parse(tmp_path / "nothing.json")


def test_a_dataset_without_a_mapping_is_taken_as_it_is():
    embodiment = Embodiment.plain(config().input_features, config().output_features, horizon=4)
    assert (embodiment.tag, embodiment.slot, embodiment.horizon) == ("new_embodiment", 10, 4)
    assert [view.name for view in embodiment.views] == ["front"]
    assert [(key.name, key.start, key.stop) for key in (*embodiment.state, *embodiment.action)] == [
        ("state", 0, 3),
        ("action", 0, 3),
    ]
    assert not embodiment.references


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tag": "g1"}, r'unknown embodiment "g1"\. Known: .*gr1.*unitree_g1.*new_embodiment.*slot'),
        ({"slot": 32}, r"slot 32: expected 0 to 31"),
        ({"action": {"arm": [0, 2], "tip": [1, 3]}}, r'column 1 of "action" belongs to two keys .*arm \[0, 2\)'),
        ({"action": {"arm": [0, 2], "tip": [3, 4]}}, r'column 2 of "action" belongs to no key'),
        ({"action": {}}, r'no "action"'),
        (
            {"action": {"leg": {"slice": [0, 2], "representation": "RELATIVE"}}},
            r'relative to state "leg".*arm.*gripper',
        ),
        ({"action": {"arm": {"slice": [0, 3], "representation": "RELATIVE"}}}, r"has 3 columns.*has 2"),
        ({"action": {"arm": {"slice": [0, 2], "representation": "DELTA"}}}, r"'DELTA': expected one of ABSOLUTE, REL"),
        (
            {"action": {"a": {"slice": [0, 7], "kind": "EEF", "representation": "RELATIVE"}}},
            r"with 7 columns: expected 16",
        ),
        ({"action": {"a": {"slice": [0, 3], "encoding": "SIN_COS"}}}, r"only states can be"),
        ({"action": {"a": {"slice": [0, 3], "colour": 1}}}, r"has \['colour'\]: expected slice, encoding"),
        ({"action": {"a": 3}}, r"slice 3: expected \[start, stop\]"),
        ({"state": {"arm": {"slice": [0, 2], "column": "gripper"}}}, r'column "gripper".*begins with "observation\."'),
        ({"horizon": 0}, r"horizon 0"),
        ({"cameras": {}}, r"\['cameras'\]: expected tag"),
    ],
)
def test_descriptions_that_do_not_fit_say_why(changes, message):
    with pytest.raises(ProcessingError, match=message):
        Embodiment.parse(ARM | changes)


def test_checkpoints_spell_formats_in_several_ways():
    for spelling in ("XYZ_ROT6D", "xyz+rot6d", "ActionFormat.XYZ_ROT6D"):
        assert choice(Format, spelling, "format") is Format.XYZ_ROT6D


def test_a_dataset_without_the_mapped_columns_is_told_so():
    embodiment = Embodiment.parse(ARM)
    with pytest.raises(
        ProcessingError, match=r"reads observation\.images\.front, which the data lack.*they have action"
    ):
        embodiment.check_columns({OBS_STATE: 3, ACTION: 3})
    with pytest.raises(ProcessingError, match=r"columns 2 to 3 of observation\.state, which has 2"):
        embodiment.check_columns({FRONT: None, OBS_STATE: 2, ACTION: 3})
    with pytest.raises(ProcessingError, match=r'cover 3 columns, "action" has 4'):
        embodiment.check_columns({FRONT: None, OBS_STATE: 3, ACTION: 4})


# normalisation


def test_a_range_becomes_minus_one_to_one():
    """2 (1.5 - 1) / (3 - 1) - 1 = -0.5; 5 is 3 beyond the middle of a half-width of 1; no range gives 0."""
    ranges = of_range([1.0, 1.0, 7.0], [3.0, 3.0, 7.0])
    values = torch.tensor([[1.5, 5.0, 9.0]])
    encoded = normalise(values, ranges, Encoding.MIN_MAX, Rules())
    assert_close(encoded, torch.tensor([[-0.5, 3.0, 0.0]]))
    assert_close(denormalise(encoded, ranges, Encoding.MIN_MAX, Rules()), torch.tensor([[1.5, 3.0, 7.0]]))


def test_a_deviation_becomes_one():
    """(5 - 2) / 1 = 3; without a deviation the value stays, and comes back as the constant that it was."""
    spread = {"mean": torch.tensor([2.0, 4.0]), "std": torch.tensor([1.0, 0.0])}
    encoded = normalise(torch.tensor([5.0, 4.0]), spread, Encoding.MEAN_STD, Rules())
    assert_close(encoded, torch.tensor([3.0, 4.0]))
    assert_close(denormalise(encoded.clamp(-1, 1), spread, Encoding.MEAN_STD, Rules()), torch.tensor([3.0, 4.0]))


def test_percentiles_stand_for_the_range_where_asked_for():
    ranges = of_range([0.0], [10.0]) | {"q01": torch.tensor([4.0]), "q99": torch.tensor([6.0])}
    assert normalise(torch.tensor([6.0]), ranges, Encoding.MIN_MAX, Rules(use_percentiles=True)).item() == 1
    assert normalise(torch.tensor([6.0]), ranges, Encoding.MIN_MAX, Rules()).item() == pytest.approx(0.2)


def test_states_by_range_are_clipped_and_others_are_not():
    """Sines first, then cosines: [sin 0, sin pi/2 | cos 0, cos pi/2] = [0, 1 | 1, 0]."""
    embodiment = Embodiment.parse(
        {
            "horizon": 1,
            "state": {
                "range": [0, 1],
                "spread": {"slice": [1, 2], "encoding": "mean_std"},
                "turn": {"slice": [0, 2], "column": "observation.turn", "encoding": "sin_cos"},
            },
            "action": {"a": [0, 1]},
        }
    )
    table = {"state": {"range": of_range([0.0], [2.0]), "spread": {"mean": torch.zeros(1), "std": torch.ones(1)}}}
    columns = {OBS_STATE: torch.tensor([[9.0, 9.0]]), "observation.turn": torch.tensor([[0.0, torch.pi / 2]])}
    encoded = encode_state(columns, embodiment, table, Rules())
    assert_close(encoded, torch.tensor([[1.0, 9.0, 0.0, 1.0, 1.0, 0.0]]), atol=1e-6, rtol=0)
    assert encode_state(columns, embodiment, table, Rules(clip_outliers=False))[0, 0] == 8
    assert embodiment.state_dim == 6


def test_relative_actions_refer_to_the_state_of_the_chunk_and_each_step_has_its_range():
    """Steps of 11, 12, 13 from state 10 are 1, 2, 3 away; with ranges [-2, 2], [-4, 4], [-6, 6] each is 0.5."""
    embodiment = Embodiment.parse(
        {"horizon": 3, "state": {"x": [0, 1]}, "action": {"x": {"slice": [0, 1], "representation": "RELATIVE"}}}
    )
    table = {"relative_action": {"x": of_range([[-2.0], [-4.0], [-6.0]], [[2.0], [4.0], [6.0]])}}
    action, reference, steps = torch.tensor([[[11.0], [12.0], [13.0]]]), torch.tensor([[10.0]]), torch.arange(3)
    encoded = encode_action(action, reference, steps, embodiment, table, Rules())
    assert_close(encoded, torch.full((1, 3, 1), 0.5))
    assert_close(decode_action(encoded, reference, steps, embodiment, table, Rules()), action)


def test_actions_are_clipped_even_where_deviations_normalise_them():
    embodiment = Embodiment.parse({"horizon": 1, "action": {"a": {"slice": [0, 1], "encoding": "MEAN_STD"}}})
    table = {"action": {"a": {"mean": torch.zeros(1), "std": torch.ones(1)}}}
    action, steps = torch.tensor([[[5.0]]]), torch.arange(1)
    assert encode_action(action, None, steps, embodiment, table, Rules()).item() == 1
    assert encode_action(action, None, steps, embodiment, table, Rules(clip_outliers=False)).item() == 5
    assert (
        decode_action(action, None, steps, embodiment, table, Rules()).item() == 5
    )  # only ranges are clipped on the way


def test_padding_is_masked_in_steps_and_dimensions():
    padded, mask = pad_chunk(
        torch.ones(2, 3, 2), horizon=5, width=4, action_dim=2, is_pad=torch.tensor([[0, 0, 0], [0, 1, 1]]).bool()
    )
    assert padded.shape == mask.shape == (2, 5, 4)
    assert padded.sum() == 12
    assert mask.sum(dim=(1, 2)).tolist() == [6, 2]
    assert mask[1, 0].tolist() == [1, 1, 0, 0]
    with pytest.raises(ProcessingError, match="does not fit into 2 x 4"):
        pad_chunk(torch.ones(2, 3, 2), horizon=2, width=4, action_dim=2)


# poses


def test_a_quarter_turn_by_hand():
    """The reference stands at (1, 0, 0), turned by 90 degrees about z: its x axis is the world's y. A pose at (1, 2, 0)
    with no turn lies 2 along its x axis, turned by -90 degrees. Rows of that R: [0, 1, 0], [-1, 0, 0]."""
    turn = torch.tensor([0.0, 0.0, torch.pi / 2])
    reference = torch.cat([torch.tensor([1.0, 0.0, 0.0]), turn])
    pose = torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0, 0.0])
    expected = torch.cat([torch.tensor([2.0, 0.0, 0.0]), -turn])
    assert_close(relative_pose(pose, reference, Format.XYZ_ROTVEC), expected, atol=1e-6, rtol=0)

    rows = torch.tensor([1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 1.0, 0.0, 0.0])  # R of +90 degrees: [0, -1, 0], [1, 0, 0]
    flat = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    six = relative_pose(flat, rows, Format.XYZ_ROT6D)
    assert_close(six, torch.tensor([2.0, 0.0, 0.0, 0.0, 1.0, 0.0, -1.0, 0.0, 0.0]), atol=1e-6, rtol=0)


def test_rotation_vectors_survive_matrices_also_near_zero_and_half_a_turn():
    torch.manual_seed(0)
    axes = torch.nn.functional.normalize(torch.randn(200, 3, dtype=torch.float64), dim=-1)
    for angle in (0.0, 1e-9, 1e-4, 1.0, 3.0, torch.pi - 1e-7):
        vector = angle * axes
        assert_close(to_rotvec(from_rotvec(vector)), vector, atol=1e-7, rtol=0)
    assert_close(torch.linalg.det(from_rotvec(axes)), torch.ones(200, dtype=torch.float64))


def test_six_numbers_are_made_a_rotation():
    matrix = to_matrix(torch.tensor([0.0, 0, 0, 2, 0, 0, 1, 3, 0]), Format.XYZ_ROT6D)
    assert_close(matrix, torch.eye(4))


@pytest.mark.parametrize("form", list(Format))
def test_poses_come_back(form):
    torch.manual_seed(0)
    rotation = from_rotvec(torch.randn(2, 7, 3))
    motion = torch.eye(4).repeat(2, 7, 1, 1)
    motion[..., :3, :3], motion[..., :3, 3] = rotation, torch.randn(2, 7, 3)
    pose = {
        Format.DEFAULT: motion.flatten(-2),
        Format.XYZ_ROT6D: torch.cat([motion[..., :3, 3], rotation[..., :2, :].flatten(-2)], -1),
        Format.XYZ_ROTVEC: torch.cat([motion[..., :3, 3], to_rotvec(rotation)], -1),
    }[form]
    reference = pose[:, :1]
    relative = relative_pose(pose, reference, form)
    assert_close(absolute_pose(relative, reference, form), pose, atol=1e-5, rtol=0)
    assert_close(to_matrix(relative[:, 0], form), torch.eye(4).expand(2, 4, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("form", "dims"), [("XYZ_ROT6D", 9), ("XYZ_ROTVEC", 6), ("DEFAULT", 16)])
def test_end_effector_chunks_come_back(form, dims):
    torch.manual_seed(0)
    key = {"slice": [0, dims], "representation": "RELATIVE", "kind": "EEF", "format": form, "state_key": "hand"}
    embodiment = Embodiment.parse({"horizon": 4, "state": {"hand": [0, dims]}, "action": {"eef": key}})
    vectors = torch.cat([torch.randn(30, 3), 0.3 * torch.randn(30, 3)], dim=-1)
    motion = to_matrix(vectors, Format.XYZ_ROTVEC)
    poses = {
        "DEFAULT": motion.flatten(-2),
        "XYZ_ROTVEC": vectors,
        "XYZ_ROT6D": torch.cat([motion[:, :3, 3], motion[:, :2, :3].flatten(1)], 1),
    }[form]
    table = statistics.from_episodes(embodiment, [(poses.numpy(), poses.numpy())])
    chunk, steps = poses[5:9][None], torch.arange(4)
    encoded = encode_action(chunk, poses[5:6], steps, embodiment, table, Rules())
    assert encoded.abs().max() <= 1
    assert_close(decode_action(encoded, poses[5:6], steps, embodiment, table, Rules()), chunk, atol=1e-4, rtol=0)


# statistics


def test_statistics_by_hand():
    """States 0, 1, 2, 3 and actions 10, 20, 30, 40, horizon 2. One step away: 10-0, 20-1, 30-2, 40-3; two: 20-0, 30-1,
    40-2. Pairs never reach over an episode's end: the second one, a single frame, adds 7-5 to the first step alone."""
    embodiment = Embodiment.parse(
        {"horizon": 2, "state": {"x": [0, 1]}, "action": {"x": {"slice": [0, 1], "representation": "RELATIVE"}}}
    )
    first = np.arange(4.0)[:, None], 10 * np.arange(1.0, 5)[:, None]
    table = statistics.from_episodes(embodiment, [first, (np.array([[5.0]]), np.array([[7.0]]))])
    assert table["state"]["x"]["max"].tolist() == [5]
    assert table["action"]["x"]["min"].tolist() == [7]
    relative = table["relative_action"]["x"]
    assert relative["min"].tolist() == [[2], [20]]
    assert relative["max"].tolist() == [[37], [38]]
    assert relative["mean"].flatten().tolist() == pytest.approx([(10 + 19 + 28 + 37 + 2) / 5, 29])
    assert relative["std"].flatten()[1].item() == pytest.approx(np.std([20, 29, 38]))


def test_statistics_of_a_lerobot_dataset_are_those_of_its_arrays(tmp_path):
    episodes = random_episodes()
    images = [np.zeros((len(state), 64, 96, 3), np.uint8) for state, _ in episodes]
    columns = [
        {OBS_STATE: state, ACTION: action, FRONT: image}
        for (state, action), image in zip(episodes, images, strict=True)
    ]
    dataset = LeRobotDataset("local/test", root=write(tmp_path / "data", columns, DATA | IMAGE))
    embodiment = Embodiment.parse(ARM)
    expected = statistics.flatten(statistics.from_episodes(embodiment, episodes))
    for found in (statistics.from_dataset(embodiment, dataset), statistics.from_metadata(embodiment, dataset.meta)):
        assert_close(statistics.flatten(found), expected)
    with pytest.raises(ProcessingError, match=r"reads observation\.images\.wrist, which the data lack"):
        statistics.from_dataset(Embodiment.parse(ARM | {"views": {"w": "observation.images.wrist"}}), dataset)

    part = LeRobotDataset("local/test", root=tmp_path / "data", episodes=[1])
    only = statistics.flatten(statistics.from_dataset(embodiment, part))
    assert_close(only, statistics.flatten(statistics.from_episodes(embodiment, episodes[1:])))


def test_every_demonstrated_chunk_lies_within_the_range():
    embodiment, episodes = Embodiment.parse(ARM), random_episodes()
    table = statistics.from_episodes(embodiment, episodes)
    state, action = (torch.from_numpy(column) for column in episodes[0])
    for start in range(3):
        chunk, reference = (
            action[start : start + 3][None],
            references_of({OBS_STATE: state[start : start + 1]}, embodiment),
        )
        encoded = encode_action(chunk, reference, torch.arange(3), embodiment, table, Rules(clip_outliers=False))
        assert encoded.abs().max() <= 1 + 1e-5


def test_statistics_that_cannot_be_computed_say_why():
    embodiment = Embodiment.parse(ARM)
    with pytest.raises(ProcessingError, match="no frames"):
        statistics.from_episodes(embodiment, [])
    with pytest.raises(ProcessingError, match="3 frames of a chunk: the longest has 2"):
        statistics.from_episodes(embodiment, random_episodes(lengths=(2, 1)))
    state, action = random_episodes()[0]
    action[1, 0] = np.nan
    with pytest.raises(ProcessingError, match='"action" is NaN or infinite in frame 1'):
        statistics.from_episodes(embodiment, [(state, action)])
    with pytest.raises(ProcessingError, match=r"action arm of .* is relative.*from_dataset.*ABSOLUTE"):
        statistics.from_dataset_stats(embodiment, {})


def test_statistics_that_do_not_fit_say_why(arm):
    embodiment, table = arm
    with pytest.raises(ProcessingError, match=r"are of chunks of 3 steps.*has 4.*or take horizon 3"):
        statistics.check_statistics(table, replace(embodiment, horizon=4), Rules())
    with pytest.raises(ProcessingError, match='no mean and std of state key "gripper"'):
        statistics.check_statistics(table | {"state": {"arm": table["state"]["arm"]}}, embodiment, Rules())
    wide = {"gripper": of_range([0.0, 0.0], [1.0, 1.0])}
    with pytest.raises(ProcessingError, match='action key "gripper" have 2 dimensions'):
        statistics.check_statistics(table | {"action": wide}, embodiment, Rules())


def test_lerobots_own_statistics_do_for_absolute_actions():
    stats = {OBS_STATE: of_range([0.0, 1, 2], [4.0, 5, 6]), ACTION: {"min": np.zeros(3), "max": np.ones(3)}}
    processing = resolve(config(), stats)
    assert processing.statistics["state"]["state"]["max"].tolist() == [4, 5, 6]
    assert set(processing.statistics["action"]["action"]) == {"min", "max"}


# images


@pytest.mark.parametrize("size", [(480, 640), (512, 512), (256, 256), (240, 320), (128, 200)])
@pytest.mark.parametrize("letterbox", [False, True])
def test_images_are_opencvs_and_pils_within_a_grey_level_or_two(size, letterbox):
    """Two resizes may each be one level off; the cubic step can add the two up to 3."""
    y, x = np.mgrid[: size[0], : size[1]]
    noise = np.random.default_rng(0).normal(0, 20, (*size, 3))
    frame = (127 + 100 * np.sin(x / 7)[..., None] * np.cos(y / 11)[..., None] + noise).clip(0, 255).astype(np.uint8)
    rules = ImageRules(letterbox=letterbox)
    images = torch.from_numpy(frame).permute(2, 0, 1)[None]
    levels = (transform_images(images, rules)[0].permute(1, 2, 0) * 0.5 + 0.5) * 255
    exact = torch.from_numpy(exact_frame(frame, rules)).float()
    off = (levels - exact).abs()
    assert off.max() <= 3.001
    assert off.mean() < 0.35
    assert_close(
        transform_images(images, replace(rules, exact=True))[0].permute(1, 2, 0), exact / 255 * 2 - 1, atol=1e-6, rtol=0
    )


def test_floats_and_bytes_are_the_same_image():
    images = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    assert torch.equal(transform_images(images, ImageRules()), transform_images(images.float() / 255, ImageRules()))


def test_sizes_of_the_specification():
    """256 x 256 -> crop 243 -> 252 x 252: 81 tokens; 480 x 640 without a letterbox -> 252 x 336: 108."""
    assert crop_box(256, 256, 0.95) == (6, 6, 243, 243)
    assert transform_images(torch.rand(1, 3, 256, 256), ImageRules()).shape == (1, 3, 252, 252)
    assert transform_images(torch.rand(1, 3, 480, 640), ImageRules()).shape == (1, 3, 252, 336)
    assert transform_images(torch.rand(1, 3, 480, 640), ImageRules(letterbox=True)).shape == (1, 3, 252, 252)
    assert smart_size(10, 10) == (56, 56)
    assert np.prod(smart_size(4000, 4000)) <= 4096 * 784


def test_reducing_by_area_is_an_average():
    """3 pixels into 2: each new one is 1.5 old ones, so weights 2/3 and 1/3."""
    assert_close(area_weights(3, 2), torch.tensor([[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]))


def test_black_white_and_grey_stay_what_they_are():
    for level in (0, 128, 255):
        images = torch.full((1, 3, 100, 120), level, dtype=torch.uint8)
        out = transform_images(images, ImageRules())
        assert_close(out, torch.full_like(out, level / 127.5 - 1))


def test_the_same_draw_serves_all_views_and_none_is_the_centre():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 64, 96)
    draw = Augmentation.draw(2)
    assert torch.equal(transform_images(images, ImageRules(), draw), transform_images(images, ImageRules(), draw))
    assert not torch.equal(
        transform_images(images, ImageRules(), Augmentation.draw(2)), transform_images(images, ImageRules(), draw)
    )
    neutral = Augmentation(torch.full((2, 2), 0.5), torch.tensor([[1.0, 1, 1, 0]]).expand(2, 4), draw.order)
    assert_close(
        transform_images(images, ImageRules(), neutral), transform_images(images, ImageRules()), atol=0.02, rtol=0
    )


def test_colours_are_changed_by_their_factors():
    """Twice as bright: levels double. No saturation: all channels equal."""
    images = torch.randint(0, 100, (1, 3, 8, 8)).float()
    plain = {"place": torch.zeros(1, 2), "order": torch.tensor([[0, 1, 2, 3]])}
    bright = jitter(images, Augmentation(colour=torch.tensor([[2.0, 1, 1, 0]]), **plain))
    assert_close(bright, 2 * images, atol=1, rtol=0)
    grey = jitter(images, Augmentation(colour=torch.tensor([[1.0, 1, 0, 0]]), **plain))
    assert_close(grey[:, 0], grey[:, 2])


def test_images_of_another_kind_are_refused():
    with pytest.raises(ProcessingError, match=r"shape \(1, 8, 8, 3\): expected \[B, 3"):
        transform_images(torch.rand(1, 8, 8, 3), ImageRules())
    with pytest.raises(ProcessingError, match=r"torch\.int64: expected float"):
        transform_images(torch.zeros(1, 3, 8, 8, dtype=torch.int64), ImageRules())


# prompts


def test_instructions_are_formalised():
    assert prompt.formalize_language("Pick up the RED pen, please!") == "pick up the red pen please"


def test_a_prompt_is_text_then_images():
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\ngo"
    text += "<image 1><img><IMG_CONTEXT></img><image 2><img><IMG_CONTEXT></img><|im_end|>\n"
    assert prompt.prompt_text("go", 2) == text


def test_prompt_ids_have_a_token_per_image_feature():
    """81 and 108 of the image token, between its brackets; nothing else has its id."""
    tokenizer, special = prompt.ByteTokenizer(), prompt.BYTE_IDS
    ids = prompt.prompt_ids(tokenizer, "go", [81, 108])
    runs = "".join("i" if token == special.image else "t" for token in ids).replace("t", " ").split()
    assert [len(run) for run in runs] == [81, 108]
    first = ids.index(special.image)
    assert ids[first - 1] == special.image_start
    assert ids[first + 81] == special.image_end
    assert bytes(i for i in ids if i < 256).decode() == (
        "system\nYou are a helpful assistant.\nuser\ngo<image 1><image 2>\n"
    )
    with pytest.raises(ProcessingError, match="contains <IMG_CONTEXT>"):
        prompt.prompt_ids(tokenizer, "<IMG_CONTEXT>", [4])


def test_prompts_are_padded_on_the_left():
    ids, mask = prompt.collate([[1, 2, 3], [4]], pad=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def words_tokenizer():
    """A stand-in for Qwen3's: the same special ids, one token per byte."""
    from tokenizers import AddedToken, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    filler = {f"filler{i}": i for i in range(256, 151_669)}
    special = dict(zip(prompt.SPECIAL[:3], (151_643, 151_644, 151_645), strict=True))
    vocabulary = {letter: i for i, letter in enumerate(alphabet)} | filler
    vocabulary = {token: i for token, i in vocabulary.items() if i not in special.values()} | special
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def test_the_image_tokens_are_added_at_the_checkpoints_ids_and_saved_with_the_policy(tmp_path, batch):
    words_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = prompt.load_tokenizer(tmp_path)
    assert tokenizer.encode("<|im_start|><img><IMG_CONTEXT></img><|im_end|>") == [
        151_644,
        151_670,
        151_669,
        151_671,
        151_645,
    ]
    step = PromptStep(ARM, str(tmp_path))
    assert step.state_dict() == {}  # not loaded yet
    ids = prompt.prompt_ids(step.tokenizer, "go", [4])
    other = PromptStep(ARM, "/nowhere")
    other.load_state_dict(step.state_dict())
    assert prompt.prompt_ids(other.tokenizer, "go", [4]) == ids


def test_tokenizers_that_cannot_be_had_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ProcessingError, match=r'"nobody/nothing" cannot be loaded .*Qwen/Qwen3-1\.7B.*local folder'):
        prompt.load_tokenizer("nobody/nothing")
    with pytest.raises(ProcessingError, match=r"folder /nowhere is not there\. Its files are public"):
        prompt.load_tokenizer("/nowhere")
    with pytest.raises(ProcessingError, match=r"holds neither tokenizer\.json nor vocab\.json"):
        prompt.load_tokenizer(tmp_path)
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ProcessingError, match="is not Qwen3's"):
        prompt.load_tokenizer(tmp_path)


# checkpoints


def write_checkpoint(folder, **kwargs):
    mode = {
        "delta_indices": [0],
        "sin_cos_embedding_keys": None,
        "mean_std_embedding_keys": None,
        "action_configs": None,
    }
    joints = {"rep": "RELATIVE", "type": "NON_EEF", "format": "DEFAULT", "state_key": None}
    absolute = joints | {"rep": "absolute"}
    gr1 = {
        "video": mode | {"modality_keys": ["ego_view"]},
        "state": mode | {"modality_keys": ["arm", "hand"], "sin_cos_embedding_keys": ["hand"]},
        "action": mode
        | {"delta_indices": [0, 1, 2], "modality_keys": ["hand", "arm"], "action_configs": [absolute, joints]},
        "language": mode | {"modality_keys": ["task"]},
    }
    defaults = {
        "modality_configs": {"gr1": gr1},
        "use_percentiles": False,
        "clip_outliers": True,
        "apply_sincos_state_encoding": True,
        "use_relative_action": True,
        "shortest_image_edge": 256,
        "crop_fraction": 0.95,
        "formalize_language": True,
    }
    flat = {kind: [1.0, 2.0] if kind == "max" else [0.0, 0.0] for kind in statistics.KINDS}
    steps = {kind: [values] * 3 for kind, values in flat.items()}
    table = {
        "gr1": {
            "state": {"arm": flat, "hand": flat},
            "action": {"arm": flat, "hand": flat},
            "relative_action": {"arm": steps},
        }
    }
    folder.mkdir(exist_ok=True)
    processor = {"processor_class": "Gr00tN1d6Processor", "processor_kwargs": defaults | kwargs}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "statistics.json").write_text(json.dumps(table))
    (folder / "embodiment_id.json").write_text(json.dumps({"gr1": 20}))
    return folder


def test_a_checkpoint_describes_its_embodiments(tmp_path):
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "groot"))
    embodiment, table = checkpoint.embodiment("gr1")
    assert (embodiment.slot, embodiment.horizon, embodiment.action_dim, embodiment.state_dim) == (20, 3, 4, 6)
    assert [(key.name, key.start, key.stop, key.is_relative) for key in embodiment.action] == [
        ("hand", 0, 2, False),
        ("arm", 2, 4, True),
    ]
    assert embodiment.views[0].column == "observation.images.ego_view"
    assert table["relative_action"]["arm"]["max"].tolist() == [[1, 2]] * 3
    mapped, _ = checkpoint.embodiment(
        "gr1",
        {
            "tag": "gr1",
            "views": {"ego_view": FRONT},
            "state": {"arm": [4, 6], "hand": [0, 2]},
            "action": {"arm": [0, 2], "hand": [2, 4]},
        },
    )
    assert mapped.order == [2, 3, 0, 1]
    assert mapped.views[0].column == FRONT


def test_a_checkpoints_switches_are_heeded(tmp_path):
    kwargs = {"use_relative_action": False, "apply_sincos_state_encoding": False, "use_percentiles": True}
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "groot", **kwargs))
    embodiment, _ = checkpoint.embodiment("gr1")
    assert not embodiment.references
    assert embodiment.state_dim == 4
    assert checkpoint.rules.bounds == ("q01", "q99")


def test_a_policy_on_a_checkpoint_keeps_its_statistics(tmp_path):
    folder = write_checkpoint(tmp_path / "groot", crop_fraction=0.9)
    features = {
        "input_features": {FRONT: config().input_features[FRONT], OBS_STATE: PolicyFeature(FeatureType.STATE, (4,))},
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (4,))},
    }
    described = config(base_model_path=str(folder), embodiment={"tag": "gr1", "views": {"ego_view": FRONT}}, **features)
    processing = resolve(described, {"anything": {}})
    assert processing.embodiment.tag == "gr1"
    assert processing.images.crop_fraction == 0.9
    assert processing.statistics["action"]["hand"]["max"].tolist() == [1, 2]
    own = resolve(replace_fields(described, embodiment=None))
    assert own.embodiment.tag == "new_embodiment"
    assert own.images.crop_fraction == 0.9


def replace_fields(settings, **changes):
    return SimpleNamespace(**vars(settings) | changes)


def test_checkpoints_that_do_not_fit_say_why(tmp_path):
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "groot"))
    with pytest.raises(ProcessingError, match=r'does not describe embodiment "g1"\. It knows gr1\. .*new_embodiment'):
        checkpoint.embodiment("g1")
    with pytest.raises(ProcessingError, match=r"names views front, which .*has not\. It has ego_view"):
        checkpoint.embodiment("gr1", {"views": {"front": FRONT}})
    (tmp_path / "groot" / "config.json").write_text(json.dumps({"model_type": "gr00t_n1_5"}))
    with pytest.raises(ProcessingError, match=r"is GR00T N1\.5.*This is GR00T N1\.6: take nvidia/GR00T-N1\.6-3B"):
        read_checkpoint(tmp_path / "groot")
    (tmp_path / "groot" / "config.json").write_text(json.dumps({"model_type": "Gr00tN1d7"}))
    with pytest.raises(ProcessingError, match=r"is GR00T N1\.7"):
        read_checkpoint(tmp_path / "groot")
    with pytest.raises(ProcessingError, match=r"no file .*processor_config\.json"):
        read_checkpoint(tmp_path)


# the pipelines


@pytest.fixture
def meta(tmp_path):
    columns = [
        {OBS_STATE: state, ACTION: action, FRONT: np.zeros((len(state), 64, 96, 3), np.uint8)}
        for state, action in random_episodes()
    ]
    return LeRobotDataset("local/test", root=write(tmp_path / "data", columns, DATA | IMAGE)).meta


def test_a_plain_dataset_goes_in_and_comes_back(meta, batch):
    pre, post = make_groot_n1d6_pre_post_processors(config(), meta.stats)
    batch[ACTION] = batch[ACTION].clamp(-0.1, 0.1)
    out = pre(dict(batch))
    shapes = {key: tuple(value.shape) for key, value in out.items() if key.startswith("observation.groot.")}
    length = out["observation.groot.input_ids"].shape[1]
    assert shapes == {
        "observation.groot.state": (2, 1, 8),
        "observation.groot.embodiment_id": (2,),
        "observation.groot.pixel_values.front": (2, 3, 252, 392),
        "observation.groot.input_ids": (2, length),
        "observation.groot.attention_mask": (2, length),
    }
    assert FRONT not in out  # the raw frames would only take memory
    assert out["observation.groot.embodiment_id"].tolist() == [10, 10]
    assert (out["observation.groot.input_ids"] == prompt.BYTE_IDS.image).sum(1).tolist() == [252 * 392 // 784] * 2
    assert out[ACTION].shape == (2, 3, 6)
    assert out[ACTION][..., 3:].abs().max() == 0
    assert_close(post(out[ACTION]), batch[ACTION], atol=1e-5, rtol=0)
    assert_close(post(out[ACTION][:, 0]), batch[ACTION][:, 0], atol=1e-5, rtol=0)  # one step
    assert_close(post(out[ACTION][..., :3].bfloat16()), batch[ACTION], atol=0.05, rtol=0)  # without the padding


def test_relative_statistics_come_from_the_datasets_files(meta):
    made = make_groot_n1d6_pre_post_processors(config(embodiment=ARM, _runtime_dataset_meta=meta), meta.stats)
    expected = statistics.from_episodes(Embodiment.parse(ARM), random_episodes())
    encode = next(step for step in made[0].steps if isinstance(step, EncodeStep))
    assert_close(statistics.flatten(encode.statistics), statistics.flatten(expected))
    with pytest.raises(ProcessingError, match="is relative"):
        make_groot_n1d6_pre_post_processors(config(embodiment=ARM), meta.stats)


def within(batch, episodes):
    """The batch with a state and a chunk that were demonstrated, so that nothing is clipped."""
    state, action = (torch.from_numpy(column) for column in episodes[1])
    return batch | {OBS_STATE: state[:2], ACTION: torch.stack([action[:3], action[1:4]])}


def test_lerobot_saves_loads_and_links_them(tmp_path, meta, batch):
    settings = config(embodiment=ARM, letterbox=True)
    pre, post = make_groot_n1d6_pre_post_processors(settings, meta.stats, meta)
    batch = within(batch, random_episodes())
    out = pre(dict(batch))
    assert out["observation.groot.reference"].shape == (2, 2)
    assert_close(post(out[ACTION]), batch[ACTION], atol=1e-5, rtol=0)
    for pipeline, name in ((pre, "policy_preprocessor.json"), (post, "policy_postprocessor.json")):
        pipeline.save_pretrained(tmp_path / "saved", config_filename=name)

    loaded, back = make_pre_post_processors(settings, pretrained_path=str(tmp_path / "saved"))
    again = loaded(dict(batch))
    assert_close({k: v for k, v in again.items() if "groot" in k}, {k: v for k, v in out.items() if "groot" in k})
    assert_close(back(again[ACTION]), batch[ACTION], atol=1e-5, rtol=0)

    # what lerobot-train overrides when it starts from a saved policy
    features = {**settings.input_features, **settings.output_features}
    norm_map = dict.fromkeys(("VISUAL", "STATE", "ACTION"), "IDENTITY")
    overridden, _ = make_pre_post_processors(
        settings,
        pretrained_path=str(tmp_path / "saved"),
        preprocessor_overrides={
            "device_processor": {"device": "cpu"},
            "normalizer_processor": {"features": features, "norm_map": norm_map, "stats": meta.stats},
            "rename_observations_processor": {"rename_map": {"observation.images.cam": FRONT}},
        },
        postprocessor_overrides={
            "unnormalizer_processor": {"features": settings.output_features, "norm_map": norm_map}
        },
    )
    renamed = dict(batch) | {"observation.images.cam": batch[FRONT]}
    del renamed[FRONT]
    assert_close(overridden(renamed)[ACTION], out[ACTION])


def test_one_pipeline_alone_says_that_it_is_not_linked(tmp_path, meta, batch):
    pre, post = make_groot_n1d6_pre_post_processors(config(embodiment=ARM), meta.stats, meta)
    chunk = pre(within(batch, random_episodes()))[ACTION]
    post.save_pretrained(tmp_path, config_filename="policy_postprocessor.json")
    alone = PolicyProcessorPipeline.from_pretrained(
        tmp_path,
        "policy_postprocessor.json",
        to_transition=lambda action: batch_to_transition({ACTION: action}),
        to_output=lambda transition: transition_to_batch(transition)[ACTION],
    )
    with pytest.raises(ProcessingError, match="is not linked"):
        alone(chunk)


def test_a_queue_of_relative_actions_is_decoded_with_the_state_of_its_chunk(meta, batch):
    """Between prediction and execution the pre-processor sees newer states; the steps carry the old one."""
    pre, post = make_groot_n1d6_pre_post_processors(config(embodiment=ARM), meta.stats, meta)
    batch = within(batch, random_episodes())
    out = pre(dict(batch))
    queue = tag_chunk(out[ACTION], out["observation.groot.reference"], 6)
    pre({OBS_STATE: batch[OBS_STATE] + 100, FRONT: batch[FRONT], "task": batch["task"]})
    for step in (2, 0, 1):
        assert_close(post(queue[:, step]), batch[ACTION][:, step], atol=1e-5, rtol=0)
    assert_close(post(queue), batch[ACTION], atol=1e-5, rtol=0)
    with pytest.raises(ProcessingError, match=r"one step of a chunk of relative actions.*tag_chunk"):
        post(out[ACTION][:, 0])
    pre({OBS_STATE: batch[OBS_STATE][:1], FRONT: batch[FRONT][:1], "task": ["go"]})
    with pytest.raises(ProcessingError, match=r"2 chunks of relative actions, but .* has 1 states"):
        post(out[ACTION])


def test_padding_beyond_the_embodiments_own_is_cut_off(meta, batch):
    _, post = make_groot_n1d6_pre_post_processors(config(), meta.stats)
    assert post(torch.zeros(2, 50, 6)).shape == (2, 3, 3)


def test_one_observation_gets_a_batch_axis(meta, batch):
    pre, _ = make_groot_n1d6_pre_post_processors(config(), meta.stats)
    out = pre({OBS_STATE: batch[OBS_STATE][0], FRONT: batch[FRONT][0], "task": "go"})
    assert out["observation.groot.state"].shape == (1, 1, 8)
    assert out["observation.groot.pixel_values.front"].shape[0] == 1
    assert len(out["observation.groot.input_ids"]) == 1


def test_only_training_batches_are_augmented(meta, batch):
    torch.manual_seed(0)
    pre, _ = make_groot_n1d6_pre_post_processors(config(augment_images=True), meta.stats)
    plain, _ = make_groot_n1d6_pre_post_processors(config(), meta.stats)
    acting = {key: value for key, value in batch.items() if key != ACTION}
    key = PIXEL_VALUES + "front"
    assert torch.equal(pre(dict(acting))[key], plain(dict(acting))[key])
    assert not torch.equal(pre(dict(batch))[key], plain(dict(batch))[key])


def test_a_state_may_have_columns_of_its_own():
    mapping = {
        "horizon": 2,
        "state": {"grip": {"slice": [0, 1], "column": "observation.grip"}},
        "action": {"a": [0, 1]},
    }
    table = {"state": {"grip": of_range([0.0], [2.0])}, "action": {"a": of_range([0.0], [1.0])}, "relative_action": {}}
    step = EncodeStep(mapping, 4, 4, statistics=table)
    for column in (torch.tensor([1.0, 2.0]), torch.tensor([[1.0], [2.0]])):  # LeRobot keeps single numbers bare
        out = transition_to_batch(step(batch_to_transition({"observation.grip": column})))
        assert out["observation.groot.state"].tolist() == [[[0, 0, 0, 0]], [[1, 0, 0, 0]]]


def test_batches_that_do_not_fit_say_why(meta, batch):
    pre, post = make_groot_n1d6_pre_post_processors(config(), meta.stats)
    for missing, message in (
        (OBS_STATE, r"lacks observation\.state.*it holds"),
        (FRONT, r"lacks observation\.images\.front"),
        ("task", '"task" is None, expected one text per row'),
    ):
        with pytest.raises(ProcessingError, match=message):
            pre({key: value for key, value in batch.items() if key != missing})
    with pytest.raises(ProcessingError, match=r"action has shape \(2, 3, 4\): expected \[B, H, 3\]"):
        pre(batch | {ACTION: torch.zeros(2, 3, 4)})
    with pytest.raises(ProcessingError, match="a chunk of 9 steps, but the horizon"):
        pre(batch | {ACTION: torch.zeros(2, 9, 3)})
    with pytest.raises(ProcessingError, match="1 instructions and 2 images"):
        pre(batch | {"task": ["go"]})
    with pytest.raises(ProcessingError, match="D at least 3"):
        post(torch.zeros(2, 2))


def test_policies_that_do_not_fit_say_why(meta):
    with pytest.raises(ProcessingError, match=r"chunk_size is 4, but .* horizon of 3"):
        make_groot_n1d6_pre_post_processors(config(embodiment=ARM, chunk_size=4), meta.stats, meta)
    with pytest.raises(ProcessingError, match="3 action dimensions, the network max_action_dim = 2"):
        make_groot_n1d6_pre_post_processors(config(max_action_dim=2), meta.stats)
    with pytest.raises(ProcessingError, match="max_state_dim = 2"):
        make_groot_n1d6_pre_post_processors(config(max_state_dim=2), meta.stats)
    with pytest.raises(ProcessingError, match=r"reads observation\.images\.front, .*which the data lack"):
        make_groot_n1d6_pre_post_processors(config(embodiment=ARM, input_features={}), meta.stats, meta)
    pre, _ = make_groot_n1d6_pre_post_processors(config())
    with pytest.raises(ProcessingError, match="no statistics of the data"):
        pre({OBS_STATE: torch.zeros(3), FRONT: torch.zeros(3, 64, 96), "task": "go"})


def test_statistics_are_checked_when_they_are_loaded(arm):
    embodiment, table = arm
    other = replace(embodiment, horizon=5)
    with pytest.raises(ProcessingError, match="chunks of 3 steps"):
        DecodeStep(other).load_state_dict(EncodeStep(embodiment, statistics=table).state_dict())


@pytest.mark.exhaustive
def test_saved_pipelines_load_where_there_is_only_this_distribution(tmp_path, meta, batch):
    """A fresh interpreter, no poco_vla, no network: what a robot's computer has."""
    pre, _ = make_groot_n1d6_pre_post_processors(config(), meta.stats)
    pre.save_pretrained(tmp_path, config_filename="policy_preprocessor.json")
    torch.save((batch, pre(dict(batch))["observation.groot.input_ids"]), tmp_path / "batch.pt")
    program = f"""
import sys, torch
sys.path[:0] = {sys.path!r}
sys.modules["poco_vla"] = None
import lerobot_policy_groot_n1d6.processing
from lerobot.processor import PolicyProcessorPipeline
pipeline = PolicyProcessorPipeline.from_pretrained({str(tmp_path)!r}, "policy_preprocessor.json")
batch, ids = torch.load({str(tmp_path / "batch.pt")!r})
assert torch.equal(pipeline(batch)["observation.groot.input_ids"], ids)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_it_needs_nothing_of_poco_vla():
    folder = Path(sys.modules["lerobot_policy_groot_n1d6.processing"].__file__).parent
    sources = [*folder.glob("*.py"), folder.parent / "processor_groot_n1d6.py"]
    assert not [path.name for path in sources if "poco_vla" in path.read_text()]
