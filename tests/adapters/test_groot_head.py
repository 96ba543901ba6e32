"""A trained head of groot_n1d6 without its base: on NVIDIA's checkpoint, on a LeRobot folder, as a LoRA."""

import json
import shutil

import pytest
import torch
from groot_folders import FRONT, OPTIONS, dataset, nvidia_folder, raw_batch
from lerobot_policy_groot_n1d6.adapter import GrootN1d6Adapter
from safetensors.torch import load_file

from poco_vla import PolicyError, propose
from poco_vla.pretrained import heads


@pytest.fixture(scope="module")
def nvidia(tmp_path_factory):
    return nvidia_folder(tmp_path_factory.mktemp("groot") / "nvidia")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groot") / "tiny"
    GrootN1d6Adapter.tiny().save_pretrained(folder)
    return folder


def train(policy):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return policy


def proposals(policy):
    generator = torch.Generator().manual_seed(0)
    return propose(policy, policy.encode(policy.preprocess(raw_batch(steps=8))), 2, generator=generator)


def on_nvidia(folder, **options):
    return GrootN1d6Adapter.from_pretrained(folder, horizon=8, **dataset(), **OPTIONS, **options)


@pytest.mark.parametrize("lora", [None, 2])
def test_a_head_on_nvidias_checkpoint_is_put_on_it_again(nvidia, tmp_path, lora):
    policy = train(on_nvidia(nvidia, lora=lora))
    policy.save_head(tmp_path / "head")
    assert not (tmp_path / "head" / heads.POLICY_WEIGHTS).exists()
    held = load_file(tmp_path / "head" / heads.HEAD_WEIGHTS)
    assert held.keys() == {n for n, p in policy.policy.named_parameters() if p.requires_grad}
    assert all(("lora_" in name) == (lora is not None) for name in held)
    loaded = GrootN1d6Adapter.from_pretrained(tmp_path / "head")
    assert loaded.base == policy.base == str(nvidia)
    assert loaded.base_version == policy.base_version
    assert torch.equal(proposals(loaded), proposals(policy))
    assert not torch.equal(proposals(policy), proposals(on_nvidia(nvidia)))


def test_a_head_on_a_lerobot_folder_is_put_on_it_again(saved, tmp_path):
    policy = train(GrootN1d6Adapter.from_pretrained(saved, horizon=8))
    policy.save_head(tmp_path / "head")
    loaded = GrootN1d6Adapter.from_pretrained(tmp_path / "head")
    assert loaded.spec == policy.spec
    assert torch.equal(proposals(loaded), proposals(policy))


def test_an_embodiment_from_a_file_travels_with_the_head(nvidia, tmp_path):
    table = {"state": {"all": [0, 6]}, "action": {"all": [0, 4]}, "views": {"front": FRONT}, "horizon": 8}
    (tmp_path / "arm.json").write_text(json.dumps(table))
    policy = train(on_nvidia(nvidia, embodiment=str(tmp_path / "arm.json")))
    for name, save in {"head": policy.save_head, "policy": policy.save_pretrained}.items():
        save(tmp_path / name)
        (tmp_path / "arm.json").unlink(missing_ok=True)
        loaded = GrootN1d6Adapter.from_pretrained(tmp_path / name)
        assert loaded.embodiment == policy.embodiment
        assert torch.equal(proposals(loaded), proposals(policy))


def test_a_base_that_has_moved_or_changed_is_told(saved, tmp_path):
    base = shutil.copytree(saved, tmp_path / "base")
    train(GrootN1d6Adapter.from_pretrained(base)).save_head(tmp_path / "head")
    base.rename(tmp_path / "moved")
    with pytest.raises(PolicyError, match=r"the base of the head: no policy in .*base: the folder does not exist"):
        GrootN1d6Adapter.from_pretrained(tmp_path / "head")
    GrootN1d6Adapter.from_pretrained(tmp_path / "head", base=tmp_path / "moved")
    GrootN1d6Adapter.tiny(seed=3).save_pretrained(tmp_path / "other")
    with pytest.raises(PolicyError, match="trained on another base model"):
        GrootN1d6Adapter.from_pretrained(tmp_path / "head", base=tmp_path / "other")


def test_a_policy_from_nowhere_has_no_head_to_save(tmp_path):
    with pytest.raises(PolicyError, match="built from no checkpoint"):
        GrootN1d6Adapter.tiny().save_head(tmp_path / "head")
    assert not list(tmp_path.iterdir())


def test_a_runs_version_tells_one_base_from_another(nvidia, saved, tmp_path):
    other = nvidia_folder(tmp_path / "other", seed=1)
    versions = {on_nvidia(nvidia).base_version, on_nvidia(other).base_version}
    versions.add(GrootN1d6Adapter.from_pretrained(saved).base_version)
    assert len(versions) == 3
