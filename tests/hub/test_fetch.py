"""What `load_head` refuses, and in which words; what stays as it was although the Hub moves on."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from run_folders import based_run, move, write_run
from safetensors.torch import load_file, save_file

from poco_vla import PolicyError, load_adapter, load_head, propose, push_head
from poco_vla.errors import HubError
from poco_vla.pretrained import heads
from poco_vla.pretrained.sources import PICKLES

pytest_plugins = ["hub_server"]
BASE, HEAD = "lerobot/pi05_base", "someone/pen"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return based_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def pushed(hub, made):
    """The Hub with a base and a head on it."""
    hub.add_repo(BASE, made[0])
    push_head(made[1], HEAD, base=BASE)
    return hub


@pytest.fixture
def head(made, tmp_path):
    """A head's folder of one's own, on the base in its folder."""
    return shutil.copytree(made[1] / "head", tmp_path / "head")


def proposals(policy):
    obs, generator = policy.example_obs(2), torch.Generator().manual_seed(0)
    return propose(policy, policy.encode(obs), 3, generator=generator)


def change(folder, **values):
    held = json.loads((folder / heads.ABOUT).read_text())
    (folder / heads.ABOUT).write_text(json.dumps(held | values))


def weights_with(folder, **values):
    change(folder, weights=json.loads((folder / heads.ABOUT).read_text())["weights"] | values)


def test_a_base_that_moved_on_changes_nothing(pushed, tmp_path):
    """New weights under the base's name: the head asks for the commit that it was trained on."""
    expected = proposals(load_head(HEAD))
    load_adapter("pi05").tiny(seed=7).save_pretrained(tmp_path / "newer")
    newer = {p.name: p.read_bytes() for p in (tmp_path / "newer").iterdir() if p.is_file()}
    pushed.commit(BASE, newer)
    assert torch.equal(proposals(load_head(HEAD)), expected)


def test_a_base_whose_commit_is_gone_is_told_and_another_place_can_be_named(hub, made):
    first = hub.add_repo(BASE, made[0])
    push_head(made[1], HEAD, base=BASE)
    last = hub.commit(BASE, {"note.txt": b"history was rewritten"})
    repo = hub.repos["model", BASE]
    repo.commits = {last: replace(repo.commits[last], parent=None)}
    with pytest.raises(PolicyError, match=f'the base of the head: "{BASE}" has no revision "{first}".*`base`'):
        load_head(HEAD)
    assert load_head(HEAD, base=BASE).base_version.startswith(f"{BASE}@{last}:")


def test_a_base_that_is_another_model_is_refused(pushed, tmp_path):
    load_adapter("pi05").tiny(seed=7).save_pretrained(tmp_path / "other")
    with pytest.raises(
        PolicyError, match=r"trained on another base model than .*fingerprint.*Give the one that it was"
    ):
        load_head(HEAD, base=tmp_path / "other")


def test_a_gated_base_says_where_to_accept_its_terms(hub, made):
    hub.add_repo(BASE, made[0])
    push_head(made[1], HEAD, base=BASE)
    hub.repos["model", BASE].gated = True
    with pytest.raises(PolicyError, match=f'"{BASE}" is gated: accept its terms on its page.*hf auth login'):
        load_head(HEAD)


def test_a_private_head_is_shown_to_its_owner_only(pushed, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PolicyError, match=f'"{HEAD}" is no local folder, and the Hub has no such .*hf auth whoami'):
        load_head(HEAD)


def test_a_revision_that_is_not_there_is_told(pushed):
    with pytest.raises(PolicyError, match=f'"{HEAD}" has no revision "v9"'):
        load_head(HEAD, revision="v9")


def test_another_adapters_head_is_refused(pushed, head):
    with pytest.raises(HubError, match='holds a head of the adapter "pi05", and "groot_n1d6" was asked for'):
        load_head(HEAD, adapter="groot_n1d6")
    with pytest.raises(PolicyError, match='holds a head of the adapter "pi05", and this is "groot_n1d6"'):
        load_adapter("groot_n1d6").from_pretrained(head)


def test_an_adapter_that_is_not_installed_is_named_with_its_distribution(pushed, head):
    change(head, adapter="pi9", adapter_distribution={"name": "poco-vla-pi9", "version": "1"})
    with pytest.raises(HubError, match=r'needs the adapter "pi9", which is not installed .*: install poco-vla-pi9'):
        load_head(head)


def test_weights_that_changed_since_are_refused(head):
    file = head / heads.HEAD_WEIGHTS
    tensors = load_file(file)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, file)
    with pytest.raises(PolicyError, match=r"head\.safetensors is not the file that poco\.json speaks of \(SHA-256"):
        load_head(head)


def test_a_whole_policy_that_changed_since_is_refused(hub, tmp_path):
    run = write_run(tmp_path / "run", move(load_adapter("flow_mlp").tiny()), "flow_mlp")
    push_head(run, "someone/cube")
    hub.commit("someone/cube", {"model.safetensors": (run / "best" / "model.safetensors").read_bytes()})
    with pytest.raises(HubError, match=r"model\.safetensors in someone/cube is not the file"):
        load_head("someone/cube")


def test_a_head_of_other_shapes_is_refused(head):
    file = head / heads.HEAD_WEIGHTS
    tensors = load_file(file)
    tensors["model.action_in_proj.weight"] = torch.zeros(3, 3)
    tensors["surprise"] = tensors.pop("model.action_out_proj.bias")
    save_file(tensors, file)
    weights_with(head, sha256=heads.sha256_of(file))
    words = r"1 missing: model\.action_out_proj\.bias; 1 unexpected: surprise; 1 of another shape: .*\[3, 3\], expected"
    with pytest.raises(PolicyError, match=words):
        load_head(head)


def test_a_pickle_in_the_place_of_safetensors_is_never_opened(head, tmp_path, monkeypatch):
    """Neither under its own name, nor under that of a safetensors file."""
    monkeypatch.setattr(torch, "load", None)
    torch.save({"w": torch.zeros(1)}, head / "head.bin")
    (head / heads.HEAD_WEIGHTS).rename(tmp_path / "held")
    with pytest.raises(
        PolicyError, match=r"head\.safetensors is missing; head\.bin may be a pickle, which would run code"
    ):
        load_head(head)
    shutil.copyfile(head / "head.bin", head / heads.HEAD_WEIGHTS)
    with pytest.raises(PolicyError, match=r"head\.safetensors is damaged, cut short, or no safetensors file"):
        load_head(head)


@pytest.mark.parametrize("adapter", ["pi05", "flow_mlp", "groot_n1d6", "smolvla"])
def test_a_processor_that_would_run_a_command_is_refused(tmp_path, adapter):
    """LeRobot calls whatever class a step names, and looks afterwards what it was."""
    load_adapter(adapter).tiny().save_pretrained(tmp_path / "policy")
    file = tmp_path / "policy" / "policy_preprocessor.json"
    mark = tmp_path / "mark"
    step = {"class": "subprocess.Popen", "config": {"args": ["touch", str(mark)]}}
    held = json.loads(file.read_text())
    file.write_text(json.dumps(held | {"steps": [step, *held["steps"]]}))
    for load in (load_head, load_adapter(adapter).from_pretrained):
        with pytest.raises(
            PolicyError, match=r"policy_preprocessor\.json names 'subprocess\.Popen' as a processing step"
        ):
            load(tmp_path / "policy")
    assert not mark.exists()


def test_a_folder_of_the_bases_name_here_is_not_the_base(pushed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / BASE).mkdir(parents=True)
    assert load_head(HEAD).base == BASE


def test_a_base_of_other_files_is_told_with_what_it_holds(hub, made):
    """In shards, or pickled."""
    sha = hub.add_repo(BASE, made[0])
    push_head(made[1], HEAD, base=BASE)
    commit = hub.repos["model", BASE].commits[sha]
    files = {n: b for n, b in commit.files.items() if n != "model.safetensors"} | {
        "model.bin": commit.files["config.json"]
    }
    hub.repos["model", BASE].commits[sha] = replace(commit, files=files)
    with pytest.raises(PolicyError, match=r"holds no model\.safetensors; model\.bin may be a pickle.*; it holds "):
        load_head(HEAD)


def test_a_policy_that_was_uploaded_by_hand_is_loaded(hub, made):
    hub.add_repo("you/policy", made[1] / "policy")
    loaded = load_head("you/policy")
    assert loaded.base == "you/policy"
    assert torch.equal(proposals(loaded), proposals(load_head(made[1])))


def test_a_copy_of_a_whole_policy_is_checked_too(hub, tmp_path):
    run = write_run(tmp_path / "run", move(load_adapter("flow_mlp").tiny()), "flow_mlp")
    push_head(run, "someone/cube")
    (tmp_path / "copy").mkdir()
    for name, data in hub.files("someone/cube").items():
        (tmp_path / "copy" / name).write_bytes(data)
    load_head(tmp_path / "copy")
    shutil.copyfile(run / "best" / "model.safetensors", tmp_path / "copy" / "model.safetensors")
    with pytest.raises(HubError, match=r"model\.safetensors in .*copy is not the file"):
        load_head(tmp_path / "copy")


def test_pickles_are_not_even_fetched(hub, tmp_path):
    run = write_run(tmp_path / "run", load_adapter("flow_mlp").tiny(), "flow_mlp")
    push_head(run, "someone/cube")
    hub.commit("someone/cube", {f"weights{suffix}": b"x" for suffix in PICKLES})
    load_head("someone/cube")
    asked = {r.path.rsplit("/", 1)[-1] for r in hub.requests if "/resolve/" in r.path}
    assert "model.safetensors" in asked
    assert not any(name.startswith("weights.") for name in asked)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / heads.ABOUT).unlink(), r"holds head\.safetensors, but no poco\.json|holds no poco\.json"),
        (lambda f: (f / heads.ABOUT).write_text("{"), r"poco\.json is damaged"),
        (lambda f: (f / heads.ABOUT).write_text("[]"), r"expected a JSON object, found list"),
        (lambda f: change(f, weights=[]), "weights is missing or of another kind"),
        (lambda f: change(f, options=[], adapter=3), "adapter, options is missing or of another kind"),
        (lambda f: weights_with(f, file="../base/model.safetensors"), r"weights\.file is missing or of another kind"),
        (lambda f: change(f, format=2), "is of format 2, and this version of poco_vla reads 1: update it"),
        (lambda f: change(f, base={}), r"poco\.json is damaged: it lacks 'id'"),
        (lambda f: (f / heads.HEAD_WEIGHTS).write_bytes(b"12"), r"head\.safetensors is damaged"),
        (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    ],
)
def test_a_folder_with_a_fault_is_refused(head, spoil, words):
    spoil(head)
    with pytest.raises((HubError, PolicyError), match=words):
        load_head(head)


def test_what_poco_vla_did_not_write_is_told_how_to_be_loaded(hub, tmp_path):
    (tmp_path / "act").mkdir()
    (tmp_path / "act" / "config.json").write_text('{"type": "act"}')
    hub.add_repo("lerobot/act", tmp_path / "act")
    for source in ("lerobot/act", tmp_path / "act"):
        with pytest.raises(
            HubError, match=r"holds no poco\.json: poco_vla did not write it\. A LeRobot policy is loaded"
        ):
            load_head(source)


def test_a_run_is_its_last_policy_and_each_of_its_folders_says_what_it_is(made):
    expected = proposals(load_head(made[1]))
    for name in ("head", "policy"):
        assert torch.equal(proposals(load_head(made[1] / name)), expected)
    assert not torch.equal(proposals(load_head(made[1] / "best")), expected)
