"""PPO through the flow's own denoising steps, which ReinFlow and DPPO share.

A chunk is the end of a chain x_0 ~ N(0, I), x_{k+1} ~ N(mean_k, std_k), whose means are Euler steps of the flow. With
std_k > 0 the chain has a density, so that PPO applies: ReinFlow takes the chain for one action, DPPO each of its steps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from poco_vla.algorithms.contract import Loss, Phase
from poco_vla.algorithms.imitation import ImitationNoise, imitation_loss, imitation_noise
from poco_vla.algorithms.on_policy.contract import OnPolicy, OnPolicyConfig
from poco_vla.config.checks import check_counts, check_positive
from poco_vla.noise import UpdateNoise, of_global_batch
from poco_vla.policy import FlowPolicy, Prefix, initial_noise
from poco_vla.types import ChunkBatch, Metrics, RolloutBatch


@dataclass(frozen=True)
class FlowPpoConfig(OnPolicyConfig):
    """Options that ReinFlow and DPPO share."""

    flow_steps: int | None = None
    """K, denoising steps of the chain; None is the model's own number (ReinFlow: 4 or 1, DPPO: 20 of a diffusion)."""
    noise_bound: float = 3.0
    """Largest magnitude of the noise of a step, in standard deviations (ReinFlow, DPPO: 3)."""
    clip: float = 0.01
    """Most by which a ratio of probabilities may depart from 1 (ReinFlow, DPPO: 0.01)."""
    target_kl: float | None = 0.01
    """Approximate KL divergence, in nats, beyond which the rest of an iteration's updates is left out (ReinFlow: 0.01,
    DPPO: 1); None never does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "noise_bound", "clip")
        if self.flow_steps is not None:
            check_counts(self, "flow_steps")


@dataclass(frozen=True)
class FlowPpoNoise(UpdateNoise):
    """Hold the advantages of an online update, normalised over its global batch."""

    advantages: Float[Tensor, " B"]


class FlowPpo(OnPolicy):
    """PPO over a chain of noisy denoising steps. A subclass says the steps' means and deviations, and the loss."""

    tiny_options = MappingProxyType(
        {"rollout_steps": 10, "minibatch": 8, "epochs": 2, "warmup_rollouts": 1, "value_hidden": (32, 32)}
    )
    clips_chain: ClassVar[bool] = True
    """True if a chain's last point is clipped to the range of chunks; what is executed is, in any case."""
    config: Any  # a FlowPpoConfig

    @property
    def num_steps(self) -> int:
        """Return K, the denoising steps of a chain."""
        return self.config.flow_steps or self.policy.spec.flow_steps

    @property
    def flow_times(self) -> Float[Tensor, " K"]:
        """Return the flow time of each denoising step."""
        return torch.arange(self.num_steps, dtype=torch.float64) / self.num_steps

    def step_means(
        self, prefix: Prefix, x: Float[Tensor, "B M H A"], t: Float[Tensor, "B M"], policy: FlowPolicy | None = None
    ) -> Float[Tensor, "B M H A"]:
        """Return the mean of the step from x at flow time t, which is Euler's, of `policy` or the algorithm's own."""
        return x + (policy or self.policy).velocity(prefix, x, t) / self.num_steps

    def sampling_steps(
        self, prefix: Prefix, x: Float[Tensor, "B 1 H A"], t: Float[Tensor, "B 1"], k: int
    ) -> tuple[Float[Tensor, "B 1 H A"], Tensor]:
        """Return mean and standard deviation by which step k is sampled."""
        raise NotImplementedError(f"{type(self).__name__} has no sampling_steps")

    # -- acting ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def explore(
        self, prefix: Prefix, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "B H A"], Mapping[str, Tensor]]:
        """Return a chunk for each of B states, and its chain x_0, ..., x_K [B, K + 1, H, A]."""
        chain = self._sample(prefix, generator, noisy=True)
        return self.policy.spec.limit(chain[:, -1]), {"chain": chain}

    @torch.no_grad()
    def act(self, prefix: Prefix, n: int = 1, generator: torch.Generator | None = None) -> Float[Tensor, "B H A"]:
        """Return the end of a chain without noise for each of B states, but for that of x_0."""
        assert n == 1, f"{type(self).__name__} does not rank candidates"
        return self.policy.spec.limit(self._sample(prefix, generator, noisy=False)[:, -1])

    def _sample(self, prefix: Prefix, generator: torch.Generator | None, *, noisy: bool) -> Float[Tensor, "B K1 H A"]:
        spec, bound = self.policy.spec, self.config.noise_bound
        x = initial_noise(self.policy, prefix, 1, generator)
        chain = [x]
        for k, time in enumerate(self.flow_times.tolist()):
            mean, std = self.sampling_steps(prefix, x, x.new_full(x.shape[:2], time), k)
            noise = initial_noise(self.policy, prefix, 1, generator) if noisy else torch.zeros_like(x)
            # What pads an action follows the flow without noise: it is no part of the density.
            noise[..., spec.action_dim :] = 0
            x = mean + std * noise.clamp(-bound, bound)
            if k == self.num_steps - 1 and self.clips_chain:
                x = x if spec.clip is None else x.clamp(*spec.clip)
            chain.append(x)
        return torch.cat(chain, dim=1)

    def _of_action(self, x: Float[Tensor, "*b A"]) -> Tensor:
        """Return the entries of the robot's own action dimensions."""
        return x[..., : self.policy.spec.action_dim]

    # -- learning -------------------------------------------------------------------------------------------------

    def sft_loss(self, batch: ChunkBatch, noise: ImitationNoise | None = None) -> Loss:
        """Return the flow-matching loss on the demonstrations."""
        return imitation_loss(self, batch, noise or imitation_noise(self, batch))

    def draw_noise(self, batch: ChunkBatch, phase: Phase) -> UpdateNoise:
        """Return the random numbers of an SFT update, or the normalised advantages of an online one."""
        if phase == "sft":
            return imitation_noise(self, batch)
        if phase == "warmup":
            return UpdateNoise()
        assert isinstance(batch, RolloutBatch)
        return FlowPpoNoise(self.normalized(batch.advantages))

    def normalized(self, advantages: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Return advantages as they are normalised over the global batch."""
        every = of_global_batch(advantages)
        return (advantages - every.mean()) / (every.std() + 1e-8)

    def has_departed(self, metrics: Metrics) -> bool:
        target = self.config.target_kl
        return target is not None and metrics["approximate_kl"].item() > target


def normal_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the log-density of N(mean, std) at each number of x."""
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
