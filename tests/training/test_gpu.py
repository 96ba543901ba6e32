"""The whole trainer on an accelerator: every stage, bf16, resume, export, and the exported policy on a CPU."""

from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from lerobot_policy_flow_mlp.adapter import FlowMlp
from poco_vla_pi05.adapter import Pi05
from pointmass_run import small
from test_backends import launch, metrics_of, run_of

from poco_vla import Poco, PocoConfig, check_policy, flow_errors, propose
from poco_vla.config import OptimConfig
from poco_vla.data import preprocess_obs
from poco_vla.errors import NonFiniteError
from poco_vla.training import Trainer, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]


def _reset():
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    _reset()
    yield
    _reset()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_trains_resumes_and_exports_a_policy_that_a_cpu_loads(precision, tmp_path):
    config = small(tmp_path / "run", tmp_path / "data", mixed_precision=precision, checkpoint_every=20)
    result = train(config)
    assert result.env_steps >= 300
    train(replace(config, resume=True))
    policy = FlowMlp.from_pretrained(result.policy_dir, device="cpu")
    state = preprocess_obs(policy, {"observation.state": torch.zeros(2, policy.feature_dim).numpy()}, ["", ""])
    assert policy.encode(state).features.device.type == "cpu"
    again = FlowMlp.from_pretrained(result.policy_dir, device="cuda")
    assert next(again.parameters()).device.type == "cuda"


@pytest.fixture
def trainer(tmp_path):
    """Builds trainers of the small run, and closes them."""
    made = []

    def build(**changes):
        _reset()
        made.append(Trainer(small(tmp_path / f"run{len(made)}", tmp_path / "data", **changes)))
        return made[-1]

    yield build
    for one in made:
        one.close()


def updated(trainer, stages=("sft", "warmup", "online", "online")):
    """Weights after some updates."""
    with trainer.display.stage("by hand", len(stages)) as bar:
        for stage in stages:
            trainer.updater.update(stage, bar)
    return [p.detach().clone() for p in trainer.updater.algorithm.parameters()]


def test_a_loss_that_is_not_finite_changes_nothing_though_the_host_looks_late(trainer):
    one = trainer()
    updated(one)
    with torch.no_grad():
        one.updater.actor_parameters[0].fill_(float("nan"))
    before = [p.detach().clone() for p in one.updater.actor_parameters[1:]]
    with pytest.raises(NonFiniteError, match=r"sft update 4: the loss is nan"):
        updated(one, ("sft", "sft"))
    for p, old in zip(one.updater.actor_parameters[1:], before, strict=True):
        assert torch.equal(p, old)


def test_an_update_keeps_to_the_memory_it_is_given(trainer):
    """`--memory` is about all that torch holds; parts give the weights of an update in one go, but for rounding."""
    whole = updated(trainer(optim=OptimConfig(batch_size=256, micro_batch=256)))
    one = trainer(optim=OptimConfig(batch_size=256), memory="60MB")
    torch.cuda.reset_peak_memory_stats()
    weights = updated(one)
    assert torch.cuda.max_memory_allocated() <= 60e6
    torch.testing.assert_close(weights, whole, rtol=0, atol=1e-5)


def test_a_compiled_update_is_the_plain_one(trainer, monkeypatch):
    """CUDA graphs through Accelerate, as `accelerate launch --dynamo_backend inductor` has it."""
    plain = updated(trainer())
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "reduce-overhead")
    torch.testing.assert_close(updated(trainer()), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["fsdp2", "zero2"])
def test_a_launched_backend_on_one_gpu_is_the_run_without_it(kind, tmp_path):
    """One process over NCCL; how several share the work is tested over gloo (test_backends.py)."""
    if kind == "zero2":
        pytest.importorskip("deepspeed")
    train(run_of(tmp_path, "one"))
    launch(tmp_path, kind, 1, (run_of(tmp_path, kind), None))
    for one, two in zip(metrics_of(tmp_path / kind), metrics_of(tmp_path / "one"), strict=True):
        assert one.pop("stage") == two.pop("stage")
        assert one == pytest.approx(two, rel=1e-3)


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
