"""Algorithms that act with networks beside the policy: the run, its resume, the guard, what the finished run says."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from pointmass_run import small
from safetensors.torch import load_file

from poco_vla.algorithms import load_algorithm
from poco_vla.cli import main
from poco_vla.config import GuardConfig
from poco_vla.training import Interrupted, Trainer, train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

NETWORKS = {"qc": "critic", "qc_fql": "one_step"}


def config_of(name, folder, data, **changes):
    options = dict(load_algorithm(name).tiny_options)
    return small(folder, data, algorithm=name, algorithm_options=options, **changes)


@pytest.fixture(scope="module", params=NETWORKS)
def finished(request, tmp_path_factory, data):
    """Name, result.json and folder of a finished run."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    train(config_of(request.param, folder, data))
    return request.param, json.loads((folder / "result.json").read_text()), folder


def lines_of(output):
    return " ".join(output.split())


def test_the_run_says_that_plain_samples_are_not_how_it_acts(finished):
    name, result, run = finished
    title = load_algorithm(name).title
    assert (result["title"], result["acts_with"]) == (title, [NETWORKS[name]])
    assert json.loads((run / "policy" / "poco.json").read_text())["acts_with"] == [NETWORKS[name]]
    assert [e["label"] for e in result["evaluations"]] == ["after SFT", f"after {title}"]


def test_the_report_names_the_algorithm(finished, capsys, monkeypatch, tmp_path):
    name, _, run = finished
    monkeypatch.setenv("COLUMNS", "160")
    main(["report", str(run), "--output", str(tmp_path / "page.html")])
    title = load_algorithm(name).title
    assert f"after {title}" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert f"<dt>after {title}</dt>" in page
    assert f"<title>{title} on dock</title>" in page
    assert "POCO" not in page.split("<h2>")[1].split("settings")[0]


def test_eval_of_a_run_acts_as_the_run_acted(finished, capsys, monkeypatch):
    """The same starts and noise as in the run's last evaluation: the same episodes. Plain samples come with a note."""
    _, result, run = finished
    monkeypatch.setenv("COLUMNS", "400")
    after = result["after"]
    main(["eval", str(run), "--episodes", str(after["episodes"])])
    shown = lines_of(capsys.readouterr().out)
    assert f"success {after['success_rate']:.0%}" in shown
    assert "Plain samples" not in shown
    main(["eval", str(run / "policy"), "--episodes", "1"])
    assert "Plain samples of this policy are not how it was trained to act" in lines_of(capsys.readouterr().out)


def test_eval_acts_with_the_weights_of_the_checkpoint(finished):
    from poco_vla import load_head
    from poco_vla.hub.acting import load_acting

    name, _, run = finished
    acting, trained = load_acting(run, load_head(run))
    assert trained
    last = sorted((run / "checkpoints").iterdir())[-1]
    saved = load_file(last / "weights.safetensors")
    own = acting.get_submodule(NETWORKS[name]).state_dict()
    assert own
    assert all(torch.equal(tensor, saved[f"{NETWORKS[name]}.{key}"]) for key, tensor in own.items())


def test_eval_of_a_run_whose_checkpoints_are_gone_says_what_it_lacks(finished, tmp_path, capsys):
    name, _, run = finished
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(SystemExit):
        main(["eval", str(tmp_path / "run"), "--episodes", "1"])
    assert f"acts with networks beside the policy ({NETWORKS[name]})" in lines_of(capsys.readouterr().err)


def test_what_is_pushed_says_so_too(finished, capsys):
    name, _, run = finished
    main(["push", str(run), "someone/dock", "--dry-run", "--license", "mit"])
    shown = lines_of(capsys.readouterr().out)
    assert f"Before: plain samples; after: as {load_algorithm(name).title} acts" in shown
    assert shown.count("Plain samples of this policy are not how it was trained to act") == 2  # card and console
    with pytest.raises(SystemExit):
        main(["push", str(run), "someone/dock", "--dry-run", "--license", "mit", "--critic"])
    assert "--critic is for the critic of POCO" in lines_of(capsys.readouterr().err)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_run_that_never_came_beyond_warm_up_acts_by_plain_samples(name, tmp_path, data):
    run = tmp_path / "run"
    train(config_of(name, run, data, online_steps=0, sft_steps=5))
    result = json.loads((run / "result.json").read_text())
    assert "acts_with" not in result
    assert "acts_with" not in json.loads((run / "policy" / "poco.json").read_text())


def test_a_run_that_was_stopped_resumes_bit_for_bit(finished, tmp_path, data):
    """Stopped in the online stage, beyond warm-up: 40 + 10 + 20 of some 100 updates."""
    name, _, whole = finished
    config = config_of(name, tmp_path / "run", data)
    trainer = Trainer(config)
    update = trainer.updater.update

    def stopping(*args):
        update(*args)
        trainer.interruption.requested = trainer.progress.update >= 70

    trainer.updater.update = stopping
    try:
        with pytest.raises(Interrupted):
            trainer.run()
    finally:
        trainer.close()
    train(replace(config, resume=True))
    last = [sorted((run / "checkpoints").iterdir())[-1] for run in (config.output_dir, whole)]
    for file in ("weights", "optimizer", "random"):
        ours, theirs = (path / f"{file}.safetensors" for path in last)
        assert ours.read_bytes() == theirs.read_bytes(), file
    assert any(key.startswith(f"{NETWORKS[name]}.") for key in load_file(last[0] / "weights.safetensors"))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_collapse_brings_back_all_that_acts(name, tmp_path, data):
    guard = GuardConfig(window=8, least=8, max_restores=1)
    trainer = Trainer(config_of(name, tmp_path / "run", data, guard=guard))
    try:
        updater = trainer.updater
        trainer.recovery.guard.reference = (50, 50)
        trainer.recovery.keep_head()
        good = {key: p.detach().clone() for key, p in updater.acting_parameters().items()}
        beside = [key for key in good if key.startswith(f"algorithm.{NETWORKS[name]}.")]
        assert beside
        target = [p.detach().clone() for p in updater.algorithm.target_critic.parameters()]
        with torch.no_grad():
            for p in updater.algorithm.parameters():
                p.add_(1.0)
                if p.requires_grad:
                    updater.optimizer.state[p] = {"step": torch.tensor(1.0)}
        for _ in range(8):
            trainer.recovery.watch(False)
        now = updater.acting_parameters()
        assert all(torch.equal(now[key], good[key]) for key in good)
        assert all(not updater.optimizer.state.get(p) for p in now.values())
        assert not any(
            torch.equal(p, old) for p, old in zip(updater.algorithm.target_critic.parameters(), target, strict=True)
        )
        assert load_file(tmp_path / "run" / "good_head.safetensors").keys() == good.keys()
    finally:
        trainer.close()
