"""The batch that every equation reads, and the letters its shapes are written in.

Shape legend, used in signatures, docstrings and tests::

    B  batch (states)              H  chunk horizon, in control steps (the paper's T)
    N  candidate chunks per state  A  action width of the network (padding included)
    D  prefix feature width        E  critics in the ensemble
    K  flow (Euler) steps          t  flow time: 0 is noise, 1 is the action
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

type Metrics = dict[str, Tensor]
"""Named scalars of one update: 0-d tensors on the device of the loss, fetched only when they are logged."""


@dataclass(frozen=True)
class ActionSpec:
    """What a policy's action chunk looks like in normalised units.

    Attributes:
        horizon: H, control steps in a chunk.
        width: A, the network's action width.
        action_dim: the robot's real action dimensions, the first ``action_dim`` of ``width``; the rest is padding.
        flow_steps: K, Euler steps of the model's own sampler.
        clip: range that a sampled chunk is clipped to (specs: the normalised action range); None leaves it as it is.
    """

    horizon: int
    width: int
    action_dim: int
    flow_steps: int
    clip: tuple[float, float] | None = (-1.0, 1.0)

    def __post_init__(self) -> None:
        assert 0 < self.action_dim <= self.width, f"action_dim {self.action_dim} outside (0, width {self.width}]"
        assert self.horizon > 0
        assert self.flow_steps > 0

    def limit(self, chunk: Float[Tensor, "*batch H A"]) -> Float[Tensor, "*batch H A"]:
        """Return chunks in the range of `clip`, with zeros for padding. Gradients pass inside the range alone."""
        if self.clip is not None:
            chunk = chunk.clamp(*self.clip)
        padding = self.width - self.action_dim
        return F.pad(chunk[..., :-padding], (0, padding)) if padding else chunk

    def pad(self, chunk: Float[Tensor, "*batch H R"]) -> Float[Tensor, "*batch H A"]:
        """Return chunks of the real action dimensions in the network's width, with zeros for padding."""
        return F.pad(chunk, (0, self.width - self.action_dim))


@dataclass(frozen=True)
class ChunkBatch:
    """B transitions of one chunk each, ready for the network: processed observations, normalised actions.

    Attributes:
        obs: processed observation at the chunk's first step; every tensor has B rows.
        next_obs: processed observation at the state that the return bootstraps from. Where ``discount`` is 0 it is
            a placeholder that no result depends on.
        actions: the chunk that was executed, normalised; steps that are not ``valid`` repeat the last valid one.
        valid: True for steps that were executed inside the episode. The only mask there is.
        returns: sum of gamma^k r over the steps before the bootstrap state, in units of reward.
        discount: gamma^n * not_terminal, n the number of those steps. The only word about episode ends.
        is_demo: the chunk comes from the offline demonstrations.
        is_success: the chunk's episode ended in success.
        prefix: `obs`, encoded already; None where the policy is to encode it. `obs` may then be empty.
        next_prefix: likewise for `next_obs`.
    """

    obs: Mapping[str, Tensor]
    next_obs: Mapping[str, Tensor]
    actions: Float[Tensor, "B H A"]
    valid: Bool[Tensor, "B H"]
    returns: Float[Tensor, " B"]
    discount: Float[Tensor, " B"]
    is_demo: Bool[Tensor, " B"]
    is_success: Bool[Tensor, " B"]
    prefix: Any = None  # a poco_vla.policy.Prefix
    next_prefix: Any = None

    def __len__(self) -> int:
        return self.actions.shape[0]

    def to(self, device: object) -> "ChunkBatch":
        """The same batch on another device."""
        return self._each(lambda value: value.to(device))

    def rows(self, rows: slice) -> "ChunkBatch":
        """Some of the transitions."""
        return self._each(lambda value: value[rows] if isinstance(value, Tensor) else value.select(rows))

    def _each(self, change: Callable[[Any], Any]) -> "ChunkBatch":
        changed = {
            name: {k: change(v) for k, v in value.items()} if isinstance(value, Mapping) else change(value)
            for name, value in vars(self).items()
            if value is not None
        }
        return replace(self, **changed)


@dataclass(frozen=True, kw_only=True)
class RolloutBatch(ChunkBatch):
    """B chunk steps of the latest rollout, for algorithms that learn from these alone. `actions` are the chunks that
    were sampled; `returns` and `discount` hold nothing.

    Attributes:
        acted: what :meth:`poco_vla.algorithms.Algorithm.explore` noted of each, such as the chain of denoising steps.
        log_prob: of what was noted, by the weights that acted; its further axes are the algorithm's own.
        values: V of each state by those weights.
        advantages: of each chunk step, as they were estimated.
        value_targets: what V is to become.
    """

    acted: Mapping[str, Tensor]
    log_prob: Float[Tensor, "B ..."]
    values: Float[Tensor, " B"]
    advantages: Float[Tensor, " B"]
    value_targets: Float[Tensor, " B"]
