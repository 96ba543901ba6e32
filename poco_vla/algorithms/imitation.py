"""Imitation: flow matching on data (SFT, behaviour cloning), without a critic."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from poco_vla.algorithms.contract import Algorithm, Loss, Phase
from poco_vla.config.checks import check_choices
from poco_vla.distill import Anchor, anchor_rows, flow_errors
from poco_vla.noise import UpdateNoise, row_weights
from poco_vla.policy import Prefix
from poco_vla.types import ChunkBatch


@dataclass(frozen=True)
class ImitationConfig:
    """Options of imitation."""

    anchor: Anchor = "demos"
    """Chunks that are imitated online: the demonstrations, those and the policy's own successes (self-imitation), or
    everything."""
    error_mean: Literal["valid", "all"] = "valid"
    """Denominator of masked means: entries that count, or all of them."""

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True)
class ImitationNoise(UpdateNoise):
    """Hold a_0 and t of each data chunk's flow error, and its weight; the mean of the weights is 1."""

    weights: Float[Tensor, " B"]
    flow_noise: Float[Tensor, "B 1 H A"]
    flow_time: Float[Tensor, "B 1"]


def imitation_noise(algorithm: Algorithm, batch: ChunkBatch, anchor: Anchor = "all") -> ImitationNoise:
    """Return the random numbers of `imitation_loss` on the chunks that `anchor` selects, and what these weigh."""
    weights = row_weights(anchor_rows(batch, anchor), batch.actions)
    return ImitationNoise(weights, algorithm.draw_chunks(batch, 1), algorithm.draw_times(batch, 1))


def imitation_loss(
    algorithm: Algorithm,
    batch: ChunkBatch,
    noise: ImitationNoise,
    mean_over: Literal["valid", "all"] = "valid",
    prefix: Prefix | None = None,
) -> Loss:
    """Return the mean flow error of the data chunks (POCO Eq. 24); `prefix` is the batch's where it is encoded."""
    errors = flow_errors(
        algorithm.policy,
        algorithm.encode(batch) if prefix is None else prefix,
        batch.actions[:, None],
        batch.valid,
        noise=noise.flow_noise,
        t=noise.flow_time,
        mean_over=mean_over,
    )
    loss = (errors[:, 0] * noise.weights).mean()
    return loss, {"bc_loss": loss.detach()}


class Imitation(Algorithm):
    """Behaviour cloning: the flow-matching loss on data in every stage, without a critic.

    Online it goes on with the episodes that `anchor` selects.
    """

    title = "BC"
    config_class = ImitationConfig
    has_warmup = False
    own_options = frozenset({"anchor"})  # with own successes it is self-imitation, which is asked for by name
    config: ImitationConfig

    def sft_loss(self, batch: ChunkBatch, noise: ImitationNoise | None = None) -> Loss:
        """Return the mean flow error of the data chunks (POCO Eq. 24)."""
        return imitation_loss(self, batch, noise or self.draw_noise(batch, "sft"), self.config.error_mean)

    def online_loss(self, batch: ChunkBatch, noise: ImitationNoise | None = None) -> Loss:
        """Return the same over the chunks that `anchor` selects."""
        return imitation_loss(self, batch, noise or self.draw_noise(batch, "online"), self.config.error_mean)

    def draw_noise(self, batch: ChunkBatch, phase: Phase) -> ImitationNoise:
        """Return the random numbers of an update, and what its transitions weigh."""
        return imitation_noise(self, batch, "all" if phase == "sft" else self.config.anchor)

    def reads_next(self, phase: Phase) -> bool:
        return False
