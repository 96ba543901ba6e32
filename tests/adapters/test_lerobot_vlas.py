"""Check what every adapter around a LeRobot VLA does alike: what one refuses the others refuse, in the same words."""

import json
import shutil
from dataclasses import dataclass

import pytest
import torch
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.utils.constants import ACTION, OBS_STATE
from pi05_folders import change_json, change_weights
from poco_vla_pi05.adapter import Pi05
from poco_vla_smolvla.adapter import SmolVla

from poco_vla import DataError, PocoError, PolicyError, check_policy
from poco_vla.adapting import lerobot_vla
from poco_vla.pretrained import heads

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
PROJECTION = "model.action_out_proj.weight"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"


@dataclass(frozen=True)
class Vla:
    """An adapter, and what differs in the messages about it.

    Attributes:
        adapter: its class.
        frozen: a tensor of its frozen part.
        mode: its normalisation.
        bounds: statistics under which a value of `spread` is normalised to 1, by kind.
        expert: part of the names of the head's tensors.
        columns: width of the expert.
    """

    adapter: type
    frozen: str
    mode: str
    bounds: dict[str, float]
    expert: str
    columns: int

    @property
    def needed(self):
        return " and ".join(self.bounds)


VLAS = {
    "pi05": Vla(
        Pi05,
        "model.paligemma_with_expert.paligemma.model.language_model.norm.weight",
        "QUANTILES",
        {"q01": -1.0, "q99": 1.0},
        "gemma_expert.model",
        32,
    ),
    "smolvla": Vla(
        SmolVla,
        "model.vlm_with_expert.vlm.model.text_model.norm.weight",
        "MEAN_STD",
        {"mean": 0.0, "std": 1.0},
        "lm_expert",
        36,
    ),
}


@pytest.fixture(scope="module", params=VLAS)
def vla(request):
    return VLAS[request.param]


@pytest.fixture(scope="module")
def saved(vla, tmp_path_factory):
    folder = tmp_path_factory.mktemp(vla.adapter.adapter) / "tiny"
    vla.adapter.tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(saved, tmp_path / "policy")


def dataset(vla, state=6, action=4, cameras=(FRONT, WRIST), spread=4.0):
    """LeRobot features and statistics of a dataset; a value of `spread` is normalised to 1."""
    camera = {"dtype": "video", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
    sizes = {OBS_STATE: state, ACTION: action}
    features: dict = dict.fromkeys(cameras, camera)
    features |= {key: {"dtype": "float32", "shape": (n,), "names": None} for key, n in sizes.items()}
    stats = {key: {kind: torch.full((n,), spread * b) for kind, b in vla.bounds.items()} for key, n in sizes.items()}
    return {"features": features, "stats": stats}


def raw_batch(size=2, cameras=(FRONT, WRIST), steps=50):
    """What a dataset gives, in the robot's units."""
    generator = torch.Generator().manual_seed(0)
    return {key: torch.rand(size, 3, 64, 64, generator=generator) for key in cameras} | {
        OBS_STATE: torch.rand(size, 6, generator=generator) * 2 - 1,
        ACTION: torch.rand(size, steps, 4, generator=generator) * 2 - 1,
        "task": ["pick up the pen", "hang the keychain on the hook"][:size],
    }


@torch.no_grad()
def velocity(policy, horizon=10):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, horizon, 32, generator=generator)
    obs = type(policy).tiny().example_obs(2)
    return policy.velocity(policy.encode(obs), x, torch.rand(2, 3, generator=generator))


# -- what cannot be loaded --------------------------------------------------------------------------------------------


def drop(name):
    return lambda folder: change_weights(folder, lambda weights: weights.pop(name))


def put(name, *shape):
    return lambda folder: change_weights(folder, lambda weights: weights.update({name: torch.zeros(shape)}))


def cut_short(folder):
    file = folder / heads.POLICY_WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])


def no_safetensors(folder):
    (folder / heads.POLICY_WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 4)


def no_cameras(folder):
    held = json.loads((folder / "config.json").read_text())["input_features"]
    change_json(folder / "config.json", input_features={OBS_STATE: held[OBS_STATE]})


def another_mode(folder):
    for file in (PREPROCESSOR, POSTPROCESSOR):
        held = json.loads((folder / file).read_text())
        for step in held["steps"]:
            if "norm_map" in step.get("config", {}):
                step["config"]["norm_map"]["ACTION"] = "MIN_MAX"
        (folder / file).write_text(json.dumps(held))


SPOILED = {
    "missing tensor": (drop(PROJECTION), rf"1 missing: {PROJECTION}"),
    "missing tensor of the frozen part": (lambda f, vla: drop(vla.frozen)(f), r"1 missing: {vla.frozen}"),
    "unexpected tensor": (put("model.memory.weight", 2, 2), r"1 unexpected: model\.memory\.weight"),
    "wrong shape": (
        lambda f, vla: put(PROJECTION, 7, vla.columns)(f),
        rf"of another shape: {PROJECTION} is \[7, {{vla.columns}}\], expected \[32, {{vla.columns}}\]",
    ),
    "truncated weights": (cut_short, r"model\.safetensors is damaged, cut short, or no safetensors file"),
    "weights that are a pointer": (no_safetensors, r"model\.safetensors is damaged, cut short, or no safetensors file"),
    "no weights": (lambda f: (f / heads.POLICY_WEIGHTS).unlink(), r"model\.safetensors is missing"),
    "no configuration": (lambda f: (f / "config.json").unlink(), r"config\.json is missing \(the folder holds"),
    "damaged configuration": (lambda f: (f / "config.json").write_text("{"), r"config\.json is damaged"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), r"config\.json is damaged"),
    "field that LeRobot lacks": (
        lambda f: change_json(f / "config.json", memory_frames=3),
        r"(?s)config\.json is not understood by LeRobot: .*memory_frames",
    ),
    "another policy": (
        lambda f: ACTConfig(push_to_hub=False).save_pretrained(f),
        'policy of type "act", expected "{vla.adapter.adapter}"',
    ),
    "no camera": (no_cameras, "names no camera among its input_features: {vla.adapter.model} acts on pictures"),
    "damaged pre-processor": (lambda f: (f / PREPROCESSOR).write_text("{"), r"policy_preprocessor\.json is damaged"),
    "pre-processor with a step that nobody knows": (
        lambda f: change_json(f / PREPROCESSOR, steps=[{"registry_name": "magic", "config": {}}]),
        r"processors in .* cannot be loaded: .*magic",
    ),
    "another normalisation than the configuration's": (
        another_mode,
        r'the pre-processor in .* normalises by MIN_MAX "action", and the policy.s config\.json says {vla.mode}',
    ),
    "damaged statistics": (
        lambda f: next(f.glob("policy_preprocessor*normalizer*")).write_bytes(b"1234"),
        r"normalizer_processor\.safetensors is damaged",
    ),
}


def spoil_folder(spoil, folder, vla):
    spoil(folder, vla) if spoil.__code__.co_argcount == 2 else spoil(folder)


@pytest.mark.parametrize(("spoil", "words"), SPOILED.values(), ids=SPOILED)
def test_a_folder_with_a_fault_is_refused_and_the_fault_named(vla, folder, spoil, words):
    spoil_folder(spoil, folder, vla)
    with pytest.raises(PolicyError, match=words.replace("{vla", "{0").format(vla) if "{vla" in words else words):
        vla.adapter.from_pretrained(folder)


@pytest.mark.parametrize("name", ["pre-processor with a step that nobody knows", "damaged pre-processor"])
def test_processors_are_checked_even_where_a_dataset_takes_their_place(vla, folder, name):
    spoil, words = SPOILED[name]
    spoil(folder)
    with pytest.raises(PolicyError, match=words):
        vla.adapter.from_pretrained(folder, statistics="dataset", **dataset(vla))


def test_processors_are_checked_before_weights_are_fetched(vla, folder):
    (folder / heads.POLICY_WEIGHTS).unlink()
    (folder / PREPROCESSOR).write_text("{")
    with pytest.raises(PolicyError, match=r"policy_preprocessor\.json is damaged"):
        vla.adapter.from_pretrained(folder)


def test_lost_statistics_are_missed(vla, folder):
    for file in folder.glob("*normalizer*.safetensors"):
        file.unlink()
    with pytest.raises(DataError, match=f"has no {vla.needed} for"):
        vla.adapter.from_pretrained(folder)


def test_many_wrong_tensors_are_counted_and_some_named(vla, folder):
    change_weights(folder, lambda weights: [weights.pop(name) for name in list(weights) if vla.expert in name])
    with pytest.raises(PolicyError, match=rf"\d\d missing: .*{vla.expert}.* \.\.\."):
        vla.adapter.from_pretrained(folder)


@pytest.mark.parametrize("path", ["/nowhere/policy", "./nowhere", "nowhere", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(vla, path):
    with pytest.raises(PolicyError, match=rf"^no policy in {path}: the folder does not exist"):
        vla.adapter.from_pretrained(path)


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_hub_repository_that_cannot_be_had_is_named(vla, monkeypatch, revision):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    at = ' at revision "v1"' if revision else ""
    with pytest.raises(PolicyError, match=rf'"nobody/nothing"{at} is no local folder and cannot be had from the Hub'):
        vla.adapter.from_pretrained("nobody/nothing", revision=revision)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden_dims": [3], "colour": "red"}, "{0} has no option colour, hidden_dims"),
        ({"horizon": 51}, "chunks of 50 steps, asked for 51: it never saw positions beyond"),
        ({"horizon": 0}, "horizon is 0; a chunk has at least one step"),
        ({"dtype": "float16"}, 'dtype is "float16".*bfloat16, float32'),
        ({"statistics": "mine"}, 'statistics is "mine".*auto, checkpoint, dataset'),
        ({"statistics": "dataset"}, 'statistics="dataset" without a dataset'),
        ({"normalization_mapping": {"STATE": "SIGMA"}}, "SIGMA.*MEAN_STD"),
        ({"normalization_mapping": {"STATES": "MEAN_STD"}}, "STATES.*STATE"),
        ({"normalization_mapping": {"STATE": "MIN_MAX"}}, 'has no min and max for "observation.state"'),
        ({"revision": "main"}, 'local folder and has no revisions, but revision "main"'),
        ({"lora": 0}, "lora.rank is 0"),
        ({"cameras": [FRONT]}, r"trained with the cameras .*, and observation\.images\.wrist is not among"),
    ],
)
def test_options_that_cannot_work_are_named(vla, saved, options, words):
    with pytest.raises(PocoError, match=words.format(vla.adapter.adapter)):
        vla.adapter.from_pretrained(saved, **options)


def test_a_vla_does_not_start_from_nothing(vla):
    with pytest.raises(PolicyError, match=f"{vla.adapter.adapter} starts from a pretrained base: give policy"):
        vla.adapter.from_dataset({}, {}, horizon=10)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"cameras": ()}, "no camera at all; its cameras: none"),
        ({"state": 33}, '"observation.state" has 33 dimensions, the checkpoint knows at most 32'),
        ({"action": 33}, '"action" has 33 dimensions, the checkpoint knows at most 32'),
    ],
)
def test_a_dataset_that_does_not_fit_is_refused(vla, saved, data, words):
    with pytest.raises(PolicyError, match=words):
        vla.adapter.from_pretrained(saved, statistics="dataset", **dataset(vla, **data))


def test_a_dataset_without_a_state_or_of_other_sizes_is_refused(vla, saved):
    data = dataset(vla)
    del data["features"][OBS_STATE]
    with pytest.raises(PolicyError, match=rf"{vla.adapter.model} needs {OBS_STATE} and {ACTION}; the dataset has"):
        vla.adapter.from_pretrained(saved, statistics="dataset", **data)
    with pytest.raises(
        DataError, match=r'"observation.state" has 7 dimensions in the dataset, and .* was trained on 6'
    ):
        vla.adapter.from_pretrained(saved, statistics="checkpoint", **dataset(vla, state=7))
    data = dataset(vla, cameras=(FRONT, "observation.images.hand"), spread=1.0)
    with pytest.raises(DataError, match=rf"trained with the cameras .*, and the dataset has no {WRIST}"):
        vla.adapter.from_pretrained(saved, statistics="checkpoint", **data)


# -- whose statistics -------------------------------------------------------------------------------------------------


def normalised(policy, value):
    """What a state and an action of `value` in all dimensions become; and the way back."""
    size = policy.policy.config.robot_state_feature.shape[0]
    batch = raw_batch(1, cameras=policy.input_keys[:-1]) | {
        OBS_STATE: torch.full((1, size), value),
        ACTION: torch.full((1, 3, policy.spec.action_dim), value),
    }
    processed = policy.preprocess(batch)
    torch.testing.assert_close(policy.postprocess(processed[ACTION]), batch[ACTION], rtol=1e-5, atol=1e-5)
    return processed[OBS_STATE].unique().item(), processed[ACTION].unique().item()


@pytest.mark.parametrize("statistics", ["auto", "checkpoint", "dataset"])
def test_a_trained_policy_keeps_its_statistics_unless_told(vla, folder, statistics):
    """The checkpoint's are of spread 3, the dataset's of spread 4."""
    policy = vla.adapter.from_pretrained(folder, statistics="dataset", **dataset(vla, spread=3.0))
    policy.save_pretrained(folder)
    policy = vla.adapter.from_pretrained(folder, statistics=statistics, **dataset(vla))
    spread = 4.0 if statistics == "dataset" else 3.0
    assert normalised(policy, spread) == pytest.approx((1.0, 1.0))
    assert policy.input_keys == (FRONT, WRIST, OBS_STATE)


def test_a_trained_policy_may_take_on_a_dataset_of_other_sizes(vla, saved, tmp_path):
    """Cameras, state and action are then the dataset's, and so is what is saved."""
    data = dataset(vla, state=9, action=7, cameras=(WRIST,))
    policy = vla.adapter.from_pretrained(saved, statistics="dataset", **data)
    policy.save_pretrained(tmp_path / "taken")
    for taken in (policy, vla.adapter.from_pretrained(tmp_path / "taken")):
        assert taken.input_keys == (WRIST, OBS_STATE)
        assert (taken.spec.action_dim, taken.feature_dim) == (7, vla.adapter.tiny().feature_dim + 3)
        assert normalised(taken, 4.0) == pytest.approx((1.0, 1.0))
    check_policy(taken)


SWAPPED = {FRONT: WRIST, WRIST: FRONT}


@pytest.mark.parametrize(
    ("cameras", "seen"),
    [([WRIST], [WRIST]), ([WRIST, FRONT], [FRONT, WRIST]), (SWAPPED, [WRIST, FRONT])],
    ids=["one", "listed backwards", "mapped"],
)
def test_cameras_keep_their_slots_unless_they_are_mapped(vla, saved, cameras, seen):
    """Positions differ, so order matters: it is the checkpoint's, not a list's. One that is left out is not seen."""
    options = dataset(vla, cameras=("observation.images.side", WRIST, FRONT)) | {"statistics": "dataset"}
    policy = vla.adapter.from_pretrained(saved, cameras=cameras, **options)
    assert policy.input_keys == (*seen, OBS_STATE)
    in_order = vla.adapter.from_pretrained(saved, statistics="dataset", **dataset(vla))
    found, expected = (p.encode(p.preprocess(raw_batch())).features for p in (policy, in_order))
    assert torch.allclose(found, expected, atol=1e-5) is (seen == [FRONT, WRIST])


# -- a batch ----------------------------------------------------------------------------------------------------------


def nan(row):
    def change(tensor):
        tensor = tensor.clone()
        tensor[row].view(-1)[-1] = float("nan")
        return tensor

    return change


WRONG = {
    "a camera under another name": (
        lambda b: b.update({"observation.images.hand": b.pop(WRIST)}),
        rf"the batch lacks {WRIST}; it holds action, observation\.images\.front, observation\.images\.hand",
    ),
    "no state": (lambda b: b.pop(OBS_STATE), rf"the batch lacks {OBS_STATE}; it holds action, "),
    "a wider state": (
        lambda b: b.update({OBS_STATE: torch.zeros(2, 7)}),
        rf'"{OBS_STATE}" has 7 dimensions, the policy knows 6',
    ),
    "padded actions": (lambda b: b.update({ACTION: torch.zeros(2, 50, 32)}), '"action" has 32 dimensions.* knows 4'),
    "NaN in a state": (lambda b: b.update({OBS_STATE: nan(1)(b[OBS_STATE])}), f'"{OBS_STATE}" is NaN.* in row 1'),
    "NaN in an image": (lambda b: b.update({WRIST: nan(0)(b[WRIST])}), rf'"{WRIST}" is NaN or infinite in row 0'),
    "NaN in an action": (lambda b: b.update({ACTION: nan(1)(b[ACTION])}), '"action" is NaN or infinite in row 1'),
    "infinity": (lambda b: b.update({OBS_STATE: b[OBS_STATE] / 0}), rf'"{OBS_STATE}" is NaN or infinite in row 0'),
    "no instruction": (lambda b: b.pop("task"), "the batch lacks task; it holds action, "),
    "an empty instruction": (
        lambda b: b.update({"task": ["pick", " \n"]}),
        "row 1 of the batch has an empty instruction",
    ),
    "images of bytes": (
        lambda b: b.update({FRONT: (255 * b[FRONT]).byte()}),
        rf'"{FRONT}" is torch\.uint8.*\[0, 1\]',
    ),
    "images up to 255": (lambda b: b.update({FRONT: 255 * b[FRONT]}), rf'"{FRONT}" reaches 25\d'),
}


@pytest.fixture(scope="module")
def tiny(vla):
    return vla.adapter.tiny()


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_a_batch_that_cannot_be_read_is_refused_and_the_cause_named(tiny, change, words):
    batch = raw_batch()
    change(batch)
    with pytest.raises(DataError, match=words):
        tiny.preprocess(batch)


def test_a_policy_without_processors_says_so(vla, tmp_path):
    bare = vla.adapter.wrap(vla.adapter.tiny().policy)
    words = rf"this {vla.adapter.__name__} was wrapped without processors: give {vla.adapter.__name__}\.wrap"
    for call in (
        lambda: bare.preprocess(raw_batch()),
        lambda: bare.preprocess_actions(raw_batch()),
        lambda: bare.postprocess(torch.zeros(1, 4)),
        lambda: bare.save_pretrained(tmp_path / "policy"),
    ):
        with pytest.raises(PolicyError, match=words):
            call()
    assert not list(tmp_path.iterdir())


def test_the_frozen_part_stays_in_eval_mode(vla, tiny):
    backbone = tiny.train().policy.model.get_submodule(vla.adapter.backbone)
    assert not any(module.training for module in backbone.modules())
    assert tiny.head.training


# -- saving -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_written_whole_or_not_at_all(vla, tmp_path, monkeypatch):
    def full_disk(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    policy = vla.adapter.tiny()
    policy.save_pretrained(tmp_path / "old")
    held = {p.name: p.read_bytes() for p in (tmp_path / "old").glob("*") if p.is_file()}
    based = vla.adapter.from_pretrained(tmp_path / "old")
    monkeypatch.setattr(lerobot_vla, "save_file", full_disk)
    monkeypatch.setattr(heads, "save_file", full_disk)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="no space left"):
            policy.save_pretrained(tmp_path / name)
    with pytest.raises(OSError, match="no space left"):
        based.save_head(tmp_path / "head")
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "old").glob("*") if p.is_file()} == held


def test_nothing_but_a_policy_is_replaced(vla, folder, tmp_path):
    """A folder of somebody's own stays; a head does not take the place of a whole policy."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("three years")
    policy = vla.adapter.from_pretrained(folder)
    with pytest.raises(PocoError, match="mine holds something else than a policy"):
        policy.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "three years"
    with pytest.raises(PolicyError, match="holds a whole policy, which a head is not to replace"):
        policy.save_head(folder)


def test_a_policy_from_nowhere_has_no_head_to_save(vla, tmp_path):
    with pytest.raises(PolicyError, match="built from no checkpoint"):
        vla.adapter.tiny().save_head(tmp_path / "head")
    assert not list(tmp_path.iterdir())


def test_what_was_trained_on_a_bfloat16_backbone_is_loaded_on_one(vla, folder, tmp_path):
    policy = vla.adapter.from_pretrained(folder, horizon=10, dtype="bfloat16")
    policy.save_pretrained(tmp_path / "out")
    policy.save_head(tmp_path / "head")
    for name in ("out", "head"):
        assert json.loads((tmp_path / name / heads.ABOUT).read_text())["options"] == {"dtype": "bfloat16"}
        loaded = vla.adapter.from_pretrained(tmp_path / name)
        assert velocity(loaded).equal(velocity(policy))
        assert loaded.backbone_dtype is torch.bfloat16


def test_a_head_is_refused_on_another_base_and_follows_one_that_has_moved(vla, folder, tmp_path):
    policy = vla.adapter.from_pretrained(folder, horizon=10)
    policy.save_head(tmp_path / "head")
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(PolicyError, match="If it has moved, say where it is now"):
        vla.adapter.from_pretrained(tmp_path / "head")
    assert velocity(vla.adapter.from_pretrained(tmp_path / "head", base=moved)).equal(velocity(policy))
    vla.adapter.tiny(seed=9).save_pretrained(folder)
    with pytest.raises(PolicyError, match="trained on another base model than"):
        vla.adapter.from_pretrained(tmp_path / "head")
