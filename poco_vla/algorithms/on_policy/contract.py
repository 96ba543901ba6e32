"""Learn from the latest rollouts alone: the parts that such algorithms share."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from poco_vla.algorithms.contract import Algorithm, Loss, ParameterGroup, Phase, group
from poco_vla.algorithms.registry import options_of
from poco_vla.config import TrainConfig
from poco_vla.config.checks import check_counts, check_widths, require
from poco_vla.errors import ConfigError
from poco_vla.gae import RewardScaler, generalized_advantages
from poco_vla.mlp import Mlp
from poco_vla.noise import GlobalBatchRNG
from poco_vla.policy import FlowPolicy, Prefix
from poco_vla.types import ChunkBatch, Metrics, RolloutBatch

FEWEST_ITERATIONS = 10
"""Iterations of rollout and learning in a run, where `rollout_steps` is left to it."""


@dataclass(frozen=True)
class OnPolicyConfig:
    """Options of learning from rollouts. An iteration acts for `rollout_steps` chunks in every environment, then learns
    from these for some epochs."""

    rollout_steps: int = 100
    """S, chunks of each environment in an iteration (ReinFlow: 400, DPPO: 300 to 400, of 50 environments). Where nobody
    gives it, a run that is too short for ten iterations has shorter ones."""
    epochs: int = 5
    """Times that an iteration's chunks are learned from (ReinFlow: 5, DPPO: 10)."""
    minibatch: int = 512
    """Chunks per update (ReinFlow: 10,000, DPPO: 7,500 to 10,000 pairs of a chunk and a denoising step)."""
    warmup_rollouts: int = 2
    """First iterations that learn the value alone (ReinFlow, DPPO: 2)."""
    discount: float = 0.999
    """Discount per chunk (ReinFlow, DPPO)."""
    gae_lambda: float = 0.95
    """Lambda of generalized advantage estimation (ReinFlow, DPPO)."""
    scale_rewards: bool = True
    """Divide rewards by the running standard deviation of their discounted returns (ReinFlow, DPPO)."""
    scaling_discount: float | None = None
    """Discount of those returns; None is `discount` (ReinFlow; DPPO: 0.99)."""
    reward_factor: float = 1.0
    """Factor of the rewards, after scaling (ReinFlow, DPPO: 1)."""
    value_hidden: tuple[int, ...] = (256, 256, 256)
    """Hidden widths of the value network (DPPO, ReinFlow: 3 x 256, residual)."""
    value_weight: float = 0.5
    """Weight of the value loss (ReinFlow, DPPO)."""
    value_clip: float | None = None
    """Most by which a value may depart from that of the rollout, else its larger error counts; None does not clip
    (ReinFlow, DPPO)."""

    def __post_init__(self) -> None:
        check_counts(self, "rollout_steps", "epochs", "minibatch")
        require(self.rollout_steps >= 2, "rollout_steps is 1; at least 2 chunks, whose advantages can be compared")
        require(self.warmup_rollouts >= 0, f"warmup_rollouts is {self.warmup_rollouts}; it must not be negative")
        for name in ("discount", "gae_lambda"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name} is {value}; it must lie in [0, 1]")
        check_widths(self, "value_hidden")


class OnPolicy(Algorithm):
    """An algorithm that learns from its latest rollouts alone. Its online updates get a :class:`RolloutBatch`.

    A subclass writes `explore`, `log_prob`, `sft_loss` and `online_loss`.
    """

    config: Any  # an OnPolicyConfig

    def __init__(
        self, policy: FlowPolicy, config: OnPolicyConfig | None = None, rng: GlobalBatchRNG | None = None
    ) -> None:
        super().__init__(policy, config, rng)
        cfg = self.config
        self.value = Mlp(policy.feature_dim, cfg.value_hidden, 1, "gelu")
        scaling = cfg.discount if cfg.scaling_discount is None else cfg.scaling_discount
        self.reward_scaler = RewardScaler(scaling)

    # -- acting ---------------------------------------------------------------------------------------------------

    def explore(
        self, prefix: Prefix, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "B H A"], Mapping[str, Tensor]]:
        """Return a chunk for each of B states, as this algorithm acts in order to learn, and what learning has to know
        of it, each tensor with B rows."""
        raise NotImplementedError(f"{type(self).__name__} has no explore")

    def explores_with(self) -> tuple[str, ...]:
        """Return the names of the submodules beside the policy that `explore` reads."""
        return ()

    def for_acting(self, n: int = 1) -> Algorithm:
        view = copy(self)
        names = dict.fromkeys(("policy", *self.acts_with(n), *self.explores_with()))
        view.__dict__.update(_modules={name: self._modules[name] for name in names}, rng=None)
        return view

    def begin_rollout(self) -> None:
        """Renew whatever acts, before a rollout."""

    # -- learning -------------------------------------------------------------------------------------------------

    def log_prob(self, prefix: Prefix, acted: Mapping[str, Tensor]) -> Float[Tensor, "B ..."]:
        """Return the log-probability of what `explore` noted, by the present weights."""
        raise NotImplementedError(f"{type(self).__name__} has no log_prob")

    @torch.no_grad()
    def look_back(self, prefix: Prefix, acted: Mapping[str, Tensor]) -> tuple[Float[Tensor, " B"], Tensor]:
        """Return the value of each state and `log_prob`, before the first update from a rollout."""
        return self.state_values(prefix), self.log_prob(prefix, acted)

    def state_values(self, prefix: Prefix) -> Float[Tensor, " B"]:
        """Return V(s) of each of B states, in units of scaled reward."""
        return self.value(prefix.features)[..., 0]

    def advantages(
        self,
        rewards: Float[Tensor, "S E"],
        values: Float[Tensor, "S1 E"],
        terminated: Bool[Tensor, "S E"],
        firsts: Bool[Tensor, "S E"],
        running: Float[Tensor, " E"],
    ) -> tuple[Float[Tensor, "S E"], Float[Tensor, "S E"]]:
        """Return the advantage of each chunk step of a rollout, and what the value of its state is to become.

        As in the official code of DPPO and ReinFlow, a time limit does not cut an advantage: what follows is the next
        episode.

        Args:
            rewards: sum over each chunk.
            values: V of each state, the one after the last step included.
            terminated: True where a chunk ended in a state without a future.
            firsts: True where a chunk is the first of its episode.
            running: discounted return of each environment's episode so far; updated in place.
        """
        if self.config.scale_rewards:
            rewards = self.reward_scaler(rewards, firsts, running)
        discounts = self.config.discount * (~terminated).to(rewards)
        return self.estimates(self.config.reward_factor * rewards, values, discounts)

    def estimates(
        self, rewards: Float[Tensor, "S E"], values: Float[Tensor, "S1 E"], discounts: Float[Tensor, "S E"]
    ) -> tuple[Float[Tensor, "S E"], Float[Tensor, "S E"]]:
        """Return generalized advantage estimates and their returns, of rewards that are scaled already."""
        advantages = generalized_advantages(rewards, values, discounts, lam=self.config.gae_lambda)
        return advantages, advantages + values[:-1]

    def warmup_loss(self, batch: ChunkBatch, noise: Any = None) -> Loss:
        """Return the loss of the value alone."""
        assert isinstance(batch, RolloutBatch)
        loss, metrics = self.value_loss(self.encode(batch), batch)
        return self.config.value_weight * loss, metrics

    def value_loss(self, prefix: Prefix, batch: RolloutBatch) -> Loss:
        """Return 0.5 mean (V - target)^2, with `value_clip` the larger of that and the one of the clipped V."""
        v, clip = self.state_values(prefix), self.config.value_clip
        errors = (v - batch.value_targets).square()
        if clip is not None:
            clipped = batch.values + (v - batch.values).clamp(-clip, clip)
            errors = torch.maximum(errors, (clipped - batch.value_targets).square())
        loss = 0.5 * errors.mean()
        return loss, {"value_loss": loss.detach(), "value": v.detach().mean(), "target": batch.value_targets.mean()}

    def has_departed(self, metrics: Metrics) -> bool:
        """Return True if the policy has departed from the one that acted, so that no more is learned of a rollout."""
        return False

    def parameter_groups(self, actor_lr: float = 3e-4, critic_lr: float = 3e-4) -> list[ParameterGroup]:
        return [*super().parameter_groups(actor_lr), group("value", self.value, critic_lr)]

    def trained_groups(self, phase: Phase) -> frozenset[str]:
        groups = super().trained_groups(phase)
        return {"sft": groups - {"value"}, "warmup": frozenset({"value"})}.get(phase, groups)

    def reads_next(self, phase: Phase) -> bool:
        return False

    @classmethod
    def fit(cls, config: TrainConfig) -> TrainConfig:
        """Return the run with as many warm-up updates as `warmup_rollouts` has, and with ten iterations at least.

        Raises:
            ConfigError: it does not act in step with learning, or in no simulated environments.
        """
        config = super().fit(config)
        if not config.online_steps:
            return config
        if config.env is None or config.interaction.mode != "synchronous":
            mode = config.interaction.mode
            raise ConfigError(
                f'algorithm "{config.algorithm}" learns from its latest rollouts, which its own weights must have '
                "made: it needs simulated environments (env) and interaction.mode synchronous, "
                + (f'and interaction.mode is "{mode}"' if mode != "synchronous" else "and env is None")
            )
        options: OnPolicyConfig = options_of(config)
        num_envs = config.env.num_envs
        if "rollout_steps" not in config.algorithm_options:
            tenth = config.online_steps // (FEWEST_ITERATIONS * num_envs * config.horizon)
            if tenth < options.rollout_steps:
                shorter = {"rollout_steps": max(2, tenth)}
                config = replace(config, algorithm_options={**config.algorithm_options, **shorter})
                options = options_of(config)
        updates = options.epochs * -(-options.rollout_steps * num_envs // options.minibatch)
        return replace(config, warmup_steps=options.warmup_rollouts * updates)
