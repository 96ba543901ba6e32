"""DSRL (arXiv 2506.15799): the flow policy is frozen, and SAC learns the noise that it starts from."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from poco_vla.algorithms.contract import Algorithm, Loss, ParameterGroup, Phase, Stage, group
from poco_vla.algorithms.imitation import ImitationNoise, imitation_loss, imitation_noise
from poco_vla.algorithms.soft_actor_critic import actor_and_temperature
from poco_vla.config import TrainConfig
from poco_vla.config.checks import check_choices, check_counts, check_positive, check_shares, check_widths
from poco_vla.critic import ChunkCritic, TargetNetwork, aggregate, td_target, values_for_actor
from poco_vla.errors import ConfigError
from poco_vla.gaussian import GaussianNetwork, SquashedGaussian, Temperature
from poco_vla.noise import GlobalBatchRNG, UpdateNoise
from poco_vla.policy import FlowPolicy, Prefix, initial_noise, propose
from poco_vla.types import ChunkBatch


@dataclass(frozen=True)
class DsrlConfig:
    """Options of DSRL ("authors": ajwagen/dsrl and its fork of Stable-Baselines3)."""

    gamma: float = 0.99
    """Discount per control step (authors: per chunk, over the plain sum of its rewards; square 0.999)."""
    tau: float = 0.005
    """Share of the critics mixed into their targets at every update (authors)."""
    action: Literal["chunk", "noise"] = "chunk"
    """Input of the critic of the TD loss: executed chunks, from which a second critic over noise is distilled
    (DSRL-NA), or the noise itself (DSRL-SAC), which no dataset and no replay buffer of this library holds."""
    noise_bound: float = 1.0
    """b, largest magnitude of the chosen noise, in standard deviations (authors' published script: 1; their DSRL-SAC
    and paper: 1.5)."""
    critic_members: int = 2
    """E, critics in each ensemble (authors)."""
    aggregation: Literal["mean", "min"] = "min"
    """How the critics' values become one, in the target and in the actor's loss (authors)."""
    backup_entropy: bool = True
    """Subtract alpha * log pi in the TD target (authors)."""
    target_entropy: float = 0.0
    """Entropy that the actor keeps, in nats per number of the noise (authors)."""
    initial_temperature: float = 1.0
    """alpha at first, in units of discounted reward per nat (authors)."""
    distill_every: int = 2
    """Updates between those of the noise critic (authors: 10 after 20 others)."""
    hidden: tuple[int, ...] = (2048, 2048, 2048)
    """Hidden widths of actor and critics (authors)."""
    layer_norm_eps: float = 1e-5
    """Epsilon of their LayerNorms (authors)."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_shares(self, "gamma", "tau")
        check_counts(self, "critic_members", "distill_every")
        check_positive(self, "noise_bound", "initial_temperature")
        check_widths(self, "hidden")


@dataclass(frozen=True)
class DsrlNoise(UpdateNoise):
    """Hold the random numbers of a phase.

    Attributes:
        next_noise: of the actor at the bootstrap state.
        noise: of the actor at the state.
        flow_noise: w of the distillation, plain noise of the flow policy.
    """

    next_noise: Float[Tensor, "B H A"] | None = None
    noise: Float[Tensor, "B H A"] | None = None
    flow_noise: Float[Tensor, "B 1 H A"] | None = None


class Dsrl(Algorithm):
    """DSRL: the flow policy is frozen online, an actor learns by SAC from which noise it is to start.

    An update is a step of the chunk critic Q^A, one of actor and temperature on the noise critic Q^W, and every
    `distill_every`-th time one of Q^W. The actor works in scaled noise p in (-1, 1), the flow starts from w = b p.
    """

    title = "DSRL"
    config_class = DsrlConfig
    tiny_options = MappingProxyType({"hidden": [32, 32]})
    config: DsrlConfig

    def __init__(self, policy: FlowPolicy, config: DsrlConfig | None = None, rng: GlobalBatchRNG | None = None) -> None:
        super().__init__(policy, config, rng)
        cfg, spec = self.config, policy.spec
        of_noise, of_chunk = spec.width, spec.action_dim
        self.actor = GaussianNetwork(
            policy.feature_dim,
            spec.horizon,
            of_noise,
            hidden=cfg.hidden,
            activation="tanh",
            layer_norm_eps=cfg.layer_norm_eps,
        )
        self.critic = self._critic(of_chunk if cfg.action == "chunk" else of_noise)
        self.target_critic = TargetNetwork(self.critic, cfg.tau)
        self.noise_critic = self._critic(of_noise) if cfg.action == "chunk" else None
        self.temperature = Temperature(cfg.initial_temperature)

    def _critic(self, width: int) -> ChunkCritic:
        cfg, policy = self.config, self.policy
        return ChunkCritic(
            policy.feature_dim,
            policy.spec.horizon,
            width,
            hidden=cfg.hidden,
            members=cfg.critic_members,
            activation="tanh",
            layer_norm_eps=cfg.layer_norm_eps,
            norm_first=True,
        )

    # -- losses ---------------------------------------------------------------------------------------------------

    def sft_loss(self, batch: ChunkBatch, noise: ImitationNoise | None = None) -> Loss:
        """Return the mean flow error of the data chunks: how the base policy is trained."""
        return imitation_loss(self, batch, noise or imitation_noise(self, batch))

    def critic_loss(self, batch: ChunkBatch, noise: Any = None) -> Loss:
        """Return 1/2 sum_e mean (Q^A_e(s, a) - y)^2, where p' ~ pi(s'), a' = flow(s', b p') and
        y = returns + discount * (min_e Q^A'_e(s', a') - alpha * log pi(p' | s'))."""
        noise = noise or self.draw_noise(batch, "critic")
        y = td_target(batch.returns, batch.discount, self.next_value(self.encode_next(batch), noise))
        q = self.critic(self.encode(batch).features, batch.actions[:, None])[..., 0]
        loss = 0.5 * (q - y).square().mean(dim=1).sum()
        return loss, {"critic_loss": loss.detach(), "q": q.detach().mean(), "target": y.mean()}

    @torch.no_grad()
    def next_value(self, prefix: Prefix, noise: DsrlNoise) -> Float[Tensor, " B"]:
        """Return min_e Q^A'_e(s', a') - alpha * log pi(p' | s') at the bootstrap states."""
        assert noise.next_noise is not None
        scaled, log_prob = self.distribution(prefix).sample(noise.next_noise)
        chunk = self.steered(prefix, scaled) if self.config.action == "chunk" else scaled
        q = aggregate(self.target_critic(prefix.features, chunk[:, None]), self.config.aggregation)[:, 0]
        return q - self.temperature() * log_prob if self.config.backup_entropy else q

    def actor_loss(self, batch: ChunkBatch, noise: Any = None) -> Loss:
        """Return the sum of the losses of actor and temperature: the mean of alpha * log pi(p | s) - min_e Q^W_e(s, p),
        gradients through p; and log_alpha * (entropy - target)."""
        cfg, noise = self.config, noise or self.draw_noise(batch, "actor")
        assert noise.noise is not None
        prefix = self.encode(batch)
        scaled, log_prob = self.distribution(prefix).sample(noise.noise)
        critic = self.critic if self.noise_critic is None else self.noise_critic
        q = aggregate(values_for_actor(critic, prefix.features, scaled[:, None]), cfg.aggregation)[:, 0]
        target = cfg.target_entropy * scaled[0].numel()
        return actor_and_temperature(self.temperature, log_prob, q, target, log=True)

    def distill_loss(self, batch: ChunkBatch, noise: Any = None) -> Loss:
        """Return 1/2 sum_e mean (Q^A_e(s, flow(s, w)) - Q^W_e(s, w / b))^2 for plain noise w, member by member."""
        noise = noise or self.draw_noise(batch, "distill")
        assert noise.flow_noise is not None
        assert self.noise_critic is not None
        prefix = self.encode(batch)
        with torch.no_grad():
            chunk = propose(self.policy, prefix, 1, noise=noise.flow_noise)
            y = self.critic(prefix.features, chunk)[..., 0]
        q = self.noise_critic(prefix.features, noise.flow_noise / self.config.noise_bound)[..., 0]
        loss = 0.5 * (q - y).square().mean(dim=1).sum()
        return loss, {"noise_critic_loss": loss.detach()}

    def distribution(self, prefix: Prefix) -> SquashedGaussian:
        """Return pi(p | s), over scaled noise of the network's whole action width."""
        return SquashedGaussian(self.actor(prefix.features), epsilon=1e-6)

    def steered(self, prefix: Prefix, scaled: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A"]:
        """Return the chunks that the flow makes of scaled noise."""
        return propose(self.policy, prefix, 1, noise=self.config.noise_bound * scaled[:, None])[:, 0]

    def after_step(self, phase: Phase) -> None:
        if phase == "critic":
            self.target_critic.follow(self.critic)

    # -- an update ------------------------------------------------------------------------------------------------

    def phases(self, stage: Stage, update: int) -> tuple[Phase, ...]:
        if stage == "sft":
            return ("sft",)
        # Deviation 10: distilled on the batch of its update; the authors' code draws others, after many updates.
        distills = self.noise_critic is not None and (update + 1) % self.config.distill_every == 0
        return ("critic", "actor", "distill") if distills else ("critic", "actor")

    def draw_noise(self, batch: ChunkBatch, phase: Phase) -> Any:
        """Return the random numbers of a phase."""
        if phase == "sft":
            return imitation_noise(self, batch)
        chunk = self.draw_chunks(batch, 1)
        name = {"critic": "next_noise", "actor": "noise", "distill": "flow_noise"}[phase]
        return DsrlNoise(**{name: chunk if phase == "distill" else chunk[:, 0]})

    def trained_groups(self, phase: Phase) -> frozenset[str]:
        groups = {"sft": ["actor"], "critic": ["critic"], "actor": ["gaussian", "temperature"]}
        return frozenset(groups.get(phase, ["noise_critic"]))

    def reads_next(self, phase: Phase) -> bool:
        return phase == "critic"

    def chunks_per_state(self, phase: Phase) -> int:
        return int(phase == "sft")

    def parameter_groups(self, actor_lr: float = 3e-4, critic_lr: float = 3e-4) -> list[ParameterGroup]:
        groups = [group("gaussian", self.actor, actor_lr), group("critic", self.critic, critic_lr)]
        groups += [] if self.noise_critic is None else [group("noise_critic", self.noise_critic, critic_lr)]
        return [*super().parameter_groups(actor_lr), *groups, group("temperature", self.temperature, actor_lr)]

    # -- acting and a run -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, prefix: Prefix, n: int = 1, generator: torch.Generator | None = None) -> Float[Tensor, "B H A"]:
        """Return the chunk that the flow makes of a sample of the actor, for each state."""
        noise = initial_noise(self.policy, prefix, 1, generator)[:, 0]
        return self.steered(prefix, self.distribution(prefix).sample(noise)[0])

    def acts_with(self, n: int) -> tuple[str, ...]:
        return ("actor",)

    @classmethod
    def fit(cls, config: TrainConfig) -> TrainConfig:
        """Return the configuration as it is.

        Raises:
            ConfigError: there is no base policy, or the replay buffer cannot hold what the critic reads.
        """
        require_base(config)
        if config.algorithm_options.get("action") == "noise":
            raise ConfigError(
                'dsrl.action is "noise", but demonstrations and the replay buffer hold executed chunks and not the '
                'noise that they came from: take "chunk", which learns from both'
            )
        return super().fit(config)


def require_base(config: TrainConfig) -> None:
    """Raise ConfigError if a run neither starts from a trained policy nor trains one by SFT."""
    if config.policy is None and config.sft_steps == 0:
        raise ConfigError(
            f'algorithm "{config.algorithm}" leaves the flow policy as SFT made it, and this run has none: give a '
            "trained one (--policy FOLDER_OR_HUB_ID), or train one (--sft-steps 20000)"
        )
