"""Runs of algorithms beside POCO: every stage, the figures that they log, and a resume bit for bit."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from pointmass_run import small
from safetensors.torch import load_file

from poco_vla.algorithms import load_algorithm
from poco_vla.training import Interrupted, Trainer, train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
LOGGED = {
    "dsrl": {"critic_loss", "actor_loss", "temperature", "entropy", "noise_critic_loss", "gaussian_grad_norm"},
    "expo": {"critic_loss", "actor_loss", "temperature", "entropy", "critic_grad_norm"},
    "mpo": {"critic_loss", "mean_loss", "temperature_loss", "kl_std_loss", "candidate_q", "duals_grad_norm"},
    "rlpd": {"critic_loss", "actor_loss", "temperature", "entropy", "temperature_grad_norm"},
    "rlpd_ac": {"critic_loss", "actor_loss", "temperature", "entropy", "gaussian_grad_norm"},
}


def config_of(name, run, data):
    options = {"target_period": 3} if name == "mpo" else {}  # its own 100 are more updates than there are here
    return small(run, data, algorithm=name, algorithm_options={**load_algorithm(name).tiny_options, **options})


def outcome(run):
    """What a run computed, without what a clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = sorted((run / "checkpoints").iterdir())[-1]
    return {
        "metrics": [{name: value for name, value in line.items() if name != "seconds"} for line in lines],
        "episodes": (run / "episodes.jsonl").read_text(),
        **{name: (last / f"{name}.safetensors").read_bytes() for name in ("weights", "optimizer", "random")},
    }


def interrupted(config, update):
    """Train until an update, and let Ctrl-C come."""
    trainer = Trainer(config)
    after = trainer._after_update

    def stop():
        trainer.interruption.requested = trainer.interruption.requested or trainer.progress.update >= update
        after()

    trainer._after_update = stop
    try:
        with pytest.raises(Interrupted):
            trainer.run()
    finally:
        trainer.close()
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize(
    "name", [name if name == "dsrl" else pytest.param(name, marks=pytest.mark.exhaustive) for name in LOGGED]
)  # DSRL has the most networks of its own
def test_a_run_trains_and_resumes_bit_for_bit(name, tmp_path, data):
    """Interrupted in its first stage, and online. Checkpoints hold the extra networks, none of which stands still."""
    whole, config = tmp_path / "whole", config_of(name, tmp_path / "run", data)
    train(replace(config, output_dir=whole))
    AcceleratorState._reset_state(reset_partial_state=True)
    interrupted(config, 6)
    saved = load_file(sorted((config.output_dir / "checkpoints").iterdir())[-1] / "weights.safetensors")
    interrupted(replace(config, resume=True), 45)
    train(replace(config, resume=True))
    assert outcome(config.output_dir) == outcome(whole)
    metrics = outcome(whole)["metrics"]
    kind, stages = load_algorithm(name), load_algorithm(name).stages()
    assert list(dict.fromkeys(line["stage"] for line in metrics)) == list(stages)
    assert set().union(*(line.keys() for line in metrics if line["stage"] == "online")) >= LOGGED[name]
    last = load_file(sorted((whole / "checkpoints").iterdir())[-1] / "weights.safetensors")
    networks = {key.split(".")[0] for key in last if not key.startswith("policy.")}
    moved = {key.split(".")[0] for key in last if not torch.equal(last[key], saved[key])}
    assert moved - {"policy"} == networks - {"edit_scale"}
    assert ("policy" in moved) == ("sft" in stages and kind.sft_trains_policy)
