"""POCO, Algorithm 1: the losses of its three stages, over one module that holds actor and critic."""

from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from poco_vla.config import PocoConfig
from poco_vla.critic import ChunkCritic, aggregate, polyak_update, td_target
from poco_vla.distill import clipped_distillation, flow_errors, row_weights
from poco_vla.errors import ConfigError
from poco_vla.flow import Draws
from poco_vla.policy import FlowPolicy, Prefix, propose
from poco_vla.posterior import effective_sample_size, posterior_weights
from poco_vla.types import ChunkBatch, Metrics

type Stage = Literal["sft", "warmup", "online"]
STAGES: tuple[Stage, ...] = ("sft", "warmup", "online")


@dataclass(frozen=True)
class Plan:
    """What is settled about an update before it is computed: its random numbers, and how much each transition counts.

    Settled for the whole batch, over all processes, so that the losses of its parts add up to that of the whole, and
    that nothing random and no communication is left in the computation itself.

    Attributes:
        anchored: weight of each transition in the BC loss (`PocoConfig.anchor`); their mean over the batch is 1.
        kept: likewise in the critic loss (`PocoConfig.drop_crossing`).
        noise: a_0 of each flow error: of the data chunk, then of the N candidates.
        time: t of each flow error, likewise.
        next_noise: a_0 of the sample at the bootstrap state.
        candidate_noise: a_0 of the N candidates.
    """

    anchored: Float[Tensor, " B"]
    kept: Float[Tensor, " B"]
    noise: Float[Tensor, "B M H A"] | None = None
    time: Float[Tensor, "B M"] | None = None
    next_noise: Float[Tensor, "B 1 H A"] | None = None
    candidate_noise: Float[Tensor, "B N H A"] | None = None

    def rows(self, rows: slice) -> "Plan":
        """That of some of the transitions."""
        return replace(self, **{name: value[rows] for name, value in vars(self).items() if value is not None})


class Poco(nn.Module):
    """Actor and critic in one module, so that one `prepare` and one backward serve every Accelerate backend.

    `forward(batch, stage)` gives the loss of a stage; after the optimizer step call `update_target`. Both actor and
    critic terms are in one loss: no gradient of Q reaches the policy and none of the posterior reaches the critic, so
    their gradients are those of two separate losses. An update may be computed in parts that fit a memory or a cache:
    `parts` cuts a batch and its plan; the gradients of ``share * loss`` add up to those of the whole.

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
        self._uncalibrated = config.zeta == "auto"

    def forward(self, batch: ChunkBatch, stage: Stage, plan: Plan | None = None) -> tuple[Tensor, Metrics]:
        """Loss of one batch in a stage, and its named scalars. `plan` is drawn here when None."""
        losses = {"sft": self.imitate, "warmup": self.warm_up, "online": self.update}
        return losses[stage](batch, plan)

    def plan(self, batch: ChunkBatch, stage: Stage) -> Plan:
        """The random numbers of an update of a stage, and what its transitions weigh. On several processes all of them
        call this together."""
        cfg, size, every = self.config, len(batch), torch.ones_like(batch.is_demo)
        # Deviation 2: chunks that met an episode end stay, with their exact n-step return (the code drops them).
        kept = batch.valid[:, -1] if cfg.drop_crossing else every
        anchored = {"all": every, "demos": batch.is_demo, "demos_and_successes": batch.is_demo | batch.is_success}
        like = batch.actions
        counts = {
            "anchored": row_weights(every if stage == "sft" else anchored[cfg.anchor], like),
            "kept": row_weights(kept, like) if cfg.error_mean == "valid" else kept.to(like.dtype),
        }
        drawn = {}
        if stage != "sft":
            drawn["next_noise"] = self._normal(size, 1, like)
        if stage == "online":
            drawn["candidate_noise"] = self._normal(size, cfg.num_candidates, like)
        if stage != "warmup" or cfg.warmup_bc:
            chunks = 1 + (cfg.num_candidates if stage == "online" else 0)
            drawn["noise"] = self._normal(size, chunks, like)
            drawn["time"] = self.draws.time(self.policy.sample_time, (size, chunks), like=like)
        return Plan(**counts, **drawn)

    def imitate(self, batch: ChunkBatch, plan: Plan | None = None) -> tuple[Tensor, Metrics]:
        """Stage 1, supervised fine-tuning: L_BC on the demonstrations (Eq. 24)."""
        plan = plan or self.plan(batch, "sft")
        return self._anchor(self._flow_errors(self._prefix(batch), batch, batch.actions[:, None], plan)[:, 0], plan)

    def warm_up(self, batch: ChunkBatch, plan: Plan | None = None) -> tuple[Tensor, Metrics]:
        """Stage 2a: the critic learns the frozen policy's values (SARSA style); with `warmup_bc` the actor goes on
        imitating, as the authors' code does."""
        plan = plan or self.plan(batch, "warmup")
        prefix = self._prefix(batch)
        loss, metrics = self.critic_loss(prefix, batch, plan)
        if self.config.warmup_bc:
            errors = self._flow_errors(prefix, batch, batch.actions[:, None], plan)
            bc_loss, bc_metrics = self._anchor(errors[:, 0], plan)
            loss, metrics = loss + bc_loss, metrics | bc_metrics
        return loss, metrics

    def update(self, batch: ChunkBatch, plan: Plan | None = None) -> tuple[Tensor, Metrics]:
        """Stage 2b, one update of Algorithm 1: critic, E-step, M-step."""
        cfg, plan = self.config, plan or self.plan(batch, "online")
        prefix = self._prefix(batch)

        # Critic (Eq. 14)
        critic_loss, metrics = self.critic_loss(prefix, batch, plan)

        # E-step (Eq. 17): candidates are plain samples of the current policy, weighed by the target critic
        with sampling_precision(cfg.sampling_dtype, batch.actions.device):
            x = self._propose(prefix, plan.candidate_noise)
        with torch.no_grad():
            q = aggregate(self.target_critic(prefix.features, x), cfg.aggregation)
        w = posterior_weights(q, eta=cfg.eta)

        # M-step (Eq. 23): clipped distillation of the candidates, beside the anchor on data
        errors = self._flow_errors(prefix, batch, torch.cat([batch.actions[:, None], x], dim=1), plan)
        bc_loss, bc_metrics = self._anchor(errors[:, 0], plan)
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

    def critic_loss(self, prefix: Prefix, batch: ChunkBatch, plan: Plan | None = None) -> tuple[Tensor, Metrics]:
        """Mean over critics and batch of (Q_e - y)^2, y from one plain sample at the bootstrap state (Eq. 14)."""
        cfg, plan = self.config, plan or self.plan(batch, "warmup")
        next_prefix = batch.next_prefix if batch.next_prefix is not None else self.policy.encode(batch.next_obs)
        next_chunk = self._propose(next_prefix, plan.next_noise)
        with torch.no_grad():
            next_q = aggregate(self.target_critic(next_prefix.features, next_chunk), cfg.aggregation)[:, 0]
        y = td_target(batch.returns, batch.discount, next_q)
        q = self.critic(prefix.features, batch.actions[:, None])[..., 0]
        loss = ((q - y).square().mean(dim=0) * plan.kept).mean()
        return loss, {"critic_loss": loss.detach(), "q": q.detach().mean(), "target": y.mean()}

    @torch.no_grad()
    def update_target(self) -> None:
        """Target critic <- EMA of the critic, tau per update.

        # Deviation 1: mixes the critic from after the optimizer step; the authors' code the one from before it.
        """
        polyak_update(self.target_critic, self.critic, self.config.tau)

    @torch.no_grad()
    def data_errors(self, batch: ChunkBatch, draws: Draws) -> Float[Tensor, " B"]:
        """Flow error of each data chunk, with random numbers of one's own."""
        chunk = batch.actions[:, None]
        noise = draws.normal(chunk.shape, like=chunk)
        t = draws.time(self.policy.sample_time, chunk.shape[:2], like=chunk)
        return self._errors(self._prefix(batch), batch, chunk, noise, t)[:, 0]

    @torch.no_grad()
    def calibrate_zeta(self, errors: Float[Tensor, " M"]) -> float:
        """`zeta="auto"`: the clip becomes the `zeta_quantile` of the demonstrations' flow errors after SFT."""
        self.zeta.fill_(torch.quantile(errors.float(), self.config.zeta_quantile))
        return self.zeta.item()

    def _prefix(self, batch: ChunkBatch) -> Prefix:
        return batch.prefix if batch.prefix is not None else self.policy.encode(batch.obs)

    def _zeta(self) -> Tensor:
        # Looked at once: on a GPU a look waits for it.
        if self._uncalibrated and torch.isnan(self.zeta):
            raise ConfigError('zeta = "auto" was not calibrated: call calibrate_zeta() on demonstration errors first')
        self._uncalibrated = False
        return self.zeta

    def _anchor(self, errors: Float[Tensor, " B"], plan: Plan) -> tuple[Tensor, Metrics]:
        """The BC term of Eq. 23 on the chunks that `anchor` selects (paper: all of D)."""
        loss = (errors * plan.anchored).mean()
        return loss, {"bc_loss": loss.detach()}

    def _normal(self, size: int, n: int, like: Tensor) -> Float[Tensor, "B N H A"]:
        spec = self.policy.spec
        return self.draws.normal((size, n, spec.horizon, spec.width), like=like)

    def _propose(self, prefix: Prefix, noise: Tensor | None) -> Float[Tensor, "B N H A"]:
        assert noise is not None, "the plan is of another stage"
        return propose(self.policy, prefix, noise.shape[1], steps=self.config.flow_steps, noise=noise)

    def _flow_errors(
        self, prefix: Prefix, batch: ChunkBatch, chunk: Float[Tensor, "B M H A"], plan: Plan
    ) -> Float[Tensor, "B M"]:
        assert plan.noise is not None, "the plan is of another stage"
        assert plan.time is not None
        return self._errors(prefix, batch, chunk, plan.noise, plan.time)

    def _errors(
        self, prefix: Prefix, batch: ChunkBatch, chunk: Tensor, noise: Tensor, t: Tensor
    ) -> Float[Tensor, "B M"]:
        return flow_errors(self.policy, prefix, chunk, batch.valid, noise=noise, t=t, mean_over=self.config.error_mean)


def parts(batch: ChunkBatch, plan: Plan, size: int) -> Iterator[tuple[ChunkBatch, Plan, float]]:
    """A batch and its plan in parts of about `size` transitions, none larger, each with its share of the batch."""
    count = -(-len(batch) // size)
    bounds = [len(batch) * i // count for i in range(count + 1)]
    for begin, end in pairwise(bounds):
        rows = slice(begin, end)
        yield (batch, plan, 1.0) if count == 1 else (batch.rows(rows), plan.rows(rows), (end - begin) / len(batch))


def sampling_precision(name: str, device: torch.device) -> Any:
    """A context in which a policy's own matrix products are of this precision. Adapters that choose theirs by
    themselves (a VLA's `compute`) stay with it."""
    return torch.autocast(device.type, torch.bfloat16) if name == "bfloat16" else nullcontext()
