"""Gaussians over chunks against torch.distributions, their network, and the temperature."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from poco_vla.gaussian import Gaussian, GaussianNetwork, SquashedGaussian, Temperature


def gaussian(*batch):
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.randn(*batch, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return Gaussian(mean / 4, (std / 4).exp() / 2)  # samples stay off the bound


def theirs(base):
    return Independent(Normal(base.mean, base.std), 2)


@pytest.mark.parametrize("batch", [(4,), (4, 5)])
def test_log_probabilities_are_those_of_torch(batch):
    base = gaussian(*batch)
    noise = torch.randn(base.mean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(base.log_prob(base.sample(noise)), theirs(base).log_prob(base.sample(noise)))
    chunk, log_prob = SquashedGaussian(base).sample(noise)
    squashed = TransformedDistribution(theirs(base), TanhTransform())
    torch.testing.assert_close(log_prob, squashed.log_prob(chunk))
    torch.testing.assert_close(SquashedGaussian(base).log_prob(chunk), log_prob)


def test_the_log_probability_of_an_action_at_the_bound_is_finite():
    """It is that of 1 - 1e-5, and has a gradient."""
    base = gaussian(1)
    mean = base.mean.requires_grad_()
    log_prob = SquashedGaussian(base).log_prob(torch.ones_like(mean))
    torch.testing.assert_close(log_prob, SquashedGaussian(base).log_prob(torch.full_like(mean, 1 - 1e-5)))
    log_prob.sum().backward()
    assert mean.grad.isfinite().all()
    assert mean.grad.any()


def test_epsilon_bounds_the_log_determinant_of_a_saturated_action():
    """At u = 20 the exact log(1 - tanh(u)^2) is 2 log 2 - 40; with 1e-6 it is log(1e-6)."""
    base = Gaussian(torch.full((1, 1, 1), 20.0).double(), torch.ones(1, 1, 1).double())
    at_mean = -0.5 * math.log(2 * math.pi)
    noise = torch.zeros(1, 1, 1).double()
    exact, bounded = (SquashedGaussian(base, epsilon).sample(noise)[1].item() for epsilon in (0.0, 1e-6))
    assert exact == pytest.approx(at_mean - (2 * math.log(2) - 40))
    assert bounded == pytest.approx(at_mean - math.log(1e-6))


@pytest.mark.parametrize("layer_norm_eps", [None, 1e-5])
def test_the_network_gives_a_gaussian_within_its_range(layer_norm_eps):
    network = GaussianNetwork(
        2, 3, 4, hidden=(8, 8), activation="tanh", layer_norm_eps=layer_norm_eps, log_std=(-1.0, 0.5)
    )
    with torch.no_grad():
        network.log_std.bias[:6], network.log_std.bias[6:] = 100, -100
    found = network(torch.randn(5, 2))
    assert found.mean.shape == found.std.shape == (5, 3, 4)
    torch.testing.assert_close(found.std.flatten(1)[:, :6], torch.full((5, 6), math.exp(0.5)))
    torch.testing.assert_close(found.std.flatten(1)[:, 6:], torch.full((5, 6), math.exp(-1.0)))
    names = {name.split(".")[0] for name, _ in network.named_parameters()}
    assert names == {"layers", "mean", "log_std"} | ({"norms"} if layer_norm_eps else set())


def test_the_temperature_goes_down_where_the_entropy_is_above_its_target():
    """d/dlog_alpha of alpha (entropy - target) is alpha (entropy - target), of log_alpha (...) it is (...) itself."""
    temperature = Temperature(0.5)
    assert temperature().item() == pytest.approx(0.5)
    assert not temperature().requires_grad
    for log, slope in ((False, 0.5 * 3), (True, 3)):
        temperature.zero_grad()
        temperature.loss(torch.tensor(1.0), -2.0, log=log).backward()
        assert temperature.log_alpha.grad.item() == pytest.approx(slope)
