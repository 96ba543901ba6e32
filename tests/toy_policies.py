"""Small policies that the tests share: a flow MLP over raw states, without processors or files."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from poco_vla import ActionSpec, ChunkBatch, FlowPolicy


@dataclass(frozen=True)
class ToyPrefix:
    features: Tensor

    def select(self, index):
        return ToyPrefix(self.features[index])

    def to(self, device):
        return ToyPrefix(self.features.to(device))


class ToyPolicy(FlowPolicy):
    """v = MLP(state, chunk, t), over all `width` dimensions of the chunk, padding included."""

    def __init__(
        self, *, state_dim=2, horizon=3, width=2, action_dim=None, flow_steps=4, hidden=(16, 16), seed=0, dtype=None
    ):
        super().__init__()
        self.spec = ActionSpec(horizon, width, action_dim or width, flow_steps)
        self.feature_dim = state_dim
        chunk = horizon * width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            widths = (state_dim + chunk + 1, *hidden)
            layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.SiLU())]
            self.head = nn.Sequential(*layers, nn.Linear(widths[-1], chunk)).to(dtype)

    def encode(self, obs):
        return ToyPrefix(obs["state"])

    def velocity(self, prefix, x, t):
        state = prefix.features[:, None].expand(-1, x.shape[1], -1)
        return self.head(torch.cat([state, x.flatten(2), t[..., None]], dim=-1)).view_as(x)


@dataclass(frozen=True)
class ClosedForm:
    """A velocity field out of a formula v(x, t)."""

    formula: Callable[[Tensor, Tensor], Tensor]
    spec: ActionSpec | None = None

    def velocity(self, prefix: Any, x: Tensor, t: Tensor) -> Tensor:
        return self.formula(x, t[..., None, None])

    def sample_time(self, shape: Any, generator: torch.Generator | None = None) -> Tensor:
        return torch.rand(shape, generator=generator)


def toy_batch(policy: FlowPolicy, size: int = 5, *, seed: int = 0, dtype: Any = None, **changes: Any) -> ChunkBatch:
    """A random batch that fits a policy; `changes` replace fields."""
    generator = torch.Generator().manual_seed(seed)
    spec = policy.spec

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype or torch.float32)

    actions = normal(size, spec.horizon, spec.width).clamp(-1, 1)
    actions[..., spec.action_dim :] = 0
    every = torch.ones(size, dtype=torch.bool)
    fields = {
        "obs": {"state": normal(size, policy.feature_dim)},
        "next_obs": {"state": normal(size, policy.feature_dim)},
        "actions": actions,
        "valid": torch.ones(size, spec.horizon, dtype=torch.bool),
        "returns": normal(size),
        "discount": torch.full((size,), 0.9, dtype=dtype),
        "is_demo": every,
        "is_success": ~every,
    }
    return ChunkBatch(**(fields | changes))
