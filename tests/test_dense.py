"""Dense layers, norms and GELU give what torch's give, forward and backward; other layers are left to torch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from poco_vla import ChunkCritic, dense, linear
from poco_vla.dense import CPU_ROWS, batched_linear, ensemble_norm, gelu, layer_norm, row_blocks, states_at_once

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def slow_mkl(request, monkeypatch):
    """Whether the processor is one that MKL is slow on."""
    monkeypatch.setattr(dense, "_slow_mkl", lambda: request.param)
    return request.param


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, size):
    """Sums of `size` products of order 1, in another order: a few float32 roundings of the largest."""
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * size**0.5)


@pytest.mark.parametrize("shape", [(100, 30), (4, 25, 30), (2, 3, 40, 30)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, nn.SiLU(), nn.GELU()])
def test_a_layer_and_its_gradients_are_torchs(slow_mkl, shape, bias, activation):
    inputs = [normal(*shape), normal(20, 30, seed=1), normal(20, seed=2) if bias else None]
    grads, outputs = [], []
    for of in (linear, lambda x, w, b, act: F.linear(x, w, b) if act is None else act(F.linear(x, w, b))):
        x, w, b = (None if t is None else t.clone().requires_grad_() for t in inputs)
        y = of(x, w, b, activation)
        y.backward(normal(*y.shape, seed=3))
        outputs.append(y.detach())
        grads.append([t.grad for t in (x, w, b) if t is not None])
    close(outputs[0], outputs[1], 30)
    for one, other in zip(*grads, strict=True):
        close(one, other, 120)


def test_without_gradients_silu_is_fused_and_the_same(slow_mkl):
    x, w, b = normal(200, 64), normal(32, 64, seed=1), normal(32, seed=2)
    with torch.no_grad():
        close(linear(x, w, b, nn.SiLU()), F.silu(F.linear(x, w, b)), 64)


def test_weights_with_gaps_are_closed_up_first(slow_mkl):
    """A first layer's share of the chunk is a slice of its weight."""
    x, w = normal(100, 26), normal(32, 54, seed=1)
    close(linear(x, w[:, 28:]), F.linear(x, w[:, 28:]), 26)


def test_gradients_that_nobody_wants_are_not_formed():
    x, w = normal(100, 30), normal(20, 30, seed=1).requires_grad_()
    y = dense._OneDnn.apply(x, w, None)
    y.sum().backward()
    close(w.grad, x.sum(0).expand(20, -1), 100)
    assert x.grad is None


@pytest.mark.parametrize("members", [1, 2, 5])
def test_an_ensembles_layer_is_that_of_each_member(slow_mkl, members):
    x, w, b = normal(members, 90, 16), normal(members, 16, 8, seed=1), normal(members, 1, 8, seed=2)
    for bias in (b, None):
        y = batched_linear(x, w, bias)
        for e in range(members):
            close(y[e], F.linear(x[e], w[e].T, None if bias is None else b[e, 0]), 16)


def test_a_critic_is_the_same_by_either(monkeypatch):
    """Values and gradients of 3 members, 6 states and 20 chunks each; the gradients to 1e-5 of their largest."""
    torch.manual_seed(0)
    critic = ChunkCritic(7, 4, 3, hidden=(32, 32), members=3)
    features, chunk = normal(6, 7), normal(6, 20, 4, 3, seed=1)
    found = []
    for slow in (True, False):
        monkeypatch.setattr(dense, "_slow_mkl", lambda slow=slow: slow)
        critic.zero_grad()
        values = critic(features, chunk)
        values.square().sum().backward()
        found.append((values.detach(), [p.grad.clone() for p in critic.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("x", [normal(100, 8).double(), normal(100, 8).bfloat16(), normal(3, 8)])
def test_other_precisions_and_few_rows_are_torchs(monkeypatch, x):
    monkeypatch.setattr(dense, "_slow_mkl", lambda: True)
    assert not dense.suits_onednn(x)
    assert torch.equal(linear(x, torch.ones(4, 8, dtype=x.dtype)), F.linear(x, torch.ones(4, 8, dtype=x.dtype)))


def test_autocast_is_torchs(monkeypatch):
    monkeypatch.setattr(dense, "_slow_mkl", lambda: True)
    x, w = normal(100, 8), normal(4, 8, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w).dtype == torch.bfloat16


def test_many_rows_are_taken_in_blocks_without_gradients_only():
    x = torch.zeros(100, 32, 2)
    assert row_blocks(x) == [slice(0, 100)]  # a gradient wants all of it
    with torch.no_grad():
        blocks = row_blocks(x)
        assert [x[rows].shape[0] for rows in blocks] == [64, 36]
        assert row_blocks(torch.zeros(2, CPU_ROWS + 1, 2)) == [slice(0, 1), slice(1, 2)]
        assert row_blocks(torch.zeros(100, 32, 2, device="meta")) == [slice(0, 100)]


def test_a_critics_values_are_the_same_in_blocks():
    critic = ChunkCritic(6, 2, 3, hidden=(16, 16), members=3)
    features, chunk = normal(100, 6), normal(100, 32, 2, 3, seed=1)
    whole = critic(features, chunk)
    with torch.no_grad():
        close(critic(features, chunk), whole, 16)
        torch.testing.assert_close(critic(features, chunk, torch.tensor([2, 0])), critic(features, chunk)[[2, 0]])


def with_gradients(function, *inputs):
    """Return what a function gives, and its gradients for those inputs that have one."""
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    y = function(*inputs)
    y.backward(normal(*y.shape, seed=9).to(y))
    return [y.detach(), *(x.grad for x in inputs if x.requires_grad)]


def test_a_norm_is_torchs():
    x = normal(3, 40, 24).requires_grad_()
    ours, theirs = (with_gradients(f, x) for f in (lambda x: layer_norm(x, 1e-5), lambda x: F.layer_norm(x, (24,))))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "wanted", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_a_norm_of_an_ensemble_is_each_members_own(wanted):
    inputs = [normal(3, 40, 24), normal(3, 1, 24, seed=1), normal(3, 1, 24, seed=2)]
    inputs = [x.double().requires_grad_(need) for x, need in zip(inputs, wanted, strict=True)]
    plain = lambda x, gain, shift: F.layer_norm(x, (24,), eps=1e-6) * gain + shift  # noqa: E731
    ours = with_gradients(lambda *xs: ensemble_norm(*xs, 1e-6), *inputs)
    torch.testing.assert_close(ours, with_gradients(plain, *inputs), rtol=1e-12, atol=1e-12)


def test_gelu_is_torchs():
    x = (4 * normal(50, 24)).double().requires_grad_()
    ours, theirs = (with_gradients(f, x) for f in (gelu, lambda x: F.gelu(x, approximate="tanh")))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    large = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    assert torch.equal(gelu(large.detach()), F.relu(large.detach()))
    assert with_gradients(gelu, large)[1].isfinite().all()


def test_a_cpu_computes_as_many_states_at_once_as_suit_its_caches():
    assert states_at_once(256, 33, "cpu") == CPU_ROWS // 33 == 62
    assert states_at_once(256, CPU_ROWS + 1, "cpu") == 1
    assert states_at_once(256, 0, "cpu") == states_at_once(256, 33, "cuda") == 256
