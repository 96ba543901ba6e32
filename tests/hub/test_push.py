"""A run's head goes to the Hub and comes back: every byte over a real wire, by the real client, to a local server."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from run_folders import about_of, based_run, move, write_run
from safetensors.torch import load_file, save_file

from poco_vla import PocoError, load_adapter, load_critic, load_head, propose, push_head
from poco_vla.errors import HubError
from poco_vla.hub.artifact import check_portable
from poco_vla.pretrained.heads import sha256_of

pytest_plugins = ["hub_server"]
BASE, HEAD = "lerobot/pi05_base", "someone/pen"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny pi05 base and a run on it."""
    return based_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "run")


@pytest.fixture
def based(hub, made):
    """The Hub with the base on it."""
    hub.add_repo(BASE, made[0])
    hub.commit(BASE, {"README.md": b"---\nlicense: gemma\n---\n# base\n"})
    return hub


@pytest.fixture(scope="module")
def lora_made(tmp_path_factory, made):
    return based_run(tmp_path_factory.mktemp("lora"), base=made[0], lora=2)[1]


def proposals(policy):
    obs, generator = policy.example_obs(2), torch.Generator().manual_seed(0)
    return propose(policy, policy.encode(obs), 3, generator=generator)


# -- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["head", "peft", "policy"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_comes_back_is_the_policy_that_was_pushed(based, run, lora_made, form, kind):
    run = run if kind == "full" else lora_made
    pushed = push_head(run, HEAD, base=BASE, form=form)
    assert pushed.files.keys() == based.files(HEAD).keys()
    loaded = load_head(HEAD)
    expected = proposals(load_head(run / "head"))
    if form == "policy" and kind == "lora":  # merged: rounded once more
        torch.testing.assert_close(proposals(loaded), expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(proposals(loaded), expected)
    assert loaded.base == (HEAD if form == "policy" else BASE)


def test_it_is_one_commit_in_a_private_repository(based, run):
    pushed = push_head(run, "pen", base=BASE)  # one's own namespace
    assert pushed.repo_id == HEAD
    assert pushed.private
    assert based.repos["model", HEAD].private
    assert len(based.revisions(HEAD)) == 2  # the Hub's own first commit
    assert based.revisions(HEAD)[0] == pushed.revision
    assert pushed.url.endswith(f"/{HEAD}/commit/{pushed.revision}")
    assert not list(run.glob(".push-*"))


def test_a_public_one_is_asked_for(based, run):
    assert not push_head(run, HEAD, base=BASE, private=False).private
    assert not based.repos["model", HEAD].private


def test_the_best_evaluations_policy_can_be_pushed_and_is_called_that(based, run):
    pushed = push_head(run, HEAD, base=BASE, which="best")
    assert torch.equal(proposals(load_head(HEAD)), proposals(load_head(run / "best")))
    assert about_of(based, HEAD)["results"]["best"]["success_rate"] == 0.9
    assert "best of 3 evaluations, picked after the fact" in pushed.card
    assert "| after: POCO, best evaluation | 90% | 77% to 96% | 36 of 40 | 600 |" in pushed.card


def test_bfloat16_halves_the_file_and_rounds(based, run):
    push_head(run, HEAD, base=BASE, dtype="bfloat16")
    files = based.files(HEAD)
    whole = (run / "head" / "head.safetensors").stat().st_size
    assert len(files["head.safetensors"]) < 0.55 * whole
    loaded, exact = load_head(HEAD), load_head(run / "head")
    for (name, rounded), p in zip(loaded.head.named_parameters(), exact.head.parameters(), strict=True):
        assert rounded.dtype == torch.float32, name
        assert torch.equal(rounded, p.bfloat16().float())


def test_a_policy_without_a_base_goes_whole(hub, tmp_path):
    policy = move(load_adapter("flow_mlp").tiny())
    expected = proposals(policy)
    run = write_run(tmp_path / "run", policy, "flow_mlp")
    pushed = push_head(run, "someone/cube", license="apache-2.0", critic=True)
    assert "model.safetensors" in pushed.files
    assert "head.safetensors" not in pushed.files
    assert torch.equal(proposals(load_head("someone/cube")), expected)
    card = ModelCard(pushed.card)
    assert card.data.license == "apache-2.0"
    assert card.data.get("base_model") is None
    assert "It has no base model: training began with random weights." in pushed.card


def test_the_critic_comes_along_if_asked(based, run):
    push_head(run, HEAD, base=BASE, critic=True)
    policy = load_head(HEAD)
    x = proposals(policy)[..., : policy.spec.action_dim]
    features = policy.encode(policy.example_obs(2)).features
    held = load_file(run / "checkpoints" / "00001000" / "weights.safetensors")
    for target in (False, True):
        critic = load_critic(HEAD, target=target)
        assert critic(features, x).shape == (2, 2, 3)
        prefix = "target_critic." if target else "critic."
        assert all(torch.equal(t, held[prefix + n]) for n, t in critic.state_dict().items())
    assert "`critic.safetensors`" in based.files(HEAD)["README.md"].decode()


def test_the_critic_is_not_that_of_an_earlier_policy(based, run):
    with pytest.raises(HubError, match="the critic is the one of the run's end, and which=best is an earlier policy"):
        push_head(run, HEAD, base=BASE, which="best", critic=True)


def test_a_critic_that_changed_since_is_refused(based, run):
    push_head(run, HEAD, base=BASE, critic=True)
    spoilt = bytearray(based.files(HEAD)["critic.safetensors"])
    spoilt[-1] ^= 1
    based.commit(HEAD, {"critic.safetensors": bytes(spoilt)})
    with pytest.raises(HubError, match=r"critic\.safetensors in .* is not the file that poco\.json speaks of"):
        load_critic(HEAD)


def test_without_it_one_is_told(based, run):
    push_head(run, HEAD, base=BASE)
    with pytest.raises(HubError, match=f"{HEAD} came without its critic: push it again with"):
        load_critic(HEAD)


# -- the account and the card -----------------------------------------------------------------------------------------


def test_poco_json_says_what_belongs_together_and_how_it_came_about(based, run):
    push_head(run, HEAD, base=BASE)
    about = about_of(based, HEAD)
    assert about["adapter"] == "pi05"
    assert about["adapter_distribution"]["name"] == "poco-vla-pi05"
    assert (about["base"]["id"], about["base"]["revision"]) == (BASE, based.revisions(BASE)[0])
    assert about["weights"]["sha256"] == sha256_of(run / "head" / "head.safetensors")
    assert about["horizon"] == 50
    assert about["algorithm"]["zeta"] == 0.25, "what was calibrated, not how"
    assert about["versions"]["lerobot"] == "0.6.1"
    assert about["results"]["after"]["interval_95"] == [0.598, 0.858]
    assert about["normalization"]["action"]["q99"] == [2.0] * 4
    assert not {"output_dir", "policy"} & about["training"].keys()


def test_the_card_says_it_all_and_the_hub_accepts_it(based, run):
    card = ModelCard(push_head(run, HEAD, base=BASE).card)
    assert card.data.license == "gemma", "inherited"
    assert card.data.base_model == BASE
    assert card.data.pipeline_tag == "robotics"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("success_rate", 0.75)
    assert "| before: supervised fine-tuning | 20% | 10% to 35% | 8 of 40 | 0 |" in card.text
    assert "| after: POCO | 75% | 60% to 86% | 30 of 40 | 900 |" in card.text
    assert f"at commit `{based.revisions(BASE)[0]}`" in card.text
    assert "![Success against environment steps](curve.png)" in card.text
    found = "--env.discover_packages_path=poco_vla.simulators --env.type=ogbench --env.task=cube-single-"
    assert f"lerobot-eval --policy.path=FOLDER {found}" in card.text
    assert any(r.path == "/api/validate-yaml" for r in based.requests)


def test_the_example_on_the_card_runs(based, run):
    card = push_head(run, HEAD, base=BASE).card
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) <= 5
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["chunk"].shape == (1, 50, 4)


def test_terms_and_text_of_the_bases_licence_are_carried_over(hub, tmp_path):
    """GR00T's are NVIDIA's: non-commercial."""
    base, run = based_run(tmp_path, "groot_n1d6")
    (tmp_path / "base" / "LICENSE").write_text("NVIDIA's terms")
    (tmp_path / "base" / "NOTICE").write_text("and whose it is")
    front = "license: other\nlicense_name: nvidia-license\nlicense_link: LICENSE"
    hub.add_repo("nvidia/groot", base)
    commit = hub.commit("nvidia/groot", {"README.md": f"---\n{front}\n---\n".encode()})
    pushed = push_head(run, "someone/groot", base="nvidia/groot")
    data = ModelCard(pushed.card).data
    assert (data.license, data.license_name) == ("other", "nvidia-license")
    assert data.license_link == f"https://huggingface.co/nvidia/groot/blob/{commit}/LICENSE"
    assert "non-commercial research and evaluation only" in " ".join(pushed.card.split())
    assert hub.files("someone/groot")["LICENSE"] == b"NVIDIA's terms"
    assert hub.files("someone/groot")["NOTICE"] == b"and whose it is"
    assert torch.equal(proposals(load_head("someone/groot")), proposals(load_head(run / "head")))


def test_a_run_without_an_environment_claims_no_success(based, run):
    result = json.loads((run / "result.json").read_text())
    nothing = dict.fromkeys(("env", "before", "after", "best"))
    (run / "result.json").write_text(json.dumps(result | nothing | {"evaluations": []}))
    pushed = push_head(run, HEAD, base=BASE)
    assert "Not measured: the run had no environment" in pushed.card
    assert "model-index" not in pushed.card


def test_a_run_that_did_not_practise_does_not_claim_it(based, run):
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"env_steps": 0, "after": result["before"]}))
    card = push_head(run, HEAD, base=BASE).card
    assert "trained on demonstrations with poco_vla; it has not practised" in card
    assert "| supervised fine-tuning | 20% | 10% to 35% |" in card
    assert "after: POCO" not in card


def test_a_tokenizer_goes_as_it_is(based, run):
    """Its merges hold "/", which is no path."""
    file = run / "head" / "tokenizer" / "tokenizer.json"
    held = json.loads(file.read_text())
    held["model"]["merges"] = [["/", "/"], ["/", "b"]]
    file.write_text(json.dumps(held))
    push_head(run, HEAD, base=BASE)
    assert based.files(HEAD)["tokenizer/tokenizer.json"] == file.read_bytes()


def test_weights_behind_a_link_go_whole(based, run, tmp_path):
    """As DVC and git-annex keep them."""
    file = run / "head" / "head.safetensors"
    file.rename(tmp_path / "held")
    file.symlink_to(Path("..") / ".." / "held")
    push_head(run, HEAD, base=BASE)
    assert based.files(HEAD)["head.safetensors"] == (tmp_path / "held").read_bytes()


def test_damaged_weights_do_not_go(based, run):
    file = run / "head" / "head.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(PocoError, match=r"head\.safetensors is not the file that poco\.json speaks of"):
        push_head(run, HEAD, base=BASE)
    assert ("model", HEAD) not in based.repos


# -- nothing half, nothing twice --------------------------------------------------------------------------------------


def test_a_dry_run_lists_what_would_go_and_sends_nothing(based, run):
    dry = push_head(run, HEAD, base=BASE, dry_run=True)
    assert ("model", HEAD) not in based.repos
    assert dry.revision is None
    assert all(r.method in ("GET", "HEAD") for r in based.requests)
    pushed = push_head(run, HEAD, base=BASE)
    assert (pushed.files, pushed.card) == (dry.files, dry.card)
    assert dry.files["head.safetensors"] == (run / "head" / "head.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", "/lfs/models/"), ("POST", "/commit/main"), ("POST", "/preupload/"), ("POST", "/objects/batch")],
)
def test_a_push_that_breaks_off_shows_nothing_and_goes_on(based, run, method, path):
    based.fail(method, path, status=403)
    with pytest.raises(HubError, match="the same command goes on where it broke off"):
        push_head(run, HEAD, base=BASE)
    assert based.files(HEAD) == {}
    push_head(run, HEAD, base=BASE)
    assert based.files(HEAD)["head.safetensors"] == (run / "head" / "head.safetensors").read_bytes()
    assert len(based.revisions(HEAD)) == 2


def test_large_files_that_arrived_are_not_sent_again(based, run):
    based.fail("POST", "/commit/main", status=403)
    with pytest.raises(HubError):
        push_head(run, HEAD, base=BASE)
    before = based.received("PUT", "/lfs/")
    assert before > 0
    push_head(run, HEAD, base=BASE)
    assert based.received("PUT", "/lfs/") == before


def test_a_push_whose_answer_got_lost_can_be_repeated(based, run):
    based.fail("POST", "/commit/main", status="lost")
    with pytest.raises(HubError):
        push_head(run, HEAD, base=BASE)
    assert based.files(HEAD)
    assert push_head(run, HEAD, base=BASE).revision


def test_a_name_that_exists_is_not_written_over(based, run):
    push_head(run, HEAD, base=BASE)
    with pytest.raises(HubError, match=f"{HEAD} exists and holds what was trained already.*--update"):
        push_head(run, HEAD, base=BASE, which="best")
    first = based.files(HEAD)["head.safetensors"]
    push_head(run, HEAD, base=BASE, which="best", update=True)
    assert based.files(HEAD)["head.safetensors"] != first
    assert len(based.revisions(HEAD)) == 3
    old = load_head(HEAD, revision=based.revisions(HEAD)[1])
    assert torch.equal(proposals(old), proposals(load_head(run / "head")))


@pytest.mark.parametrize("public", [False, True])
def test_a_push_that_goes_on_is_as_visible_as_the_second_call_says(based, run, public):
    based.fail("POST", "/commit/main", status=403)
    with pytest.raises(HubError):
        push_head(run, HEAD, base=BASE, private=public)
    pushed = push_head(run, HEAD, base=BASE, private=not public)
    assert based.repos["model", HEAD].private is pushed.private is not public


def test_two_first_pushes_do_not_mix(based, run, monkeypatch):
    """Both found no repository; the second to arrive is told."""
    from poco_vla.hub import publish

    look = publish._look

    def slowly(api, repo_id, *arguments, **options):
        place = look(api, repo_id, *arguments, **options)
        monkeypatch.setattr(publish, "_look", look)
        push_head(run, HEAD, base=BASE, which="best")
        return place

    monkeypatch.setattr(publish, "_look", slowly)
    with pytest.raises(HubError, match=f"somebody has pushed to {HEAD} meanwhile"):
        push_head(run, HEAD, base=BASE)
    assert about_of(based, HEAD)["results"]["which"] == "best"


def test_a_dry_run_says_that_the_name_is_taken(based, run):
    push_head(run, HEAD, base=BASE)
    with pytest.raises(HubError, match="holds what was trained already"):
        push_head(run, "pen", base=BASE, which="best", dry_run=True)


def test_a_licence_that_the_hub_does_not_know_is_told(hub, tmp_path):
    run = write_run(tmp_path / "run", load_adapter("flow_mlp").tiny(), "flow_mlp")
    with pytest.raises(HubError, match=r"the Hub does not take the model card .*is the licence one of its names"):
        push_head(run, "someone/cube", license="My Own Licence")


def test_an_update_takes_away_what_only_the_earlier_push_brought(based, run):
    push_head(run, HEAD, base=BASE)
    based.commit(HEAD, {"mine.mp4": b"a video"})
    shutil.rmtree(run / "head" / "tokenizer")
    file = run / "head" / "policy_preprocessor.json"
    file.write_text(re.sub(r'"/[^"]*/tokenizer"', '"google/paligemma-3b-pt-224"', file.read_text()))
    (run / "curve.png").unlink()
    push_head(run, HEAD, base=BASE, update=True)
    held = based.files(HEAD).keys()
    assert not any(name.startswith("tokenizer/") for name in held)
    assert "curve.png" not in held
    assert "mine.mp4" in held, "what somebody put there by hand stays"


def test_an_update_of_another_form_takes_the_old_weights_away(based, run):
    push_head(run, HEAD, base=BASE, critic=True)
    push_head(run, HEAD, base=BASE, form="peft", update=True)
    held = based.files(HEAD).keys()
    assert {"adapter_model.safetensors", "adapter_config.json"} <= held
    assert not {"head.safetensors", "critic.safetensors"} & held


def test_a_repository_of_something_else_is_left_alone(based, run, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("three years")
    based.add_repo("someone/thesis", tmp_path / "thesis")
    for update in (False, True):
        with pytest.raises(HubError, match=r"exists and holds something else \(thesis.txt; no poco.json\)"):
            push_head(run, "someone/thesis", base=BASE, update=update)


def test_a_repository_of_another_adapter_is_left_alone(based, run, tmp_path):
    other = write_run(tmp_path / "other", load_adapter("flow_mlp").tiny(), "flow_mlp")
    push_head(other, HEAD)
    with pytest.raises(HubError, match='holds what the adapter "flow_mlp" has trained, and this is of "pi05"'):
        push_head(run, HEAD, base=BASE, update=True)


def test_somebody_elses_push_meanwhile_is_not_overrun(based, run, monkeypatch):
    push_head(run, HEAD, base=BASE)
    from poco_vla.hub import publish

    look = publish._look

    def slowly(*arguments, **options):
        place = look(*arguments, **options)
        based.commit(HEAD, {"note.txt": b"mine"})
        return place

    monkeypatch.setattr(publish, "_look", slowly)
    with pytest.raises(HubError, match="somebody else has pushed meanwhile"):
        push_head(run, HEAD, base=BASE, which="best", update=True)


# -- what cannot go ---------------------------------------------------------------------------------------------------


def test_without_a_token_one_is_told_how_to_get_one(based, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no token for the Hub: run `hf auth login`"):
        push_head(run, HEAD, base=BASE)
    assert push_head(run, HEAD, base=BASE, dry_run=True).files


def test_a_wrong_token_and_a_foreign_namespace_are_told(based, run):
    with pytest.raises(HubError, match="the Hub does not know this token"):
        push_head(run, HEAD, base=BASE, token="hf_" + "wrong" * 5)
    with pytest.raises(HubError, match="this token may not do that: it needs write access"):
        push_head(run, "else/pen", base=BASE)


def test_a_name_that_cannot_be_is_told(run):
    with pytest.raises(HubError, match='"a/b/c" is no name for a repository'):
        push_head(run, "a/b/c")


def test_what_is_no_finished_run_is_told(tmp_path):
    with pytest.raises(PocoError, match=r"no result\.json in .*: not the folder of a finished run"):
        push_head(tmp_path, HEAD)


def test_a_base_that_nobody_else_has_is_refused(based, run):
    with pytest.raises(HubError, match=r"trained on the local folder .*/base, which nobody else has"):
        push_head(run, HEAD)
    with pytest.raises(HubError, match="licence of the base model holds for what derives from it: name it"):
        push_head(run, HEAD, form="policy")
    pushed = push_head(run, HEAD, form="policy", license="gemma")
    assert about_of(based, HEAD)["base"] is None
    assert "It derives from a base model that is not at the Hub" in pushed.card
    assert torch.equal(proposals(load_head(HEAD)), proposals(load_head(run / "policy")))
    assert pushed.private


def test_a_base_of_other_weights_is_refused(based, run, tmp_path):
    load_adapter("pi05").tiny(seed=5).save_pretrained(tmp_path / "other")
    based.add_repo("lerobot/other", tmp_path / "other")
    with pytest.raises(HubError, match=r"lerobot/other is not the base of .*model.safetensors is another file"):
        push_head(run, HEAD, base="lerobot/other")
    with pytest.raises(HubError, match="lerobot/nothing cannot be compared"):
        push_head(run, HEAD, base="lerobot/nothing")


def test_a_base_that_was_replaced_since_is_refused(hub, tmp_path):
    base, run = based_run(tmp_path)
    load_adapter("pi05").tiny(seed=5).save_pretrained(base)
    hub.add_repo("lerobot/newer", base)
    with pytest.raises(HubError, match=r"holds other weights than those that .* was trained on"):
        push_head(run, HEAD, base="lerobot/newer")


def test_the_bases_licence_is_not_ours_to_choose(based, run):
    with pytest.raises(HubError, match=f"the licence is inherited from {BASE}"):
        push_head(run, HEAD, base=BASE, license="mit")


def test_an_adapter_without_a_peft_form_says_so(hub, tmp_path):
    base, run = based_run(tmp_path, "groot_n1d6")
    hub.add_repo("nvidia/groot", base)
    with pytest.raises(HubError, match='the adapter "groot_n1d6" offers no peft form'):
        push_head(run, "someone/groot", base="nvidia/groot", form="peft")


@pytest.mark.parametrize(
    "words",
    [
        "hf_" + "a1B2" * 8,
        "hf_oauth_" + "a1B2" * 8,
        "github_pat_" + "a1B2" * 8,
        "xoxb-" + "1" * 12,
        "AIza" + "x" * 35,
        "https://me:sesame@host/x",
        "-----BEGIN RSA PRIVATE KEY-----",
    ],
)
def test_a_secret_in_a_runs_configuration_stays_here(based, run, words):
    config = json.loads((run / "config.json").read_text())
    config["policy_options"] = {"note": words}
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(HubError, match=r"poco\.json would publish a secret"):
        push_head(run, HEAD, base=BASE)
    assert ("model", HEAD) not in based.repos


PATHS = ["/ho" + "me/me/weights", "/lustre/alice/x.model", "/fsx/x", "C:\\data\\me", "D:/data", "~/x", "~me/x"]


@pytest.mark.parametrize("words", PATHS)
def test_a_local_path_among_the_options_is_left_out(based, run, words):
    """A tokenizer of one's own, say: it travels with the head, the place where it was does not."""
    config = json.loads((run / "config.json").read_text())
    config["policy_options"] = {"tokenizer": words, "dtype": "bfloat16"}
    (run / "config.json").write_text(json.dumps(config))
    push_head(run, HEAD, base=BASE)
    assert about_of(based, HEAD)["training"]["policy_options"] == {"tokenizer": "a local path", "dtype": "bfloat16"}
    assert all(words.encode() not in data for data in based.files(HEAD).values())


@pytest.mark.parametrize("words", PATHS)
def test_a_local_path_anywhere_else_is_refused(tmp_path, words):
    (tmp_path / "config.json").write_text(json.dumps({"nested": [{"note": words}]}))
    with pytest.raises(HubError, match=r"config\.json would publish the path .* of this machine"):
        check_portable(tmp_path)


def test_folders_of_ones_own_are_found_in_any_text(tmp_path, monkeypatch):
    """And by whole names only: a dataset that begins like the working folder is another word."""
    (tmp_path / "app").mkdir()
    monkeypatch.chdir(tmp_path / "app")
    (tmp_path / "README.md").write_text(f"trained in {tmp_path}/app/runs")
    with pytest.raises(HubError, match=r"README\.md would publish the path .*/app/runs"):
        check_portable(tmp_path)
    (tmp_path / "README.md").write_text(f"you/app_picking {tmp_path}/apple")
    check_portable(tmp_path)


def test_a_secret_of_the_environment_or_the_call_is_known(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text('{"a": "sesame-open"}')
    check_portable(tmp_path)
    with pytest.raises(HubError, match=r"a\.json would publish a secret"):
        check_portable(tmp_path, token="sesame-open")
    monkeypatch.setenv("POCO_VLA_TOKEN", "sesame-open")
    with pytest.raises(HubError, match=r"a\.json would publish a secret"):
        check_portable(tmp_path)


def test_relative_paths_addresses_and_hub_ids_are_no_paths_of_this_machine(tmp_path):
    words = "https://huggingface.co/data/x, runs/data/x, lerobot/home, a/tmp/b, 1/2, ../var/x"
    (tmp_path / "a.json").write_text(json.dumps(words))
    check_portable(tmp_path)


def test_no_file_that_was_pushed_names_this_machine(based, run, made):
    push_head(run, HEAD, base=BASE, critic=True)
    for name, data in based.files(HEAD).items():
        for path in (run, made[0], run.parent):
            assert str(path).encode() not in data, name
    processors = json.loads(based.files(HEAD)["policy_preprocessor.json"])
    assert [s["config"]["tokenizer_name"] for s in processors["steps"] if "tokenizer_name" in s["config"]] == [
        "tokenizer"
    ]
    assert yaml.safe_load(based.files(HEAD)["README.md"].decode().split("---")[1])["license"] == "gemma"


# -- what must not go --------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(hub, tmp_path):
    return write_run(tmp_path / "run", load_adapter("flow_mlp").tiny(), "flow_mlp")


@pytest.mark.parametrize("name", ["policy/notes.txt", "policy/model.safetensors", "curve.png"])
def test_a_link_out_of_the_policys_folder_is_not_followed(hub, whole, tmp_path, name):
    (tmp_path / "private.txt").write_text("root:x:0:0")
    (whole / name).unlink(missing_ok=True)
    (whole / name).symlink_to(tmp_path / "private.txt")
    with pytest.raises(PocoError, match=r"link out of|no safetensors file"):
        push_head(whole, "someone/cube")
    assert not hub.repos


def test_weights_that_are_not_finite_do_not_go(hub, whole):
    file = whole / "policy" / "model.safetensors"
    held = load_file(file)
    held[max(held)].view(-1)[:1].fill_(torch.nan)
    save_file(held, file)
    with pytest.raises(PocoError, match="NaN or infinite"):
        push_head(whole, "someone/cube")
    assert not hub.repos


def test_a_secret_among_the_options_of_the_environment_does_not_go(hub, whole):
    for name in ("config.json", "result.json"):
        held = json.loads((whole / name).read_text())
        held["env"]["options"] = {"password": "hunter2"}
        (whole / name).write_text(json.dumps(held))
    with pytest.raises(HubError, match="would publish a secret") as told:
        push_head(whole, "someone/cube")
    assert "hunter2" not in str(told.value)
    assert not hub.repos


def test_a_run_of_another_algorithm_is_published_with_its_own_options(based, run):
    config = json.loads((run / "config.json").read_text())
    config |= {"algorithm": "bc", "algorithm_options": {"anchor": "demos"}}
    (run / "config.json").write_text(json.dumps(config))
    card = push_head(run, HEAD, base=BASE).card
    assert about_of(based, HEAD)["algorithm"] == {"name": "bc", "anchor": "demos"}
    assert "| algorithm | bc (anchor demos) |" in card
    assert "candidates N" not in card
