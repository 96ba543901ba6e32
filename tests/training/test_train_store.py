"""Runs with a prefix cache are the runs without: same losses, same episodes, same weights."""

import json
from dataclasses import replace

import pytest
from accelerate.state import AcceleratorState
from lerobot_policy_flow_mlp.adapter import FlowMlp
from pointmass_run import small
from vla_run import assert_same_updates, prepare, updates, vla

from poco_vla.config import PrefixConfig
from poco_vla.errors import CheckpointError, ConfigError
from poco_vla.training import Interrupted, Trainer, train

ON = PrefixConfig(mode="on")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def outcome(run):
    """What a run computed, without what a clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": [{name: value for name, value in line.items() if name != "seconds"} for line in lines],
        "episodes": (run / "episodes.jsonl").read_text(),
        "policy": (run / "policy" / "model.safetensors").read_bytes(),
    }


def figures(run):
    return json.loads((run / "result.json").read_text())["prefixes"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, data):
    run = tmp_path_factory.mktemp("plain") / "run"
    train(small(run, data))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert figures(run) == {"on": False}, "an MLP over states has nothing frozen"
    return outcome(run)


@pytest.mark.parametrize("kept", ["ram", "disk", "a little of both"])
def test_a_run_with_a_store_is_the_run_without_bit_for_bit(tmp_path, data, plain, kept):
    """An MLP's prefix does not depend on batch mates. 40 updates of SFT and 60 online, 4 steps a round."""
    budgets = {
        "ram": {"ram_bytes": 10**6},
        "disk": {"ram_bytes": 0, "disk_bytes": 10**6},
        "a little of both": {"ram_bytes": 1000, "disk_bytes": 20_000},
    }[kept]
    run = tmp_path / "run"
    train(small(run, data, prefixes=replace(ON, **budgets)))
    assert outcome(run) == plain
    found = figures(run)
    assert found["on"]
    assert 0 < found["hit_rate"] < 1
    assert found["bytes"]["ram"] <= budgets["ram_bytes"]
    assert found["bytes"]["disk"] <= budgets.get("disk_bytes", 0)
    assert found["loads"]["from_disk"] > 0 or kept == "ram"


def test_a_second_run_finds_the_demonstrations_prefixes(tmp_path, data, plain):
    shared = replace(ON, ram_bytes=0, disk_bytes=10**7, folder=tmp_path / "prefixes")
    encoded = []
    for number in range(2):
        run = tmp_path / f"run_{number}"
        train(small(run, data, prefixes=shared, online_steps=0))
        AcceleratorState._reset_state(reset_partial_state=True)
        encoded.append(figures(run)["encoded"])
    assert encoded[0] > 100
    assert encoded[1] < encoded[0] / 4, "states that the first run never drew"
    assert len(list((tmp_path / "prefixes").iterdir())) == 1


@pytest.mark.xdist_group("resume")
def test_a_run_that_is_interrupted_resumes_bit_for_bit(tmp_path, data, plain):
    """Interrupted in SFT and online, each time with a batch drawn ahead: what was drawn ahead is drawn again."""
    config = small(tmp_path / "run", data, prefixes=ON)
    for update in (17, 63):
        trainer = Trainer(config)
        after = trainer._after_update

        def stop(trainer=trainer, after=after, update=update):
            trainer.interruption.requested = trainer.interruption.requested or trainer.progress.update >= update
            after()

        trainer._after_update = stop
        try:
            with pytest.raises(Interrupted):
                trainer.run()
        finally:
            trainer.close()
        config = replace(config, resume=True)
    train(config)
    assert outcome(config.output_dir) == plain


def test_budgets_may_change_at_a_resume_and_eight_bit_prefixes_may_not(tmp_path, data):
    config = small(tmp_path / "run", data, prefixes=ON)
    train(config)
    train(replace(config, resume=True, prefixes=replace(ON, mode="off", ram_bytes=10, disk_bytes=10**6)))
    with pytest.raises(CheckpointError, match=r"prefixes\.dtype"):
        train(replace(config, resume=True, prefixes=replace(ON, dtype="fp8")))


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path, data):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"prefixes cannot be kept in .*file \(prefixes.folder\): Not a directory"):
        train(small(tmp_path / "run", data, prefixes=replace(ON, disk_bytes=10**6, folder=tmp_path / "file")))
    with pytest.raises(ConfigError, match=r"prefixes.folder is .*prefixes.disk_bytes is 0, which keeps nothing there"):
        replace(ON, folder=tmp_path)


def test_consecutive_transitions_train_and_are_part_of_the_configuration(tmp_path, data, plain):
    config = small(tmp_path / "run", data)
    train(replace(config, replay=replace(config.replay, consecutive=4)))
    found = outcome(config.output_dir)
    assert len(found["metrics"]) == len(plain["metrics"])
    assert found["metrics"] != plain["metrics"]
    assert all(abs(line["bc_loss"]) < 10 for line in found["metrics"] if "bc_loss" in line)


def test_a_policy_that_cannot_say_how_a_prefix_is_stored_is_refused_only_where_a_store_is_asked_for(
    tmp_path, data, monkeypatch
):
    monkeypatch.setattr(FlowMlp, "can_pack", property(lambda self: False))
    with pytest.raises(ConfigError, match="has no `pack` and `unpack`"):
        train(small(tmp_path / "on", data, prefixes=ON))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(small(tmp_path / "auto", data, online_steps=0))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    prepare(folder)
    return folder


def test_a_vlas_losses_do_not_depend_on_a_store(tmp_path, pictures):
    """pi0.5's real parts, small, cold and warm."""

    def check(trainer):
        assert trainer.parts.prefixes.hits > 20

    updates(vla(pictures, tmp_path / "off", prefixes=PrefixConfig(mode="off")))
    AcceleratorState._reset_state(reset_partial_state=True)
    updates(vla(pictures, tmp_path / "on", prefixes=ON), check)
    assert_same_updates(tmp_path / "on", tmp_path / "off")
