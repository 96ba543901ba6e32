"""Holds the pi05 adapter against LeRobot's own PI05Policy: same weights, noise and times.

    python tests/adapters/check_pi05.py [--seed 0] [--candidates 16] [--cameras 2] [--width full --depth 2]

Prints the largest differences of loss, head gradients and Euler samples, and fails where one is beyond its bound.
LeRobot's joint training forward is run once per candidate, its sampler once per chunk of noise.
"""

import argparse
import copy
import sys
from dataclasses import dataclass, replace

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from poco_vla_pi05.adapter import Pi05
from poco_vla_pi05.architecture import TINY, Architecture, empty_policy, random_weights
from rich.console import Console
from rich.table import Table

from poco_vla import flow_errors, integrate

BOUNDS = {"loss": 1e-6, "head gradients": 1e-5, "Euler samples": 1e-5}
"""float32: losses relative to the largest, each parameter's gradient relative to its norm, samples absolute."""

FULL_WIDTH = replace(Architecture(), vocab=1024)
"""The real layers; embeddings of words that no prompt here uses are left out."""


@dataclass(frozen=True)
class Case:
    """One comparison. `missing` leaves the last camera out of the observation; prompts differ in length."""

    seed: int = 0
    candidates: int = 16
    cameras: int = 2
    missing: bool = False
    horizon: int = 10
    states: int = 2
    architecture: Architecture = TINY


def stock_policy(case):
    """LeRobot's policy with random weights, language heads included."""
    size = case.architecture.image_size
    images = {f"{OBS_IMAGES}.cam{i}": PolicyFeature(FeatureType.VISUAL, (3, size, size)) for i in range(case.cameras)}
    config = PI05Config(
        input_features=images | {OBS_STATE: PolicyFeature(FeatureType.STATE, (7,))},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (6,))},
        chunk_size=case.horizon,
        n_action_steps=case.horizon,
        image_resolution=(size, size),
        device="cpu",
    )
    policy = empty_policy(config, case.architecture)
    policy.load_state_dict(random_weights(policy, case.seed), assign=True)
    return policy.eval()


def observations(policy, case):
    obs = Pi05.example_obs(_Sizes(policy), case.states, case.seed)
    obs[OBS_LANGUAGE_TOKENS] %= case.architecture.vocab
    if case.missing:
        del obs[list(policy.config.image_features)[-1]]
    return obs


@dataclass
class _Sizes:
    """What `Pi05.example_obs` reads of an adapter."""

    policy: object


def differences(case):
    """Name -> largest difference (see BOUNDS). The stock side runs on a copy of the weights."""
    stock = stock_policy(case)
    adapter = Pi05.wrap(copy.deepcopy(stock)).eval()
    obs = observations(stock, case)
    generator = torch.Generator().manual_seed(case.seed + 1)
    shape = (case.states, case.candidates, case.horizon, stock.config.max_action_dim)
    chunks = torch.zeros(shape)
    chunks[..., : adapter.spec.action_dim] = torch.randn((*shape[:-1], adapter.spec.action_dim), generator=generator)
    noise = torch.randn(shape, generator=generator)
    t = adapter.sample_time(shape[:2], generator)

    valid = torch.ones(case.states, case.horizon, dtype=torch.bool)
    errors = flow_errors(adapter, adapter.encode(obs), chunks, valid, noise=noise, t=t)
    errors.mean().backward()
    expected = stock_errors(stock, obs, chunks, noise, 1 - t)
    expected.mean().backward()

    grads = {name: p.grad for name, p in adapter.policy.named_parameters() if p.requires_grad}
    stock_grads = dict(stock.named_parameters())
    assert grads
    assert all(grad is not None for grad in grads.values())
    gaps = [(g - stock_grads[name].grad).norm() / stock_grads[name].grad.norm() for name, g in grads.items()]

    with torch.no_grad():
        samples = integrate(adapter, adapter.encode(obs), noise, adapter.spec.flow_steps)
        native = torch.stack([stock_sample(stock, obs, noise[:, j]) for j in range(case.candidates)], dim=1)
    return {
        "loss": ((errors - expected).abs().max() / expected.abs().max()).item(),
        "head gradients": max(gaps).item(),
        "Euler samples": (samples - native).abs().max().item(),
    }


def stock_inputs(policy, obs):
    images, masks = policy._preprocess_images(dict(obs))
    return images, masks, obs[OBS_LANGUAGE_TOKENS], obs[OBS_LANGUAGE_ATTENTION_MASK]


def stock_errors(policy, obs, chunks, noise, time):
    """LeRobot's joint forward, prefix and all, once per candidate: [B, N] mean squared errors over real dimensions."""
    dims = policy.config.action_feature.shape[0]
    inputs = stock_inputs(policy, obs)
    losses = [
        policy.model.forward(*inputs, chunks[:, j], noise[:, j], time[:, j])[..., :dims].mean(dim=(1, 2))
        for j in range(chunks.shape[1])
    ]
    return torch.stack(losses, dim=1)


def stock_sample(policy, obs, noise):
    return policy.model.sample_actions(*stock_inputs(policy, obs), noise=noise)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--missing", action="store_true", help="leave the last camera out of the observation")
    parser.add_argument("--horizon", type=int, default=10)
    parser.add_argument("--states", type=int, default=2)
    parser.add_argument("--width", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--depth", type=int, default=None, help="layers of each stack")
    args = vars(parser.parse_args())
    architecture, depth = TINY if args.pop("width") == "tiny" else FULL_WIDTH, args.pop("depth")
    case = Case(**args, architecture=architecture.with_depth(depth) if depth else architecture)
    found = differences(case)
    table = Table("float32, against PI05Policy", "difference", "bound")
    for name, value in found.items():
        table.add_row(name, f"{value:.1e}", f"{BOUNDS[name]:.0e}")
    Console().print(table)
    sys.exit(not all(value <= BOUNDS[name] for name, value in found.items()))  # NaN fails


if __name__ == "__main__":
    main()
