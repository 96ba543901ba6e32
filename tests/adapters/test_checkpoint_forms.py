"""The forms that people have checkpoints in: shards, a LoRA of lerobot-train, statistics among the weights."""

import json
import shutil

import pytest
import torch
from lerobot_policy_flow_mlp.adapter import FlowMlp
from poco_vla_pi05.adapter import Pi05
from poco_vla_smolvla.adapter import SmolVla
from safetensors.torch import load_file, save_file

from poco_vla import PolicyError

ADAPTERS = {"flow_mlp": FlowMlp, "smolvla": SmolVla}
LINEAR = {"flow_mlp": "net.layers.1", "smolvla": "model.action_out_proj"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    for name, adapter in ADAPTERS.items():
        adapter.tiny().save_pretrained(root / name)
    return root


@pytest.fixture
def folder(bases, tmp_path, name):
    return shutil.copytree(bases / name, tmp_path / "policy")


def velocity(policy):
    generator = torch.Generator().manual_seed(0)
    spec = policy.spec
    x = torch.randn(2, 1, spec.horizon, spec.width, generator=generator)
    with torch.no_grad():
        return policy.velocity(policy.encode(policy.example_obs(2)), x, torch.rand(2, 1, generator=generator))


def split(folder, parts=2):
    """The weights in shards with an index, as transformers and accelerate write them."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    names = [f"model-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]
    table = {key: names[i % parts] for i, key in enumerate(sorted(tensors))}
    for shard in names:
        save_file({key: tensors[key] for key, held in table.items() if held == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    file.unlink()
    return names


def put_lora(folder, base, module, rank=2):
    """Return what peft writes for a LoRA layer in the place of its weights, and what it adds to the layer."""
    (folder / "model.safetensors").unlink()
    shape = load_file(base / "model.safetensors")[f"{module}.weight"].shape
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)
    name = f"base_model.model.{module}"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return 4 / rank * up @ down


@pytest.mark.parametrize("name", ADAPTERS)
def test_weights_in_shards_are_the_same_policy(bases, folder, name):
    split(folder)
    assert velocity(ADAPTERS[name].from_pretrained(folder)).equal(
        velocity(ADAPTERS[name].from_pretrained(bases / name))
    )


@pytest.mark.parametrize("name", ["flow_mlp"])
def test_a_shard_that_is_missing_is_named(folder, name):
    shard = split(folder)[1]
    (folder / shard).unlink()
    with pytest.raises(PolicyError, match=f"of 2 shards {shard} is missing"):
        FlowMlp.from_pretrained(folder)


@pytest.mark.parametrize("name", ["flow_mlp"])
@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", 3])
def test_an_index_names_files_beside_it_only(folder, name, shard):
    split(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(PolicyError, match="which is no file beside it"):
        FlowMlp.from_pretrained(folder)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_lora_of_lerobot_train_is_put_on_its_base(bases, folder, name):
    """The same function as the base whose layer was changed by hand: W + B A alpha / r."""
    base = bases / name
    added = put_lora(folder, base, LINEAR[name])
    loaded, expected = ADAPTERS[name].from_pretrained(folder), ADAPTERS[name].from_pretrained(base)
    assert not torch.allclose(velocity(loaded), velocity(expected), atol=1e-4)
    with torch.no_grad():
        owner = expected.model if name == "flow_mlp" else expected.policy
        owner.get_submodule(LINEAR[name]).weight += added
    torch.testing.assert_close(velocity(loaded), velocity(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["flow_mlp"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LOHA"}, "is a LOHA adapter of peft, not a plain LoRA: merge it into its base with peft"),
        ({"use_dora": True}, "merge it into its base"),
        ({"base_model_name_or_path": None}, 'does not say what base it belongs on: give policy_options {"base"'),
        ({"base_model_name_or_path": "/nowhere"}, "LoRA of peft on a base that cannot be had"),
    ],
)
def test_an_adapter_of_peft_that_is_not_used_is_refused_with_the_way_out(bases, folder, name, change, words):
    put_lora(folder, bases / name, LINEAR[name])
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(PolicyError, match=words):
        FlowMlp.from_pretrained(folder)


@pytest.mark.parametrize("name", ["flow_mlp"])
def test_a_base_that_has_moved_is_told(bases, folder, name):
    put_lora(folder, bases / name, LINEAR[name])
    expected = velocity(FlowMlp.from_pretrained(folder))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/nowhere"}))
    assert velocity(FlowMlp.from_pretrained(folder, base=bases / name)).equal(expected)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_pickle_is_named_and_never_read(folder, name):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(PolicyError, match=r"model\.safetensors is missing; pytorch_model\.bin may be a pickle"):
        ADAPTERS[name].from_pretrained(folder)


def old_form(folder, kinds=("mean", "std")):
    """A checkpoint from before LeRobot's processors: mean 5, deviation 3 among the weights."""
    tensors = load_file(folder / "model.safetensors")
    values = {"mean": 5.0, "std": 3.0, "min": -1.0, "max": 1.0}
    for side, n in (("normalize_inputs.buffer_observation_state", 6), ("unnormalize_outputs.buffer_action", 4)):
        tensors |= {f"{side}.{kind}": torch.full((n,), values[kind]) for kind in kinds}
    save_file(tensors, folder / "model.safetensors")
    for file in folder.glob("policy_*"):
        file.unlink()


@pytest.mark.parametrize("name", ["smolvla"])
def test_statistics_among_the_weights_are_used_and_saved_as_processors(folder, tmp_path, name):
    """By hand: a normalised 0 is the mean 5, a state of 8 is (8 - 5) / 3 = 1."""
    old_form(folder)
    SmolVla.from_pretrained(folder).save_pretrained(tmp_path / "new")
    for policy in (SmolVla.from_pretrained(folder), SmolVla.from_pretrained(tmp_path / "new")):
        torch.testing.assert_close(policy.postprocess(torch.zeros(1, 4)), torch.full((1, 4), 5.0))


@pytest.mark.parametrize("name", ["smolvla"])
def test_statistics_of_another_kind_are_refused_with_lerobots_own_remedy(folder, name):
    old_form(folder, kinds=("min", "max"))
    with pytest.raises(
        PolicyError, match=r"weights hold max, min .*MEAN_STD.*migrate_policy_normalization --pretrained-path"
    ):
        SmolVla.from_pretrained(folder)


@pytest.mark.parametrize("name", ["smolvla"])
def test_old_statistics_of_several_robots_are_no_weights(bases, folder, name):
    """SmolVLA's first base names its statistics "so100-red_buffer_action": they are of no one robot, and unused."""
    old = torch.full((4,), 5.0)
    tensors = load_file(folder / "model.safetensors") | {"unnormalize_outputs.so100-red_buffer_action.mean": old}
    save_file(tensors, folder / "model.safetensors")
    assert velocity(SmolVla.from_pretrained(folder)).equal(velocity(SmolVla.from_pretrained(bases / name)))


@pytest.mark.parametrize("name", ["smolvla"])
def test_a_head_on_a_lora_that_has_moved_is_put_on_it(bases, folder, tmp_path, name):
    put_lora(folder, bases / name, LINEAR[name])
    policy = SmolVla.from_pretrained(folder)
    policy.save_head(tmp_path / "head")
    moved = folder.rename(tmp_path / "moved")
    assert velocity(SmolVla.from_pretrained(tmp_path / "head", base=moved)).equal(velocity(policy))


@pytest.mark.parametrize(("adapter", "said"), [(SmolVla, 2), (SmolVla, 32), (Pi05, 32)])
def test_a_state_that_lerobot_trained_has_the_numbers_of_its_statistics(tmp_path, adapter, said):
    """lerobot-train keeps the inputs of the base that it starts from in config.json."""
    policy = adapter.tiny()
    policy.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    told = json.loads(file.read_text())
    told["input_features"]["observation.state"]["shape"] = [said]
    file.write_text(json.dumps(told))
    loaded = adapter.from_pretrained(tmp_path)
    assert loaded.feature_dim == policy.feature_dim
    raw = {
        key: torch.rand(1, 6 if key.endswith("state") else 3, *([64, 64] * ("image" in key)))
        for key in policy.input_keys
    }
    state = loaded.preprocess(raw | {"task": ["pick"]})["observation.state"]
    assert state.equal(policy.preprocess(raw | {"task": ["pick"]})["observation.state"])
