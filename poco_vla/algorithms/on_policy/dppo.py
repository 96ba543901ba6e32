"""DPPO (arXiv 2409.00588) in its form for a flow: PPO in which each denoising step is an action of its own."""

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from poco_vla.algorithms.contract import Loss, Phase
from poco_vla.algorithms.on_policy.flow_ppo import FlowPpo, FlowPpoConfig, FlowPpoNoise, normal_log_prob
from poco_vla.config.checks import check_positive
from poco_vla.errors import ConfigError
from poco_vla.gae import clipped_surrogate
from poco_vla.noise import GlobalBatchRNG, UpdateNoise, of_global_batch
from poco_vla.policy import FlowPolicy, Prefix
from poco_vla.types import ChunkBatch, RolloutBatch


@dataclass(frozen=True)
class DppoConfig(FlowPpoConfig):
    """Options of DPPO for a flow (defaults: its robomimic settings)."""

    target_kl: float | None = 1.0
    """Approximate KL divergence, in nats, beyond which the rest of an iteration's updates is left out (DPPO)."""
    scaling_discount: float | None = 0.99
    """Discount of the returns whose deviation rewards are divided by (DPPO); None is `discount`."""
    epochs: int = 10
    """Times that an iteration's chunks are learned from (DPPO)."""
    tuned_steps: int | None = None
    """F, denoising steps that are learned, the last ones; a frozen copy of the policy takes those before. None is all
    (DPPO: 10 of 20)."""
    std: float = 0.1
    """Standard deviation of every step, in normalised action units."""
    min_sampling_std: float = 0.1
    """Its least value where steps are sampled."""
    min_log_prob_std: float = 0.1
    """Its least value in the log-probability."""
    clip_base: float = 0.001
    """Clip of the first tuned step; from there to `clip` at the last one it goes up exponentially."""
    clip_rate: float = 3.0
    """Rate of that."""
    denoising_discount: float = 0.99
    """Discount of an advantage for each denoising step before the last."""
    log_prob_range: tuple[float, float] = (-5.0, 2.0)
    """Range that the log-probability of each number of a chunk is clipped to, in nats."""
    log_prob_steps: int | None = None
    """First steps of a chunk that count in its log-probability; None is all of them."""
    advantage_quantiles: tuple[float, float] = (0.0, 1.0)
    """Quantiles of the normalised advantages that they are clipped to."""
    normalize_advantages: bool = True
    """Normalise advantages over each update's batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "std", "min_sampling_std", "min_log_prob_std")
        if self.tuned_steps is not None and self.tuned_steps < 1:
            raise ConfigError(f"tuned_steps is {self.tuned_steps}; at least 1, or None for all")
        if not 0 < self.clip_base <= self.clip:
            raise ConfigError(f"clip_base is {self.clip_base}; it must lie in (0, {self.clip}], which is clip")
        if not 0 <= self.denoising_discount <= 1:
            raise ConfigError(f"denoising_discount is {self.denoising_discount}; it must lie in [0, 1]")


class Dppo(FlowPpo):
    """DPPO in its form for a flow: PPO in which each denoising step is an action of its own, with a fixed noise.

    Raises:
        ConfigError: more steps are to be tuned than there are.
    """

    title = "DPPO (flow)"
    config_class = DppoConfig
    learning_rates = (1e-4, 1e-3)
    clips_chain = False
    config: DppoConfig

    def __init__(self, policy: FlowPolicy, config: DppoConfig | None = None, rng: GlobalBatchRNG | None = None) -> None:
        super().__init__(policy, config, rng)
        if self.num_tuned > self.num_steps:
            raise ConfigError(f"tuned_steps is {self.num_tuned}, but the chain has {self.num_steps} denoising steps")
        self.reference = None
        if self.num_tuned < self.num_steps:
            shared = [p for p in policy.parameters() if not p.requires_grad] + list(policy.buffers())
            self.reference = deepcopy(policy, {id(tensor): tensor for tensor in shared}).requires_grad_(False)

    @property
    def num_tuned(self) -> int:
        """Return F, the denoising steps that are learned."""
        return self.config.tuned_steps or self.num_steps

    @torch.no_grad()
    def prepare_online(self, demonstrations: Iterable[ChunkBatch], rng: GlobalBatchRNG) -> str | None:
        """Let the frozen copy be what SFT has made."""
        if self.reference is not None:
            for frozen, learned in zip(self.reference.parameters(), self.policy.parameters(), strict=True):
                frozen.copy_(learned)
        return None

    def sampling_steps(
        self, prefix: Prefix, x: Float[Tensor, "B 1 H A"], t: Float[Tensor, "B 1"], k: int
    ) -> tuple[Float[Tensor, "B 1 H A"], Tensor]:
        policy = self.policy if k >= self.num_steps - self.num_tuned else self.reference
        return self.step_means(prefix, x, t, policy), self.stds(t, self.config.min_sampling_std)

    def stds(self, t: Float[Tensor, "B M"], least: float) -> Float[Tensor, "B M 1 1"]:
        """Return the standard deviation of the step at flow time t, but at least `least`."""
        return torch.full_like(t, max(self.config.std, least))[..., None, None]

    def explore(
        self, prefix: Prefix, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "B H A"], Mapping[str, Tensor]]:
        """Return a chunk for each of B states, and of its chain the tuned steps: [B, F + 1, H, A]."""
        chunk, acted = super().explore(prefix, generator)
        return chunk, {"chain": acted["chain"][:, -self.num_tuned - 1 :]}

    def log_prob(self, prefix: Prefix, acted: Mapping[str, Tensor]) -> Float[Tensor, "B M H A"]:
        """Return the log-probability of each number of the tuned steps, or, where `acted` has "steps" [B, M], of these
        alone, counted from the first tuned one."""
        chain, steps = acted["chain"], self._steps(acted)
        rows = torch.arange(len(chain), device=chain.device)[:, None]
        x, after = chain[rows, steps], chain[rows, steps + 1]
        t = self.flow_times.to(chain)[steps + self.num_steps - self.num_tuned]
        means, stds = self.step_means(prefix, x, t), self.stds(t, self.config.min_log_prob_std)
        return normal_log_prob(self._of_action(after), self._of_action(means), stds)

    def online_loss(self, batch: ChunkBatch, noise: UpdateNoise | None = None) -> Loss:
        """Return PPO's loss, with one ratio for each denoising step of each chunk, and the value loss.

        # Deviation 16: all tuned steps of a chunk are in its batch; the official code draws pairs of chunk and step.
        """
        cfg, noise = self.config, noise or self.draw_noise(batch, "online")
        assert isinstance(batch, RolloutBatch)
        assert isinstance(noise, FlowPpoNoise), "the noise is of another phase"
        prefix = self.encode(batch)
        now, before = (self.step_log_probs(x) for x in (self.log_prob(prefix, batch.acted), batch.log_prob))
        clips, discounts = self.step_schedules(self._steps(batch.acted))
        advantages = noise.advantages[:, None] * discounts.to(now)
        policy_loss, metrics = clipped_surrogate(now - before, advantages, clips.to(now))
        value_loss, of_value = self.value_loss(prefix, batch)
        return policy_loss + cfg.value_weight * value_loss, metrics | of_value

    def step_log_probs(self, log_prob: Float[Tensor, "B M H A"]) -> Float[Tensor, "B M"]:
        """Return the mean log-probability of a step's numbers, each clipped, over the chunk's first steps."""
        return log_prob.clamp(*self.config.log_prob_range)[:, :, : self.config.log_prob_steps].mean(dim=(-2, -1))

    def step_schedules(self, steps: Tensor) -> tuple[Float[Tensor, "B M"], Float[Tensor, "B M"]]:
        """Return the clip of each denoising step, and what its advantage is multiplied by."""
        cfg, last = self.config, self.num_tuned - 1
        # A single step has the full clip; the official expression is 0 / 0 there.
        share = steps.double() / last if last else torch.ones_like(steps, dtype=torch.float64)
        rise = (torch.exp(cfg.clip_rate * share) - 1) / (math.exp(cfg.clip_rate) - 1)
        return cfg.clip_base + (cfg.clip - cfg.clip_base) * rise, cfg.denoising_discount ** (last - steps).double()

    def normalized(self, advantages: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        cfg = self.config
        if cfg.normalize_advantages:
            advantages = super().normalized(advantages)
        low, high = of_global_batch(advantages).quantile(advantages.new_tensor(cfg.advantage_quantiles))
        return advantages.clamp(low, high)

    def _steps(self, acted: Mapping[str, Tensor]) -> Tensor:
        every = torch.arange(self.num_tuned, device=acted["chain"].device).expand(len(acted["chain"]), -1)
        return acted.get("steps", every)

    def chunks_per_state(self, phase: Phase) -> int:
        return {"sft": 1, "warmup": 0}.get(phase, self.num_tuned)

    def acts_with(self, n: int) -> tuple[str, ...]:
        return () if self.reference is None else ("reference",)
