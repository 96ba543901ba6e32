"""Test that the launcher's settings are obeyed or refused, however they were given."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from poco_vla.config import TrainConfig
from poco_vla.errors import ConfigError
from poco_vla.learner import launcher
from poco_vla.learner.launcher import launched_precision, precision_told, refuse_unfit_deepspeed, refuse_unheeded
from poco_vla.learner.parent import launcher_of_this_process

SHIPPED = Path(__file__).parents[2] / "recipes" / "accelerate"


def config(precision: Any = "no"):
    return TrainConfig(online_steps=0, mixed_precision=precision)


@pytest.fixture
def launch(monkeypatch):
    """This process as `accelerate launch` with these words would have started it."""

    def launched(*words, precision="no", **environment):
        line = [sys.executable, "/somewhere/bin/accelerate", "launch", *map(str, words), "recipe.py", "--seed", "1"]
        monkeypatch.setattr(launcher, "_ancestors", lambda: iter([(4711, line)]))
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "XLA_"))]:
        monkeypatch.delenv(name)
    return launched


@pytest.mark.parametrize(
    ("own", "launched", "holds"), [("no", "bf16", "bf16"), ("bf16", "no", "bf16"), ("bf16", "bf16", "bf16")]
)
def test_bf16_holds_where_either_side_asks_for_it(own, launched, holds, launch):
    launch(precision=launched)
    assert launched_precision(config(own)) == holds


def test_it_is_said_whose_precision_holds_where_the_two_differ(launch):
    launch(precision="bf16")
    assert "mixed_precision is bf16, as the launcher was told" in str(precision_told(config("no"), "bf16"))
    launch("--mixed_precision", "no")
    assert "as the configuration says; the launcher says no" in str(precision_told(config("bf16"), "bf16"))
    assert precision_told(config("no"), "no") is None


@pytest.mark.parametrize("precision", ["fp16", "fp8", "bfloat16"])
def test_a_precision_that_is_not_trained_in_is_refused(precision, launch):
    launch(precision=precision)
    with pytest.raises(ConfigError, match=f'mixed_precision "{precision}"'):
        launched_precision(config())


@pytest.mark.parametrize(
    ("words", "environment", "told"),
    [
        ((), {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps 4.*optim.micro_batch"),
        (("--gradient_accumulation_steps", 2), {}, "gradient_accumulation_steps 2.*optim.micro_batch"),
        (("--gradient_clipping", 1.0), {}, r"gradient_clipping 1\.0.*optim.max_grad_norm"),
        (("--cpu", "--num_processes", 3), {}, "num_processes 3, and started 1.*ddp_cpu.yaml"),
        (("--config_file", SHIPPED / "ddp_cpu.yaml"), {}, "num_processes 2, and started 1"),
        (("--downcast_bf16",), {}, "downcast_bf16"),
        ((), {"ACCELERATE_DOWNCAST_BF16": "1"}, "downcast_bf16"),
        ((), {"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ((), {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism"),
    ],
)
def test_what_would_have_no_effect_is_refused(words, environment, told, launch):
    launch(*words, **environment)
    with pytest.raises(ConfigError, match=told):
        refuse_unheeded()


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (("--num_processes", 1, "--num_machines", 1, "--dynamo_backend", "no"), {}),
        (("--cpu",), {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}),
        (("--config_file", SHIPPED / "one_process.yaml"), {}),
        (("--config_file", SHIPPED / "ddp_cpu.yaml"), {"WORLD_SIZE": "2"}),
        (("--config_file", SHIPPED / "ddp_machines.yaml", "--num_processes", 2), {"WORLD_SIZE": "2"}),
        (("--config_file", SHIPPED / "zero2.yaml"), {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}),
    ],
)
def test_a_launch_as_it_should_be_is_not_refused(words, environment, launch):
    launch(*words, **environment)
    refuse_unheeded()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"bf16": {"enabled": True}}, "bf16 is enabled"),
        ({"fp16": {"enabled": True}}, "fp16 is enabled"),
        ({"optimizer": {"type": "AdamW"}}, "sets an optimizer"),
        ({"train_batch_size": 64}, "train_batch_size is 64.*optim.batch_size"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}, "train_batch_size": "auto"}, None),
    ],
)
def test_a_deepspeed_file_that_sets_what_the_learner_sets_is_named(settings, told):
    found = refuse_unfit_deepspeed(settings)
    assert (len(found) == 1) == (told is not None)
    assert told is None or re.search(told, found[0])


def test_only_a_process_that_a_launcher_started_watches_for_its_end(launch, monkeypatch):
    """Else `nohup python recipe.py &` would end with the shell."""
    assert launcher_of_this_process() is None
    launch()
    assert launcher_of_this_process() == 4711


def test_a_variable_that_a_user_exported_is_no_launcher(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr("poco_vla.learner.launcher._ancestors", lambda: iter([(os.getppid(), ["bash"])]))
    assert launcher_of_this_process() is None
