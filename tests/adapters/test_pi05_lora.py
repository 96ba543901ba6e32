"""A LoRA on pi05's action head: what trains, what is saved, and what it is once merged."""

import shutil

import pytest
import torch
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from pi05_folders import move_base
from poco_vla_pi05 import checkpoint
from poco_vla_pi05.adapter import LORA_TARGETS, Pi05
from poco_vla_pi05.architecture import TINY, lerobot_builds
from safetensors.torch import load_file

from poco_vla import Lora, Poco, PocoConfig, PolicyError, check_policy, flow_errors, propose
from poco_vla.checkpointing.checkpoint import load_trainable_state, trainable_state
from poco_vla.pretrained import heads


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pi05") / "tiny"
    Pi05.tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def policy(saved):
    return Pi05.from_pretrained(saved, lora=2, horizon=10)


def train(policy, seed=0):
    """Move everything that trains, both matrices of each pair."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return policy


@torch.no_grad()
def velocity(policy):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 10, 32, generator=generator)
    return policy.velocity(policy.encode(policy.example_obs(2)), x, torch.rand(2, 3, generator=generator))


def trainable(policy):
    return {name: p for name, p in policy.policy.named_parameters() if p.requires_grad}


def test_the_contract(tmp_path):
    tiny = Pi05.tiny()
    pipelines = (tiny.preprocessor, tiny.postprocessor)
    check_policy(train(Pi05.wrap(tiny.policy, pipelines, lora=4, architecture=TINY)))


def test_only_lora_matrices_train_and_every_target_has_a_pair(policy):
    """7 projections in each of 3 layers, and the four around them, time_mlp_* included: 25 pairs of rank 2."""
    names = trainable(policy)
    assert len(names) == 2 * (7 * 3 + 4)
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    for target in LORA_TARGETS:
        assert sum(f"{target}.lora_A" in name for name in names) == (
            1 if "_proj" not in target or "action" in target else 3
        )
    assert {p.dtype for p in names.values()} == {torch.float32}
    assert {min(p.shape) for p in names.values()} == {2}
    assert {id(p) for p in names.values()} == {id(p) for p in policy.head.parameters() if p.requires_grad}


def test_at_first_it_changes_nothing(policy, saved):
    assert torch.equal(velocity(policy), velocity(Pi05.from_pretrained(saved)))
    assert not torch.equal(velocity(train(policy)), velocity(Pi05.from_pretrained(saved)))


def test_every_matrix_learns_and_nothing_else(policy):
    train(policy)
    obs, valid = policy.example_obs(2), torch.ones(2, 10, dtype=torch.bool)
    flow_errors(policy, policy.encode(obs), torch.randn(2, 3, 10, 32), valid).mean().backward()
    for name, p in policy.policy.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) is p.requires_grad, name


def test_recomputation_gives_the_same_gradients(policy):
    train(policy)
    prefix, x, t = policy.encode(policy.example_obs(2)), torch.randn(2, 3, 10, 32), torch.rand(2, 3)
    gradients = []
    for policy.recompute in (False, True):
        policy.zero_grad()
        policy.velocity(prefix, x, t).square().mean().backward()
        gradients.append([p.grad.clone() for p in trainable(policy).values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_merged_it_is_w_plus_ba_times_alpha_over_rank(policy, tmp_path):
    """Rank 2 and the default alpha of twice the rank: W + 2 B A."""
    train(policy).save_pretrained(tmp_path / "merged")
    weights = load_file(tmp_path / "merged" / checkpoint.WEIGHTS)
    held = dict(policy.policy.named_parameters())
    for name in ("model.time_mlp_in", "model.paligemma_with_expert.gemma_expert.model.layers.1.mlp.down_proj"):
        a, b = (held[f"{name}.lora_{x}.default.weight"] for x in "AB")
        expected = held[f"{name}.base_layer.weight"] + 2 * b @ a
        torch.testing.assert_close(weights[f"{name}.weight"], expected.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(weights["model.time_mlp_in.bias"], held["model.time_mlp_in.base_layer.bias"])


def test_the_merged_export_is_a_plain_model(policy, tmp_path, capsys):
    train(policy).save_pretrained(tmp_path / "merged")
    plain = Pi05.from_pretrained(tmp_path / "merged")
    assert plain.lora is None
    assert not any("lora" in name or "base_layer" in name for name in plain.policy.state_dict())
    assert trainable(plain).keys() == {n for n, _ in plain.policy.named_parameters() if Pi05.in_head(n)}
    torch.testing.assert_close(velocity(plain), velocity(policy), rtol=1e-4, atol=1e-4)
    with lerobot_builds(TINY):
        PI05Policy.from_pretrained(tmp_path / "merged")
    assert "All keys loaded successfully!" in capsys.readouterr().out


def test_exporting_leaves_the_policy_as_it_was(policy, tmp_path):
    train(policy)
    before = {name: tensor.clone() for name, tensor in policy.policy.state_dict().items()}
    policy.save_pretrained(tmp_path / "merged")
    policy.save_head(tmp_path / "head")
    after = policy.policy.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_lora_is_saved_and_put_on_its_base_again(policy, tmp_path):
    train(policy).save_head(tmp_path / "head")
    held = load_file(tmp_path / "head" / heads.HEAD_WEIGHTS)
    assert held.keys() == trainable(policy).keys()
    assert heads.read_head(tmp_path / "head", "pi05").lora.rank == 2
    loaded = Pi05.from_pretrained(tmp_path / "head")
    assert loaded.lora == policy.lora
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    found, expected = (
        propose(p, p.encode(p.example_obs(2)), 2, generator=g)
        for p, g in zip((loaded, policy), generators, strict=True)
    )
    assert torch.equal(found, expected)


def test_what_it_is_is_part_of_a_saved_head(policy, tmp_path):
    """An option that says the same is welcome, one that says otherwise would be ignored."""
    train(policy).save_head(tmp_path / "head")
    assert Pi05.from_pretrained(tmp_path / "head", lora=2).lora == policy.lora
    with pytest.raises(PolicyError, match=r"head was trained with lora .*rank=2.*, asked for .*rank=8"):
        Pi05.from_pretrained(tmp_path / "head", lora=8)


def test_a_full_head_does_not_become_a_lora(saved, tmp_path):
    Pi05.from_pretrained(saved).save_head(tmp_path / "head")
    with pytest.raises(PolicyError, match="head was trained with lora None"):
        Pi05.from_pretrained(tmp_path / "head", lora=8)


def test_a_lora_is_not_put_on_another_experts_weights(policy, saved, tmp_path):
    """Two fine-tuned models share a VLM: a full head may move between them, a LoRA adds to the frozen expert."""
    full = Pi05.from_pretrained(saved)
    train(full).save_pretrained(tmp_path / "finetuned")
    train(policy).save_head(tmp_path / "lora")
    full.save_head(tmp_path / "full")
    for name in ("lora", "full"):
        move_base(tmp_path / name, tmp_path / "finetuned")
    assert torch.equal(velocity(Pi05.from_pretrained(tmp_path / "full", horizon=10)), velocity(full))
    with pytest.raises(PolicyError, match=r"trained on another base model than .*/finetuned is now"):
        Pi05.from_pretrained(tmp_path / "lora")


def test_a_checkpoint_of_training_holds_the_matrices_alone_and_puts_them_back(saved):
    """The trainer's own two functions, between two policies on one base."""
    one, other = (Pi05.from_pretrained(saved, lora=2, horizon=10) for _ in range(2))
    first, second = Poco(train(one), PocoConfig()), Poco(train(other, seed=1), PocoConfig())
    state = {name: tensor.detach().clone() for name, tensor in trainable_state(first).items()}
    held = {name for name in state if name.startswith("policy.")}
    assert len(held) == len(trainable(one))
    assert all(".lora_" in name for name in held)
    assert not torch.equal(velocity(one), velocity(other))
    load_trainable_state(second, state)
    assert torch.equal(velocity(one), velocity(other))


def test_the_frozen_expert_is_kept_in_the_dtype_that_it_is_multiplied_in(saved):
    """bfloat16 attention and MLP under a bfloat16 backbone; norms, projections and LoRA matrices stay float32."""
    policy = Pi05.from_pretrained(saved, dtype="bfloat16", lora=2)
    dtypes = {name: p.dtype for name, p in policy.policy.named_parameters() if Pi05.in_head(name)}
    rounded = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert rounded == {name for name in dtypes if "base_layer" in name and (".self_attn." in name or ".mlp." in name)}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    full = Pi05.from_pretrained(saved, dtype="bfloat16")
    torch.testing.assert_close(velocity(policy), velocity(full), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (None, None),
        (4, Lora(LORA_TARGETS, rank=4)),
        ({"rank": 4, "alpha": 1.5}, Lora(LORA_TARGETS, rank=4, alpha=1.5)),
        ({"targets": ["q_proj", "time_mlp_in"]}, Lora(("q_proj", "time_mlp_in"))),
        (Lora(LORA_TARGETS, rank=3), Lora(LORA_TARGETS, rank=3)),
    ],
)
def test_it_is_asked_for_by_rank_or_by_its_fields(option, expected):
    assert Lora.of(option, LORA_TARGETS) == expected


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (0, "lora.rank is 0"),
        (-2, "lora.rank is -2"),
        (True, "lora.rank is True"),
        ({"rank": 2.5}, r"lora.rank is 2\.5"),
        ({"rank": 2, "dropout": 0.1}, "lora is .*dropout"),
        ("big", "lora is 'big'; expected a rank, or a mapping"),
        (
            {"rank": 2, "targets": ["q_proj", "lm_head"]},
            'lora target "lm_head" is the end of no linear layer of the head',
        ),
        ({"rank": 2, "targets": ["vision_tower"]}, 'lora target "vision_tower"'),
        ({"rank": 2, "targets": []}, "lora.targets"),
        ({"rank": 2, "targets": "q_proj"}, "lora.targets"),
        ({"rank": 2, "alpha": 0}, "lora.alpha is 0"),
    ],
)
def test_one_that_cannot_be_is_refused(saved, option, words):
    with pytest.raises(PolicyError, match=words):
        Pi05.from_pretrained(saved, lora=option)


def test_adaptive_norms_and_chosen_targets_can_carry_one(saved, tmp_path):
    policy = train(Pi05.from_pretrained(saved, horizon=10, lora={"rank": 1, "targets": ["dense", "self_attn.q_proj"]}))
    ends = {name.split(".lora_")[0].split(".")[-1] for name in trainable(policy)}
    assert ends == {"dense", "q_proj"}
    policy.save_head(tmp_path / "head")
    assert torch.equal(velocity(Pi05.from_pretrained(tmp_path / "head")), velocity(policy))
    policy.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        velocity(Pi05.from_pretrained(tmp_path / "merged")), velocity(policy), rtol=1e-4, atol=1e-4
    )


def test_a_lora_whose_base_is_gone_is_named(saved, tmp_path):
    base = shutil.copytree(saved, tmp_path / "base")
    train(Pi05.from_pretrained(base, lora=2)).save_head(tmp_path / "head")
    shutil.rmtree(base)
    with pytest.raises(PolicyError, match=f"no policy in {base}: the folder does not exist"):
        Pi05.from_pretrained(tmp_path / "head")
