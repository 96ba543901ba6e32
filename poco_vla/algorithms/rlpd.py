"""RLPD (arXiv 2302.02948): SAC with an ensemble of critics, half of each batch from demonstrations. RLPD-AC: the same
over chunks, as in QC (arXiv 2507.07969)."""

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from poco_vla.algorithms.contract import Loss, Phase, Stage
from poco_vla.algorithms.soft_actor_critic import EnsembleConfig, SacNoise, SoftActorCritic
from poco_vla.config.checks import require
from poco_vla.gaussian import SquashedGaussian
from poco_vla.policy import Prefix, initial_noise
from poco_vla.types import ChunkBatch


@dataclass(frozen=True)
class RlpdConfig(EnsembleConfig):
    """Options of RLPD ("authors": ikostrikov/rlpd)."""

    backup_entropy: bool = True
    """Subtract alpha * log pi in the TD target (authors: off on the sparse tasks of AntMaze and Adroit)."""
    bc_weight: float = 0.0
    """Weight of -log pi of the data's chunks in the actor's loss (QC-RLPD: 0.01)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.bc_weight >= 0, f"bc_weight is {self.bc_weight}; it must not be negative")


@dataclass(frozen=True)
class RlpdAcConfig(RlpdConfig):
    """Options of RLPD-AC ("authors": ColinQiyangLi/qc)."""

    target_members: int | None = None
    """Critics, drawn anew for every update, that the TD target reads; None takes all (authors)."""
    aggregation: Literal["mean", "min"] = "mean"
    """How the values of those critics become one (authors)."""
    backup_entropy: bool = False
    """Subtract alpha * log pi in the TD target (authors: no)."""
    hidden: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden widths of actor and critics (authors)."""


class Rlpd(SoftActorCritic):
    """RLPD: SAC with 10 LayerNorm critics, half of each batch from demonstrations; without a flow policy.

    A tanh-Gaussian over the features of a state acts and learns. Until the warm-up is over, actions are uniformly
    random.
    """

    # Deviation 11: evaluations sample too; the authors' act by the mode.
    # Deviation 12: critics and actor learn during the random steps too; the authors' begin after them.
    title = "RLPD"
    config_class = RlpdConfig
    has_sft = False
    tiny_options = MappingProxyType({"hidden": [32, 32], "critic_members": 3})

    def distribution(self, features: Float[Tensor, "B D"]) -> SquashedGaussian:
        """Return pi(a | s), over chunks without padding."""
        return SquashedGaussian(self.actor(features))

    def sample(self, prefix: Prefix, noise: SacNoise) -> tuple[Float[Tensor, "B H A"], Float[Tensor, " B"]]:
        assert noise.noise is not None
        return self.distribution(prefix.features).sample(noise.noise)

    def next_value(self, prefix: Prefix, noise: SacNoise) -> Float[Tensor, " B"]:
        """Return min_e Q'_e(s', a') - alpha * log pi(a' | s') for a sample a', over the members that were drawn."""
        assert noise.next_noise is not None
        chunk, log_prob = self.distribution(prefix.features).sample(noise.next_noise)
        q = self.target_values(prefix, chunk[:, None], noise)[:, 0]
        return q - self.temperature() * log_prob if self.config.backup_entropy else q

    def actor_loss(self, batch: ChunkBatch, noise: SacNoise | None = None) -> Loss:
        loss, metrics = super().actor_loss(batch, noise)
        if self.config.bc_weight:
            data = batch.actions[..., : self.policy.spec.action_dim]
            log_prob = self.distribution(self.encode(batch).features).log_prob(data)
            bc_loss = -self.config.bc_weight * log_prob.mean()
            loss, metrics = loss + bc_loss, metrics | {"bc_loss": bc_loss.detach()}
        return loss, metrics

    def draw_noise(self, batch: ChunkBatch, phase: Phase) -> SacNoise:
        """Return the random numbers of a phase, and what its transitions weigh in the critic loss."""
        drawn = {}
        if phase != "actor":
            drawn = self.draw_critic(batch) | {"next_noise": self.draw_actions(batch)}
        if phase != "critic":
            drawn["noise"] = self.draw_actions(batch)
        return SacNoise(**drawn)

    @torch.no_grad()
    def act(self, prefix: Prefix, n: int = 1, generator: torch.Generator | None = None) -> Float[Tensor, "B H A"]:
        """Return a sample of the squashed Gaussian for each state."""
        noise = initial_noise(self.policy, prefix, 1, generator)[:, 0, :, : self.policy.spec.action_dim]
        return self.policy.spec.pad(self.distribution(prefix.features).sample(noise)[0])

    @torch.no_grad()
    def act_untrained(self, prefix: Prefix, generator: torch.Generator | None = None) -> Float[Tensor, "B H A"]:
        """Return a uniformly random chunk in [-1, 1] for each state."""
        spec, features = self.policy.spec, prefix.features
        place = generator.device if generator is not None else features.device
        shape = (len(features), spec.horizon, spec.action_dim)
        return self.policy.spec.pad(torch.rand(shape, generator=generator, device=place).to(features.device) * 2 - 1)

    def acts_with(self, n: int) -> tuple[str, ...]:
        return ("actor",)


class RlpdAc(Rlpd):
    """RLPD over chunks as in QC: the mean of all critics, no entropy in the target, one step of all networks."""

    title = "RLPD-AC"
    config_class = RlpdAcConfig

    def joint_loss(self, batch: ChunkBatch, noise: SacNoise | None = None) -> Loss:
        """Return the sum of the losses of critics, actor and temperature."""
        noise = noise or self.draw_noise(batch, "joint")
        batch = replace(batch, prefix=self.encode(batch))  # once for both
        (critic_loss, metrics), (actor_loss, others) = self.critic_loss(batch, noise), self.actor_loss(batch, noise)
        return critic_loss + actor_loss, metrics | others

    def phases(self, stage: Stage, update: int) -> tuple[Phase, ...]:
        return ("joint",)

    def trained_groups(self, phase: Phase) -> frozenset[str]:
        return frozenset({"gaussian", "critic", "temperature"})
