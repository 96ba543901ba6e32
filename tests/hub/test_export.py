"""Forms that LeRobot loads by itself: a whole policy, and a peft adapter that it puts on the base."""

import json
import shutil

import pytest
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import make_policy, make_pre_post_processors
from peft import PeftModel
from poco_vla_pi05.architecture import TINY, lerobot_builds
from run_folders import based_run

from poco_vla import PocoError, PolicyError, export_policy, load_adapter, load_head, propose, push_head
from poco_vla.errors import HubError
from poco_vla.pretrained import heads

pytest_plugins = ["hub_server"]
BASE, HEAD = "lerobot/pi05_base", "someone/pen"


@pytest.fixture(scope="module", params=["full", "lora"])
def made(request, tmp_path_factory):
    options = {"lora": 2} if request.param == "lora" else {}
    return based_run(tmp_path_factory.mktemp(request.param), dtype="float32", **options)


def proposals(policy):
    obs, generator = policy.example_obs(2), torch.Generator().manual_seed(0)
    return propose(policy, policy.encode(obs), 3, generator=generator)


def chunks(policy, obs):
    """LeRobot's own prediction."""
    torch.manual_seed(0)
    return policy.predict_action_chunk(obs)


def as_lerobot_loads_it(folder):
    """By the calls of `lerobot-eval`: configuration, policy (peft and all), processors."""
    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path, config.device = folder, "cpu"
    features = {"observation.state": (6,), "action": (4,)}
    features = {k: {"dtype": "float32", "shape": v, "names": None} for k, v in features.items()}
    pictures = {"dtype": "image", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
    features |= {f"observation.images.{name}": pictures for name in ("front", "wrist")}
    meta = type("Meta", (), {"features": features, "stats": {}})()
    with lerobot_builds(TINY):
        policy = make_policy(config, ds_meta=meta)
    make_pre_post_processors(config, pretrained_path=str(folder))
    return policy.eval()


def test_lerobot_puts_the_peft_form_on_the_base_by_itself(made, tmp_path):
    _, run = made
    folder = export_policy(run / "head", tmp_path / "peft", form="peft")
    assert {"adapter_config.json", "adapter_model.safetensors", "policy_preprocessor.json"} <= {
        p.name for p in folder.iterdir()
    }
    found = as_lerobot_loads_it(folder)
    assert isinstance(found, PeftModel)
    ours = load_head(run / "head")
    obs = ours.example_obs(2)
    torch.testing.assert_close(chunks(found, obs), chunks(ours.policy.eval(), obs), rtol=1e-4, atol=1e-5)
    base = load_adapter("pi05").from_pretrained(made[0], dtype="float32")
    assert not torch.allclose(chunks(found, obs), chunks(base.policy.eval(), obs), atol=1e-2)


def test_the_peft_form_is_ours_too(made, tmp_path):
    folder = export_policy(made[1] / "head", tmp_path / "peft", form="peft")
    again = load_head(folder)
    assert torch.equal(proposals(again), proposals(load_head(made[1] / "head")))
    again.save_head(tmp_path / "head")
    assert json.loads((tmp_path / "head" / "config.json").read_text())["use_peft"] is False


def test_a_pushed_head_becomes_a_whole_policy(hub, made, tmp_path):
    base, run = made
    hub.add_repo(BASE, base)
    push_head(run, HEAD, base=BASE)
    folder = export_policy(HEAD, tmp_path / "whole")
    assert as_lerobot_loads_it(folder).config.type == "pi05"
    torch.testing.assert_close(proposals(load_head(folder)), proposals(load_head(HEAD)), rtol=1e-4, atol=1e-4)
    peft = export_policy(HEAD, tmp_path / "peft", form="peft")
    config = json.loads((peft / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, hub.revisions(BASE)[0])


def test_a_base_elsewhere_is_checked_before_it_is_named(made, tmp_path):
    base, run = made
    moved = tmp_path / "moved"
    load_adapter("pi05").from_pretrained(base, dtype="float32").save_pretrained(moved)
    folder = export_policy(run / "head", tmp_path / "peft", form="peft", base=moved)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(moved)
    load_adapter("pi05").tiny(seed=4).save_pretrained(tmp_path / "other")
    with pytest.raises(PolicyError, match="another base model"):
        export_policy(run / "head", tmp_path / "no", form="peft", base=tmp_path / "other")
    assert not (tmp_path / "no").exists()


def test_what_has_no_peft_form_is_told(made, tmp_path):
    with pytest.raises(HubError, match="holds no head that belongs on a base"):
        export_policy(made[1] / "policy", tmp_path / "peft", form="peft")
    _, run = based_run(tmp_path, "groot_n1d6")
    with pytest.raises(HubError, match='the adapter "groot_n1d6" offers no peft form'):
        export_policy(run / "head", tmp_path / "peft", form="peft")
    assert not (tmp_path / "peft").exists()


def test_neither_a_run_nor_the_head_itself_is_written_over(made, tmp_path):
    run = shutil.copytree(made[1], tmp_path / "run")
    before = sorted(p.name for p in run.iterdir())
    for form in ("policy", "peft"):
        with pytest.raises(
            PocoError, match=r"run holds something else than a policy \(no config.json, or a whole run\)"
        ):
            export_policy(run / "head", run, form=form)
        with pytest.raises(HubError, match="is what is to be exported: choose another"):
            export_policy(run, run / "head", form=form)
    assert sorted(p.name for p in run.iterdir()) == before
    assert proposals(load_head(run)).shape


def test_a_whole_policy_is_not_replaced_by_a_head(made, tmp_path):
    load_adapter("flow_mlp").tiny().save_pretrained(tmp_path / "mine")
    with pytest.raises(PolicyError, match="holds a whole policy, which a head is not to replace"):
        export_policy(made[1] / "head", tmp_path / "mine", form="peft")
    assert (tmp_path / "mine" / heads.POLICY_WEIGHTS).exists()
