"""The time convention, the path, the solver, and the shared random numbers."""

import math

import pytest
import torch
from toy_policies import ClosedForm

from poco_vla import GlobalBatchRNG, integrate, interpolate, target_velocity
from poco_vla.flow import uniform_time


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_time_0_is_noise_and_time_1_is_the_action():
    noise, action = normal(4, 3, 2), normal(4, 3, 2, seed=1)
    torch.testing.assert_close(interpolate(noise, action, torch.zeros(4).double()), noise, rtol=0, atol=0)
    torch.testing.assert_close(interpolate(noise, action, torch.ones(4).double()), action, rtol=0, atol=0)


def test_each_element_is_at_its_own_time():
    """From 2 to 10: a quarter of the way is 4, three quarters 8; the velocity is 8 everywhere."""
    noise, action = torch.full((2, 1, 1), 2.0), torch.full((2, 1, 1), 10.0)
    assert interpolate(noise, action, torch.tensor([0.25, 0.75])).flatten().tolist() == [4.0, 8.0]
    assert target_velocity(noise, action).flatten().tolist() == [8.0, 8.0]


def test_the_velocity_is_the_paths_derivative():
    """The path is straight, so a difference quotient is its derivative."""
    noise, action, t = normal(5, 3, 2), normal(5, 3, 2, seed=1), normal(5, seed=2)
    quotient = (interpolate(noise, action, t + 0.5) - interpolate(noise, action, t)) / 0.5
    torch.testing.assert_close(quotient, target_velocity(noise, action))


@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("rate", [-2.0, 0.5])
def test_euler_on_a_linear_field_is_a_power(steps, rate):
    """v = c x: every step multiplies by 1 + c / K, so x_K = (1 + c / K)^K x_0, which tends to e^c x_0."""
    x0 = normal(2, 3, 4, 1)
    x1 = integrate(ClosedForm(lambda x, t: rate * x), None, x0, steps)
    torch.testing.assert_close(x1, (1 + rate / steps) ** steps * x0)


def test_euler_asks_at_the_left_end_of_every_step():
    """v = t: sum over k of (k / K) / K = (K - 1) / (2 K), 0.4 for K = 5; asked at the right end it would be 0.6."""
    x1 = integrate(ClosedForm(lambda x, t: t.expand_as(x)), None, torch.zeros(1, 2, 1, 1), 5)
    torch.testing.assert_close(x1, torch.full_like(x1, 0.4))


@pytest.mark.parametrize("n", [1, 3])
def test_a_policy_that_declares_it_gets_the_time_that_all_share_as_one_number(n):
    """Declared, not told by strides: those of one number expanded to [B, 1] are (0, 1), as of B different ones."""

    class Embeds(ClosedForm):
        takes_shared_time = True

    shapes = []
    chunks = [
        integrate(kind(lambda x, t: shapes.append(t.shape[:2]) or t.expand_as(x)), None, torch.zeros(2, n, 1, 1), 5)
        for kind in (ClosedForm, Embeds)
    ]
    assert torch.equal(*chunks)
    assert shapes == [(2, n)] * 5 + [(1, 1)] * 5


def test_a_constant_field_is_exact_in_one_step():
    noise, action = normal(2, 1, 3, 2), normal(2, 1, 3, 2, seed=1)
    field = ClosedForm(lambda x, t: target_velocity(noise, action))
    torch.testing.assert_close(integrate(field, None, noise, 1), action)


def test_the_flow_to_a_gaussian_is_its_affine_map():
    """Independent a_0 ~ N(0, 1), a_1 ~ N(m, s^2) and x_t = (1 - t) a_0 + t a_1 are jointly Gaussian, with
    Var x_t = (1 - t)^2 + t^2 s^2 and Cov(a_1 - a_0, x_t) = t s^2 - (1 - t). The best velocity is therefore
    v(x, t) = m + (t s^2 - (1 - t)) / ((1 - t)^2 + t^2 s^2) (x - t m), since E x_t = t m. Its numerator is half the
    derivative of its denominator, so x_t - t m grows like sqrt(Var x_t): noise a_0 ends exactly at m + s a_0.
    Euler's error falls like 1 / K: at most 0.01 for K = 1000 (measured 0.002), and about ten times that for 100."""
    mean, std = 0.3, 0.4
    a0 = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 9, 1, 1)

    def velocity(x, t):
        return mean + (t * std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * std**2) * (x - t * mean)

    errors = [
        (integrate(ClosedForm(velocity), None, a0, steps) - (mean + std * a0)).abs().max().item()
        for steps in (100, 1000)
    ]
    assert errors[1] < 0.01
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)


def test_integrate_neither_clips_nor_stops_gradients():
    x0 = torch.full((1, 1, 1, 1), 3.0, requires_grad=True)
    x1 = integrate(ClosedForm(lambda x, t: x), None, x0, 2)
    x1.sum().backward()
    assert x1.item() == pytest.approx(3 * 1.5**2)
    assert x0.grad.item() == pytest.approx(1.5**2)


def test_uniform_time_is_uniform():
    """Mean 1/2 and variance 1/12; the standard error of the mean of 40,000 is 0.0014."""
    t = uniform_time((40_000,), torch.Generator().manual_seed(0))
    assert t.min() >= 0
    assert t.max() <= 1
    assert t.mean().item() == pytest.approx(0.5, abs=0.006)
    assert t.var().item() == pytest.approx(1 / 12, abs=0.002)


def draws(rank=0, world_size=1, seed=3):
    return GlobalBatchRNG(torch.Generator().manual_seed(seed), rank, world_size)


def test_two_processes_rows_are_one_processs():
    """The sequence of an update: normal, normal, time; rows 0-2 on one process, 3-5 on the other."""
    like = torch.empty(0)

    def sequence(source, rows):
        return [
            source.normal((rows, 1, 2), like),
            source.normal((rows, 4, 2), like),
            source.time(uniform_time, (rows, 5), like),
        ]

    whole = sequence(draws(), 6)
    halves = zip(sequence(draws(0, 2), 3), sequence(draws(1, 2), 3), strict=True)
    for one, two in zip(whole, halves, strict=True):
        torch.testing.assert_close(torch.cat(two), one, rtol=0, atol=0)
        assert not torch.equal(*two)


def test_drawn_members_are_different_and_the_same_ones_for_every_row_and_process():
    """Over many draws each of 4 members comes as often: 2 of 4 in half of 2,000 draws, standard error 0.011."""
    like, source = torch.empty(0), draws()
    drawn = [source.members(2, 4, 3, like) for _ in range(2000)]
    assert all((rows == rows[0]).all() and len(set(rows[0].tolist())) == 2 for rows in drawn)
    counts = torch.stack([rows[0] for rows in drawn]).flatten().bincount(minlength=4) / 2000
    torch.testing.assert_close(counts, torch.full((4,), 0.5), rtol=0, atol=0.05)
    assert torch.equal(draws(1, 2).members(2, 4, 3, like), draws().members(2, 4, 3, like))


def test_draws_are_of_the_asked_type():
    assert draws().normal((2, 3), torch.empty(0, dtype=torch.float64)).dtype == torch.float64
    assert draws().time(uniform_time, (2, 3), torch.empty(0, dtype=torch.float64)).dtype == torch.float64


def test_draws_are_standard_normal():
    """Mean 0, standard deviation 1; standard errors 0.005 and 0.004 for 40,000."""
    x = draws().normal((200, 200), torch.empty(0))
    assert x.mean().item() == pytest.approx(0, abs=0.02)
    assert x.std().item() == pytest.approx(1, abs=0.02)
    assert (x.abs() < 1).float().mean().item() == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.01)
