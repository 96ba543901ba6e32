"""Imitation: flow matching on data (SFT, behaviour cloning), without a critic."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from poco_vla.algorithms.contract import Algorithm, Loss, Phase
from poco_vla.distill import ANCHORS, anchor_rows, flow_errors
from poco_vla.errors import UnknownNameError
from poco_vla.noise import GlobalBatchRNG, UpdateNoise, row_weights
from poco_vla.policy import FlowPolicy
from poco_vla.types import ChunkBatch


@dataclass(frozen=True)
class ImitationConfig:
    """Options of imitation."""

    anchor: Literal["all", "demos", "demos_and_successes"] = "demos"
    """Chunks that are imitated online: the demonstrations, those and the policy's own successes (self-imitation), or
    everything."""
    error_mean: Literal["valid", "all"] = "valid"
    """Denominator of masked means: entries that count, or all of them."""

    def __post_init__(self) -> None:
        if self.anchor not in ANCHORS:
            raise UnknownNameError("anchor of imitation", self.anchor, ANCHORS)
        if self.error_mean not in ("valid", "all"):
            raise UnknownNameError("error_mean of imitation", self.error_mean, ("valid", "all"))


@dataclass(frozen=True)
class ImitationNoise(UpdateNoise):
    """Hold a_0 and t of each data chunk's flow error, and its weight; the mean of the weights is 1."""

    weights: Float[Tensor, " B"]
    flow_noise: Float[Tensor, "B 1 H A"]
    flow_time: Float[Tensor, "B 1"]


class Imitation(Algorithm):
    """Behaviour cloning: the flow-matching loss on data in every stage, without a critic.

    Online it goes on with the episodes that `anchor` selects.

    Args:
        policy: the actor, its backbone already frozen.
        config: the options.
        rng: source of the random numbers of updates; torch's default generator when None.
    """

    title = "BC"
    config_class = ImitationConfig
    has_warmup = False
    config: ImitationConfig

    def __init__(
        self, policy: FlowPolicy, config: ImitationConfig | None = None, rng: GlobalBatchRNG | None = None
    ) -> None:
        super().__init__(policy, config or ImitationConfig(), rng)

    def sft_loss(self, batch: ChunkBatch, noise: ImitationNoise | None = None) -> Loss:
        """Return the mean flow error of the data chunks (POCO Eq. 24)."""
        return self._bc_loss(batch, noise or self.draw_noise(batch, "sft"))

    def online_loss(self, batch: ChunkBatch, noise: ImitationNoise | None = None) -> Loss:
        """Return the same over the chunks that `anchor` selects."""
        return self._bc_loss(batch, noise or self.draw_noise(batch, "online"))

    def draw_noise(self, batch: ChunkBatch, phase: Phase) -> ImitationNoise:
        """Return the random numbers of an update, and what its transitions weigh."""
        rows = anchor_rows(batch, "all" if phase == "sft" else self.config.anchor)
        return ImitationNoise(row_weights(rows, batch.actions), self.draw_chunks(batch, 1), self.draw_times(batch, 1))

    def reads_next(self, phase: Phase) -> bool:
        return False

    def _bc_loss(self, batch: ChunkBatch, noise: ImitationNoise) -> Loss:
        errors = flow_errors(
            self.policy,
            self.encode(batch),
            batch.actions[:, None],
            batch.valid,
            noise=noise.flow_noise,
            t=noise.flow_time,
            mean_over=self.config.error_mean,
        )
        loss = (errors[:, 0] * noise.weights).mean()
        return loss, {"bc_loss": loss.detach()}
