"""POCO, Algorithm 1 of arXiv 2604.01860: chunk critic, posterior over candidates, clipped distillation."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poco_vla.algorithms.contract import Algorithm, Loss, ParameterGroup, Phase, group
from poco_vla.algorithms.critics import chunk_critic
from poco_vla.config import PocoConfig
from poco_vla.critic import aggregate, best_of, polyak_update, td_loss, td_target
from poco_vla.distill import anchor_rows, clipped_distillation, flow_errors
from poco_vla.dual import dual_of, parameter_of, temperature_loss
from poco_vla.errors import ConfigError
from poco_vla.noise import GlobalBatchRNG, UpdateNoise, crossing_weights, row_weights
from poco_vla.policy import FlowPolicy, Prefix, propose, sampling_precision
from poco_vla.posterior import effective_sample_size, posterior_weights
from poco_vla.types import ChunkBatch, Metrics


@dataclass(frozen=True)
class PocoNoise(UpdateNoise):
    """Hold the random numbers of an update, and how much each of its transitions counts.

    Attributes:
        bc_weights: of each transition in the BC loss (`PocoConfig.anchor`); their mean over the batch is 1.
        critic_weights: likewise in the critic loss (`PocoConfig.drop_crossing`).
        flow_noise: a_0 of each flow error: of the data chunk, then of the N candidates.
        flow_time: t of each flow error, likewise.
        next_noise: a_0 of the sample at the bootstrap state.
        candidate_noise: a_0 of the N candidates.
    """

    bc_weights: Float[Tensor, " B"]
    critic_weights: Float[Tensor, " B"]
    flow_noise: Float[Tensor, "B M H A"] | None = None
    flow_time: Float[Tensor, "B M"] | None = None
    next_noise: Float[Tensor, "B 1 H A"] | None = None
    candidate_noise: Float[Tensor, "B N H A"] | None = None


class Poco(Algorithm):
    """POCO: candidates weighed by a chunk critic, distilled into the flow by a clipped loss beside the data's.

    Actor and critic are in one loss: no gradient of Q reaches the policy and none of the posterior reaches the critic,
    so that their gradients are those of two separate losses.
    """

    title = "POCO"
    config_class = PocoConfig
    ranks_candidates = True
    config: PocoConfig
    zeta: Tensor
    beta: Tensor

    def __init__(self, policy: FlowPolicy, config: PocoConfig, rng: GlobalBatchRNG | None = None) -> None:
        super().__init__(policy, config, rng)
        self.critic = chunk_critic(policy, config)
        self.target_critic = deepcopy(self.critic).requires_grad_(False)
        zeta = float("nan") if config.zeta == "auto" else config.zeta
        # Buffers, because both may change while a run goes on: by calibration, and after a collapse.
        self.register_buffer("zeta", torch.tensor(zeta, dtype=torch.float32))
        self.register_buffer("beta", torch.tensor(config.beta, dtype=torch.float32))
        self._uncalibrated = config.zeta == "auto"
        if config.eta_bound is not None:
            self.eta_parameter = nn.Parameter(torch.tensor([parameter_of(config.eta)]))  # [1]: FSDP2 cuts no scalars

    # -- the losses of Algorithm 1 --------------------------------------------------------------------------------

    def sft_loss(self, batch: ChunkBatch, noise: PocoNoise | None = None) -> Loss:
        """Return the BC loss on the demonstrations (stage 1, Eq. 24)."""
        noise = noise or self.draw_noise(batch, "sft")
        errors = self._flow_errors(self.encode(batch), batch, batch.actions[:, None], noise)
        return self._bc_loss(errors[:, 0], noise)

    def warmup_loss(self, batch: ChunkBatch, noise: PocoNoise | None = None) -> Loss:
        """Return the critic loss alone: it learns the frozen policy's values (stage 2a). With `warmup_bc` the actor
        goes on imitating, as in the authors' code."""
        noise = noise or self.draw_noise(batch, "warmup")
        prefix = self.encode(batch)
        loss, metrics = self.critic_loss(prefix, batch, noise)
        if self.config.warmup_bc:
            errors = self._flow_errors(prefix, batch, batch.actions[:, None], noise)
            bc_loss, bc_metrics = self._bc_loss(errors[:, 0], noise)
            loss, metrics = loss + bc_loss, metrics | bc_metrics
        return loss, metrics

    def online_loss(self, batch: ChunkBatch, noise: PocoNoise | None = None) -> Loss:
        """Return the loss of one update of Algorithm 1 (stage 2b): critic, E-step, M-step."""
        cfg, noise = self.config, noise or self.draw_noise(batch, "online")
        prefix = self.encode(batch)

        # E-step (Eq. 17): candidates are plain samples of the current policy, weighed by the target critic. They come
        # first: a GPU works on them while the host is busy with the many small kernels of the bootstrap sample.
        with sampling_precision(cfg.sampling_dtype, batch.actions.device):
            x = self._propose(prefix, noise.candidate_noise)

        # Critic (Eq. 14)
        critic_loss, metrics = self.critic_loss(prefix, batch, noise)
        with torch.no_grad():
            q = self._aggregate(self.target_critic(prefix.features, x))
        w, eta_loss, eta_metrics = self._posterior(q)

        # M-step (Eq. 23): clipped distillation of the candidates, beside the anchor on data
        errors = self._flow_errors(prefix, batch, torch.cat([batch.actions[:, None], x], dim=1), noise)
        bc_loss, bc_metrics = self._bc_loss(errors[:, 0], noise)
        posterior_loss, posterior_metrics = clipped_distillation(errors[:, 1:], w, zeta=self._calibrated_zeta())

        loss = critic_loss + bc_loss + self.beta * posterior_loss + eta_loss
        metrics |= bc_metrics | posterior_metrics | eta_metrics
        metrics |= {
            "candidate_q": q.mean(),
            "candidate_q_std": q.std(dim=-1).mean() if q.shape[-1] > 1 else torch.zeros_like(q.mean()),
            "effective_sample_size": effective_sample_size(w).mean(),
            "max_weight": w.amax(dim=-1).mean(),
        }
        return loss, metrics

    def critic_loss(self, prefix: Prefix, batch: ChunkBatch, noise: PocoNoise | None = None) -> Loss:
        """Return the mean over critics and batch of (Q_e - y)^2, y from one plain sample at the bootstrap state
        (Eq. 14)."""
        noise = noise or self.draw_noise(batch, "warmup")
        next_prefix = self.encode_next(batch)
        next_chunk = self._propose(next_prefix, noise.next_noise)
        with torch.no_grad():
            next_q = self._aggregate(self.target_critic(next_prefix.features, next_chunk))[:, 0]
        y = td_target(batch.returns, batch.discount, next_q)
        return td_loss(self.critic, prefix.features, batch.actions, y, noise.critic_weights)

    @torch.no_grad()
    def after_step(self, phase: Phase) -> None:
        """Mix the critic into its target, tau per update.

        # Deviation 1: mixes the critic from after the optimizer step; the authors' code the one from before it.
        """
        if phase != "sft":
            polyak_update(self.target_critic, self.critic, self.config.tau)

    @torch.no_grad()
    def act(self, prefix: Prefix, n: int = 1, generator: torch.Generator | None = None) -> Float[Tensor, "B H A"]:
        """Return a plain sample for each state (the paper), or the target critic's favourite of `n`."""
        x = propose(self.policy, prefix, n, generator=generator)
        if n == 1:
            return x[:, 0]
        return best_of(x, self._aggregate(self.target_critic(prefix.features, x)))

    # -- what an update draws, and its terms ----------------------------------------------------------------------

    def draw_noise(self, batch: ChunkBatch, phase: Phase) -> PocoNoise:
        """Return the random numbers of a phase, and what its transitions weigh."""
        cfg, every, like = self.config, torch.ones_like(batch.is_demo), batch.actions
        bc_weights = row_weights(every if phase == "sft" else anchor_rows(batch, cfg.anchor), like)
        critic_weights = crossing_weights(batch, drop=cfg.drop_crossing, mean_over=cfg.error_mean)
        drawn = {}
        if phase != "sft":
            drawn["next_noise"] = self.draw_chunks(batch, 1)
        if phase == "online":
            drawn["candidate_noise"] = self.draw_chunks(batch, cfg.num_candidates)
        if chunks := self.chunks_per_state(phase):
            drawn["flow_noise"] = self.draw_chunks(batch, chunks)
            drawn["flow_time"] = self.draw_times(batch, chunks)
        return PocoNoise(bc_weights, critic_weights, **drawn)

    def chunks_per_state(self, phase: Phase) -> int:
        return {"sft": 1, "warmup": int(self.config.warmup_bc), "online": 1 + self.config.num_candidates}[phase]

    def _bc_loss(self, errors: Float[Tensor, " B"], noise: PocoNoise) -> Loss:
        """Return the BC term of Eq. 23 on the chunks that `anchor` selects (paper: all of D)."""
        loss = (errors * noise.bc_weights).mean()
        return loss, {"bc_loss": loss.detach()}

    def _aggregate(self, q: Float[Tensor, "E B N"]) -> Float[Tensor, "B N"]:
        return aggregate(q, self.config.aggregation, self.config.std_weight)

    def _posterior(self, q: Float[Tensor, "B N"]) -> tuple[Float[Tensor, "B N"], Float[Tensor, ""] | float, Metrics]:
        """Return the candidates' weights, and the loss of the temperature where it is learned (`eta_bound`)."""
        bound = self.config.eta_bound
        if bound is None:
            return posterior_weights(q, eta=self.config.eta), 0.0, {}
        eta = dual_of(self.eta_parameter)[0]
        loss = temperature_loss(q, eta, epsilon=bound).mean()
        return posterior_weights(q, eta=eta), loss, {"eta": eta.detach(), "eta_loss": loss.detach()}

    def _propose(self, prefix: Prefix, noise: Tensor | None) -> Float[Tensor, "B N H A"]:
        assert noise is not None, "the noise is of another phase"
        return propose(self.policy, prefix, noise.shape[1], steps=self.config.flow_steps, noise=noise)

    def _flow_errors(
        self, prefix: Prefix, batch: ChunkBatch, chunk: Float[Tensor, "B M H A"], noise: PocoNoise
    ) -> Float[Tensor, "B M"]:
        assert noise.flow_noise is not None, "the noise is of another phase"
        return flow_errors(
            self.policy,
            prefix,
            chunk,
            batch.valid,
            noise=noise.flow_noise,
            t=noise.flow_time,
            mean_over=self.config.error_mean,
        )

    # -- zeta and beta --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare_online(self, demonstrations: Iterable[ChunkBatch], rng: GlobalBatchRNG) -> str | None:
        """Calibrate ``zeta="auto"`` on the flow errors of demonstrations."""
        if self.config.zeta != "auto":
            return None
        zeta = self.calibrate_zeta(torch.cat([self._data_errors(batch, rng) for batch in demonstrations]))
        return f"zeta = auto: {zeta:.4f}, the {self.config.zeta_quantile:.0%} quantile of the demonstrations"

    @torch.no_grad()
    def calibrate_zeta(self, errors: Float[Tensor, " M"]) -> float:
        """Set zeta to the `zeta_quantile` of the demonstrations' flow errors after SFT, and return it."""
        self.zeta.fill_(torch.quantile(errors.float(), self.config.zeta_quantile))
        return self.zeta.item()

    def weaken(self, factor: float) -> str:
        """Multiply beta, the weight of the posterior loss."""
        self.beta.mul_(factor)
        return f"beta {self.beta.item():g}"

    def figures(self) -> dict[str, float]:
        return {"zeta": self.zeta.item()}

    def _calibrated_zeta(self) -> Tensor:
        # Looked at once: on a GPU a look waits for it.
        if self._uncalibrated and torch.isnan(self.zeta):
            raise ConfigError('zeta = "auto" was not calibrated: call calibrate_zeta() on demonstration errors first')
        self._uncalibrated = False
        return self.zeta

    def _data_errors(self, batch: ChunkBatch, rng: GlobalBatchRNG) -> Float[Tensor, " B"]:
        chunk = batch.actions[:, None]
        noise, t = rng.normal(chunk.shape, like=chunk), rng.time(self.policy.sample_time, chunk.shape[:2], like=chunk)
        mean_over = self.config.error_mean
        return flow_errors(self.policy, self.encode(batch), chunk, batch.valid, noise=noise, t=t, mean_over=mean_over)[
            :, 0
        ]

    # -- what trains and what acts --------------------------------------------------------------------------------

    def parameter_groups(self, actor_lr: float = 3e-4, critic_lr: float = 3e-4) -> list[ParameterGroup]:
        groups = [*super().parameter_groups(actor_lr), group("critic", self.critic, critic_lr)]
        if self.config.eta_bound is not None:
            groups.append({"name": "temperature", "params": [self.eta_parameter], "lr": critic_lr})
        return groups

    def trained_groups(self, phase: Phase) -> frozenset[str]:
        trained = {
            "actor": phase != "warmup" or self.config.warmup_bc,
            "critic": phase != "sft",
            "temperature": phase == "online" and self.config.eta_bound is not None,
        }
        return frozenset(name for name, does in trained.items() if does)

    def acts_with(self, n: int) -> tuple[str, ...]:
        return ("target_critic",) if n > 1 else ()
