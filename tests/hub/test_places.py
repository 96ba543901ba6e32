"""Every form in which people name a policy: a run, folders in it, with ~, relative, with a slash; a Hub id."""

import json
import os
import shutil
from pathlib import Path

import pytest
from run_folders import based_run, write_run

from poco_vla import load_adapter, load_head, push_head
from poco_vla.cli import main
from poco_vla.errors import HubError
from poco_vla.hub import located
from poco_vla.serving import server as serving

pytest_plugins = ["hub_server"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder with a run in it."""
    folder = tmp_path_factory.mktemp("home")
    write_run(folder / "run", load_adapter("flow_mlp").tiny(), "flow_mlp")
    return folder


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    return home


FORMS = {
    "run": "run/policy",
    "run/": "run/policy",
    "./run": "run/policy",
    "~/run": "run/policy",
    "~/run/": "run/policy",
    "run/policy": "run/policy",
    "~/run/policy/": "run/policy",
    "run/best": "run/best",
    "run/best/": "run/best",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_leads_to_its_policy(form, at_home):
    assert located(form).folder == (at_home / FORMS[form]).resolve()
    assert located(str(at_home / form)).folder == (at_home / FORMS[form]).resolve() if form[0] not in "~." else True
    assert load_head(form).spec.action_dim == 3


class Served(Exception):  # noqa: N818
    """Stands for a server that has begun to serve."""


@pytest.fixture
def served(monkeypatch):
    """Arguments of the servers that `poco-vla serve` starts, which do not serve."""
    seen = []

    class Server:
        def __init__(self, actor, observations, **options):
            seen.append((actor, observations, options))

        def __enter__(self):
            raise Served

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(serving, "PolicyServer", Server)
    return seen


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("adapter", [[], ["--adapter", "flow_mlp"]])
def test_serve_takes_every_form(form, adapter, at_home, served):
    with pytest.raises(Served):
        main(["serve", form, *adapter])
    ((_, observations, options),) = served
    assert {key: feature.shape for key, feature in observations.items()} == {"observation.state": (6,)}
    assert options["adapter"] == "flow_mlp"


def test_serve_takes_a_head_on_its_base(tmp_path, served):
    _, run = based_run(tmp_path)
    for form in (run, run / "head", f"{run}/best/"):
        with pytest.raises(Served):
            main(["serve", str(form)])
    assert [len(observations) for _, observations, _ in served] == [3, 3, 3]


def test_serve_takes_a_hub_id_at_a_revision(hub, home, served):
    """The newest commit's policy is of a type that nobody knows; the first one's is served."""
    first = push_head(home / "run", "someone/cube", license="mit").revision
    old = hub.files("someone/cube")["config.json"]
    hub.commit("someone/cube", {"config.json": old.replace(b'"type": "flow_mlp"', b'"type": "no_such_type"')})
    with pytest.raises(Served):
        main(["serve", "someone/cube", "--revision", first])
    with pytest.raises(SystemExit):
        main(["serve", "someone/cube"])
    assert len(served) == 1


def test_eval_knows_the_environment_of_a_pushed_policy(hub, home, monkeypatch, capsys):
    """poco.json tells it; the policy of this run has other sizes than its task, which evaluation would meet first."""
    push_head(home / "run", "someone/cube", license="mit")
    seen = []
    monkeypatch.setattr("poco_vla.evaluation.evaluate", lambda policy, env, **_: seen.append(env) or _Result())
    for form in ("someone/cube", str(home / "run"), str(home / "run" / "best")):
        main(["eval", form])
    assert [env.task for env in seen] == ["cube-single-singletask-task1-v0"] * 3


class _Result:
    success = "100%"


@pytest.mark.parametrize("form", ["run", "~/run/", "run/best", "~/run/policy"])
def test_export_takes_every_form(form, at_home, tmp_path):
    main(["export", form, f"{tmp_path}/out"])
    assert load_head(tmp_path / "out").spec.action_dim == 3


def test_paths_of_every_verb_may_begin_with_a_tilde(at_home, capsys):
    main(["report", "~/run/", "--output=~/page.html"])
    main(["export", "~/run", "~/whole"])
    main(["push", "~/run/", "cube", "--dry-run"])
    assert (at_home / "page.html").is_file()
    assert (at_home / "whole" / "config.json").is_file()
    assert not Path("~").exists()


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("run/checkpoints", "is a checkpoint that --resume goes on from, not a policy: give the run's folder"),
        ("run/checkpoints/00001000", "is a checkpoint that --resume goes on from, not a policy: give the run's folder"),
        ("run/result.json", "is a file: give the folder that it lies in"),
        ("ended/not", "is a run that has not ended, and has no policy yet: go on with --resume; ended/not/best is"),
        ("/no/such/folder", "no policy in /no/such/folder: the folder does not exist"),
    ],
)
@pytest.mark.parametrize("verb", ["eval", "serve", "export"])
def test_what_is_no_policy_is_answered_with_what_to_give(form, said, verb, at_home, capsys):
    unended = at_home / "ended" / "not"
    if not unended.exists():
        write_run(unended, load_adapter("flow_mlp").tiny(), "flow_mlp")
        os.remove(unended / "result.json")  # noqa: PTH107
    with pytest.raises(SystemExit) as stop:
        main([verb, form, *(["out"] if verb == "export" else [])])
    assert stop.value.code == 1
    shown = capsys.readouterr().err
    assert said in shown
    assert len(shown.strip().splitlines()) == 1


def test_a_file_is_no_run(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(HubError, match="is a file"):
        located(tmp_path / "x")


def test_a_card_links_a_dataset_only_if_the_hub_shows_it(hub, home, tmp_path):
    """LeRobot's cache may hold one of that name which was never pushed."""
    run = tmp_path / "run"
    shutil.copytree(home / "run", run)
    values = json.loads((run / "config.json").read_text())
    values["dataset"]["repo_id"] = "someone/pen"
    (run / "config.json").write_text(json.dumps(values))
    card = push_head(run, "someone/cube", license="mit").card
    assert 'a dataset that its user calls "someone/pen", of unknown origin' in card
    assert "datasets/someone/pen" not in card
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.txt").write_text("x")
    hub.add_repo("someone/pen", tmp_path / "data", kind="dataset")
    assert "datasets/someone/pen" in push_head(run, "someone/cube", license="mit", update=True).card
