"""POCO, Algorithm 1: the losses of its three stages, over one module that holds actor and critic."""

from copy import deepcopy
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poco_vla.config import PocoConfig
from poco_vla.critic import ChunkCritic, aggregate, polyak_update, td_target
from poco_vla.distill import clipped_distillation, flow_errors, masked_mean
from poco_vla.errors import ConfigError
from poco_vla.flow import Draws
from poco_vla.policy import FlowPolicy, Prefix, propose
from poco_vla.posterior import effective_sample_size, posterior_weights
from poco_vla.types import ChunkBatch, Metrics

type Stage = Literal["sft", "warmup", "online"]
STAGES: tuple[Stage, ...] = ("sft", "warmup", "online")


class Poco(nn.Module):
    """Actor and critic in one module, so that one `prepare` and one backward serve every Accelerate backend.

    `forward(batch, stage)` gives the loss of a stage; after the optimizer step call `update_target`. Both actor and
    critic terms are in one loss: no gradient of Q reaches the policy and none of the posterior reaches the critic, so
    their gradients are those of two separate losses.

    Args:
        policy: the actor, its backbone already frozen.
        config: the algorithm's options.
        draws: source of all random numbers; torch's default generator when None.
    """

    zeta: Tensor
    beta: Tensor

    def __init__(self, policy: FlowPolicy, config: PocoConfig, draws: Draws | None = None) -> None:
        super().__init__()
        # In eval mode throughout: no dropout, so that candidates are plain samples and draws the only randomness.
        self.policy = policy.eval()
        self.config = config
        self.draws = draws or Draws(torch.default_generator)
        spec = policy.spec
        self.critic = ChunkCritic(
            policy.feature_dim,
            spec.horizon,
            spec.action_dim,
            hidden=config.critic_hidden,
            members=config.critic_members,
            activation=config.critic_activation,
            layer_norm_eps=config.critic_layer_norm_eps,
        )
        self.target_critic = deepcopy(self.critic).requires_grad_(False)
        zeta = float("nan") if config.zeta == "auto" else config.zeta
        # Buffers, because both may change while a run goes on: by calibration, and after a collapse.
        self.register_buffer("zeta", torch.tensor(zeta, dtype=torch.float32))
        self.register_buffer("beta", torch.tensor(config.beta, dtype=torch.float32))

    def forward(self, batch: ChunkBatch, stage: Stage) -> tuple[Tensor, Metrics]:
        """Loss of one batch in a stage, and its named scalars."""
        losses = {"sft": self.imitate, "warmup": self.warm_up, "online": self.update}
        return losses[stage](batch)

    def imitate(self, batch: ChunkBatch) -> tuple[Tensor, Metrics]:
        """Stage 1, supervised fine-tuning: L_BC on the demonstrations (Eq. 24)."""
        prefix = self._prefix(batch)
        loss = self._flow_errors(prefix, batch, batch.actions[:, None])[:, 0].mean()
        return loss, {"bc_loss": loss.detach()}

    def warm_up(self, batch: ChunkBatch) -> tuple[Tensor, Metrics]:
        """Stage 2a: the critic learns the frozen policy's values (SARSA style); with `warmup_bc` the actor goes on
        imitating, as the authors' code does."""
        prefix = self._prefix(batch)
        loss, metrics = self.critic_loss(prefix, batch)
        if self.config.warmup_bc:
            bc_loss, bc_metrics = self._anchor(self._flow_errors(prefix, batch, batch.actions[:, None])[:, 0], batch)
            loss, metrics = loss + bc_loss, metrics | bc_metrics
        return loss, metrics

    def update(self, batch: ChunkBatch) -> tuple[Tensor, Metrics]:
        """Stage 2b, one update of Algorithm 1: critic, E-step, M-step."""
        cfg = self.config
        prefix = self._prefix(batch)

        # Critic (Eq. 14)
        critic_loss, metrics = self.critic_loss(prefix, batch)

        # E-step (Eq. 17): candidates are plain samples of the current policy, weighed by the target critic
        x = self._propose(prefix, cfg.num_candidates)
        with torch.no_grad():
            q = aggregate(self.target_critic(prefix.features, x), cfg.aggregation)
        w = posterior_weights(q, eta=cfg.eta)

        # M-step (Eq. 23): clipped distillation of the candidates, beside the anchor on data
        errors = self._flow_errors(prefix, batch, torch.cat([batch.actions[:, None], x], dim=1))
        bc_loss, bc_metrics = self._anchor(errors[:, 0], batch)
        posterior_loss, posterior_metrics = clipped_distillation(errors[:, 1:], w, zeta=self._zeta())

        loss = critic_loss + bc_loss + self.beta * posterior_loss
        metrics |= bc_metrics | posterior_metrics
        metrics |= {
            "candidate_q": q.mean(),
            "candidate_q_std": q.std(dim=-1).mean() if q.shape[-1] > 1 else torch.zeros_like(q.mean()),
            "effective_sample_size": effective_sample_size(w).mean(),
            "max_weight": w.amax(dim=-1).mean(),
        }
        return loss, metrics

    def critic_loss(self, prefix: Prefix, batch: ChunkBatch) -> tuple[Tensor, Metrics]:
        """Mean over critics and batch of (Q_e - y)^2, y from one plain sample at the bootstrap state (Eq. 14)."""
        cfg = self.config
        next_prefix = batch.next_prefix if batch.next_prefix is not None else self.policy.encode(batch.next_obs)
        next_chunk = self._propose(next_prefix, 1)
        with torch.no_grad():
            next_q = aggregate(self.target_critic(next_prefix.features, next_chunk), cfg.aggregation)[:, 0]
        y = td_target(batch.returns, batch.discount, next_q)
        q = self.critic(prefix.features, batch.actions[:, None])[..., 0]
        squared = (q - y).square().mean(dim=0)
        # Deviation 2: chunks that met an episode end stay, with their exact n-step return (the code drops them).
        kept = batch.valid[:, -1] if cfg.drop_crossing else torch.ones_like(batch.is_demo)
        loss = masked_mean(squared, kept) if cfg.error_mean == "valid" else (squared * kept).mean()
        metrics = {"critic_loss": loss.detach(), "q": q.detach().mean(), "target": y.mean()}
        return loss, metrics

    @torch.no_grad()
    def update_target(self) -> None:
        """Target critic <- EMA of the critic, tau per update.

        # Deviation 1: mixes the critic from after the optimizer step; the authors' code the one from before it.
        """
        polyak_update(self.target_critic, self.critic, self.config.tau)

    @torch.no_grad()
    def data_errors(self, batch: ChunkBatch, draws: Draws) -> Float[Tensor, " B"]:
        """Flow error of each data chunk, with random numbers of one's own."""
        return self._flow_errors(self._prefix(batch), batch, batch.actions[:, None], draws)[:, 0]

    @torch.no_grad()
    def calibrate_zeta(self, errors: Float[Tensor, " M"]) -> float:
        """`zeta="auto"`: the clip becomes the `zeta_quantile` of the demonstrations' flow errors after SFT."""
        self.zeta.fill_(torch.quantile(errors.float(), self.config.zeta_quantile))
        return self.zeta.item()

    def _prefix(self, batch: ChunkBatch) -> Prefix:
        return batch.prefix if batch.prefix is not None else self.policy.encode(batch.obs)

    def _zeta(self) -> Tensor:
        if self.config.zeta == "auto" and torch.isnan(self.zeta):
            raise ConfigError('zeta = "auto" was not calibrated: call calibrate_zeta() on demonstration errors first')
        return self.zeta

    def _anchor(self, errors: Float[Tensor, " B"], batch: ChunkBatch) -> tuple[Tensor, Metrics]:
        """The BC term of Eq. 23 on the chunks that `anchor` selects (paper: all of D)."""
        anchored = {
            "all": torch.ones_like(batch.is_demo),
            "demos": batch.is_demo,
            "demos_and_successes": batch.is_demo | batch.is_success,
        }[self.config.anchor]
        loss = masked_mean(errors, anchored)
        return loss, {"bc_loss": loss.detach()}

    def _propose(self, prefix: Prefix, n: int) -> Float[Tensor, "B N H A"]:
        spec = self.policy.spec
        shape = (prefix.features.shape[0], n, spec.horizon, spec.width)
        like = torch.empty(
            0, dtype=torch.promote_types(prefix.features.dtype, torch.float32), device=prefix.features.device
        )
        steps = self.config.flow_steps
        return propose(self.policy, prefix, n, steps=steps, noise=self.draws.normal(shape, like=like))

    def _flow_errors(
        self, prefix: Prefix, batch: ChunkBatch, chunk: Float[Tensor, "B N H A"], draws: Draws | None = None
    ) -> Float[Tensor, "B N"]:
        draws = draws or self.draws
        noise = draws.normal(chunk.shape, like=chunk)
        t = draws.time(self.policy.sample_time, chunk.shape[:2], like=chunk)
        return flow_errors(self.policy, prefix, chunk, batch.valid, noise=noise, t=t, mean_over=self.config.error_mean)
