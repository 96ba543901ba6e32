"""Q-chunking, QC (arXiv 2507.07969): flow behaviour cloning, and a chunk critic that chooses the best of N samples.
With H = 1 it is best-of-N (BFN)."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from poco_vla.algorithms.contract import Algorithm, Loss, ParameterGroup, Phase
from poco_vla.algorithms.imitation import ImitationNoise, imitation_loss, imitation_noise
from poco_vla.critic import Activation, ChunkCritic, TargetNetwork, aggregate, td_target
from poco_vla.distill import ANCHORS, Anchor
from poco_vla.errors import ConfigError, UnknownNameError
from poco_vla.noise import GlobalBatchRNG, crossing_weights
from poco_vla.policy import FlowPolicy, Prefix, propose
from poco_vla.types import ChunkBatch


@dataclass(frozen=True)
class QChunkingConfig:
    """Options that QC and QC-FQL share ("authors": ColinQiyangLi/qc)."""

    gamma: float = 0.99
    """Discount per control step (authors)."""
    tau: float = 0.005
    """Share of the critics mixed into their targets at every update (authors)."""
    aggregation: Literal["mean", "min"] = "mean"
    """How the critics' values become one (authors: mean)."""
    anchor: Anchor = "all"
    """Data that the flow policy imitates: all (authors), the demonstrations, or those and own successes."""
    flow_steps: int | None = None
    """Euler steps when sampling the flow; None is the model's own number (authors: 10)."""
    drop_crossing: bool = False
    """Leave chunks whose episode ended before their last step out of the critic loss (authors). False keeps them with
    their exact n-step return."""
    error_mean: Literal["valid", "all"] = "valid"
    """Denominator of masked means: entries that count, or all of them (authors)."""
    target_mixes: Literal["after", "before"] = "after"
    """Critic parameters that are mixed into the target: those from after the optimizer step, or before it (authors)."""
    critic_hidden: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden widths of each critic (authors)."""
    critic_members: int = 2
    """E, critics in the ensemble (authors)."""
    critic_activation: Activation = "gelu"
    """Critic activation (authors: tanh-approximated gelu)."""
    critic_layer_norm_eps: float = 1e-6
    """Epsilon of the critics' LayerNorms (authors)."""

    def __post_init__(self) -> None:
        for name, known in (("aggregation", ("mean", "min")), ("anchor", ANCHORS)):
            if getattr(self, name) not in known:
                raise UnknownNameError(name, getattr(self, name), known)
        require(0 < self.gamma <= 1, f"gamma is {self.gamma}; it must lie in (0, 1]")
        require(0 < self.tau <= 1, f"tau is {self.tau}; it must lie in (0, 1]")
        require(self.flow_steps is None or self.flow_steps >= 1, f"flow_steps is {self.flow_steps}; at least 1")
        require(self.critic_members >= 1, f"critic_members is {self.critic_members}; at least 1")
        require_widths("critic_hidden", self.critic_hidden)


def require(holds: bool, message: str) -> None:
    """Raise ConfigError unless a condition holds."""
    if not holds:
        raise ConfigError(message)


def require_widths(name: str, widths: tuple[int, ...]) -> None:
    """Raise ConfigError unless hidden widths are positive and there is one at least."""
    require(len(widths) > 0 and min(widths) > 0, f"{name} is {list(widths)}; it needs one width or more, all above 0")


@dataclass(frozen=True)
class BestOfNConfig(QChunkingConfig):
    """Options of QC ("authors": ColinQiyangLi/qc)."""

    num_candidates: int = 32
    """N, samples of which the critic chooses (authors: 32 on cube and scene, 64 on puzzle-3x3, 16 on RoboMimic; 4 for
    BFN)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_candidates >= 1, f"num_candidates (N) is {self.num_candidates}; it must be at least 1")


@dataclass(frozen=True)
class QChunkingNoise(ImitationNoise):
    """Hold the random numbers of an update, and how much each of its transitions counts.

    Attributes:
        critic_weights: of each transition in the critic loss.
        next_noise: a_0 of the candidates at the bootstrap state.
    """

    critic_weights: Float[Tensor, " B"] | None = None
    next_noise: Float[Tensor, "B N H A"] | None = None


class QChunking[C: QChunkingConfig](Algorithm):
    """Flow behaviour cloning beside a chunk critic, which QC and QC-FQL share; by itself its target is of one plain
    sample. Warm-up is the offline stage of the authors: critic and flow learn alike in it.

    Args:
        policy: the flow policy, its backbone already frozen.
        config: the options.
        rng: source of the random numbers of updates; torch's default generator when None.
    """

    config_class = QChunkingConfig
    tiny_options = MappingProxyType({"critic_hidden": [32, 32]})
    config: C

    def __init__(self, policy: FlowPolicy, config: C | None = None, rng: GlobalBatchRNG | None = None) -> None:
        super().__init__(policy, config or self.config_class(), rng)
        cfg, spec = self.config, policy.spec
        self.critic = ChunkCritic(
            policy.feature_dim,
            spec.horizon,
            spec.action_dim,
            hidden=cfg.critic_hidden,
            members=cfg.critic_members,
            activation=cfg.critic_activation,
            layer_norm_eps=cfg.critic_layer_norm_eps,
        )
        # Deviation 1: mixes the critic from after the optimizer step, unless `target_mixes` says before.
        self.target_critic = TargetNetwork(self.critic, cfg.tau, cfg.target_mixes)

    # -- losses ---------------------------------------------------------------------------------------------------

    def sft_loss(self, batch: ChunkBatch, noise: QChunkingNoise | None = None) -> Loss:
        """Return the flow-matching loss on the data chunks."""
        return self.bc_loss(self.encode(batch), batch, noise or self.draw_noise(batch, "sft"))

    def warmup_loss(self, batch: ChunkBatch, noise: QChunkingNoise | None = None) -> Loss:
        """Return the loss of an online update."""
        return self.online_loss(batch, noise or self.draw_noise(batch, "warmup"))

    def online_loss(self, batch: ChunkBatch, noise: QChunkingNoise | None = None) -> Loss:
        """Return the sum of critic loss and flow-matching loss. No gradient of Q reaches the flow."""
        noise = noise or self.draw_noise(batch, "online")
        prefix = self.encode(batch)
        critic_loss, metrics = self.critic_loss(prefix, batch, noise)
        bc_loss, bc_metrics = self.bc_loss(prefix, batch, noise)
        return critic_loss + bc_loss, metrics | bc_metrics

    def critic_loss(self, prefix: Prefix, batch: ChunkBatch, noise: QChunkingNoise) -> Loss:
        """Return the mean over critics and batch of (Q_e(s, a) - y)^2, y = returns + discount * Q'(s', a')."""
        assert noise.critic_weights is not None
        assert noise.next_noise is not None
        y = self.target(batch, noise.next_noise)
        q = self.critic(prefix.features, batch.actions[:, None])[..., 0]
        loss = ((q - y).square().mean(dim=0) * noise.critic_weights).mean()
        return loss, {"critic_loss": loss.detach(), "q": q.detach().mean(), "target": y.mean()}

    @torch.no_grad()
    def target(self, batch: ChunkBatch, noise: Float[Tensor, "B N H A"]) -> Float[Tensor, " B"]:
        """Return y, the value of the chunk `next_chunk` by the target critics behind the batch's returns."""
        prefix = self.encode_next(batch)
        chunk = self.next_chunk(prefix, noise)
        q = aggregate(self.target_critic(prefix.features, chunk[:, None]), self.config.aggregation)
        return td_target(batch.returns, batch.discount, q[:, 0])

    def next_chunk(self, prefix: Prefix, noise: Float[Tensor, "B N H A"]) -> Float[Tensor, "B H A"]:
        """Return the chunk a' at the bootstrap state whose value the target has."""
        return propose(self.policy, prefix, noise.shape[1], steps=self.config.flow_steps, noise=noise)[:, 0]

    def bc_loss(self, prefix: Prefix, batch: ChunkBatch, noise: QChunkingNoise) -> Loss:
        """Return the flow-matching loss on the chunks that `anchor` selects."""
        return imitation_loss(self, batch, noise, self.config.error_mean, prefix)

    def after_step(self, phase: Phase) -> None:
        if phase != "sft":
            self.target_critic.follow(self.critic)

    # -- an update ------------------------------------------------------------------------------------------------

    @property
    def next_candidates(self) -> int:
        """Return the samples at each bootstrap state."""
        return 1

    def draw_noise(self, batch: ChunkBatch, phase: Phase) -> QChunkingNoise:
        """Return the random numbers of a phase, and what its transitions weigh."""
        cfg = self.config
        if phase == "sft":
            return QChunkingNoise(**vars(imitation_noise(self, batch)))
        next_noise = self.draw_chunks(batch, self.next_candidates)
        weights = crossing_weights(batch, drop=cfg.drop_crossing, mean_over=cfg.error_mean)
        return QChunkingNoise(
            **vars(imitation_noise(self, batch, cfg.anchor)), critic_weights=weights, next_noise=next_noise
        )

    def parameter_groups(self, actor_lr: float = 3e-4, critic_lr: float = 3e-4) -> list[ParameterGroup]:
        critic: ParameterGroup = {"name": "critic", "params": list(self.critic.parameters()), "lr": critic_lr}
        return [*super().parameter_groups(actor_lr), critic]

    def trained_groups(self, phase: Phase) -> frozenset[str]:
        return frozenset({"actor"}) if phase == "sft" else super().trained_groups(phase)

    @classmethod
    def gamma(cls, config: QChunkingConfig) -> float:
        return config.gamma


class BestOfN(QChunking[BestOfNConfig]):
    """QC: imitates all data; the critic chooses the best of N samples, in acting and in its own target.

    Args:
        policy: the flow policy, its backbone already frozen.
        config: the options.
        rng: source of the random numbers of updates; torch's default generator when None.
    """

    title = "QC"
    config_class = BestOfNConfig
    ranks_candidates = True
    tiny_options = MappingProxyType({"critic_hidden": [32, 32], "num_candidates": 4})

    @property
    def next_candidates(self) -> int:
        return self.config.num_candidates

    def next_chunk(self, prefix: Prefix, noise: Float[Tensor, "B N H A"]) -> Float[Tensor, "B H A"]:
        """Return the candidate with the largest value, by the online critic; the target critic is asked for y alone."""
        return self.best(
            prefix, propose(self.policy, prefix, noise.shape[1], steps=self.config.flow_steps, noise=noise)
        )

    def best(self, prefix: Prefix, x: Float[Tensor, "B N H A"]) -> Float[Tensor, "B H A"]:
        """Return the best of N chunks of each state by the online critic."""
        q = aggregate(self.critic(prefix.features, x), self.config.aggregation)
        return x[torch.arange(len(x), device=x.device), q.argmax(dim=1)]

    @torch.no_grad()
    def act(self, prefix: Prefix, n: int = 1, generator: torch.Generator | None = None) -> Float[Tensor, "B H A"]:
        """Return the best of `num_candidates` samples for each state, or of `n` where that is above 1."""
        num = n if n > 1 else self.config.num_candidates
        return self.best(prefix, propose(self.policy, prefix, num, steps=self.config.flow_steps, generator=generator))

    def acts_with(self, n: int) -> tuple[str, ...]:
        return ("critic",)
