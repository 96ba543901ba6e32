"""From raw observations to the chunks that a robot executes."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from poco_vla.critic import ChunkCritic, aggregate
from poco_vla.data import network_obs
from poco_vla.errors import NonFiniteError
from poco_vla.policy import FlowPolicy, propose


class Actor:
    """Samples chunks from a policy: plain samples (paper), or the critic's favourite of `best_of_n`.

    Args:
        policy: the policy that acts.
        seed: of the actor's own noise.
        best_of_n: candidates per state; above 1 needs a critic.
        critic: values them.
        aggregation: how the critics' values become one.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        seed: int,
        best_of_n: int = 1,
        critic: ChunkCritic | None = None,
        aggregation: Literal["mean", "min"] = "mean",
    ) -> None:
        assert best_of_n == 1 or critic is not None, "best_of_n > 1 needs a critic"
        self.policy = policy
        self.critic = critic
        self.best_of_n = best_of_n
        self.aggregation: Literal["mean", "min"] = aggregation
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def chunks(
        self, obs: Mapping[str, np.ndarray], tasks: Sequence[str], *, best_of_n: int | None = None
    ) -> np.ndarray:
        """One chunk per state: [B, H, action_dim] float32, in the robot's units. `best_of_n` is the actor's when None.

        Raises:
            NonFiniteError: an observation or a sampled action is NaN or infinite.
        """
        for key, column in obs.items():
            if column.dtype.kind == "f" and not np.isfinite(column).all():
                raise NonFiniteError(f'the environment returned a non-finite "{key}": nothing was sent to it')
        prefix = self.policy.encode(network_obs(self.policy, obs, tasks))
        n = best_of_n or self.best_of_n
        x = propose(self.policy, prefix, n, generator=self.generator)
        if self.critic is not None and n > 1:
            q = aggregate(self.critic(prefix.features, x), self.aggregation)
            x = x[torch.arange(len(x), device=x.device), q.argmax(dim=1)][:, None]
        actions = self.policy.postprocess(x[:, 0, :, : self.policy.spec.action_dim]).float().cpu().numpy()
        if not np.isfinite(actions).all():
            raise NonFiniteError("the policy sampled a non-finite action: nothing was sent to the environment")
        return actions
