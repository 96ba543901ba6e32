"""FQL (arXiv 2502.02538) and QC-FQL (arXiv 2507.07969): a one-step policy, distilled from the flow policy and raised by
the critic's gradient, acts."""

from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poco_vla.algorithms.best_of_n import QChunking, QChunkingConfig, QChunkingNoise
from poco_vla.algorithms.contract import Loss, ParameterGroup, Phase, group
from poco_vla.config import TrainConfig
from poco_vla.config.checks import check_widths, require
from poco_vla.critic import values_for_actor
from poco_vla.errors import ConfigError
from poco_vla.mlp import Mlp
from poco_vla.noise import GlobalBatchRNG, of_global_batch
from poco_vla.policy import FlowPolicy, Prefix, initial_noise, propose
from poco_vla.types import ActionSpec, ChunkBatch


@dataclass(frozen=True)
class OneStepConfig(QChunkingConfig):
    """Options of QC-FQL and FQL ("authors": ColinQiyangLi/qc, seohongpark/fql)."""

    alpha: float = 300.0
    """Weight of the distillation, in units of discounted reward per squared normalised action (authors: 300 on scene
    and cube, 100 on cube-triple, 1000 on puzzle, 10000 on RoboMimic)."""
    normalize_q_loss: bool = False
    """Divide the critic's term by the mean of |Q| over the batch, which FQL's authors advise for new tasks. Takes one
    more pass of one-step policy and critic."""
    hidden: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden widths of the one-step policy (authors)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha >= 0, f"alpha is {self.alpha}; it must not be negative (0 is no distillation)")
        check_widths(self, "hidden")


@dataclass(frozen=True)
class OneStepNoise(QChunkingNoise):
    """Hold the random numbers of an update, and how much each of its transitions counts.

    Attributes:
        distill_noise: z of the one-step policy and of the flow that it is distilled from.
        q_scale: factor of the critic's term, the same for each transition.
    """

    distill_noise: Float[Tensor, "B 1 H A"] | None = None
    q_scale: Float[Tensor, " B"] | None = None


class OneStepPolicy(nn.Module):
    """mu(features, z): an MLP from a state's features and the noise of a chunk to the chunk, not clipped.

    Args:
        feature_dim: D.
        spec: of the chunk; padding is never read, and is zero in the result.
        hidden: widths of the hidden layers.
    """

    def __init__(self, feature_dim: int, spec: ActionSpec, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.spec = spec
        chunk_dim = spec.horizon * spec.action_dim
        self.mlp = Mlp(feature_dim + chunk_dim, hidden, chunk_dim, "gelu")

    def forward(self, features: Float[Tensor, "B D"], noise: Float[Tensor, "B H A"]) -> Float[Tensor, "B H A"]:
        z = noise[..., : self.spec.action_dim]
        chunk = self.mlp(torch.cat([features.to(z.dtype), z.flatten(1)], dim=-1)).view(z.shape)
        return self.spec.pad(chunk)


class QcFql(QChunking[OneStepConfig]):
    """QC-FQL: a one-step policy is distilled from the flow and follows the critic's gradient; it acts."""

    title = "QC-FQL"
    config_class = OneStepConfig
    tiny_options = MappingProxyType({"critic_hidden": [32, 32], "hidden": [32, 32]})
    alpha: Tensor

    def __init__(
        self, policy: FlowPolicy, config: OneStepConfig | None = None, rng: GlobalBatchRNG | None = None
    ) -> None:
        super().__init__(policy, config, rng)
        self.one_step = OneStepPolicy(policy.feature_dim, policy.spec, self.config.hidden)
        # A buffer, because it changes after a collapse.
        self.register_buffer("alpha", torch.tensor(self.config.alpha, dtype=torch.float32))

    def online_loss(self, batch: ChunkBatch, noise: QChunkingNoise | None = None) -> Loss:
        """Return the sum of critic loss, flow-matching loss, alpha * distillation and the critic's term. The last two
        have a gradient for the one-step policy alone."""
        noise = noise or self.draw_noise(batch, "online")
        assert isinstance(noise, OneStepNoise)
        assert noise.distill_noise is not None
        prefix = self.encode(batch)
        critic_loss, metrics = self.critic_loss(prefix, batch, noise)
        bc_loss, bc_metrics = self.bc_loss(prefix, batch, noise)
        chunk = self.one_step(prefix.features, noise.distill_noise[:, 0])
        distill_loss = self.distill_loss(prefix, chunk, noise.distill_noise)
        q = self.values(prefix, chunk)
        q_loss = -(q.mean() if noise.q_scale is None else (q.mean(dim=0) * noise.q_scale).mean())
        loss = critic_loss + bc_loss + self.alpha * distill_loss + q_loss
        metrics |= {"distill_loss": distill_loss.detach(), "q_loss": q_loss.detach(), "actor_q": q.detach().mean()}
        return loss, metrics | bc_metrics

    def distill_loss(
        self, prefix: Prefix, chunk: Float[Tensor, "B H A"], noise: Float[Tensor, "B 1 H A"]
    ) -> Float[Tensor, ""]:
        """Return the mean of (mu(s, z) - F(s, z))^2 over batch, steps and real dimensions: F(s, z) is a sample of the
        flow from the same noise, without gradient, and mu is not clipped."""
        target = propose(self.policy, prefix, 1, steps=self.config.flow_steps, noise=noise)[:, 0]
        return (chunk - target)[..., : self.policy.spec.action_dim].square().mean()

    def values(self, prefix: Prefix, chunk: Float[Tensor, "B H A"]) -> Float[Tensor, "E B"]:
        """Return Q_e(s, clip(chunk)) by the online critics, with a gradient for the chunk alone, inside the clip."""
        return values_for_actor(self.critic, prefix.features, self.policy.spec.limit(chunk)[:, None])[..., 0]

    def next_chunk(self, prefix: Prefix, noise: Float[Tensor, "B N H A"]) -> Float[Tensor, "B H A"]:
        """Return clip(mu(s', z')) for the target."""
        return self.policy.spec.limit(self.one_step(prefix.features, noise[:, 0]))

    def draw_noise(self, batch: ChunkBatch, phase: Phase) -> OneStepNoise:
        """Return the random numbers of a phase, and what its transitions weigh."""
        shared = vars(super().draw_noise(batch, phase))
        if phase == "sft":
            return OneStepNoise(**shared)
        z = self.draw_chunks(batch, 1)
        scale = self._q_scale(batch, z[:, 0]) if self.config.normalize_q_loss else None
        return OneStepNoise(**shared, distill_noise=z, q_scale=scale)

    @torch.no_grad()
    def _q_scale(self, batch: ChunkBatch, z: Float[Tensor, "B H A"]) -> Float[Tensor, " B"]:
        """Return 1 / mean |mean_e Q_e| over the global batch, for each transition."""
        prefix = self.encode(batch)
        q = self.values(prefix, self.one_step(prefix.features, z)).mean(dim=0).abs()
        return (1 / of_global_batch(q).mean()).expand(len(q))

    def parameter_groups(self, actor_lr: float = 3e-4, critic_lr: float = 3e-4) -> list[ParameterGroup]:
        return [*super().parameter_groups(actor_lr, critic_lr), group("one_step", self.one_step, actor_lr)]

    def weaken(self, factor: float) -> str:
        """Divide alpha, the weight of the distillation, by a factor below 1."""
        self.alpha.div_(factor)
        return f"alpha {self.alpha.item():g}"

    @torch.no_grad()
    def act(self, prefix: Prefix, n: int = 1, generator: torch.Generator | None = None) -> Float[Tensor, "B H A"]:
        """Return clip(mu(s, z)), z ~ N(0, I), for each state."""
        assert n == 1, f"{type(self).__name__} does not rank candidates"
        return self.next_chunk(prefix, initial_noise(self.policy, prefix, 1, generator))

    def acts_with(self, n: int) -> tuple[str, ...]:
        return ("one_step",)


class Fql(QcFql):
    """FQL: QC-FQL with chunks of one step."""

    title = "FQL"
    horizon = 1

    @classmethod
    def fit(cls, config: TrainConfig) -> TrainConfig:
        """Return the configuration.

        Raises:
            ConfigError: its chunks are longer than one step.
        """
        if config.horizon != cls.horizon:
            raise ConfigError(
                f'algorithm "{config.algorithm}" acts one step at a time, and horizon is {config.horizon}: give '
                '--horizon 1, or take "qc_fql", the same over chunks'
            )
        return super().fit(config)
