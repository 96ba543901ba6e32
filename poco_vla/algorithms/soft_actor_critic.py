"""Share between RLPD and EXPO: soft actor-critic (SAC, arXiv 1812.05905) with an ensemble of critics over chunks."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from poco_vla.algorithms.contract import Algorithm, Loss, ParameterGroup, Phase, Stage, group
from poco_vla.algorithms.critics import TdOptions
from poco_vla.config import TrainConfig
from poco_vla.config.checks import check_counts, check_positive, check_widths
from poco_vla.critic import ChunkCritic, TargetNetwork, aggregate, td_loss, td_target, values_for_actor
from poco_vla.errors import ConfigError
from poco_vla.gaussian import GaussianNetwork, Temperature
from poco_vla.noise import GlobalBatchRNG, UpdateNoise, crossing_weights
from poco_vla.policy import FlowPolicy, Prefix
from poco_vla.types import ChunkBatch, Metrics


@dataclass(frozen=True)
class EnsembleConfig(TdOptions):
    """Options of the critics and of the temperature ("authors": ikostrikov/rlpd)."""

    critic_members: int = 10
    """E, critics in the ensemble (authors)."""
    target_members: int | None = 2
    """Critics, drawn anew for every update, that the TD target reads (authors: 2, 1 for AntMaze); None takes all."""
    aggregation: Literal["mean", "min"] = "min"
    """How the values of those critics become one (authors)."""
    target_entropy: float = -0.5
    """Entropy that the actor keeps, in nats per number of a chunk (authors)."""
    initial_temperature: float = 1.0
    """alpha at first, in units of discounted reward per nat (authors)."""
    actor_every: int | None = None
    """Updates of the critics for each of actor and temperature; None is `updates_per_step`, rounded: one update of the
    actor per environment step (authors)."""
    hidden: tuple[int, ...] = (256, 256)
    """Hidden widths of actor and critics (authors; 3 layers on sparse tasks)."""
    layer_norm_eps: float = 1e-6
    """Epsilon of the critics' LayerNorms (authors)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "initial_temperature")
        check_widths(self, "hidden")
        if self.target_members is not None and not 1 <= self.target_members <= self.critic_members:
            raise ConfigError(
                f"target_members is {self.target_members}; it must lie in 1 to critic_members ({self.critic_members})"
            )
        if self.actor_every is not None:
            check_counts(self, "actor_every")


@dataclass(frozen=True)
class SacNoise(UpdateNoise):
    """Hold the random numbers of a phase.

    Attributes:
        critic_weights: of each transition in the critic loss.
        members: critics that the target reads, the same for each transition.
        next_noise: of the actor at the bootstrap state; of one chunk, or of each candidate.
        noise: of the actor at the state.
    """

    critic_weights: Float[Tensor, " B"] | None = None
    members: Int[Tensor, "B M"] | None = None
    next_noise: Tensor | None = None
    noise: Float[Tensor, "B H A"] | None = None


class SoftActorCritic(Algorithm):
    """SAC over chunks with an ensemble of critics. A subclass says how it samples, and what a state's value is.

    An update is a step of the critics and, every `actor_every`-th time, one of actor and temperature.
    """

    config: Any

    def __init__(self, policy: FlowPolicy, config: Any = None, rng: GlobalBatchRNG | None = None) -> None:
        super().__init__(policy, config, rng)
        config, spec = self.config, policy.spec
        self.actor = GaussianNetwork(self.actor_input_dim(), spec.horizon, spec.action_dim, hidden=config.hidden)
        self.critic = ChunkCritic(
            policy.feature_dim,
            spec.horizon,
            spec.action_dim,
            hidden=config.hidden,
            members=config.critic_members,
            activation="relu",
            layer_norm_eps=config.layer_norm_eps,
            norm_first=True,
        )
        self.target_critic = TargetNetwork(self.critic, config.tau, config.target_mixes)
        self.temperature = Temperature(config.initial_temperature)

    def actor_input_dim(self) -> int:
        """Return the numbers that the actor reads of a state."""
        return self.policy.feature_dim

    def sample(self, prefix: Prefix, noise: Any) -> tuple[Float[Tensor, "B H A"], Float[Tensor, " B"]]:
        """Return what the actor does, and log pi of it; gradients reach the actor through both."""
        raise NotImplementedError

    def next_value(self, prefix: Prefix, noise: Any) -> Float[Tensor, " B"]:
        """Return the target value of the bootstrap states."""
        raise NotImplementedError

    # -- losses ---------------------------------------------------------------------------------------------------

    def critic_loss(self, batch: ChunkBatch, noise: Any = None) -> Loss:
        """Return the mean over critics and batch of (Q_e(s, a) - y)^2, y = returns + discount * V(s')."""
        noise = noise or self.draw_noise(batch, "critic")
        with torch.no_grad():
            next_value = self.next_value(self.encode_next(batch), noise)
        y = td_target(batch.returns, batch.discount, next_value)
        features = self.encode(batch).features
        return td_loss(self.critic, features, batch.actions, y, noise.critic_weights)

    def actor_loss(self, batch: ChunkBatch, noise: Any = None) -> Loss:
        """Return the sum of the losses of actor and temperature: the mean of alpha * log pi(a | s) - mean_e Q_e(s, a),
        gradients through a; and alpha * (entropy - target)."""
        noise = noise or self.draw_noise(batch, "actor")
        prefix = self.encode(batch)
        chunk, log_prob = self.sample(prefix, noise)
        q = values_for_actor(self.critic, prefix.features, chunk[:, None])[..., 0].mean(dim=0)
        target = self.config.target_entropy * chunk[0].numel()
        return actor_and_temperature(self.temperature, log_prob, q, target)

    def target_values(self, prefix: Prefix, chunk: Float[Tensor, "B N H A"], noise: SacNoise) -> Float[Tensor, "B N"]:
        """Return the values of N chunks for each state by the target's drawn members."""
        members = None if noise.members is None else noise.members[0]
        return aggregate(self.target_critic(prefix.features, chunk, members), self.config.aggregation)

    def after_step(self, phase: Phase) -> None:
        if "critic" in self.trained_groups(phase):
            self.target_critic.follow(self.critic)

    # -- an update ------------------------------------------------------------------------------------------------

    def phases(self, stage: Stage, update: int) -> tuple[Phase, ...]:
        if stage == "sft":
            return ("sft",)
        last = (update + 1) % (self.config.actor_every or 1) == 0
        return ("critic", "actor") if last else ("critic",)

    def draw_critic(self, batch: ChunkBatch) -> dict[str, Tensor]:
        """Return what transitions weigh in the critic loss, and the members that its target reads."""
        cfg = self.config
        drawn = {"critic_weights": crossing_weights(batch, drop=cfg.drop_crossing, mean_over=cfg.error_mean)}
        if cfg.target_members is not None:
            drawn["members"] = self.rng.members(cfg.target_members, cfg.critic_members, len(batch), batch.actions)
        return drawn

    def trained_groups(self, phase: Phase) -> frozenset[str]:
        groups = {"sft": ["actor"], "critic": ["critic"], "actor": ["gaussian", "temperature"]}
        return frozenset(groups[phase])

    def reads_next(self, phase: Phase) -> bool:
        return phase not in ("sft", "actor")

    def chunks_per_state(self, phase: Phase) -> int:
        return int(phase == "sft")

    def parameter_groups(self, actor_lr: float = 3e-4, critic_lr: float = 3e-4) -> list[ParameterGroup]:
        return [
            *super().parameter_groups(actor_lr),
            group("gaussian", self.actor, actor_lr),
            group("critic", self.critic, critic_lr),
            group("temperature", self.temperature, actor_lr),
        ]

    # -- a run ----------------------------------------------------------------------------------------------------

    @classmethod
    def fit(cls, config: TrainConfig) -> TrainConfig:
        """Return the configuration with half of each batch from demonstrations, unless it says otherwise, and with
        `actor_every`."""
        config = super().fit(config)
        given = {name: value for name, value in config.algorithm_options.items() if value is not None}
        options = {"actor_every": max(1, round(config.updates_per_step))} | given
        fraction = 0.5 if config.replay.demo_fraction is None else config.replay.demo_fraction
        return replace(config, replay=replace(config.replay, demo_fraction=fraction), algorithm_options=options)


def actor_and_temperature(
    temperature: Temperature, log_prob: Float[Tensor, " B"], q: Float[Tensor, " B"], target: float, *, log: bool = False
) -> tuple[Float[Tensor, ""], Metrics]:
    """Return the mean of alpha * log pi - Q, plus the loss of the temperature (SAC Eq. 7 and 18).

    Args:
        temperature: gives alpha, which is constant in the first.
        log_prob: log pi(a | s) of a sample.
        q: its value.
        target: entropy that is to be kept, in nats.
        log: see :meth:`Temperature.loss`.
    """
    actor_loss = (temperature() * log_prob - q).mean()
    entropy = -log_prob.mean()
    temperature_loss = temperature.loss(entropy, target, log=log)
    return actor_loss + temperature_loss, {
        "actor_loss": actor_loss.detach(),
        "temperature_loss": temperature_loss.detach(),
        "temperature": temperature(),
        "entropy": entropy.detach(),
        "actor_q": q.detach().mean(),
    }
