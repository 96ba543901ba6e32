"""Folders that somebody else wrote: nothing in them runs, takes memory or changes units without a word."""

import json
import os
import shutil
import struct
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from poco_vla import PocoError, load_adapter
from poco_vla.adapting.weights import weights_of, whole_source
from poco_vla.cli import main
from poco_vla.hub import export_policy, load_head
from poco_vla.pretrained import heads
from poco_vla.pretrained.sources import locate

ADAPTERS = ("flow_mlp", "pi05", "smolvla", "groot_n1d6")
WEIGHTS, CONFIG = heads.POLICY_WEIGHTS, "config.json"
PIPELINES = ("policy_preprocessor.json", "policy_postprocessor.json")
NORMALISING = ("normalizer_processor", "unnormalizer_processor", "groot_n1d6_encode", "groot_n1d6_decode")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a small policy by adapter, and the actions that it makes of normalised ones."""
    top = tmp_path_factory.mktemp("saved")

    @cache
    def make(name):
        policy = load_adapter(name).tiny()
        policy.save_pretrained(top / name)
        return top / name, denormalised(policy)

    return make


@pytest.fixture
def folder_of(saved, tmp_path):
    return lambda name: shutil.copytree(saved(name)[0], tmp_path / name, symlinks=True)


def denormalised(policy):
    return policy.postprocess(torch.full((1, policy.spec.horizon, policy.spec.action_dim), 0.5))


@pytest.fixture
def hostile(tmp_path):
    """A repository whose code, if anybody runs it, leaves a file: as a model, a tokenizer and a processor."""
    marker, folder = tmp_path / "marker", tmp_path / "hostile"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\nEvilConfig = Evil\n")
    classes = dict.fromkeys(("AutoModel", "AutoProcessor", "AutoTokenizer"), "evil.Evil")
    table = {"auto_map": classes | {"AutoConfig": "evil.EvilConfig"}, "model_type": "evil"}
    tokenizer = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoProcessor": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(table))
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps(table | tokenizer | {"tokenizer_class": "Evil"}))
    return folder, marker


def change(file, edit):
    """Let `edit` work on what a JSON file holds."""
    held = json.loads(file.read_text())
    edit(held)
    file.write_text(json.dumps(held))


def steps_of(file, names=NORMALISING):
    """A damage: `edit` works on those steps of a pipeline that normalise."""

    def damage(edit):
        def on(folder):
            change(
                folder / file,
                lambda held: [edit(step, folder) for step in held["steps"] if step["registry_name"] in names],
            )

        return on

    return damage


def refused(name, folder):
    with pytest.raises(PocoError) as told:
        load_adapter(name).from_pretrained(folder)
    assert "Traceback" not in str(told.value)
    assert len(str(told.value)) < 1500
    return str(told.value)


# -- code --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("file", PIPELINES)
@pytest.mark.parametrize("naming", ["registry_name", "class"])
def test_a_step_that_loads_code_by_name_is_refused(folder_of, hostile, adapter, file, naming):
    repo, marker = hostile
    folder = folder_of(adapter)
    named = {
        "registry_name": "action_tokenizer_processor",
        "class": "lerobot.processor.tokenizer_processor.ActionTokenizerProcessorStep",
    }
    config = {"action_tokenizer_name": str(repo), "paligemma_tokenizer_name": str(repo), "trust_remote_code": True}
    change(folder / file, lambda held: held["steps"].append({naming: named[naming], "config": config}))
    assert named[naming] in refused(adapter, folder)
    assert not marker.exists()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("file", PIPELINES)
def test_an_argument_that_is_not_on_the_list_is_refused(folder_of, adapter, file):
    folder = folder_of(adapter)
    change(folder / file, lambda held: held["steps"][0].setdefault("config", {}).update(trust_remote_code=True))
    assert "trust_remote_code" in refused(adapter, folder)


def name_the_tokenizer(folder, repo):
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    change(
        folder / PIPELINES[0],
        lambda held: [
            s["config"].update(tokenizer_name=repo) for s in held["steps"] if "tokenizer_name" in s["config"]
        ],
    )


def name_the_prompts_tokenizer(folder, repo):
    change(
        folder / PIPELINES[0],
        lambda held: [s["config"].update(tokenizer=repo) for s in held["steps"] if "tokenizer" in s["config"]],
    )
    change(folder / CONFIG, lambda held: held.update(tokenizer=repo))


def name_the_vlm(folder, repo):
    shutil.rmtree(folder / "vlm")
    change(folder / CONFIG, lambda held: held.update(vlm_model_name=repo))


def name_the_encoder(folder, repo):
    picture = {"type": "VISUAL", "shape": [3, 64, 64]}
    change(
        folder / CONFIG,
        lambda held: (
            held.update(vision_encoder=repo) or held["input_features"].update({"observation.images.front": picture})
        ),
    )


NAMED = {
    "flow_mlp": name_the_encoder,
    "pi05": name_the_tokenizer,
    "smolvla": name_the_vlm,
    "groot_n1d6": name_the_prompts_tokenizer,
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_repository_that_a_file_names_runs_no_code(folder_of, hostile, adapter):
    repo, marker = hostile
    folder = folder_of(adapter)
    NAMED[adapter](folder, str(repo))
    try:
        policy = load_adapter(adapter).from_pretrained(folder)
        policy.preprocess({"observation.state": torch.zeros(1, 6), "task": ["go"]})
    except (PocoError, ValueError):
        pass
    assert not marker.exists()


@pytest.mark.parametrize("verb", ["eval", "serve", "export", "load_head"])
def test_no_command_runs_code_of_a_folder(folder_of, hostile, tmp_path, verb, capsys):
    repo, marker = hostile
    folder = folder_of("flow_mlp")
    name_the_encoder(folder, str(repo))
    commands = {
        "eval": lambda: main(["eval", str(folder), "--env", "{}"]),
        "serve": lambda: main(["serve", str(folder), "--port", "0", "--fps", "10"]),
        "export": lambda: export_policy(folder, tmp_path / "out"),
        "load_head": lambda: load_head(folder),
    }
    with pytest.raises((SystemExit, PocoError)):
        commands[verb]()
    assert not marker.exists()


def test_an_encoders_own_code_runs_for_a_user_who_trusts_it_and_no_file_can_say_so(folder_of, hostile, monkeypatch):
    repo, marker = hostile
    folder = folder_of("flow_mlp")
    name_the_encoder(folder, str(repo))
    change(folder / CONFIG, lambda held: held.update(trust_remote_code=True))
    assert "trust_remote_code" in refused("flow_mlp", folder)
    change(folder / CONFIG, lambda held: held.pop("trust_remote_code"))
    change(folder / heads.ABOUT, lambda held: held["options"].update(trust_remote_code=True))
    assert 'policy_options {"trust_remote_code": true}' in refused("flow_mlp", folder)
    assert not marker.exists()
    monkeypatch.setenv("POCO_VLA_TRUST_REMOTE_CODE", "1")
    with pytest.raises(Exception):  # noqa: B017, PT011 (the code that ran is no model)
        load_adapter("flow_mlp").from_pretrained(folder)
    assert marker.exists()


def test_a_dtype_is_no_name_of_something_else_in_torch(folder_of):
    for name in ("pi05", "smolvla"):
        folder = folder_of(name)
        change(folder / heads.ABOUT, lambda held: held["options"].update(dtype="load"))
        assert "dtype is 'load'" in refused(name, folder)


# -- units -------------------------------------------------------------------------------------------------------------


def spoil_state(folder, step, edit):
    if "state_file" in step:
        tensors = load_file(folder / step["state_file"])
        edit(tensors)
        save_file(tensors, folder / step["state_file"])


def widened(tensors):
    for name, tensor in tensors.items():
        if name.rpartition(".")[2].rpartition("/")[2] in ("max", "std", "q99"):
            tensors[name] = 3 * tensor


LOST = {
    "no state": lambda step, folder: step.pop("state_file", None),
    "state file gone": lambda step, folder: "state_file" in step and (folder / step["state_file"]).unlink(),
    "empty statistics": lambda step, folder: spoil_state(folder, step, lambda held: held.clear()),
    "other statistics": lambda step, folder: spoil_state(folder, step, widened),
    "statistics that are NaN": lambda step, folder: spoil_state(
        folder, step, lambda held: [t.fill_(torch.nan) for t in held.values()]
    ),
    "no normalisation": lambda step, folder: step["config"].update(
        norm_map=dict.fromkeys(step["config"].get("norm_map", {}), "IDENTITY")
    ),
    "no features": lambda step, folder: "features" in step["config"] and step["config"].update(features={}),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("file", PIPELINES)
@pytest.mark.parametrize("loss", LOST)
def test_actions_are_in_the_robots_units_or_refused(saved, folder_of, adapter, file, loss):
    """A post-processor that lost its statistics gives 0.5 where 90 degrees are meant."""
    folder = folder_of(adapter)
    steps_of(file)(LOST[loss])(folder)
    right_or_refused(saved, adapter, folder)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("file", PIPELINES)
def test_a_step_that_was_taken_out_is_missed(saved, folder_of, adapter, file):
    folder = folder_of(adapter)
    change(
        folder / file,
        lambda held: held.update(steps=[s for s in held["steps"] if s["registry_name"] not in NORMALISING]),
    )
    right_or_refused(saved, adapter, folder)


def right_or_refused(saved, adapter, folder):
    try:
        policy = load_adapter(adapter).from_pretrained(folder)
    except PocoError:
        return
    assert torch.equal(denormalised(policy), saved(adapter)[1])


# -- damage ------------------------------------------------------------------------------------------------------------


def with_config(**values):
    return lambda folder: change(folder / CONFIG, lambda held: held.update(values))


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def gone(name):
    return lambda folder: (folder / name).unlink()


def linked(name, to):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(to)

    return damage


def piped(name):
    def damage(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def tensors_with(edit):
    def damage(folder):
        held = load_file(folder / WEIGHTS)
        edit(held)
        save_file(held, folder / WEIGHTS)

    return damage


def one_bad_number(value):
    return lambda held: held[max(held)].view(-1)[-1:].fill_(value)


def state_file(name):
    return lambda file: steps_of(file)(lambda step, folder: "state_file" in step and step.update(state_file=name))


def shape(*sizes):
    return lambda folder: change(
        folder / CONFIG, lambda held: held["output_features"]["action"].update(shape=list(sizes))
    )


DAMAGES = {
    "config gone": gone(CONFIG),
    "config empty": text(CONFIG, ""),
    "config no JSON": text(CONFIG, "{"),
    "config a list": text(CONFIG, "[1]"),
    "config no text": text(CONFIG, b"\xff\xfe\x00"),
    "config too deep": text(CONFIG, '{"a":' * 100_000 + "1" + "}" * 100_000),
    "config deep": text(CONFIG, '{"a":' * 50 + "1" + "}" * 50),
    "config too large": text(CONFIG, '{"type": "' + "x" * 9_000_000 + '"}'),
    "config never ends": linked(CONFIG, "/dev/zero"),
    "config a pipe": piped(CONFIG),
    "NaN in config": text(CONFIG, '{"type": "flow_mlp", "optimizer_lr": NaN}'),
    "infinity in config": text(CONFIG, '{"type": "flow_mlp", "optimizer_lr": 1e999}'),
    "digits without end": text(CONFIG, '{"type": "flow_mlp", "chunk_size": 1' + "0" * 5000 + "}"),
    "no type": lambda folder: change(folder / CONFIG, lambda held: held.pop("type")),
    "type a number": with_config(type=3),
    "type of nobody": with_config(type="nothing"),
    "unknown field": with_config(memory_frames=3),
    "chunk a text": with_config(chunk_size="long"),
    "chunk without end": with_config(chunk_size=10**9, n_action_steps=10**9, max_action_horizon=10**9),
    "chunk below zero": with_config(chunk_size=-5),
    "inputs a list": with_config(input_features=[1]),
    "inputs nothing": with_config(input_features={}),
    "outputs nothing": with_config(output_features={}),
    "shape without end": shape(10**9),
    "shape of words": shape("four"),
    "shape of nothing": shape(),
    "mapping of words": with_config(normalization_mapping={"ACTION": "BY_MAGIC"}),
    "weights gone": gone(WEIGHTS),
    "weights empty": text(WEIGHTS, ""),
    "weights no tensors": text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"),
    "weights cut": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100]),
    "header that lies": text(WEIGHTS, struct.pack("<Q", 2**60) + b"{}"),
    "header larger than the file": text(
        WEIGHTS,
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4]}} ' + b"\0" * 4,
    ),
    "weights a pipe": piped(WEIGHTS),
    "weights a folder": lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
    "a tensor less": tensors_with(lambda held: held.pop(max(held))),
    "a tensor more": tensors_with(lambda held: held.update(extra=torch.zeros(1))),
    "another shape": tensors_with(lambda held: held.update({max(held): torch.zeros(3, 3, 3)})),
    "weights NaN": tensors_with(one_bad_number(torch.nan)),
    "weights infinite": tensors_with(one_bad_number(-torch.inf)),
    "no object in poco.json": text(heads.ABOUT, "[]"),
    "poco.json too deep": text(heads.ABOUT, "[" * 100_000),
    "options a list": lambda folder: change(folder / heads.ABOUT, lambda held: held.update(options=[])),
}
PIPELINE_DAMAGES = {
    "empty": lambda file: text(file, ""),
    "no JSON": lambda file: text(file, "{"),
    "a list": lambda file: text(file, "[]"),
    "no steps": lambda file: text(file, '{"name": "x"}'),
    "steps a number": lambda file: text(file, '{"steps": 3}'),
    "a step of words": lambda file: text(file, '{"steps": ["magic"]}'),
    "a step of nothing": lambda file: text(file, '{"steps": [{}]}'),
    "a step of nobody": lambda file: text(file, '{"steps": [{"registry_name": "magic", "config": {}}]}'),
    "a step's arguments a list": lambda file: steps_of(file)(lambda step, folder: step.update(config=[1])),
    "an argument of another kind": lambda file: steps_of(file)(
        lambda step, _: step["config"].update(eps="x", use_percentiles=3)
    ),
    "a step twice": lambda file: (
        lambda folder: change(folder / file, lambda held: held["steps"].append(held["steps"][-1]))
    ),
    "never ends": lambda file: linked(file, "/dev/zero"),
    "too deep": lambda file: text(file, '{"steps":' * 100_000),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_told_in_one_sentence(folder_of, adapter, damage):
    folder = folder_of(adapter)
    DAMAGES[damage](folder)
    refused(adapter, folder)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("file", PIPELINES)
@pytest.mark.parametrize("damage", PIPELINE_DAMAGES)
def test_a_damaged_pipeline_is_told_in_one_sentence(folder_of, adapter, file, damage):
    folder = folder_of(adapter)
    PIPELINE_DAMAGES[damage](file)(folder)
    refused(adapter, folder)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("file", PIPELINES)
@pytest.mark.parametrize("way", ["above", "absolute", "link", "number"])
def test_the_state_of_a_step_lies_in_its_folder(saved, folder_of, tmp_path, adapter, file, way):
    """The other file holds the very same numbers: only where it lies is wrong."""
    folder = folder_of(adapter)

    def move(step, folder):
        if "state_file" in step:
            name = step["state_file"]
            shutil.move(folder / name, tmp_path / name)
            if way == "link":
                (folder / name).symlink_to(tmp_path / name)
            else:
                step["state_file"] = {"above": f"../{name}", "absolute": str(tmp_path / name), "number": 3}[way]

    steps_of(file)(move)(folder)
    refused(adapter, folder)


SIZES = {
    "flow_mlp": [{"num_inference_steps": 10**9}, {"hidden_dims": [10**9]}, {"hidden_dims": [8] * 100_000}],
    "pi05": [
        {"num_inference_steps": 10**9},
        {"max_action_dim": 10**9},
        {"tokenizer_max_length": 10**9},
        {"empty_cameras": 10**9},
    ],
    "smolvla": [
        {"num_steps": 10**9},
        {"num_vlm_layers": 10**9},
        {"max_state_dim": 10**9},
        {"expert_width_multiplier": 1e9},
    ],
    "groot_n1d6": [{"max_action_dim": 10**9}, {"max_state_dim": 10**9}, {"max_action_horizon": 10**9}],
}


@pytest.mark.parametrize(("adapter", "values"), [(name, one) for name, some in SIZES.items() for one in some])
def test_sizes_are_bounded_before_memory_is_taken(folder_of, adapter, values):
    folder = folder_of(adapter)
    change(folder / CONFIG, lambda held: held.update(values))
    told = refused(adapter, folder)
    assert next(iter(values)) in told


def test_sizes_of_an_architecture_are_bounded(folder_of):
    folder = folder_of("pi05")
    change(folder / "architecture.json", lambda held: held["vlm"].update(depth=10**9))
    assert "depth is 1000000000" in refused("pi05", folder)
    folder = folder_of("groot_n1d6")
    change(folder / CONFIG, lambda held: held["sizes"]["head"].update(depth=10**9))
    assert "depth is 1000000000" in refused("groot_n1d6", folder)
    folder = folder_of("smolvla")
    change(folder / "vlm" / CONFIG, lambda held: held["text_config"].update(num_hidden_layers=10**9))
    assert "num_hidden_layers is 1000000000" in refused("smolvla", folder)


# -- heads -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(saved, tmp_path_factory):
    """A folder with a LoRA of rank 2 on a small pi0.5."""
    folder = tmp_path_factory.mktemp("lora") / "head"
    load_adapter("pi05").from_pretrained(saved("pi05")[0], lora=2).save_head(folder)
    return folder


def in_head(*path, value):
    def damage(held):
        for name in path[:-1]:
            held = held[name]
        held[path[-1]] = value

    return damage


HEADS = {
    "a revision that leads elsewhere": in_head("base", "revision", value="../../refs"),
    "a base that is a number": in_head("base", "id", value=3),
    "a fingerprint that is a list": in_head("base", "fingerprint", value=[]),
    "a horizon without end": in_head("horizon", value=10**9),
    "a horizon of words": in_head("horizon", value="long"),
    "a hash that is a number": in_head("weights", "sha256", value=3),
    "a rank without end": in_head("weights", "lora", "rank", value=10**9),
    "a rank that the file has not": in_head("weights", "lora", "rank", value=4000),
    "targets of numbers": in_head("weights", "lora", "targets", value=[1, 2]),
    "a scale of words": in_head("weights", "lora", "alpha", value="big"),
    "a file elsewhere": in_head("weights", "file", value="../base/model.safetensors"),
    "an adapter with terminal codes": in_head("adapter", value="\x1b]0;pwned\x07"),
    "options of another kind": in_head("options", value={"dtype": {"a": 1}}),
}


@pytest.mark.parametrize("damage", HEADS)
def test_what_a_head_says_of_itself_is_checked_before_it_is_used(lora, tmp_path, damage):
    folder = shutil.copytree(lora, tmp_path / "head")
    change(folder / heads.ABOUT, HEADS[damage])
    for load in (load_head, load_adapter("pi05").from_pretrained):
        with pytest.raises(PocoError) as told:
            load(folder)
        assert str(told.value).replace("\n", "").isprintable()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_head_that_is_not_finite_is_refused(lora, tmp_path, value):
    folder = shutil.copytree(lora, tmp_path / "head")
    held = load_file(folder / heads.HEAD_WEIGHTS)
    held[max(held)].view(-1)[:1].fill_(value)
    save_file(held, folder / heads.HEAD_WEIGHTS)
    digest = heads.sha256_of(folder / heads.HEAD_WEIGHTS)
    change(folder / heads.ABOUT, lambda about: about["weights"].update(sha256=digest))
    with pytest.raises(PocoError, match=r"head\.safetensors holds weights that are NaN or infinite"):
        load_head(folder)


def test_loras_that_name_each_other_as_their_base_are_refused(tmp_path):
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        save_file({"x": torch.zeros(1)}, tmp_path / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / base)}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    for read in (weights_of, whole_source):
        with pytest.raises(PocoError, match="a LoRA of peft on more than 4 others"):
            read(locate(tmp_path / "a"))
