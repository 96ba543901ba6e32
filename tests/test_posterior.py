"""E-step weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poco_vla import effective_sample_size, posterior_weights


def test_weights_by_hand():
    """Q = (0, ln 2, ln 5) at eta 1: proportional to 1, 2, 5, so 1/8, 2/8, 5/8; at eta 1/2 to 1, 4, 25, of 30."""
    q = torch.tensor([[1.0, 2.0, 5.0]]).double().log()
    torch.testing.assert_close(posterior_weights(q, eta=1.0), torch.tensor([[1, 2, 5]]).double() / 8)
    torch.testing.assert_close(posterior_weights(q, eta=0.5), torch.tensor([[1, 4, 25]]).double() / 30)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8),
    st.floats(-1e4, 1e4, width=32),
    st.floats(1e-3, 1e3),
)
def test_weights_are_a_distribution_that_a_shift_of_q_leaves_alone(values, shift, eta):
    q = torch.tensor([values], dtype=torch.float64)
    w = posterior_weights(q, eta=eta)
    assert w.sum().item() == pytest.approx(1)
    assert (w >= 0).all()
    torch.testing.assert_close(posterior_weights(q + shift, eta=eta), w, rtol=1e-5, atol=1e-6)


def test_eta_to_0_picks_the_best_and_splits_ties():
    q = torch.tensor([[0.1, 0.3, 0.2], [0.7, 0.7, 0.2]])
    torch.testing.assert_close(posterior_weights(q, eta=1e-6), torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]))


@pytest.mark.parametrize("eta", [1e9, math.inf])
def test_eta_to_infinity_weighs_all_alike(eta):
    q = torch.tensor([[0.1, 0.3, -5.0, 40.0]])
    torch.testing.assert_close(posterior_weights(q, eta=eta), torch.full((1, 4), 0.25))


def test_large_values_do_not_overflow():
    """Without the maximum subtracted, exp(1e3 / 1e-3) is infinite in any precision."""
    w = posterior_weights(torch.tensor([[1000.0, 999.999, -1000.0]]), eta=1e-3)
    torch.testing.assert_close(w, torch.softmax(torch.tensor([[0.0, -1.0, -2e6]]), dim=-1), rtol=0.05, atol=0.02)


def test_no_gradient_reaches_q():
    q = torch.randn(2, 3, requires_grad=True)
    assert not posterior_weights(q, eta=0.1).requires_grad


@pytest.mark.parametrize(
    ("weights", "size"), [([1, 0, 0, 0], 1), ([0.25] * 4, 4), ([0.5, 0.5, 0, 0], 2), ([0.6, 0.4], 1 / 0.52)]
)
def test_effective_sample_size_by_hand(weights, size):
    """1 / sum w^2: one candidate 1, N alike N, 0.6 and 0.4 give 1 / (0.36 + 0.16)."""
    assert effective_sample_size(torch.tensor([weights], dtype=torch.float64)).item() == pytest.approx(size)
