"""The Hub of our tests speaks with the real client as the real Hub does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from hub_server import TOKEN, HubServer, connected
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    ModelCard,
    constants,
    create_repo,
    file_exists,
    hf_hub_download,
    model_info,
    snapshot_download,
    upload_folder,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

pytest_plugins = ["hub_server"]

REPO = "someone/policy"
CARD = b"---\nlicense: apache-2.0\ntags: [robotics]\npipeline_tag: robotics\n---\n# A policy\n"


def contents(folder):
    """Bytes of a folder by path, without what the Hub itself adds."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".gitattributes"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def folder(tmp_path):
    """Two large files and two small ones."""
    made = tmp_path / "made"
    (made / "poco").mkdir(parents=True)
    (made / "model.safetensors").write_bytes(os.urandom(1_000_000))
    (made / "poco" / "critic.safetensors").write_bytes(os.urandom(300_000))
    (made / "config.json").write_text(json.dumps({"type": "flow_mlp"}))
    (made / "README.md").write_bytes(CARD)
    return made


@pytest.fixture
def pushed(hub, folder):
    create_repo(REPO)
    return upload_folder(repo_id=REPO, folder_path=folder).oid


def test_what_is_pushed_comes_back_byte_for_byte(hub, folder, pushed):
    assert hub.files(REPO) == contents(folder) == contents(snapshot_download(REPO))
    assert len(pushed) == 40
    assert hub.revisions(REPO)[0] == pushed
    assert hub.received("PUT") == 1_300_000


def test_a_pinned_revision_stays_what_it_was(hub, pushed):
    newer = hub.commit(REPO, {"config.json": b"{}"})
    assert Path(hf_hub_download(REPO, "config.json", revision=pushed)).read_bytes() == b'{"type": "flow_mlp"}'
    assert Path(hf_hub_download(REPO, "config.json")).read_bytes() == b"{}"
    assert model_info(REPO).sha == newer
    assert {path.name for path in Path(constants.HF_HUB_CACHE).glob("*/snapshots/*")} == {pushed, newer}


def test_listings_tell_sizes_hashes_and_the_card(hub, pushed):
    info = model_info(REPO, files_metadata=True)
    weights = next(s for s in info.siblings if s.rfilename == "model.safetensors")
    assert (info.sha, info.private, info.gated, info.pipeline_tag) == (pushed, False, False, "robotics")
    assert info.card_data.license == "apache-2.0"
    assert (weights.size, weights.lfs.size) == (1_000_000, 1_000_000)
    names = {".gitattributes", "README.md", "config.json", "model.safetensors", "poco"}
    hub.page_size = 2
    api = HfApi()
    assert {entry.path for entry in api.list_repo_tree(REPO)} == names
    assert {e.path for e in api.list_repo_tree(REPO, recursive=True)} == names | {"poco/critic.safetensors"}
    assert [entry.path for entry in api.list_repo_tree(REPO, "poco")] == ["poco/critic.safetensors"]
    (found,) = api.get_paths_info(REPO, ["config.json", "absent"], expand=True)
    assert found.last_commit.oid == pushed


def test_names_lead_to_commits(hub, pushed):
    api = HfApi()
    api.create_tag(REPO, tag="v1", revision=pushed)
    api.create_branch(REPO, branch="next")
    moved = api.upload_file(repo_id=REPO, path_or_fileobj=b"1", path_in_repo="a/b.txt", revision="next")
    assert hub.files(REPO, "next")["a/b.txt"] == b"1"
    assert "a/b.txt" not in hub.files(REPO)
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": pushed, "next": moved.oid}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": pushed}
    assert [commit.commit_id for commit in api.list_repo_commits(REPO)] == hub.revisions(REPO)
    api.delete_file("a/b.txt", REPO, revision="next")
    assert hub.files(REPO, "next") == hub.files(REPO)


def test_what_is_not_there_has_its_error(hub, pushed):
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "absent.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "config.json", revision="absent")
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("someone/absent")
    assert not file_exists(REPO, "absent.json")


def test_a_private_repository_is_its_owners(hub, folder):
    create_repo(REPO, private=True)
    upload_folder(repo_id=REPO, folder_path=folder)
    for download in (snapshot_download, lambda *a, **k: hf_hub_download(*a, "README.md", **k), model_info):
        with pytest.raises(RepositoryNotFoundError):
            download(REPO, token=False)
    assert model_info(REPO).private
    assert contents(snapshot_download(REPO)) == contents(folder)
    hub.add_repo("other/secret", folder, private=True)
    with pytest.raises(RepositoryNotFoundError):
        model_info("other/secret")


def test_a_gated_repository_shows_itself_and_keeps_its_files(hub, folder):
    hub.add_repo("other/gated", folder, gated=True)
    assert model_info("other/gated").gated == "manual"
    for token in (None, False):
        with pytest.raises(GatedRepoError):
            hf_hub_download("other/gated", "config.json", token=token)
    with pytest.raises(GatedRepoError):
        snapshot_download("other/gated")


def test_only_the_owner_writes(hub, folder):
    api = HfApi()
    assert api.whoami()["name"] == "someone"
    hub.add_repo("other/policy", folder)
    for token, repo, status in [(None, "other/new", 403), (False, REPO, 401), ("hf_wrong", REPO, 401)]:
        with pytest.raises(HfHubHTTPError) as refused:
            create_repo(repo, token=token)
        assert refused.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        upload_folder(repo_id="other/policy", folder_path=folder)
    with pytest.raises(RepositoryNotFoundError):
        upload_folder(repo_id=REPO, folder_path=folder)
    assert (hub.received("PUT"), len(hub.repos)) == (0, 1)


def test_a_repository_is_made_once(hub, pushed):
    with pytest.raises(HfHubHTTPError) as refused:
        create_repo(REPO)
    assert refused.value.response.status_code == 409
    assert create_repo(REPO, exist_ok=True).repo_id == REPO
    HfApi().delete_repo(REPO)
    assert hub.repos == {}


def test_a_push_that_changes_nothing_makes_no_commit(hub, folder, pushed):
    assert upload_folder(repo_id=REPO, folder_path=folder).oid == pushed
    assert len(hub.revisions(REPO)) == 2
    assert hub.received("PUT") == 1_300_000


def test_what_arrived_before_a_failure_is_not_sent_again(hub, folder):
    create_repo(REPO)
    large = HfApi().preupload_lfs_files
    large(REPO, [CommitOperationAdd("model.safetensors", folder / "model.safetensors")])
    hub.fail("PUT", "/lfs/", status=403)  # a status that the client does not try again
    with pytest.raises(RuntimeError, match=r"critic\.safetensors"):
        upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.files(REPO) == {}
    before = hub.received("PUT")
    upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.received("PUT") - before == 300_000
    assert hub.files(REPO) == contents(folder)


@pytest.mark.parametrize("status", [500, "drop"])
def test_the_client_tries_again_by_itself(hub, folder, status):
    create_repo(REPO)
    hub.fail("PUT", "/lfs/", times=3, status=status, after=100_000)
    upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.files(REPO) == contents(folder)
    assert len([r for r in hub.requests if r.method == "PUT"]) == 5


def test_a_lasting_fault_ends_the_push(hub, folder):
    create_repo(REPO)
    hub.fail("PUT", "/lfs/", times=12, status="drop", after=100_000)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.files(REPO) == {}


def test_a_commit_that_fails_leaves_no_revision(hub, folder):
    create_repo(REPO)
    before = hub.revisions(REPO)
    hub.fail("POST", "/commit/", status=500)
    with pytest.raises(HfHubHTTPError):
        upload_folder(repo_id=REPO, folder_path=folder)
    hub.fail("POST", "/commit/", status="drop", after=100)
    with pytest.raises(httpx.HTTPError):
        upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.revisions(REPO) == before
    upload_folder(repo_id=REPO, folder_path=folder)
    assert len(hub.revisions(REPO)) == len(before) + 1
    assert hub.received("PUT") == 1_300_000


def test_a_commit_whose_answer_is_lost_is_there(hub, folder):
    create_repo(REPO)
    hub.fail("POST", "/commit/", status="lost")
    with pytest.raises(httpx.HTTPError):
        upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.files(REPO) == contents(folder)
    upload_folder(repo_id=REPO, folder_path=folder)
    assert len(hub.revisions(REPO)) == 2


def test_a_commit_on_an_old_parent_is_refused(hub, pushed):
    upload = {"repo_id": REPO, "path_or_fileobj": b"1", "path_in_repo": "a.txt", "parent_commit": pushed}
    newer = HfApi().upload_file(**upload).oid
    with pytest.raises(HfHubHTTPError) as refused:
        HfApi().upload_file(**upload | {"path_or_fileobj": b"2"})
    assert refused.value.response.status_code == 412
    assert hub.revisions(REPO)[0] == newer


def test_a_download_goes_on_where_it_broke_off(hub, folder, pushed, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # what is written to disk at once
    hub.fail("GET", "/resolve/", status="drop", after=400_000)
    path = hf_hub_download(REPO, "model.safetensors")
    assert Path(path).read_bytes() == (folder / "model.safetensors").read_bytes()
    assert [r.status for r in hub.requests if r.method == "GET" and "/resolve/" in r.path] == [200, 206]


def test_large_files_go_in_parts(folder):
    with HubServer(part_size=400_000) as hub, connected(hub):
        create_repo(REPO)
        upload_folder(repo_id=REPO, folder_path=folder)
        assert sorted(r.received for r in hub.requests if r.method == "PUT") == [200_000, 300_000, 400_000, 400_000]
        assert hub.files(REPO) == contents(folder)


def test_cards_are_checked_and_read(hub, pushed):
    card = ModelCard.load(REPO)
    card.validate()
    assert card.data.tags == ["robotics"]
    with pytest.raises(ValueError, match="license"):
        ModelCard("---\nlicense: my own\n---\n").validate()
    with pytest.raises(ValueError, match="base_model"):
        HfApi().upload_file(repo_id=REPO, path_or_fileobj=b"---\nbase_model: a/b/c\n---\n", path_in_repo="README.md")
    assert hub.revisions(REPO)[0] == pushed


def test_datasets_have_names_of_their_own(hub, folder):
    create_repo(REPO, repo_type="dataset")
    upload_folder(repo_id=REPO, folder_path=folder, repo_type="dataset")
    assert contents(snapshot_download(REPO, repo_type="dataset")) == hub.files(REPO, kind="dataset")
    assert list(hub.repos) == [("dataset", REPO)]


def test_another_process_talks_to_it_too(hub, folder, pushed):
    code = "from huggingface_hub import *; print(whoami()['name'], snapshot_download('someone/policy'))"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | hub.environment()
    run = [sys.executable, "-c", code]
    name, path = subprocess.run(run, env=environment, text=True, capture_output=True, check=True).stdout.split()
    assert (name, contents(path)) == ("someone", contents(folder))


def test_transformers_peft_and_lerobot_load_from_it(hub):
    from lerobot.policies.act.configuration_act import ACTConfig
    from peft import PeftConfig
    from transformers import AutoConfig

    files = {"config.json": {"model_type": "bert", "hidden_size": 24, "num_attention_heads": 2}}
    files["adapter_config.json"] = {"peft_type": "LORA", "r": 3}
    hub.add_repo("other/text")
    hub.commit("other/text", {path: json.dumps(content).encode() for path, content in files.items()})
    assert AutoConfig.from_pretrained("other/text").hidden_size == 24
    assert PeftConfig.from_pretrained("other/text").r == 3
    hub.add_repo("other/act")
    hub.commit("other/act", {"config.json": json.dumps({"type": "act", "chunk_size": 7, "n_action_steps": 7}).encode()})
    assert ACTConfig.from_pretrained("other/act").chunk_size == 7
    assert {r.status for r in hub.requests if "resolve" in r.path} <= {200, 404}


def test_it_leaves_no_trace_in_the_process(monkeypatch):
    from lerobot.utils import constants as lerobot

    def traces():
        names = ["ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "HUGGINGFACE_CO_URL_TEMPLATE"]
        variables = {name: os.environ.get(name) for name in ("HF_ENDPOINT", "HF_HOME", "HF_TOKEN")}
        return {name: getattr(constants, name) for name in names} | variables | {"lerobot": lerobot.HF_LEROBOT_HOME}

    before = traces()
    with HubServer() as server, connected(server):
        assert server.url == constants.ENDPOINT
        assert os.environ["HF_TOKEN"] == TOKEN
        assert lerobot.HF_LEROBOT_HOME.is_relative_to(server.home)
        assert HfApi().whoami()["name"] == "someone"
        late = ModuleType("lerobot.late")  # as if it were first imported here
        late.HF_LEROBOT_HOME = lerobot.HF_LEROBOT_HOME
        monkeypatch.setitem(sys.modules, "lerobot.late", late)
    assert late.HF_LEROBOT_HOME == lerobot.HF_LEROBOT_HOME
    assert traces() == before
    assert not server.home.exists()
