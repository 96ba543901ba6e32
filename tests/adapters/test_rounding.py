"""Weights that are rounded once for a sample give what weights give that are rounded for every product."""

import pytest
import torch
from poco_vla_pi05.expert import fused_norm
from torch import nn
from torch.nn import functional as F

from poco_vla import load_adapter, propose
from poco_vla.adapting import rounding
from poco_vla.adapting.rounding import rounded_linear, rounded_weights


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_weights_are_rounded_once_and_anew_after_they_change(bias, monkeypatch):
    layer, x, calls = nn.Linear(8, 4, bias=bias), torch.randn(3, 8).bfloat16(), []
    once = rounding._rounded
    monkeypatch.setattr(rounding, "_rounded", lambda *args: calls.append(1) or once(*args))
    for _ in range(2):
        expected = rounded_linear(layer, x)
        calls.clear()
        with rounded_weights(nn.ModuleList([layer])):
            assert all(torch.equal(rounded_linear(layer, x), expected) for _ in range(3))
        assert len(calls) == 1
        layer.weight.data.add_(1)  # as fused Adam does it: without a new version
        assert not torch.equal(rounded_linear(layer, x), expected)


def test_gradients_reach_the_weights_themselves():
    layer, x = nn.Linear(8, 4), torch.randn(3, 8).bfloat16()
    with rounded_weights(layer), torch.enable_grad():
        rounded_linear(layer, x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("name", ["pi05", "groot_n1d6"])
def test_a_sample_rounds_each_weight_once(name, monkeypatch):
    """In bfloat16, by a head of float32; the same chunks to the last bit."""
    policy = load_adapter(name).tiny()
    if name == "pi05":
        policy.compute = torch.bfloat16
    else:
        policy.policy.config.compute = "bfloat16"
    prefix = policy.encode(policy.example_obs(2))
    noise = torch.randn(2, 3, policy.spec.horizon, policy.spec.width)
    used, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight, *bias: used.append(weight) or linear(x, weight, *bias))

    def rounded():
        found = [weight for weight in used if weight.dtype == torch.bfloat16]
        return len(found), len(set(map(id, found)))

    chunks = propose(policy, prefix, 3, steps=4, noise=noise)
    products, weights = rounded()
    assert products == 4 * weights > 0
    used.clear()
    monkeypatch.setattr(type(policy), "sampling", lambda self: torch.no_grad())
    assert torch.equal(propose(policy, prefix, 3, steps=4, noise=noise), chunks)
    assert rounded() == (products, products)


@torch.no_grad()
def test_the_norm_of_two_kernels_is_lerobots():
    """pi0.5's adaptive norm, to float32's rounding."""
    policy = load_adapter("pi05").tiny()
    norm = policy.policy.model.paligemma_with_expert.gemma_expert.model.layers[0].input_layernorm
    x, condition = torch.randn(2, 3, 5, norm.dim), torch.randn(1, 1, 1, norm.cond_dim)
    for found, expected in zip(fused_norm(norm, x, condition), norm(x, cond=condition), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
