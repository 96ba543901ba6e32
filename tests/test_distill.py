"""M-step: flow errors, the clip, masked means."""

import math

import pytest
import torch
import torch.multiprocessing as mp
from toy_policies import ClosedForm, ToyPolicy, ToyPrefix

from poco_vla import ActionSpec, clipped_distillation, flow_errors
from poco_vla.noise import row_weights


def test_flow_error_by_hand():
    """v = 0, one candidate, H = 3, two real dimensions of three. Noise 0, so the target velocity is the chunk itself:
    rows (1, 2), (3, 0), (9, 9), the last not valid. Row means of squares 2.5 and 4.5: 3.5 over the two valid steps,
    7 / 3 over all three as in the authors' code."""
    policy = ClosedForm(lambda x, t: 0 * x, ActionSpec(horizon=3, width=3, action_dim=2, flow_steps=1))
    chunk = torch.tensor([[1.0, 2.0, 7.0], [3.0, 0.0, 7.0], [9.0, 9.0, 7.0]])[None, None]
    valid = torch.tensor([[True, True, False]])
    draw = {"noise": torch.zeros_like(chunk), "t": torch.full((1, 1), 0.5)}
    assert flow_errors(policy, None, chunk, valid, **draw).item() == pytest.approx(3.5)
    assert flow_errors(policy, None, chunk, valid, **draw, mean_over="all").item() == pytest.approx(7 / 3)


def test_a_perfect_velocity_has_no_error():
    """For a single target a the velocity (a - x) / (1 - t) is a - a_0 on the whole path."""
    action = torch.randn(2, 1, 3, 2).double()
    policy = ClosedForm(lambda x, t: (action - x) / (1 - t), ActionSpec(3, 2, 2, 1))
    t = torch.rand(2, 4).double() * 0.9
    errors = flow_errors(policy, None, action.expand(-1, 4, -1, -1), torch.ones(2, 3, dtype=torch.bool),
                         noise=torch.randn(2, 4, 3, 2).double(), t=t)  # fmt: skip
    torch.testing.assert_close(errors, torch.zeros(2, 4).double())


def test_the_best_error_on_a_gaussian_is_half_pi_times_its_spread():
    """With a_1 ~ N(0, s^2) the best velocity leaves Var(a_1 - a_0 | x_t) = s^2 / ((1 - t)^2 + t^2 s^2), whose mean
    over t ~ U(0, 1) is s (atan(s) + atan(1 / s)) = s pi / 2. For s = 0.2 that is 0.314: what "zeta is in units of the
    BC loss" means. Standard error with 400,000 draws below 0.0015."""
    s, num = 0.2, 400_000
    generator = torch.Generator().manual_seed(0)

    def velocity(x, t):
        return (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2) * x

    chunk = s * torch.randn(1, num, 1, 1, generator=generator)
    noise = torch.randn(1, num, 1, 1, generator=generator)
    t = torch.rand(1, num, generator=generator)
    policy = ClosedForm(velocity, ActionSpec(1, 1, 1, 1))
    errors = flow_errors(policy, None, chunk, torch.ones(1, 1, dtype=torch.bool), noise=noise, t=t)
    assert errors.mean().item() == pytest.approx(s * math.pi / 2, abs=0.006)


@pytest.fixture
def padded():
    """A policy that *reads* its padded dimension (2 real of 3), and a batch whose last step is not valid."""
    policy = ToyPolicy(width=3, action_dim=2, horizon=4, dtype=torch.float64)
    chunk, noise = torch.randn(2, 5, 4, 3).double(), torch.randn(2, 5, 4, 3).double()
    valid = torch.ones(2, 4, dtype=torch.bool)
    valid[:, -1] = False
    return policy, ToyPrefix(torch.randn(2, 2).double()), chunk, valid, noise, torch.rand(2, 5).double()


class Tap:
    """A policy whose velocity is a leaf: what gradient arrives there, all parameters behind it receive."""

    def __init__(self, policy):
        self.policy, self.spec, self.sample_time = policy, policy.spec, policy.sample_time

    def velocity(self, prefix, x, t):
        self.v = self.policy.velocity(prefix, x, t).detach().requires_grad_()
        return self.v


@pytest.mark.parametrize("mean_over", ["valid", "all"])
def test_invalid_steps_and_padded_dimensions_get_exactly_no_gradient(padded, mean_over):
    policy, prefix, chunk, valid, noise, t = padded
    tap = Tap(policy)
    flow_errors(tap, prefix, chunk, valid, noise=noise, t=t, mean_over=mean_over).sum().backward()
    assert not tap.v.grad[:, :, -1].any()
    assert not tap.v.grad[..., 2].any()
    assert tap.v.grad[:, :, :-1, :2].all()


def test_what_stands_in_padded_dimensions_of_a_chunk_counts_for_nothing(padded):
    """Even for a network that reads its padded inputs, as pi0.5 and GR00T do (the noise there)."""
    policy, prefix, chunk, valid, noise, t = padded
    chunk.requires_grad_()
    errors = flow_errors(policy, prefix, chunk, valid, noise=noise, t=t)
    errors.sum().backward()
    assert not chunk.grad[..., 2].any()
    assert chunk.grad[..., :2].any()
    other = torch.cat([chunk[..., :2], torch.full_like(chunk[..., 2:], 7)], dim=-1)
    torch.testing.assert_close(flow_errors(policy, prefix, other, valid, noise=noise, t=t), errors, rtol=0, atol=0)
    other_noise = torch.cat([noise[..., :2], noise[..., 2:] + 1], dim=-1)
    assert not torch.equal(flow_errors(policy, prefix, chunk, valid, noise=other_noise, t=t), errors)


def test_candidates_errors_are_independent(padded):
    policy, prefix, chunk, valid, noise, t = padded
    errors = flow_errors(policy, prefix, chunk, valid, noise=noise, t=t)
    for j in range(5):
        one = flow_errors(policy, prefix, chunk[:, [j]], valid, noise=noise[:, [j]], t=t[:, [j]])
        torch.testing.assert_close(one, errors[:, [j]])


def test_a_chunk_without_a_valid_step_has_error_0(padded):
    policy, prefix, chunk, valid, noise, t = padded
    assert not flow_errors(policy, prefix, chunk, torch.zeros_like(valid), noise=noise, t=t).any()


def test_noise_and_time_are_drawn_where_they_are_not_given(padded):
    policy, prefix, chunk, valid, _, _ = padded
    first, second = (flow_errors(policy, prefix, chunk, valid) for _ in range(2))
    assert first.shape == (2, 5)
    assert not torch.equal(first, second)


def test_clipped_loss_and_its_scalars_by_hand():
    """Errors (1, 3 | 2, 8), weights (1/2, 1/2 | 1/4, 3/4), zeta 2: (1/2 + 2/2 + 2/4 + 6/4) / 2 = 1.75. Two of four are
    above 2; weight 1/2 and 1/4 survives; the mean error is 14 / 4."""
    errors, weights = torch.tensor([[1.0, 3.0], [2.0, 8.0]]), torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    loss, metrics = clipped_distillation(errors, weights, zeta=2.0)
    assert loss.item() == pytest.approx(1.75)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"posterior_loss": 1.75, "candidate_loss": 3.5, "clipped_fraction": 0.5, "surviving_weight": 0.375}
    )


@pytest.mark.parametrize(("offset", "gradient"), [(-1e-6, 0.5), (1e-6, 0.0)])
def test_the_clip_is_hard(offset, gradient):
    """One of two states, weight 1: gradient 1/2 just below zeta, exactly none just above."""
    errors = torch.tensor([[0.3 + offset], [5.0]], dtype=torch.float64, requires_grad=True)
    clipped_distillation(errors, torch.ones(2, 1).double(), zeta=0.3)[0].backward()
    assert errors.grad.flatten().tolist() == [gradient, 0.0]


@pytest.mark.parametrize(("zeta", "clipped"), [(math.inf, 0.0), (1e-12, 1.0)])
def test_without_a_clip_all_count_and_below_all_errors_none(zeta, clipped):
    errors = torch.tensor([[1.0, 2.0]], requires_grad=True)
    loss, metrics = clipped_distillation(errors, torch.tensor([[0.25, 0.75]]), zeta=zeta)
    loss.backward()
    assert metrics["clipped_fraction"].item() == clipped
    assert errors.grad.flatten().tolist() == ([0.25, 0.75] if clipped == 0 else [0.0, 0.0])


def test_no_gradient_reaches_the_weights_nor_leaves_through_the_scalars():
    errors, weights = torch.rand(2, 3, requires_grad=True), torch.rand(2, 3, requires_grad=True)
    loss, metrics = clipped_distillation(errors, weights, zeta=0.5)
    loss.backward()
    assert weights.grad is None
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    ("mask", "mean"), [([True, False, True], 4.0), ([True, True, True], 3.0), ([False, False, False], 0.0)]
)
def test_rows_that_count_by_hand(mask, mean):
    """Of 1, 1, 7: the first and last average 4, all 3, none 0 with a finite, zero gradient."""
    x = torch.tensor([1.0, 1.0, 7.0], requires_grad=True)
    result = (x * row_weights(torch.tensor(mask), x)).mean()
    result.backward()
    assert result.item() == pytest.approx(mean)
    assert x.grad.tolist() == pytest.approx([m / max(sum(mask), 1) for m in mask])


def _share(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, mask = torch.tensor([[1.0, 2.0], [30.0, 40.0]])[rank], torch.tensor([[True, True], [False, True]])[rank]
    x.requires_grad_()
    loss = (x * row_weights(mask, x)).mean()
    loss.backward()
    torch.save((loss.detach(), x.grad), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_rows_that_count_over_two_processes_give_the_global_mean(tmp_path):
    """1, 2 | (30), 40: the mean of the three selected is 43 / 3, which averaging per-process means (1.5 and 40) would
    miss. The average over processes, as data-parallel training takes it, gives every selected row gradient 1/3."""
    mp.spawn(_share, (str(tmp_path),), nprocs=2)
    (loss0, grad0), (loss1, grad1) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert (loss0 + loss1).item() / 2 == pytest.approx(43 / 3)
    assert (torch.cat([grad0, grad1]) / 2).tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
