"""Precision of products on a GPU: set by the configuration alone, and put back after a run."""

import pytest
import torch
from accelerate import Accelerator
from pointmass_run import small

from poco_vla.config import TrainConfig
from poco_vla.errors import ConfigError
from poco_vla.learner import accelerator as opening
from poco_vla.learner.arithmetic import arithmetic_told, gpu_arithmetic
from poco_vla.training import Trainer

GPU = torch.device("cuda")


def settings():
    backends = torch.backends
    return backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cuda.cudnn_sdp_enabled()


@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerate_does_not_choose_the_precision(monkeypatch):
    """Accelerate switches TF32 on, without a word, where a run on CUDA is compiled."""

    class Compiled(Accelerator):
        def __init__(self, **options):
            super().__init__(**options)
            torch.backends.cuda.matmul.allow_tf32 = True

    monkeypatch.setattr(opening, "Accelerator", Compiled)
    before = settings()
    opening.open_accelerator(TrainConfig(online_steps=0))
    assert settings() == before
    assert before[0] is False


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_the_configuration_chooses_the_precision_for_the_time_of_a_run(precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    before = settings()
    with gpu_arithmetic(precision, GPU):
        assert settings() == (precision == "tf32", precision == "tf32", False)
    assert settings() == before
    with gpu_arithmetic("fp32", torch.device("cpu")):
        assert settings() == before


def test_a_device_without_tf32_is_refused_before_anything_changes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for device in ("cpu", "cuda"):
        with pytest.raises(ConfigError, match=f"precision is tf32, .* this run is on {device}"):
            gpu_arithmetic("tf32", torch.device(device)).__enter__()


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_asks_for_it_first_and_ends_it(tmp_path, data):
    with pytest.raises(ConfigError, match="precision is tf32"):
        Trainer(small(tmp_path / "run", data, precision="tf32"))
    assert not (tmp_path / "run").exists()


def test_the_log_says_both():
    assert arithmetic_told("fp32", None).startswith("products of float32 numbers are computed in float32;")
    assert "TF32 (10 bits of mantissa), candidates sampled in bfloat16;" in arithmetic_told("tf32", "bfloat16")
