"""The whole trainer on an accelerator: every stage, bf16, resume, export, and the exported policy on a CPU."""

from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from lerobot_policy_flow_mlp.adapter import FlowMlp
from poco_vla_pi05.adapter import Pi05
from pointmass_run import small

from poco_vla import Poco, PocoConfig, check_policy, flow_errors, propose
from poco_vla.data import network_obs
from poco_vla.train import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_trains_resumes_and_exports_a_policy_that_a_cpu_loads(precision, tmp_path):
    config = small(tmp_path / "run", tmp_path / "data", mixed_precision=precision, checkpoint_every=20)
    result = train(config)
    assert result.env_steps >= 300
    train(replace(config, resume=True))
    policy = FlowMlp.from_pretrained(result.policy_dir, device="cpu")
    state = network_obs(policy, {"observation.state": torch.zeros(2, policy.feature_dim).numpy()}, ["", ""])
    assert policy.encode(state).features.device.type == "cpu"
    again = FlowMlp.from_pretrained(result.policy_dir, device="cuda")
    assert next(again.parameters()).device.type == "cuda"


def test_the_contract_holds_on_the_gpu():
    check_policy(FlowMlp.tiny().cuda())


def test_zeta_and_target_move_with_the_module():
    poco = Poco(FlowMlp.tiny(), PocoConfig(critic_hidden=(8,))).cuda()
    assert {tensor.device.type for tensor in poco.state_dict().values()} == {"cuda"}


def test_pi05_keeps_the_contract_trains_and_is_saved_on_the_gpu(tmp_path):
    """Float32 on both sides: LeRobot's own sampler is the measure, as on a CPU."""
    Pi05.tiny().save_pretrained(tmp_path / "base")
    policy = Pi05.from_pretrained(tmp_path / "base", horizon=10, device="cuda")
    check_policy(policy, {key: value.cuda() for key, value in policy.example_obs(3).items()})
    poco = Poco(policy, PocoConfig(critic_hidden=(8,), num_candidates=4)).cuda()
    prefix = policy.encode(policy.example_obs(2))
    x = propose(policy, prefix, 4)
    assert x.device.type == "cuda"
    flow_errors(poco.policy, prefix, x, torch.ones(2, 10, dtype=torch.bool, device="cuda")).mean().backward()
    assert all(p.grad is not None for p in policy.head.parameters())
    policy.save_pretrained(tmp_path / "out")
    policy.save_head(tmp_path / "head")
    for name in ("out", "head"):
        assert Pi05.from_pretrained(tmp_path / name).base_version is not None
    lora = Pi05.from_pretrained(tmp_path / "base", device="cuda", dtype="bfloat16", lora=2)
    check_policy(lora, {key: value.cuda() for key, value in lora.example_obs(3).items()}, atol=0.05)
