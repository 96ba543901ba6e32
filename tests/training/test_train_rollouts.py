"""Training on the latest rollouts: runs, resumes bit for bit in the midst of one, and refuses what it cannot do."""

import json
from dataclasses import replace

import pytest
from accelerate import Accelerator
from pointmass_run import small
from toy_policies import ToyPolicy

from poco_vla.algorithms import load_algorithm
from poco_vla.config import InteractionConfig
from poco_vla.errors import ConfigError
from poco_vla.experience.rollouts import open_rollouts
from poco_vla.training import Interrupted, Trainer, train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
OPTIONS = {"rollout_steps": 5, "epochs": 2, "minibatch": 8, "warmup_rollouts": 1, "value_hidden": (16,)}


class TwoProcesses(Accelerator):
    num_processes = 2


def on_policy(output_dir, data, name="reinflow", **changes):
    return small(output_dir, data, algorithm=name, algorithm_options=OPTIONS, **changes)


def state_of(run):
    last = sorted((run / "checkpoints").iterdir())[-1]
    files = {name: (last / f"{name}.safetensors").read_bytes() for name in ("weights", "optimizer", "random")}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
    return files | {"metrics": metrics, "episodes": (run / "episodes.jsonl").read_text()}


def interrupt_after(config, rounds):
    """Run until so many rounds of chunks have come, and stop as Ctrl-C does."""
    trainer, left = Trainer(config), rounds
    receive = trainer.rollouts.received

    def received(*args):
        nonlocal left
        receive(*args)
        left -= 1
        trainer.interruption.requested = left <= 0

    trainer.rollouts.received = received
    try:
        with pytest.raises(Interrupted):
            trainer.run()
        return len(trainer.rollouts.rounds)
    finally:
        trainer.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["reinflow", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("dppo", "vmpo"))]
)
def test_a_run_interrupted_within_a_rollout_resumes_bit_for_bit(name, tmp_path, data):
    """300 steps are 20 rounds of 3 environments, 5 to a rollout, with 4 updates each; the first 4 are the value's."""
    whole = on_policy(tmp_path / "whole", data, name)
    result = train(whole)
    config = on_policy(tmp_path / "cut", data, name)
    assert interrupt_after(config, 8) == 3
    train(replace(config, resume=True))
    one, other = state_of(whole.output_dir), state_of(config.output_dir)
    assert [part for part in one if one[part] != other[part]] == []
    assert result.output_dir == whole.output_dir
    online = [line for line in one["metrics"] if line["stage"] != "sft"]
    assert online


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"interaction": InteractionConfig(mode="asynchronous")}, 'interaction.mode is "asynchronous"'),
        ({"env": None, "demonstrations": None, "interaction": InteractionConfig(mode="remote")}, 'is "remote"'),
    ],
)
def test_acting_beside_learning_is_refused_in_one_sentence(changes, words, tmp_path, data):
    config = on_policy(tmp_path, data, **changes)
    with pytest.raises(ConfigError, match=f'algorithm "reinflow" learns from its latest rollouts.*{words}'):
        load_algorithm("reinflow").fit(config)


def test_several_processes_are_refused(tmp_path, data):
    algorithm = load_algorithm("reinflow")(ToyPolicy())
    with pytest.raises(ConfigError, match="one process, and 2 were launched"):
        open_rollouts(on_policy(tmp_path, data), algorithm, TwoProcesses())


def test_the_warm_up_is_as_many_updates_as_its_rollouts_have(tmp_path, data):
    """5 chunks of 3 environments in minibatches of 8 are 2 updates, twice over."""
    assert load_algorithm("reinflow").fit(on_policy(tmp_path, data)).warmup_steps == 4
