"""PPO through the flow's own denoising steps: ReinFlow (arXiv 2505.22094), and DPPO (arXiv 2409.00588) for a flow.

A chunk is the end of a chain x_0 ~ N(0, I), x_{k+1} ~ N(mean_k, std_k), whose means are Euler steps of the flow. With
std_k > 0 the chain has a density, so that PPO applies: ReinFlow takes the chain for one action, DPPO each of its steps.
"""

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from poco_vla.algorithms.contract import Loss, ParameterGroup, Phase
from poco_vla.algorithms.on_policy import OnPolicy, OnPolicyConfig
from poco_vla.distill import flow_errors
from poco_vla.errors import ConfigError
from poco_vla.gae import clipped_surrogate
from poco_vla.mlp import Mlp
from poco_vla.noise import GlobalBatchRNG, UpdateNoise, of_global_batch
from poco_vla.policy import FlowPolicy, Prefix
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
        for name in ("noise_bound", "clip"):
            value = getattr(self, name)
            if value <= 0:
                raise ConfigError(f"{name} is {value}; it must be above 0")
        if self.flow_steps is not None and self.flow_steps < 1:
            raise ConfigError(f"flow_steps is {self.flow_steps}; at least 1")


@dataclass(frozen=True)
class FlowPpoNoise(UpdateNoise):
    """Hold what an update draws or counts over its global batch.

    Attributes:
        advantages: normalised over the global batch.
        flow_noise: a_0 of each data chunk's flow error, in SFT alone.
        flow_time: its t, likewise.
    """

    advantages: Float[Tensor, " B"] | None = None
    flow_noise: Float[Tensor, "B 1 H A"] | None = None
    flow_time: Float[Tensor, "B 1"] | None = None


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
        return self._chunk(chain), {"chain": chain}

    @torch.no_grad()
    def act(self, prefix: Prefix, n: int = 1, generator: torch.Generator | None = None) -> Float[Tensor, "B H A"]:
        """Return the end of a chain without noise for each of B states, but for that of x_0."""
        assert n == 1, f"{type(self).__name__} does not rank candidates"
        return self._chunk(self._sample(prefix, generator, noisy=False))

    def _sample(self, prefix: Prefix, generator: torch.Generator | None, *, noisy: bool) -> Float[Tensor, "B K1 H A"]:
        spec, features, bound = self.policy.spec, prefix.features, self.config.noise_bound
        dtype = torch.promote_types(features.dtype, torch.float32)
        place = generator.device if generator is not None else features.device

        def normal() -> Float[Tensor, "B 1 H A"]:
            shape = (len(features), 1, spec.horizon, spec.width)
            return torch.randn(shape, generator=generator, device=place, dtype=dtype).to(features.device)

        x = normal()
        chain = [x]
        for k, time in enumerate(self.flow_times.tolist()):
            mean, std = self.sampling_steps(prefix, x, x.new_full(x.shape[:2], time), k)
            noise = normal() if noisy else torch.zeros_like(x)
            # What pads an action follows the flow without noise: it is no part of the density.
            noise[..., spec.action_dim :] = 0
            x = mean + std * noise.clamp(-bound, bound)
            if k == self.num_steps - 1 and self.clips_chain:
                x = self._clipped(x)
            chain.append(x)
        return torch.cat(chain, dim=1)

    def _clipped(self, x: Float[Tensor, "*b H A"]) -> Float[Tensor, "*b H A"]:
        clip = self.policy.spec.clip
        return x if clip is None else x.clamp(*clip)

    def _chunk(self, chain: Float[Tensor, "B K1 H A"]) -> Float[Tensor, "B H A"]:
        """Return the end of a chain as it is executed."""
        chunk = self._clipped(chain[:, -1]).clone()
        chunk[..., self.policy.spec.action_dim :] = 0
        return chunk

    def _of_action(self, x: Float[Tensor, "*b A"]) -> Tensor:
        """Return the entries of the robot's own action dimensions."""
        return x[..., : self.policy.spec.action_dim]

    # -- learning -------------------------------------------------------------------------------------------------

    def sft_loss(self, batch: ChunkBatch, noise: FlowPpoNoise | None = None) -> Loss:
        """Return the flow-matching loss on the demonstrations."""
        noise = noise or self.draw_noise(batch, "sft")
        prefix, chunk = self.encode(batch), batch.actions[:, None]
        errors = flow_errors(self.policy, prefix, chunk, batch.valid, noise=noise.flow_noise, t=noise.flow_time)
        loss = errors.mean()
        return loss, {"bc_loss": loss.detach()}

    def draw_noise(self, batch: ChunkBatch, phase: Phase) -> FlowPpoNoise:
        """Return the random numbers of an SFT update, or the normalised advantages of an online one."""
        if phase == "sft":
            return FlowPpoNoise(flow_noise=self.draw_chunks(batch, 1), flow_time=self.draw_times(batch, 1))
        if phase == "warmup":
            return FlowPpoNoise()
        assert isinstance(batch, RolloutBatch)
        return FlowPpoNoise(advantages=self.normalized(batch.advantages))

    def normalized(self, advantages: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Return advantages as they are normalised over the global batch."""
        every = of_global_batch(advantages)
        return (advantages - every.mean()) / (every.std() + 1e-8)

    def has_departed(self, metrics: Metrics) -> bool:
        target = self.config.target_kl
        return target is not None and metrics["approximate_kl"].item() > target


# -- ReinFlow ---------------------------------------------------------------------------------------------------------


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
    """ReinFlow: PPO over whole chains of denoising steps, with a learned noise.

    Args:
        policy: the actor, its backbone already frozen.
        config: the algorithm's options.
        rng: source of the random numbers of updates; torch's default generator when None.
    """

    title = "ReinFlow"
    config_class = ReinFlowConfig
    learning_rates = (4.5e-5, 6.5e-4)
    config: ReinFlowConfig

    def __init__(
        self, policy: FlowPolicy, config: ReinFlowConfig | None = None, rng: GlobalBatchRNG | None = None
    ) -> None:
        config = config or ReinFlowConfig()
        super().__init__(policy, config, rng)
        spec = policy.spec
        self.noise = Mlp(1 + policy.feature_dim, config.noise_hidden, spec.horizon * spec.action_dim, "tanh")

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
        padding = self.policy.spec.width - self.policy.spec.action_dim
        return self.step_means(prefix, x, t), torch.nn.functional.pad(self.stds(prefix, t), (0, padding))

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
        start = _normal_log_prob(x[:, 0], torch.zeros_like(x[:, 0]), torch.ones_like(x[:, 0])).sum(dim=(-2, -1))
        return start, _normal_log_prob(x[:, 1:], means, stds).sum(dim=(-2, -1)), stds

    def log_prob(self, prefix: Prefix, acted: Mapping[str, Tensor]) -> Float[Tensor, " B"]:
        """Return the log-probability of each chain, per number: over K + 1 terms and all entries of a chunk."""
        return self._per_number(*self.chain_terms(prefix, acted["chain"])[:2])

    def online_loss(self, batch: ChunkBatch, noise: FlowPpoNoise | None = None) -> Loss:
        """Return PPO's loss, with one ratio for each chain, the value loss and the entropy of the steps."""
        cfg, noise = self.config, noise or self.draw_noise(batch, "online")
        assert isinstance(batch, RolloutBatch)
        assert noise.advantages is not None, "the noise is of another phase"
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
        noise: ParameterGroup = {"name": "noise", "params": list(self.noise.parameters()), "lr": actor_lr}
        return [*super().parameter_groups(actor_lr, critic_lr), noise]

    def trained_groups(self, phase: Phase) -> frozenset[str]:
        groups = super().trained_groups(phase)
        return groups - {"noise"} if phase == "sft" else groups


# -- DPPO -------------------------------------------------------------------------------------------------------------


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
        for name in ("std", "min_sampling_std", "min_log_prob_std"):
            value = getattr(self, name)
            if value <= 0:
                raise ConfigError(f"{name} is {value}; it must be above 0")
        if self.tuned_steps is not None and self.tuned_steps < 1:
            raise ConfigError(f"tuned_steps is {self.tuned_steps}; at least 1, or None for all")
        if not 0 < self.clip_base <= self.clip:
            raise ConfigError(f"clip_base is {self.clip_base}; it must lie in (0, {self.clip}], which is clip")
        if not 0 <= self.denoising_discount <= 1:
            raise ConfigError(f"denoising_discount is {self.denoising_discount}; it must lie in [0, 1]")


class Dppo(FlowPpo):
    """DPPO in its form for a flow: PPO in which each denoising step is an action of its own, with a fixed noise.

    Args:
        policy: the actor, its backbone already frozen.
        config: the algorithm's options.
        rng: source of the random numbers of updates; torch's default generator when None.

    Raises:
        ConfigError: more steps are to be tuned than there are.
    """

    title = "DPPO (flow)"
    config_class = DppoConfig
    learning_rates = (1e-4, 1e-3)
    clips_chain = False
    config: DppoConfig

    def __init__(self, policy: FlowPolicy, config: DppoConfig | None = None, rng: GlobalBatchRNG | None = None) -> None:
        config = config or DppoConfig()
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
        return _normal_log_prob(self._of_action(after), self._of_action(means), stds)

    def online_loss(self, batch: ChunkBatch, noise: FlowPpoNoise | None = None) -> Loss:
        """Return PPO's loss, with one ratio for each denoising step of each chunk, and the value loss.

        # Deviation 16: all tuned steps of a chunk are in its batch; the official code draws pairs of chunk and step.
        """
        cfg, noise = self.config, noise or self.draw_noise(batch, "online")
        assert isinstance(batch, RolloutBatch)
        assert noise.advantages is not None, "the noise is of another phase"
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


def _normal_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the log-density of N(mean, std) at each number of x."""
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
