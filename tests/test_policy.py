"""Proposals, and what the base class leaves to an adapter."""

import pytest
import torch
from toy_policies import ToyPolicy, ToyPrefix

from poco_vla import ActionSpec, FlowPolicy, Prefix, integrate, propose


@pytest.fixture
def policy():
    built = ToyPolicy(width=3, action_dim=2, horizon=2)
    for p in built.parameters():
        p.data *= 3  # far enough from zero that some proposals are clipped
    return built


@pytest.fixture
def prefix():
    return ToyPrefix(torch.randn(4, 2))


def test_proposals_are_the_flows_end_clipped_and_without_padding(policy, prefix):
    noise = torch.randn(4, 6, 2, 3)
    x = propose(policy, prefix, 6, noise=noise)
    raw = integrate(policy, prefix, noise, policy.spec.flow_steps)
    torch.testing.assert_close(x[..., :2], raw[..., :2].clamp(-1, 1))
    assert raw[..., :2].abs().max() > 1
    assert raw[..., 2].any()
    assert not x[..., 2].any()


def test_many_proposals_are_sampled_in_blocks_and_are_the_same(policy, monkeypatch):
    prefix, noise, shapes = ToyPrefix(torch.randn(100, 2)), torch.randn(100, 32, 2, 3), []
    velocity = policy.velocity

    def seen(prefix, x, t):
        shapes.append(tuple(x.shape[:2]))
        return velocity(prefix, x, t)

    monkeypatch.setattr(policy, "velocity", seen)
    x = propose(policy, prefix, 32, noise=noise, steps=1)
    assert shapes == [(64, 32), (36, 32)]
    torch.testing.assert_close(x[..., :2], integrate(policy, prefix, noise, 1)[..., :2].clamp(-1, 1))


def test_no_clip_leaves_the_flows_end(policy, prefix):
    policy.spec = ActionSpec(2, 3, 2, 4, clip=None)
    noise = torch.randn(4, 6, 2, 3)
    torch.testing.assert_close(
        propose(policy, prefix, 6, noise=noise)[..., :2], integrate(policy, prefix, noise, 4)[..., :2]
    )


def test_no_gradient_and_the_noise_is_left_alone(policy, prefix):
    noise = torch.randn(4, 6, 2, 3)
    kept = noise.clone()
    assert not propose(policy, prefix, 6, noise=noise).requires_grad
    torch.testing.assert_close(noise, kept, rtol=0, atol=0)


def test_a_generator_makes_proposals_reproducible_and_candidates_differ(policy, prefix):
    first, again, other = (
        propose(policy, prefix, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first[:, 0], first[:, 1])


def test_steps_default_to_the_models_own(policy, prefix):
    noise = torch.randn(4, 1, 2, 3)
    own, four, one = (propose(policy, prefix, 1, noise=noise, steps=steps) for steps in (None, 4, 1))
    torch.testing.assert_close(own, four, rtol=0, atol=0)
    assert not torch.allclose(own, one)


@pytest.mark.parametrize(("features", "noise"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_noise_is_at_least_of_single_precision(features, noise):
    seen = []

    class Spy(ToyPolicy):
        def velocity(self, prefix, x, t):
            seen.append((x.dtype, t.dtype))
            return x

    propose(Spy(), ToyPrefix(torch.zeros(1, 2, dtype=features)), 2)
    assert set(seen) == {(noise, noise)}


def test_a_prefix_is_recognised():
    assert isinstance(ToyPrefix(torch.zeros(1, 2)), Prefix)
    assert not isinstance(torch.zeros(1, 2), Prefix)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("encode", ({},)),
        ("native_sample", ({}, torch.zeros(1, 1, 1))),
        ("tiny", ()),
        ("example_obs", (1,)),
        ("save_pretrained", ("nowhere",)),
        ("from_pretrained", ("nowhere",)),
    ],
)
def test_an_adapter_must_write_these_itself(method, arguments):
    with pytest.raises(NotImplementedError):
        getattr(FlowPolicy(), method)(*arguments)
