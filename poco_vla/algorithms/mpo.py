"""MPO (arXiv 1812.02256) over chunks: a Gaussian over a state's features, fitted to samples that the critic weighs.

What POCO does without a likelihood, this does with one. The losses are those of acme, of rlax, or of the POCO authors.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from poco_vla.algorithms.contract import Loss, ParameterGroup, Phase, group
from poco_vla.algorithms.critics import CriticOptions, chunk_critic
from poco_vla.algorithms.gaussian_actor import GaussianActor, split_kl
from poco_vla.config.checks import check_counts, check_positive, check_widths
from poco_vla.critic import TargetNetwork, aggregate, polyak_update, td_loss, td_target
from poco_vla.dual import Duals, temperature_loss
from poco_vla.gaussian import SQUASH_LIMIT, Gaussian, SquashedGaussian
from poco_vla.noise import GlobalBatchRNG, UpdateNoise, crossing_weights
from poco_vla.policy import FlowPolicy, Prefix
from poco_vla.types import ChunkBatch


@dataclass(frozen=True)
class MpoConfig(CriticOptions):
    """Options of MPO ("authors": the POCO authors' acmpo)."""

    form: Literal["acme", "rlax", "fixed"] = "acme"
    """Losses: "acme" fits mean and spread apart, within learned trust regions; "rlax" fits both together, likewise;
    "fixed" has a tanh-Gaussian, a fixed temperature and no trust region (authors)."""
    num_candidates: int = 20
    """N, samples per state in the E-step (acme: 20, authors: 32)."""
    temperature: float = 10.0
    """Temperature of the E-step, in units of discounted reward: at first (acme), or for good where `form` is "fixed"
    (authors: 0.001)."""
    alpha_mean: float = 10.0
    """Multiplier of the trust regions of the mean at first (acme)."""
    alpha_std: float = 1000.0
    """Multiplier of the trust regions of the standard deviation at first (acme)."""
    epsilon: float = 0.1
    """Bound of the E-step: KL divergence of the weights from equal ones, in nats (acme)."""
    epsilon_mean: float = 0.0025
    """Trust region of the mean: KL divergence per number of a chunk, in nats (acme)."""
    epsilon_std: float = 1e-6
    """Trust region of the standard deviation, likewise (acme)."""
    per_dimension: bool = True
    """A trust region for each number of a chunk (acme, rlax); False has one for their sum."""
    penalty: float | None = 0.001
    """Bound of a second E-step, which weighs samples by how far they lie outside [-1, 1], in nats; "acme" only (acme:
    0.001). None leaves it out."""
    dual_lr: float = 1e-2
    """Learning rate of temperatures and multipliers (acme)."""
    beta: float = 1.0
    """Weight of the fit to the samples where `form` is "fixed" (authors)."""
    bc_weight: float = 0.0
    """Weight of imitation of the data's chunks beside it (acme: none, authors: 1)."""
    bc_form: Literal["nll", "mse"] = "nll"
    """Imitation by log-likelihood, or by squared error of mean and standard deviation (authors' option)."""
    bc_std: float = 0.1
    """Standard deviation that "mse" holds on to, before the tanh (authors)."""
    target_period: int = 100
    """Updates between two steps of the target networks (acme: 100, authors: 1)."""
    tau: float = 1.0
    """Share of the networks that such a step mixes into their targets (acme: 1, authors: 0.005)."""
    hidden: tuple[int, ...] = (256, 256, 256)
    """Hidden widths of the Gaussian's network (acme; authors: 4 x 512)."""
    log_std: tuple[float, float] = (-5.0, 2.0)
    """Range of the log standard deviation (authors)."""
    critic_hidden: tuple[int, ...] = (512, 512, 256)
    """Hidden widths of each critic (acme; authors: 4 x 512)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            self, "temperature", "alpha_mean", "alpha_std", "epsilon", "epsilon_mean", "epsilon_std", "dual_lr"
        )
        check_counts(self, "num_candidates", "target_period")
        check_widths(self, "hidden")


@dataclass(frozen=True)
class MpoNoise(UpdateNoise):
    """Hold the random numbers of an update, and how much each of its transitions counts in the critic loss."""

    critic_weights: Float[Tensor, " B"] | None = None
    next_noise: Float[Tensor, "B M H A"] | None = None
    candidate_noise: Float[Tensor, "B N H A"] | None = None


class Mpo(GaussianActor):
    """MPO over chunks: a Gaussian fitted to its own samples, which are weighed by a critic; without a flow policy.

    The Gaussian imitates in SFT, and acts from then on.
    """

    # Deviation 13: over chunks, whose samples act in evaluations too; acme acts by the mean there.
    title = "MPO"
    config_class = MpoConfig
    sft_trains_policy = False
    own_options = frozenset({"tau"})  # of a step at every `target_period`-th update
    tiny_options = MappingProxyType({"hidden": [32, 32], "critic_hidden": [32, 32], "num_candidates": 4})
    config: MpoConfig
    updates: Tensor

    def __init__(self, policy: FlowPolicy, config: MpoConfig | None = None, rng: GlobalBatchRNG | None = None) -> None:
        super().__init__(policy, config, rng)
        cfg = self.config
        self.gaussian = self.network(policy, cfg.hidden, cfg.log_std)
        self.critic = chunk_critic(policy, cfg)
        self.duals = Duals(
            policy.spec.horizon * policy.spec.action_dim if cfg.per_dimension else 1,
            temperature=cfg.temperature,
            alpha_mean=cfg.alpha_mean,
            alpha_std=cfg.alpha_std,
            penalty=cfg.temperature if cfg.form == "acme" and cfg.penalty is not None else None,
            direct=cfg.form == "rlax",
        ).requires_grad_(cfg.form != "fixed")
        self.target_critic = TargetNetwork(self.critic, cfg.tau, cfg.target_mixes)
        self.target_gaussian = deepcopy(self.gaussian).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    # -- losses ---------------------------------------------------------------------------------------------------

    def sft_loss(self, batch: ChunkBatch, noise: MpoNoise | None = None) -> Loss:
        """Return the imitation loss of the Gaussian on the demonstrations."""
        loss = self.imitation_loss(self.encode(batch), batch)
        return loss, {"bc_loss": loss.detach()}

    def warmup_loss(self, batch: ChunkBatch, noise: MpoNoise | None = None) -> Loss:
        """Return the critic loss alone."""
        return self.critic_loss(self.encode(batch), batch, noise or self.draw_noise(batch, "warmup"))

    def online_loss(self, batch: ChunkBatch, noise: MpoNoise | None = None) -> Loss:
        """Return the sum of critic loss, M-step, imitation and duals."""
        noise = noise or self.draw_noise(batch, "online")
        assert noise.candidate_noise is not None, "the noise is of another phase"
        prefix = self.encode(batch)
        critic_loss, metrics = self.critic_loss(prefix, batch, noise)
        x, q = self.candidates(prefix, noise.candidate_noise)
        if self.config.form == "fixed":
            terms = {"q_loss": self.config.beta * self.fixed_loss(prefix, x, q)}
        else:
            terms = self.dual_terms(prefix, x, q)
        if self.config.bc_weight:
            terms["bc_loss"] = self.config.bc_weight * self.imitation_loss(prefix, batch)
        actor_loss = torch.stack([term.mean() for term in terms.values()]).sum()
        metrics |= {name: term.detach().mean() for name, term in terms.items()}
        metrics |= {"candidate_q": q.mean(), "temperature": self.duals("temperature").detach()[0]}
        return critic_loss + actor_loss, metrics | {"actor_loss": actor_loss.detach()}

    def critic_loss(self, prefix: Prefix, batch: ChunkBatch, noise: MpoNoise) -> Loss:
        """Return the mean over critics and batch of (Q_e(s, a) - y)^2, y = returns + discount * V(s')."""
        assert noise.critic_weights is not None
        assert noise.next_noise is not None
        y = td_target(batch.returns, batch.discount, self.next_value(self.encode_next(batch), noise.next_noise))
        return td_loss(self.critic, prefix.features, batch.actions, y, noise.critic_weights)

    @torch.no_grad()
    def next_value(self, prefix: Prefix, noise: Float[Tensor, "B M H A"]) -> Float[Tensor, " B"]:
        """Return V(s'), the mean of the target critics over M samples."""
        return self.candidates(prefix, noise, limit=1.0)[1].mean(dim=1)

    @torch.no_grad()
    def candidates(
        self, prefix: Prefix, noise: Float[Tensor, "B N H A"], limit: float = SQUASH_LIMIT
    ) -> tuple[Float[Tensor, "B N H A"], Float[Tensor, "B N"]]:
        """Return samples for the E-step and their values by the target critics. They are of the target Gaussian or,
        where `form` is "fixed", of the present one: squashed, and clipped to +-`limit`."""
        fixed = self.config.form == "fixed"
        g = (self.gaussian if fixed else self.target_gaussian)(prefix.features)
        x = Gaussian(g.mean[:, None], g.std[:, None]).sample(noise)
        x = x.tanh().clamp(-limit, limit) if fixed else x
        return x, aggregate(self.target_critic(prefix.features, x), "mean")

    def fixed_loss(self, prefix: Prefix, x: Float[Tensor, "B N H A"], q: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
        """Return -sum_j w_j log pi(a_j | s) of each state, w = softmax(Q / eta) at the fixed temperature."""
        g = self.gaussian(prefix.features)
        squashed = SquashedGaussian(Gaussian(g.mean[:, None], g.std[:, None]))
        return -(self.weights(q) * squashed.log_prob(x)).sum(dim=1)

    def weights(self, q: Float[Tensor, "B N"], name: str = "temperature") -> Float[Tensor, "B N"]:
        """Return the E-step's weights w_j = softmax_j(Q_j / eta) by the present temperature; no gradient reaches it."""
        eta = self.config.temperature if self.config.form == "fixed" else self.duals(name).detach()[0]
        return torch.softmax(q / eta, dim=-1)

    def dual_terms(
        self, prefix: Prefix, x: Float[Tensor, "B N H A"], q: Float[Tensor, "B N"]
    ) -> dict[str, Float[Tensor, " B"]]:
        """Return the terms of each state's loss: fit, trust regions, and their duals (MPO Eq. 8 to 12)."""
        with torch.no_grad():
            old = self.target_gaussian(prefix.features)
        return self.gaussian_terms(self.gaussian(prefix.features), old, x, q)

    def gaussian_terms(
        self, new: Gaussian, old: Gaussian, x: Float[Tensor, "B N H A"], q: Float[Tensor, "B N"]
    ) -> dict[str, Float[Tensor, " B"]]:
        """Return `dual_terms` of a Gaussian that is learned, and the one that was sampled."""
        cfg, eta = self.config, self.duals("temperature")[0]
        terms = {"temperature_loss": temperature_loss(q, eta, epsilon=cfg.epsilon)}
        w = self.weights(q)
        if "penalty" in self.duals.raw:  # acme: weights of a second temperature are added
            assert cfg.penalty is not None
            cost = self.penalty_cost(x)
            terms["penalty_loss"] = temperature_loss(cost, self.duals("penalty")[0], epsilon=cfg.penalty)
            w = w + self.weights(cost, "penalty")

        def fit(mean: Tensor, std: Tensor) -> Float[Tensor, " B"]:
            return -(w * Gaussian(mean[:, None], std[:, None]).log_prob(x)).sum(dim=1)

        if cfg.form == "acme":  # decoupled: each is fitted with the other one's old value
            terms |= {"mean_loss": fit(new.mean, old.std), "std_loss": fit(old.mean, new.std)}
        else:
            terms["policy_loss"] = fit(new.mean, new.std)
        return terms | self.trust_region_terms(*self.divergences(new, old))

    def penalty_cost(self, x: Float[Tensor, "B N H A"]) -> Float[Tensor, "B N"]:
        """Return minus the distance of each sample from the range [-1, 1]."""
        return -(x - x.clamp(-1, 1)).flatten(2).norm(dim=-1)

    def divergences(self, new: Gaussian, old: Gaussian) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        """Return KL(old || new) of each number of a chunk, with the old spread or the old mean in both; summed over the
        chunk unless `per_dimension`."""
        kls = split_kl(old, new)
        return kls if self.config.per_dimension else (kls[0].sum(-1, keepdim=True), kls[1].sum(-1, keepdim=True))

    def imitation_loss(self, prefix: Prefix, batch: ChunkBatch) -> Float[Tensor, ""]:
        """Return -log pi of the data's chunks, summed over a chunk, or the squared error of mean and deviation."""
        g, data = self.gaussian(prefix.features), batch.actions[..., : self.policy.spec.action_dim]
        fixed = self.config.form == "fixed"
        if self.config.bc_form == "mse":
            mean = g.mean.tanh() if fixed else g.mean
            return (mean - data).square().mean() + (g.std - self.config.bc_std).square().mean()
        return -(SquashedGaussian(g) if fixed else g).log_prob(data).mean()

    @torch.no_grad()
    def after_step(self, phase: Phase) -> None:
        """Move the target networks, every `target_period` updates, and keep the duals above 0."""
        if phase == "sft":
            return
        self.duals.project()
        self.updates += 1
        if self.updates % self.config.target_period == 0:
            self.target_critic.follow(self.critic)
            polyak_update(self.target_gaussian, self.gaussian, self.config.tau)

    def prepare_online(self, demonstrations: Iterable[ChunkBatch], rng: GlobalBatchRNG) -> str | None:
        """Let the target Gaussian be what SFT has made."""
        polyak_update(self.target_gaussian, self.gaussian, 1.0)
        return None

    # -- acting ---------------------------------------------------------------------------------------------------

    def executed(self, x: Float[Tensor, "B H R"]) -> Float[Tensor, "B H A"]:
        return super().executed(x.tanh() if self.config.form == "fixed" else x)

    # -- an update ------------------------------------------------------------------------------------------------

    def draw_noise(self, batch: ChunkBatch, phase: Phase) -> MpoNoise:
        """Return the random numbers of a phase, and what its transitions weigh."""
        cfg = self.config
        if phase == "sft":
            return MpoNoise()
        weights = crossing_weights(batch, drop=cfg.drop_crossing, mean_over=cfg.error_mean)
        next_noise = self.draw_actions(batch, 1 if cfg.form == "fixed" else cfg.num_candidates)
        drawn = self.draw_actions(batch, cfg.num_candidates) if phase == "online" else None
        return MpoNoise(weights, next_noise, drawn)

    def parameter_groups(self, actor_lr: float = 3e-4, critic_lr: float = 3e-4) -> list[ParameterGroup]:
        groups = [group("gaussian", self.gaussian, actor_lr), group("critic", self.critic, critic_lr)]
        groups += [group("duals", self.duals, self.config.dual_lr)] if self.config.form != "fixed" else []
        return [*super().parameter_groups(actor_lr), *groups]

    def trained_groups(self, phase: Phase) -> frozenset[str]:
        online = {group["name"] for group in self.parameter_groups()} - {"actor"}
        return frozenset({"sft": {"gaussian"}, "warmup": {"critic"}}.get(phase, online))
