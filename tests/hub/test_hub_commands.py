"""`poco-vla push | export | eval`, on what a real run left behind."""

import json

import pytest
from pointmass_run import small
from run_folders import about_of, based_run

from poco_vla.cli import main
from poco_vla.training import train

pytest_plugins = ["hub_server"]
BASE = "lerobot/pi05_base"
# One worker runs them all: they share a run.
pytestmark = pytest.mark.xdist_group("hub_commands")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a small run with all its stages."""
    folder = tmp_path_factory.mktemp("push")
    return train(small(folder / "run", folder / "data")).output_dir


def test_a_runs_policy_goes_to_the_hub_and_is_evaluated_from_there(hub, run, capsys):
    main(["push", str(run), "cube", "--license", "apache-2.0", "--critic"])
    shown = capsys.readouterr().out
    assert "pushed to someone/cube (private): http" in shown
    for name, data in hub.files("someone/cube").items():
        assert f"{name} " in shown
        assert f"{len(data):,}" in shown
    about, result = about_of(hub, "someone/cube"), json.loads((run / "result.json").read_text())
    assert about["results"]["after"] == result["after"]
    assert about["versions"]["torch"]
    assert about["critic"]["arguments"]["feature_dim"] == result["sizes"]["feature_dim"]
    env = json.dumps(result["env"])
    main(["eval", "someone/cube", "--env", env, "--episodes", "2"])
    assert "of 2 episodes" in capsys.readouterr().out


def test_a_dry_run_shows_files_and_card(hub, run, capsys):
    main(["push", str(run), "someone/cube", "--dry-run"])
    shown = capsys.readouterr().out
    assert "nothing was uploaded; this would go to someone/cube (private)" in shown
    assert "# cube" in shown
    assert "model.safetensors" in shown
    assert "in all" in shown
    assert not hub.repos


def test_a_run_that_cannot_be_pushed_is_told_in_one_line(hub, run, tmp_path, capsys):
    for words, told in {
        (str(tmp_path), "x/y"): "HubError|DataError",
        (str(run), "x/y"): "this token may not do that",
        (str(run), "cube", "--base", "lerobot/nothing"): "was trained on no base, not on lerobot/nothing",
        (str(run), "cube", "--form", "peft"): "there is no peft form of it",
    }.items():
        with pytest.raises(SystemExit) as stop:
            main(["push", *words])
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert any(word in error for word in told.split("|"))
        assert "Traceback" not in error


def test_a_head_is_exported_for_lerobot(hub, tmp_path, capsys):
    base, run = based_run(tmp_path)
    hub.add_repo(BASE, base)
    main(["push", str(run), "pen", "--base", BASE, "--public", "--which", "best", "--dtype", "bfloat16"])
    assert "pushed to someone/pen (public)" in capsys.readouterr().out
    main(["export", "someone/pen", str(tmp_path / "whole")])
    assert capsys.readouterr().out.strip().endswith("whole")
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["type"] == "pi05"
    main(["export", "someone/pen", str(tmp_path / "peft"), "--form", "peft"])
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
