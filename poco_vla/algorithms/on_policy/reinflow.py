"""ReinFlow (arXiv 2505.22094): PPO that takes a chain of denoising steps for one action, with a learned noise."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from poco_vla.algorithms.contract import Loss, ParameterGroup, Phase, group
from poco_vla.algorithms.on_policy.flow_ppo import FlowPpo, FlowPpoConfig, FlowPpoNoise, normal_log_prob
from poco_vla.errors import ConfigError
from poco_vla.gae import clipped_surrogate
from poco_vla.mlp import Mlp
from poco_vla.noise import GlobalBatchRNG, UpdateNoise
from poco_vla.policy import FlowPolicy, Prefix
from poco_vla.types import ChunkBatch, RolloutBatch


@dataclass(frozen=True)
class ReinFlowConfig(FlowPpoConfig):
    """Options of ReinFlow (defaults: its robomimic settings)."""

    min_std: float = 0.08
    """Least standard deviation of a step, in normalised action units."""
    max_std: float = 0.14
    """Largest standard deviation of a step, likewise."""
    mean_clip: float | None = 1.0
    """Largest magnitude of a step's mean, in normalised action units; None does not clip."""
    log_prob_range: tuple[float, float] = (-1.0, 1.0)
    """Range that a chain's log-probability per number is clipped to, in nats."""
    entropy_weight: float = 0.01
    """Weight of the entropy of the steps."""
    noise_hidden: tuple[int, ...] = (128, 128)
    """Hidden widths of the network of the standard deviations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.min_std < self.max_std:
            raise ConfigError(f"min_std is {self.min_std} and max_std {self.max_std}; expected 0 < min_std < max_std")
        if self.mean_clip is not None and self.mean_clip <= 0:
            raise ConfigError(f"mean_clip is {self.mean_clip}; it must be above 0, or None")
        if self.log_prob_range[0] >= self.log_prob_range[1]:
            raise ConfigError(f"log_prob_range is {self.log_prob_range}; expected the lower bound first")


class ReinFlow(FlowPpo):
    """ReinFlow: PPO over whole chains of denoising steps, with a learned noise."""

    title = "ReinFlow"
    config_class = ReinFlowConfig
    learning_rates = (4.5e-5, 6.5e-4)
    config: ReinFlowConfig

    def __init__(
        self, policy: FlowPolicy, config: ReinFlowConfig | None = None, rng: GlobalBatchRNG | None = None
    ) -> None:
        super().__init__(policy, config, rng)
        spec, hidden = policy.spec, self.config.noise_hidden
        self.noise = Mlp(1 + policy.feature_dim, hidden, spec.horizon * spec.action_dim, "tanh")

    def step_means(
        self, prefix: Prefix, x: Float[Tensor, "B M H A"], t: Float[Tensor, "B M"], policy: FlowPolicy | None = None
    ) -> Float[Tensor, "B M H A"]:
        means, clip = super().step_means(prefix, x, t, policy), self.config.mean_clip
        return means if clip is None else means.clamp(-clip, clip)

    def stds(self, prefix: Prefix, t: Float[Tensor, "B M"]) -> Float[Tensor, "B M H R"]:
        """Return the standard deviation of the step at flow time t, for the robot's own action dimensions: between
        `min_std` and `max_std`, by the tanh of a network, on a logarithmic scale."""
        spec, low, high = self.policy.spec, 2 * math.log(self.config.min_std), 2 * math.log(self.config.max_std)
        features = prefix.features[:, None].expand(-1, t.shape[1], -1)
        g = self.noise(torch.cat([t[..., None].to(features), features], dim=-1))
        log_variances = low + (high - low) * (torch.tanh(g) + 1) / 2
        return (0.5 * log_variances).exp().unflatten(-1, (spec.horizon, spec.action_dim))

    def sampling_steps(
        self, prefix: Prefix, x: Float[Tensor, "B 1 H A"], t: Float[Tensor, "B 1"], k: int
    ) -> tuple[Float[Tensor, "B 1 H A"], Tensor]:
        return self.step_means(prefix, x, t), self.policy.spec.pad(self.stds(prefix, t))

    def chain_terms(
        self, prefix: Prefix, chain: Float[Tensor, "B K1 H A"]
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, "B K"], Float[Tensor, "B K H R"]]:
        """Return the log-probability of x_0, that of each step, and the steps' standard deviations, for the R action
        dimensions of the robot.

        # Deviation 15: the official sampler takes its steps at t = linspace(0, 1, K) and its density at k / K; both
        # are at k / K here, so that the ratio is 1 before the first update.
        """
        t = self.flow_times.to(chain).expand(len(chain), -1)
        means, stds = self._of_action(self.step_means(prefix, chain[:, :-1], t)), self.stds(prefix, t)
        x = self._of_action(chain)
        start = normal_log_prob(x[:, 0], torch.zeros_like(x[:, 0]), torch.ones_like(x[:, 0])).sum(dim=(-2, -1))
        return start, normal_log_prob(x[:, 1:], means, stds).sum(dim=(-2, -1)), stds

    def log_prob(self, prefix: Prefix, acted: Mapping[str, Tensor]) -> Float[Tensor, " B"]:
        """Return the log-probability of each chain, per number: over K + 1 terms and all entries of a chunk."""
        return self._per_number(*self.chain_terms(prefix, acted["chain"])[:2])

    def online_loss(self, batch: ChunkBatch, noise: UpdateNoise | None = None) -> Loss:
        """Return PPO's loss, with one ratio for each chain, the value loss and the entropy of the steps."""
        cfg, noise = self.config, noise or self.draw_noise(batch, "online")
        assert isinstance(batch, RolloutBatch)
        assert isinstance(noise, FlowPpoNoise), "the noise is of another phase"
        prefix = self.encode(batch)
        start, steps, stds = self.chain_terms(prefix, batch.acted["chain"])
        now, before = (x.clamp(*cfg.log_prob_range) for x in (self._per_number(start, steps), batch.log_prob))
        clip = now.new_tensor(cfg.clip)
        policy_loss, metrics = clipped_surrogate((now - before)[:, None], noise.advantages[:, None], clip)
        entropy = self.entropy_rate(stds).mean()
        value_loss, of_value = self.value_loss(prefix, batch)
        loss = policy_loss - cfg.entropy_weight * entropy + cfg.value_weight * value_loss
        return loss, metrics | of_value | {"entropy": entropy.detach(), "std": stds.detach().mean()}

    def entropy_rate(self, stds: Float[Tensor, "B K H R"]) -> Float[Tensor, " B"]:
        """Return the entropy of a chain's K steps and of x_0, per number, in nats."""
        unit = 0.5 * math.log(2 * math.pi * math.e)
        of_steps = (unit + stds.log()).sum(dim=(-2, -1))
        start = torch.full_like(of_steps[:, 0], unit * stds[0, 0].numel())
        return self._per_number(start, of_steps)

    def _per_number(self, start: Float[Tensor, " B"], steps: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
        spec = self.policy.spec
        return (start + steps.sum(dim=1)) / ((steps.shape[1] + 1) * spec.horizon * spec.action_dim)

    def chunks_per_state(self, phase: Phase) -> int:
        return {"sft": 1, "warmup": 0}.get(phase, self.num_steps)

    def explores_with(self) -> tuple[str, ...]:
        return ("noise",)

    def parameter_groups(self, actor_lr: float = 3e-4, critic_lr: float = 3e-4) -> list[ParameterGroup]:
        return [*super().parameter_groups(actor_lr, critic_lr), group("noise", self.noise, actor_lr)]

    def trained_groups(self, phase: Phase) -> frozenset[str]:
        groups = super().trained_groups(phase)
        return groups - {"noise"} if phase == "sft" else groups
