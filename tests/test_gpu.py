"""The whole trainer on an accelerator: every stage, bf16, resume, export, and the exported policy on a CPU."""

from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from lerobot_policy_flow_mlp.adapter import FlowMlp
from pointmass_run import small

from poco_vla import Poco, PocoConfig, check_policy
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
