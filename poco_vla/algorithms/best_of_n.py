"""Q-chunking, QC (arXiv 2507.07969): flow behaviour cloning, and a chunk critic that chooses the best of N samples.
With H = 1 it is best-of-N (BFN)."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from poco_vla.algorithms.contract import Algorithm, Loss, ParameterGroup, Phase, group
from poco_vla.algorithms.critics import CriticOptions, chunk_critic
from poco_vla.algorithms.imitation import ImitationNoise, imitation_loss, imitation_noise
from poco_vla.config.checks import check_counts
from poco_vla.critic import TargetNetwork, aggregate, best_of, td_loss, td_target
from poco_vla.distill import Anchor
from poco_vla.noise import GlobalBatchRNG, crossing_weights
from poco_vla.policy import FlowPolicy, Prefix, propose
from poco_vla.types import ChunkBatch


@dataclass(frozen=True)
class QChunkingConfig(CriticOptions):
    """Options that QC and QC-FQL share ("authors": ColinQiyangLi/qc)."""

    aggregation: Literal["mean", "min"] = "mean"
    """How the critics' values become one (authors: mean)."""
    anchor: Anchor = "all"
    """Data that the flow policy imitates: all (authors), the demonstrations, or those and own successes."""
    flow_steps: int | None = None
    """Euler steps when sampling the flow; None is the model's own number (authors: 10)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flow_steps is not None:
            check_counts(self, "flow_steps")


@dataclass(frozen=True)
class BestOfNConfig(QChunkingConfig):
    """Options of QC ("authors": ColinQiyangLi/qc)."""

    num_candidates: int = 32
    """N, samples of which the critic chooses (authors: 32 on cube and scene, 64 on puzzle-3x3, 16 on RoboMimic; 4 for
    BFN)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "num_candidates")


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
    """

    config_class = QChunkingConfig
    tiny_options = MappingProxyType({"critic_hidden": [32, 32]})
    config: C

    def __init__(self, policy: FlowPolicy, config: C | None = None, rng: GlobalBatchRNG | None = None) -> None:
        super().__init__(policy, config, rng)
        self.critic = chunk_critic(policy, self.config)
        # Deviation 1: mixes the critic from after the optimizer step, unless `target_mixes` says before.
        self.target_critic = TargetNetwork(self.critic, self.config.tau, self.config.target_mixes)

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
        return td_loss(self.critic, prefix.features, batch.actions, y, noise.critic_weights)

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
        return [*super().parameter_groups(actor_lr), group("critic", self.critic, critic_lr)]

    def trained_groups(self, phase: Phase) -> frozenset[str]:
        return frozenset({"actor"}) if phase == "sft" else super().trained_groups(phase)


class BestOfN(QChunking[BestOfNConfig]):
    """QC: imitates all data; the critic chooses the best of N samples, in acting and in its own target."""

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
        return best_of(x, aggregate(self.critic(prefix.features, x), self.config.aggregation))

    @torch.no_grad()
    def act(self, prefix: Prefix, n: int = 1, generator: torch.Generator | None = None) -> Float[Tensor, "B H A"]:
        """Return the best of `num_candidates` samples for each state, or of `n` where that is above 1."""
        num = n if n > 1 else self.config.num_candidates
        return self.best(prefix, propose(self.policy, prefix, num, steps=self.config.flow_steps, generator=generator))

    def acts_with(self, n: int) -> tuple[str, ...]:
        return ("critic",)
