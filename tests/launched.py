"""Runs one after the other in the processes that `accelerate launch` started.

accelerate launch ... tests/launched.py RUNS.json: a list of {"config": as `to_json` gives it, "since": folder of a run
that it goes on from, at its first checkpoint of the online stage, or null}; or {"config": ..., "updates": true}, for
those of vla_run.py alone. Then the collapse guard's head is put back.
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pointmass  # noqa: F401 (registers the environment)
import torch
import vla_run
from accelerate.state import PartialState
from poco_vla_pi05.adapter import Pi05

from poco_vla.config import TrainConfig, from_json
from poco_vla.progress import Bar
from poco_vla.training import Trainer, train


def copy_run(run, to, after):
    """A run as it was at its first checkpoint with more updates than `after`."""
    shutil.copytree(run, to)
    later = [path for path in sorted((to / "checkpoints").iterdir()) if int(path.name) > after]
    for path in later[1:]:
        shutil.rmtree(path)


def put_a_head_back(config):
    """The guard's head, from before some updates, is what learns again, whatever form the backend gives it."""
    trainer = Trainer(config)
    try:
        with trainer.display.stage("guard", 6, 0) as bar:
            three_updates(trainer, bar)
            trainer.recovery.keep_head()
            kept = dict(trainer.recovery.good_head)
            three_updates(trainer, bar)
            trainer.updater.gather()
            assert any(not torch.equal(p.cpu(), kept[name]) for name, p in trainer.updater.head_parameters().items())
            trainer.recovery.restore_head()
            trainer.updater.learner.gather()
            assert all(torch.equal(p.cpu(), kept[name]) for name, p in trainer.updater.head_parameters().items())
            state = trainer.updater.learner.optimizer_state()
            assert not state["state"].keys() & set(state["param_groups"][0]["params"])
            three_updates(trainer, bar)
            an_optimizer_state_is_taken_back_bit_for_bit(trainer)
    finally:
        trainer.close()


def an_optimizer_state_is_taken_back_bit_for_bit(trainer: Trainer):
    learner = trainer.updater.learner
    state = learner.optimizer_state()
    three = {i: {name: value * 3 for name, value in entry.items()} for i, entry in state["state"].items()}
    assert set(state["param_groups"][0]["params"]) <= three.keys()
    learner.load_optimizer_state(state | {"state": three})
    now = learner.optimizer_state()
    assert now["param_groups"] == state["param_groups"]
    assert now["state"].keys() == three.keys()
    assert all(torch.equal(now["state"][i][name], value) for i in three for name, value in three[i].items())


def only_the_head_has_changed(trainer: Trainer):
    """Of a VLA whose backbone is frozen: the backbone is the base's bit for bit, and all that trains is not."""
    trainer.updater.gather()
    base = dict(Pi05.from_pretrained(trainer.config.policy).named_parameters())
    trained = {name for name, p in trainer.parts.policy.named_parameters() if p.requires_grad}
    changed = {name for name, p in trainer.parts.policy.named_parameters() if not torch.equal(p.cpu(), base[name])}
    assert changed == trained < base.keys(), changed ^ trained


def three_updates(trainer: Trainer, bar: Bar):
    for _ in range(3):
        trainer.updater.update("sft", bar)


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        # DeepSpeed would first compile collectives of its own for a CPU, for a minute; gloo's do.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for one in json.loads(Path(sys.argv[1]).read_text()):
        config = from_json(TrainConfig, one["config"])
        if one.get("updates"):
            vla_run.updates(config, only_the_head_has_changed)
            continue
        if one["since"] is not None:
            if os.environ.get("RANK", "0") == "0":
                copy_run(Path(one["since"]), config.output_dir, config.sft_steps)
            PartialState().wait_for_everyone()
            config = replace(config, resume=True)
        result = train(config)
        print(f"{result.output_dir.name}: {result.seconds:.1f} s")
    put_a_head_back(replace(config, output_dir=config.output_dir / "guard", resume=False, online_steps=1))
    # All is done, and on disk. Now and then a process that met others over gloo aborts as Python winds up ("terminate
    # called without an active exception", torch 2.11; a script without this library does, too).
    sys.stdout.flush()
    os._exit(0)
