"""EXPO (arXiv 2507.07986): the flow policy is frozen, a small actor edits its chunks, and Q chooses among edited and
unedited ones."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from poco_vla.algorithms.contract import Loss, Phase
from poco_vla.algorithms.imitation import ImitationNoise, imitation_loss, imitation_noise
from poco_vla.algorithms.noise_steering import require_base
from poco_vla.algorithms.soft_actor_critic import EnsembleConfig, SacNoise, SoftActorCritic
from poco_vla.config import TrainConfig
from poco_vla.config.checks import check_counts, check_positive
from poco_vla.critic import aggregate, best_of
from poco_vla.gaussian import SquashedGaussian
from poco_vla.noise import GlobalBatchRNG
from poco_vla.policy import FlowPolicy, Prefix, initial_noise, propose
from poco_vla.types import ChunkBatch


@dataclass(frozen=True)
class ExpoConfig(EnsembleConfig):
    """Options of EXPO ("FEdit": agents/fedit.py of ColinQiyangLi/qam, which is like it; EXPO's own code was not
    available). Those of the critics are RLPD's, on which EXPO builds."""

    num_candidates: int = 8
    """N, samples of the flow policy per state, in acting and in the TD target. Each is edited once, and the best of
    these 2 N is taken."""
    edit_scale: float = 0.2
    """c, largest edit of a number of a chunk, in normalised units (FEdit: 0.2, cube-triple 0.3)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "num_candidates")
        check_positive(self, "edit_scale")


@dataclass(frozen=True)
class ExpoNoise(SacNoise):
    """Hold the random numbers of a phase.

    Attributes:
        next_flow_noise: a_0 of the N candidates at the bootstrap state, of the network's whole width W, which
            `next_noise` edits.
        flow_noise: a_0 of the chunk at the state, which `noise` edits.
    """

    next_flow_noise: Float[Tensor, "B N H W"] | None = None
    flow_noise: Float[Tensor, "B 1 H W"] | None = None


class Expo(SoftActorCritic):
    """EXPO: the flow policy is frozen online, a small actor edits its chunks, and Q chooses among all of them.

    The edit is e ~ tanh-Gaussian of the features and the chunk a of the flow; what is done is a + c e, or a itself.
    """

    # Deviation 14: the flow is as SFT made it; EXPO's and FEdit's goes on imitating what is in the replay buffer.
    title = "EXPO"
    config_class = ExpoConfig
    tiny_options = MappingProxyType({"hidden": [32, 32], "critic_members": 3, "num_candidates": 2})
    config: ExpoConfig
    edit_scale: Tensor

    def __init__(self, policy: FlowPolicy, config: ExpoConfig | None = None, rng: GlobalBatchRNG | None = None) -> None:
        super().__init__(policy, config, rng)
        # A buffer, because it changes after a collapse.
        self.register_buffer("edit_scale", torch.tensor(self.config.edit_scale))

    def actor_input_dim(self) -> int:
        spec = self.policy.spec
        return self.policy.feature_dim + spec.horizon * spec.action_dim

    def edit(
        self, prefix: Prefix, chunk: Float[Tensor, "B N H A"], noise: Float[Tensor, "B N H R"]
    ) -> tuple[Float[Tensor, "B N H A"], Float[Tensor, "B N"]]:
        """Return clip(a + c e), e a sample of the actor, for N chunks a of each state, and log pi(e | s, a)."""
        spec = self.policy.spec
        real = chunk[..., : spec.action_dim].flatten(2)
        features = prefix.features[:, None].to(real).expand(-1, real.shape[1], -1)
        gaussian = self.actor(torch.cat([features, real], dim=-1).flatten(0, 1))
        e, log_prob = SquashedGaussian(gaussian).sample(noise.flatten(0, 1))
        edited = chunk + self.edit_scale * spec.pad(e).view_as(chunk)
        return spec.limit(edited), log_prob.view(chunk.shape[:2])

    def candidates(
        self, prefix: Prefix, flow_noise: Float[Tensor, "B N H A"], edit_noise: Float[Tensor, "B N H R"]
    ) -> Float[Tensor, "B M H A"]:
        """Return N samples of the flow for each state, and their edits: M = 2 N."""
        chunk = propose(self.policy, prefix, flow_noise.shape[1], noise=flow_noise)
        return torch.cat([chunk, self.edit(prefix, chunk, edit_noise)[0]], dim=1)

    # -- losses ---------------------------------------------------------------------------------------------------

    def sft_loss(self, batch: ChunkBatch, noise: ImitationNoise | None = None) -> Loss:
        """Return the mean flow error of the data chunks: how the base policy is trained."""
        return imitation_loss(self, batch, noise or imitation_noise(self, batch))

    def sample(self, prefix: Prefix, noise: ExpoNoise) -> tuple[Float[Tensor, "B H A"], Float[Tensor, " B"]]:
        assert noise.flow_noise is not None
        assert noise.noise is not None
        chunk, log_prob = self.edit(
            prefix, propose(self.policy, prefix, 1, noise=noise.flow_noise), noise.noise[:, None]
        )
        return chunk[:, 0], log_prob[:, 0]

    def next_value(self, prefix: Prefix, noise: ExpoNoise) -> Float[Tensor, " B"]:
        """Return the target value of the best candidate, over the members that were drawn."""
        assert noise.next_flow_noise is not None
        assert noise.next_noise is not None
        x = self.candidates(prefix, noise.next_flow_noise, noise.next_noise)
        return self.target_values(prefix, x, noise).amax(dim=1)

    def draw_noise(self, batch: ChunkBatch, phase: Phase) -> Any:
        """Return the random numbers of a phase, and what its transitions weigh in the critic loss."""
        if phase == "sft":
            return imitation_noise(self, batch)
        if phase == "actor":
            return ExpoNoise(flow_noise=self.draw_chunks(batch, 1), noise=self.draw_actions(batch))
        n = self.config.num_candidates
        drawn = {"next_flow_noise": self.draw_chunks(batch, n), "next_noise": self.draw_actions(batch, n)}
        return ExpoNoise(**self.draw_critic(batch), **drawn)

    # -- acting and a run -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, prefix: Prefix, n: int = 1, generator: torch.Generator | None = None) -> Float[Tensor, "B H A"]:
        """Return the best of N samples of the flow and their edits for each state, by the mean of the target critics
        (of `n` samples where it is above 1)."""
        count = n if n > 1 else self.config.num_candidates
        flow_noise, edit_noise = (initial_noise(self.policy, prefix, count, generator) for _ in range(2))
        x = self.candidates(prefix, flow_noise, edit_noise[..., : self.policy.spec.action_dim])
        return best_of(x, aggregate(self.target_critic(prefix.features, x), "mean"))

    def acts_with(self, n: int) -> tuple[str, ...]:
        return ("actor", "target_critic")

    def weaken(self, factor: float) -> str:
        """Multiply c, the largest edit."""
        self.edit_scale.mul_(factor)
        return f"edits of at most {self.edit_scale.item():g}"

    @classmethod
    def fit(cls, config: TrainConfig) -> TrainConfig:
        """Return the configuration as :meth:`SoftActorCritic.fit` does.

        Raises:
            ConfigError: there is no base policy.
        """
        require_base(config)
        return super().fit(config)
