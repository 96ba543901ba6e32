"""What is saved comes back exactly, whole or not at all."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from toy_policies import ToyPolicy, toy_batch

from poco_vla import Poco, PocoConfig
from poco_vla.checkpointing import checkpoint
from poco_vla.config import DatasetConfig, EnvSpec, TrainConfig
from poco_vla.errors import CheckpointError
from poco_vla.files import write_json

CONFIG = TrainConfig(env=EnvSpec())


def toy_poco(seed=0):
    torch.manual_seed(seed)
    return Poco(ToyPolicy(seed=seed), PocoConfig(num_candidates=3, critic_hidden=(8,)))


def trained(poco, steps=2):
    optimizer = torch.optim.Adam([p for p in poco.parameters() if p.requires_grad], lr=0.01)
    for seed in range(steps):
        loss, _ = poco(toy_batch(poco.policy, seed=seed), "online")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        poco.after_step("online")
    return optimizer


def saved(root, update=7, *, poco=None, **changes):
    poco = poco or toy_poco()
    parts = {
        "weights": checkpoint.trainable_state(poco),
        "optimizer": trained(poco).state_dict(),
        "tensors": {"draws": torch.Generator().get_state(), "chunks.0": torch.zeros(0, 3, 2)},
        "state": {"progress": {"update": update}},
        "config": CONFIG,
    }
    return checkpoint.save(root, update, **(parts | changes))


def test_demonstrations_may_lie_elsewhere_where_a_checkpoint_knows_them_by_content(tmp_path):
    moved = replace(CONFIG, dataset=DatasetConfig(root=Path("elsewhere"), revision="v3.0", episodes=(0, 1)))
    known = saved(tmp_path / "known", state={"progress": {"update": 7}, "data": {"demonstrations": {"rows": "1a"}}})
    assert checkpoint.load(known, moved)[3]["data"] == {"demonstrations": {"rows": "1a"}}
    with pytest.raises(CheckpointError, match=r"another configuration.*\n  dataset.episodes"):
        checkpoint.load(saved(tmp_path / "old"), moved)


def test_weights_moments_and_tensors_come_back_bit_for_bit(tmp_path):
    poco = toy_poco()
    optimizer = trained(poco)
    tensors = {"draws": torch.Generator().manual_seed(5).get_state(), "chunks.0": torch.zeros(0, 3, 2)}
    path = saved(tmp_path, poco=poco, optimizer=optimizer.state_dict(), tensors=tensors)
    expected = {name: value.clone() for name, value in checkpoint.trainable_state(poco).items()}

    weights, moments, back, state = checkpoint.load(path, CONFIG)
    other = toy_poco(seed=1)
    checkpoint.load_trainable_state(other, weights)
    assert all(torch.equal(value, expected[name]) for name, value in checkpoint.trainable_state(other).items())
    assert state == {"progress": {"update": 7}}
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    old = optimizer.state_dict()
    assert [group["params"] for group in moments["param_groups"]] == [group["params"] for group in old["param_groups"]]
    assert [group["lr"] for group in moments["param_groups"]] == [group["lr"] for group in old["param_groups"]]
    assert moments["state"].keys() == old["state"].keys()
    for index, entry in old["state"].items():
        assert all(torch.equal(moments["state"][index][name], value) for name, value in entry.items())


def test_an_optimizer_that_was_restored_takes_the_same_step(tmp_path):
    one, two = toy_poco(), toy_poco()
    path = saved(tmp_path, poco=one, optimizer=(first := trained(one)).state_dict())
    second = trained(two, steps=0)
    weights, moments, _, _ = checkpoint.load(path, CONFIG)
    checkpoint.load_trainable_state(two, weights)
    second.load_state_dict(moments)
    for poco, optimizer in ((one, first), (two, second)):
        torch.manual_seed(3)
        poco(toy_batch(poco.policy, seed=9), "online")[0].backward()
        optimizer.step()
    for name, value in checkpoint.trainable_state(one).items():
        assert torch.equal(value, checkpoint.trainable_state(two)[name]), name


def test_a_frozen_backbone_is_not_in_the_checkpoint():
    poco = toy_poco()
    poco.policy.backbone = torch.nn.Linear(4, 4).requires_grad_(False)
    names = checkpoint.trainable_state(poco)
    assert not any("backbone" in name for name in names)
    assert "zeta" in names
    assert any(name.startswith("policy.head") for name in names)
    assert any(name.startswith("target_critic") for name in names)


def test_the_newest_two_are_kept_and_the_newest_is_found(tmp_path):
    for update in (5, 90, 1000):
        saved(tmp_path, update)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000090", "00001000"]
    assert checkpoint.latest(tmp_path).name == "00001000"


def test_saving_the_same_update_again_replaces_it(tmp_path):
    saved(tmp_path, state={"progress": "first"})
    path = saved(tmp_path, state={"progress": "second"})
    assert [found.name for found in tmp_path.iterdir()] == ["00000007"]
    assert checkpoint.load(path, CONFIG)[3] == {"progress": "second"}


def test_what_a_crash_left_half_written_is_never_resumed(tmp_path):
    saved(tmp_path, 5)
    partial = tmp_path / ".00000009.partial"
    partial.mkdir()
    (partial / "weights.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path).name == "00000005"
    saved(tmp_path, 9)
    assert not partial.exists()
    assert checkpoint.latest(tmp_path).name == "00000009"


def test_a_disk_that_refuses_leaves_earlier_checkpoints_whole(tmp_path, monkeypatch):
    path = saved(tmp_path, 5)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(CheckpointError, match=r"00000009 could not be written: .*No space left.*Earlier .* intact"):
        saved(tmp_path, 9)
    monkeypatch.undo()
    assert [found.name for found in tmp_path.iterdir()] == ["00000005"]
    checkpoint.load(path, CONFIG)


def test_an_empty_folder_has_nothing_to_resume(tmp_path):
    with pytest.raises(CheckpointError, match="nothing to resume: no checkpoint"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize("name", ["weights", "optimizer", "random"])
def test_a_truncated_file_is_damage(name, tmp_path):
    path = saved(tmp_path)
    file = path / f"{name}.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="00000007 is damaged"):
        checkpoint.load(path, CONFIG)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "config.json"])
def test_a_missing_file_is_damage(name, tmp_path):
    path = saved(tmp_path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"is damaged.*{name}"):
        checkpoint.load(path, CONFIG)


def test_broken_json_is_damage(tmp_path):
    path = saved(tmp_path)
    (path / "state.json").write_text('{"progress": ')
    with pytest.raises(CheckpointError, match="is damaged: JSONDecodeError"):
        checkpoint.load(path, CONFIG)


def test_only_what_changes_no_update_may_differ_on_resume(tmp_path):
    path = saved(tmp_path)
    values = {"resume": True, "log_every": 1, "checkpoint_every": 3, "output_dir": tmp_path, "num_threads": 2}
    checkpoint.load(path, TrainConfig(env=EnvSpec(), **values))
    with pytest.raises(CheckpointError, match="seed: 0 -> 1"):
        checkpoint.load(path, TrainConfig(env=EnvSpec(), seed=1, **values))


def test_weights_of_another_model_are_refused_by_name_and_shape():
    poco = toy_poco()
    weights = dict(checkpoint.trainable_state(poco))
    name = "policy.head.0.weight"
    shape = tuple(weights[name].shape)
    with pytest.raises(CheckpointError, match=r"do not fit this model: policy.head.0.weight \(1, 1\), expected"):
        checkpoint.load_trainable_state(poco, weights | {name: torch.zeros(1, 1)})
    del weights[name]
    with pytest.raises(CheckpointError, match=r"do not fit this model: policy.head.0.weight"):
        checkpoint.load_trainable_state(poco, weights)
    assert tuple(poco.policy.head[0].weight.shape) == shape


def test_json_appears_whole_under_its_own_name(tmp_path):
    write_json(tmp_path / "a.json", {"path": Path("x")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"path": "x"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_newest_two_and_the_first_after_each_milestone_are_kept(tmp_path):
    """Checkpoints of every 4 updates, milestones each 10: 12, 20, 32 are the first at or after 10, 20, 30."""
    for update in range(4, 41, 4):
        checkpoint.save(
            tmp_path,
            update,
            weights={},
            optimizer={"state": {}, "param_groups": []},
            tensors={},
            state={},
            config=CONFIG,
            keep_every=10,
        )
    assert [int(path.name) for path in sorted(tmp_path.iterdir())] == [12, 20, 32, 36, 40]


def test_a_checkpoint_keeps_its_head_when_a_newer_one_takes_its_place(tmp_path):
    first, second = ({"w": torch.full((3,), value)} for value in (1.0, 2.0))
    checkpoint.save_good_head(tmp_path, first)
    old = saved(tmp_path / "checkpoints", 1, head=tmp_path / checkpoint.GOOD_HEAD)
    checkpoint.save_good_head(tmp_path, second)
    new = saved(tmp_path / "checkpoints", 2, head=tmp_path / checkpoint.GOOD_HEAD)
    assert torch.equal(checkpoint.load_good_head(old)["w"], first["w"])
    assert torch.equal(checkpoint.load_good_head(new)["w"], second["w"])
    assert checkpoint.load_good_head(saved(tmp_path / "checkpoints", 3)) == {}


# -- damage ----------------------------------------------------------------------------------------------------------


def damaged(path, how):
    """The optimizer's file: emptied by a valid file of nothing, cut to nothing, or one byte changed."""
    file = path / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    if how == "emptied":
        save_file({}, file)
    else:
        content[-1] ^= 1
        file.write_bytes(b"" if how == "truncated" else bytes(content))


@pytest.mark.parametrize("how", ["emptied", "truncated", "changed"])
def test_a_damaged_optimizer_is_named_and_the_checkpoint_before_is_taken(how, tmp_path):
    root = tmp_path / "checkpoints"
    older, newer = saved(root, 5), saved(root, 9)
    damaged(newer, how)
    told = []
    path, (_, moments, _, state) = checkpoint.load_newest(root, CONFIG, told.append, ("progress",))
    assert (path, state["progress"]["update"]) == (older, 5)
    assert moments["state"]
    (line,) = told
    assert "00000009 is damaged: optimizer.safetensors" in line
    checkpoint.set_newer_aside(path)
    assert checkpoint.latest(root) == older
    assert (tmp_path / "checkpoints.set_aside" / "00000009").is_dir()


def test_without_another_checkpoint_damage_is_an_error(tmp_path):
    damaged(saved(tmp_path), "emptied")
    with pytest.raises(CheckpointError, match=r"is damaged: optimizer\.safetensors has \d+ bytes"):
        checkpoint.load_newest(tmp_path, CONFIG, print)


def test_an_emptied_optimizer_of_an_older_version_is_damage_too(tmp_path):
    """Its state.json notes no sizes."""
    path = saved(tmp_path)
    state = json.loads((path / "state.json").read_text())
    del state["files"]
    write_json(path / "state.json", state)
    checkpoint.load(path, CONFIG)
    damaged(path, "emptied")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is empty"):
        checkpoint.load(path, CONFIG)


@pytest.mark.parametrize("content", [bytes(64), b"\xff\xfe", b"[]", b"null"])
def test_a_state_that_is_no_json_object_is_damage(content, tmp_path):
    path = saved(tmp_path)
    (path / "state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="00000007 is damaged"):
        checkpoint.load(path, CONFIG)


def test_a_checkpoint_whose_replacement_was_cut_short_is_resumed(tmp_path):
    """The same update saved twice, killed between the two renames."""
    path = saved(tmp_path / "checkpoints")
    path.rename(path.with_name(".00000007.old"))
    assert checkpoint.can_resume(tmp_path)
    assert checkpoint.latest(tmp_path / "checkpoints") == path
    checkpoint.load(path, CONFIG)
