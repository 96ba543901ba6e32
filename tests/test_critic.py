"""The chunk critic, its target and its slow copy."""

import math

import pytest
import torch
from torch import nn

from poco_vla import ChunkCritic, polyak_update, td_target
from poco_vla.critic import TargetNetwork, aggregate


def critic(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = ChunkCritic(3, 2, 2, **({"hidden": (8, 6), "members": 3} | options)).double()
        for p in (*built.gains, *built.shifts):
            p.data += 0.3 * torch.randn_like(p)
        return built


def reference(ours, member, activation, eps, *, norm_first=False):
    """The same member out of torch's own layers: Linear, activation, LayerNorm (or the other way round); Linear."""
    layers = []
    for i, (weight, bias) in enumerate(zip(ours.weights, ours.biases, strict=True)):
        linear = nn.Linear(weight.shape[1], weight.shape[2]).double()
        linear.weight.data, linear.bias.data = weight[member].T.clone(), bias[member, 0].clone()
        layers.append(linear)
        if i < len(ours.gains):
            norm = nn.LayerNorm(weight.shape[2], eps=eps).double()
            norm.weight.data, norm.bias.data = ours.gains[i][member, 0].clone(), ours.shifts[i][member, 0].clone()
            layers += [norm, activation] if norm_first else [activation, norm]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("name", "activation"),
    [("silu", nn.SiLU()), ("gelu", nn.GELU(approximate="tanh")), ("relu", nn.ReLU()), ("tanh", nn.Tanh())],
)
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("norm_first", [False, True])
def test_each_member_is_a_plain_mlp(name, activation, eps, norm_first):
    ours = critic(activation=name, layer_norm_eps=eps, norm_first=norm_first)
    features, chunk = torch.randn(4, 3).double(), torch.randn(4, 5, 2, 2).double()
    inputs = torch.cat([features[:, None].expand(-1, 5, -1), chunk.flatten(2)], dim=-1)
    members = [reference(ours, k, activation, eps, norm_first=norm_first)(inputs)[..., 0] for k in range(3)]
    torch.testing.assert_close(ours(features, chunk), torch.stack(members))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_members_that_are_asked_give_their_own_values(dtype):
    """Of enough rows for either way of computing a product."""
    ours = critic().to(dtype)
    features, chunk = torch.randn(70, 3, dtype=dtype), torch.randn(70, 1, 2, 2, dtype=dtype)
    whole = ours(features, chunk)
    torch.testing.assert_close(ours(features, chunk, torch.tensor([2, 0])), whole[[2, 0]])


def test_members_are_independent():
    """A loss of one member gives the others no gradient, and changing one leaves the others' values alone."""
    ours = critic()
    features, chunk = torch.randn(4, 3).double(), torch.randn(4, 1, 2, 2).double()
    before = ours(features, chunk)
    before[1].sum().backward()
    for p in ours.parameters():
        assert not p.grad[[0, 2]].any()
    assert ours.weights[0].grad[1].any()
    with torch.no_grad():
        for p in ours.parameters():
            p[1] += 1
    after = ours(features, chunk)
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]])
    assert not torch.allclose(after[1], before[1])


def test_members_start_different():
    q = ChunkCritic(3, 2, 2, hidden=(8,), members=2)(torch.randn(4, 3), torch.randn(4, 1, 2, 2))
    assert not torch.allclose(q[0], q[1])


def test_a_candidates_value_does_not_depend_on_the_others():
    ours, features, chunk = critic(), torch.randn(4, 3).double(), torch.randn(4, 5, 2, 2).double()
    whole = ours(features, chunk)
    for j in range(5):
        torch.testing.assert_close(ours(features, chunk[:, [j]]), whole[..., [j]])


def test_padded_dimensions_are_never_read():
    ours = critic()
    chunk = torch.randn(4, 5, 2, 4).double().requires_grad_()
    q = ours(torch.randn(4, 3).double(), chunk)
    q.sum().backward()
    assert not chunk.grad[..., 2:].any()
    assert chunk.grad[..., :2].any()


def test_weights_start_as_torchs_linear_layers_do():
    """Uniform within 1 / sqrt(fan in), 1 / sqrt(7) for the first layer: standard deviation bound / sqrt(3)."""
    weight = ChunkCritic(3, 2, 2, hidden=(4096,), members=1).weights[0]
    assert weight.abs().max().item() <= 1 / math.sqrt(7)
    assert weight.std().item() == pytest.approx(1 / math.sqrt(21), rel=0.03)


def test_aggregation_by_hand():
    q = torch.tensor([[[1.0, 5.0]], [[3.0, -1.0]]])
    assert aggregate(q, "mean").tolist() == [[2.0, 2.0]]
    assert aggregate(q, "min").tolist() == [[1.0, -1.0]]
    assert aggregate(q, "mean_minus_std", 2.0).tolist() == [[0.0, -4.0]]  # standard deviations 1 and 3


def test_td_target_by_hand():
    """gamma 0.5, next value 8. Success after 2 steps (rewards 0, 1): 0.5, nothing behind it. Time limit after 2 steps
    (rewards 1, 1): 1.5 + 0.25 x 8 = 3.5. Neither, 3 steps without reward: 0.125 x 8 = 1."""
    returns, discount = torch.tensor([0.5, 1.5, 0.0]), torch.tensor([0.0, 0.25, 0.125])
    assert td_target(returns, discount, torch.full((3,), 8.0)).tolist() == [0.5, 3.5, 1.0]


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
def test_what_lies_behind_a_terminal_cannot_leak(rubbish):
    y = td_target(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.5]), torch.tensor([rubbish, 4.0]))
    assert y.tolist() == [1.0, 3.0]


def test_no_gradient_reaches_the_next_value():
    next_q = torch.ones(3, requires_grad=True)
    assert not td_target(torch.zeros(3), torch.ones(3), next_q).requires_grad


@pytest.mark.parametrize("tau", [0.005, 0.3, 1.0])
def test_polyak_closed_form(tau):
    """A fixed online value c: after n updates the target is c + (1 - tau)^n (start - c)."""
    online, target = critic(), critic()
    for p, q in zip(online.parameters(), target.parameters(), strict=True):
        p.data.fill_(2.0)
        q.data.fill_(10.0)
    for _ in range(7):
        polyak_update(target, online, tau)
    for p, q in zip(online.parameters(), target.parameters(), strict=True):
        torch.testing.assert_close(q, torch.full_like(q, 2 + (1 - tau) ** 7 * 8))
        assert (p == 2).all()


@pytest.mark.parametrize(("mixes", "expected"), [("after", [1.0, 2.5]), ("before", [0.0, 1.0])])
def test_a_target_mixes_in_the_parameters_from_after_or_before_a_step(mixes, expected):
    """tau 0.5, online 0 at first, 2 after its first step, 4 after its second. After: 1, then (1 + 4) / 2 = 2.5. Before:
    (0 + 0) / 2 = 0, then (0 + 2) / 2 = 1."""
    online = nn.Linear(1, 1, bias=False)
    online.weight.data.fill_(0.0)
    target = TargetNetwork(online, 0.5, mixes)
    for value, mean in zip((2.0, 4.0), expected, strict=True):
        online.weight.data.fill_(value)
        target.follow(online)
        assert target(torch.ones(1, 1)).item() == mean
    assert not any(p.requires_grad for p in target.parameters())


def test_values_keep_float32_under_autocast():
    """bfloat16 keeps 8 bits: near a value of 10 it knows steps of 1/16, coarser than the differences eta weighs."""
    ours = critic().float()
    features, chunk = torch.randn(4, 3), torch.randn(4, 5, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = ours(features.bfloat16().float(), chunk)
    assert q.dtype == torch.float32
    torch.testing.assert_close(q, ours(features.bfloat16().float(), chunk), rtol=0, atol=0)
