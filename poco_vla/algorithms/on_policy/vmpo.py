"""V-MPO (arXiv 1909.12238) over chunks: the best half of a rollout's samples, weighed by their advantages, is fitted by
a Gaussian over a state's features within learned trust regions. The loss is rlax's."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from poco_vla.algorithms.contract import Loss, ParameterGroup, Phase, group
from poco_vla.algorithms.gaussian_actor import GaussianActor, split_kl
from poco_vla.algorithms.on_policy.contract import OnPolicy, OnPolicyConfig
from poco_vla.config.checks import check_counts, check_positive, check_shares
from poco_vla.critic import polyak_update
from poco_vla.dual import Duals, top_samples_weights
from poco_vla.gae import n_step_returns
from poco_vla.gaussian import Gaussian
from poco_vla.noise import GlobalBatchRNG, UpdateNoise
from poco_vla.policy import FlowPolicy, Prefix
from poco_vla.types import ChunkBatch, RolloutBatch


@dataclass(frozen=True)
class VmpoConfig(OnPolicyConfig):
    """Options of V-MPO. Its authors' code has no agent: the defaults are those of public re-implementations, from the
    paper's ranges."""

    n_step: int = 3
    """Rewards in a return, in chunks."""
    top: float = 0.5
    """Share of the samples that is fitted (paper)."""
    epsilon: float = 0.02
    """Bound of the E-step, in nats (paper: 0.01 to 0.1)."""
    epsilon_mean: float = 0.01
    """Trust region of the mean: KL divergence per number of a chunk, in nats (paper: 0.005 to 0.01)."""
    epsilon_std: float = 1e-4
    """Trust region of the standard deviation, likewise (paper: 5e-6 to 5e-5)."""
    dual_lr: float = 1e-2
    """Learning rate of temperature and multipliers."""
    hidden: tuple[int, ...] = (256, 256, 256)
    """Hidden widths of the Gaussian's network."""
    log_std: tuple[float, float] = (-5.0, 2.0)
    """Range of the log standard deviation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "n_step")
        check_shares(self, "top")
        check_positive(self, "epsilon", "epsilon_mean", "epsilon_std", "dual_lr")


@dataclass(frozen=True)
class VmpoNoise(UpdateNoise):
    """Hold the E-step of an update, which is over its whole batch.

    Attributes:
        weights: of each sample; their mean over the batch is 1.
        dual_loss: loss of the temperature, the same for all rows, and `dual_slope`, its derivative.
    """

    weights: Float[Tensor, " B"] | None = None
    dual_loss: Float[Tensor, " B"] | None = None
    dual_slope: Float[Tensor, " B"] | None = None


class Vmpo(GaussianActor, OnPolicy):
    """V-MPO over chunks, a Gaussian that learns from its latest rollouts; without a flow policy.

    The Gaussian imitates in SFT; its target network acts, and is renewed for every rollout.
    """

    title = "V-MPO"
    config_class = VmpoConfig
    sft_trains_policy = False
    tiny_options = MappingProxyType(
        {"rollout_steps": 10, "minibatch": 8, "epochs": 2, "warmup_rollouts": 1, "value_hidden": [32], "hidden": [32]}
    )

    def __init__(self, policy: FlowPolicy, config: VmpoConfig | None = None, rng: GlobalBatchRNG | None = None) -> None:
        super().__init__(policy, config, rng)
        self.gaussian = self.network(policy, self.config.hidden, self.config.log_std)
        self.duals = Duals(
            policy.spec.horizon * policy.spec.action_dim,
            temperature=1.0,
            alpha_mean=1.0,
            alpha_std=1.0,
            penalty=None,
            direct=True,
        )
        self.target_gaussian = deepcopy(self.gaussian).requires_grad_(False)

    # -- acting ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def explore(
        self, prefix: Prefix, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "B H A"], Mapping[str, Tensor]]:
        """Return a sample of the target Gaussian for each state, and what it was before it is clipped."""
        x = self.sampled(self.target_gaussian(prefix.features), generator)
        return self.executed(x), {"sample": x}

    def explores_with(self) -> tuple[str, ...]:
        return ("target_gaussian",)

    # -- learning -------------------------------------------------------------------------------------------------

    def sft_loss(self, batch: ChunkBatch, noise: VmpoNoise | None = None) -> Loss:
        """Return -log pi of the demonstrations' chunks, summed over a chunk."""
        data = batch.actions[..., : self.policy.spec.action_dim]
        loss = -self.gaussian(self.encode(batch).features).log_prob(data).mean()
        return loss, {"bc_loss": loss.detach()}

    def prepare_online(self, demonstrations: Iterable[ChunkBatch], rng: GlobalBatchRNG) -> str | None:
        """Let the target Gaussian be what SFT has made."""
        self.begin_rollout()
        return None

    def begin_rollout(self) -> None:
        """Let the target Gaussian be the present one."""
        polyak_update(self.target_gaussian, self.gaussian, 1.0)

    def log_prob(self, prefix: Prefix, acted: Mapping[str, Tensor]) -> Float[Tensor, " B"]:
        """Return the log-probability of the samples by the present Gaussian."""
        return self.gaussian(prefix.features).log_prob(acted["sample"])

    def estimates(
        self, rewards: Float[Tensor, "S E"], values: Float[Tensor, "S1 E"], discounts: Float[Tensor, "S E"]
    ) -> tuple[Float[Tensor, "S E"], Float[Tensor, "S E"]]:
        """Return G - V and G of each chunk step, G its return over `n_step` rewards."""
        returns = n_step_returns(rewards, values, discounts, n=self.config.n_step)
        return returns - values[:-1], returns

    def draw_noise(self, batch: ChunkBatch, phase: Phase) -> VmpoNoise:
        """Return the E-step over the batch: nothing of it is random."""
        if phase != "online":
            return VmpoNoise()
        assert isinstance(batch, RolloutBatch)
        cfg, eta = self.config, self.duals("temperature")[0].detach().requires_grad_()
        with torch.enable_grad():
            counts = batch.acted.get("counts")
            weights, loss, _ = top_samples_weights(
                batch.advantages, eta, epsilon=cfg.epsilon, top=cfg.top, counts=counts
            )
            (slope,) = torch.autograd.grad(loss, eta)
        rows = len(batch)
        return VmpoNoise(rows * weights, loss.detach().expand(rows), slope.expand(rows))

    def online_loss(self, batch: ChunkBatch, noise: VmpoNoise | None = None) -> Loss:
        """Return the mean over samples of `terms`, and the value loss."""
        assert isinstance(batch, RolloutBatch)
        noise, prefix = noise or self.draw_noise(batch, "online"), self.encode(batch)
        terms = self.terms(prefix, batch, noise)
        value_loss, metrics = self.value_loss(prefix, batch)
        loss = torch.stack([term.mean() for term in terms.values()]).sum() + self.config.value_weight * value_loss
        metrics |= {name: term.detach().mean() for name, term in terms.items()}
        return loss, metrics | {"temperature": self.duals("temperature").detach()[0]}

    def terms(self, prefix: Prefix, batch: RolloutBatch, noise: VmpoNoise) -> dict[str, Float[Tensor, " B"]]:
        """Return the terms of each sample's loss: fit, temperature, trust regions, multipliers (Eq. 3 to 8)."""
        assert noise.weights is not None
        assert noise.dual_loss is not None
        assert noise.dual_slope is not None
        eta, new = self.duals("temperature")[0], self.gaussian(prefix.features)
        terms = {
            "policy_loss": -noise.weights * new.log_prob(batch.acted["sample"]),
            # Value and gradient of the loss over the whole batch, whatever part of it is computed here.
            "temperature_loss": noise.dual_loss + noise.dual_slope * (eta - eta.detach()),
        }
        return terms | self.trust_region_terms(*self.divergences(prefix, new))

    def divergences(self, prefix: Prefix, new: Gaussian) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        """Return KL(target || new) of each number of a chunk, with the target's spread or its mean in both.

        Args:
            prefix: of the states, for the target Gaussian.
            new: Gaussian of each state by the present weights.
        """
        with torch.no_grad():
            old = self.target_gaussian(prefix.features)
        return split_kl(old, new)

    def after_step(self, phase: Phase) -> None:
        self.duals.project()

    def parameter_groups(self, actor_lr: float = 3e-4, critic_lr: float = 3e-4) -> list[ParameterGroup]:
        groups = [group("gaussian", self.gaussian, actor_lr), group("duals", self.duals, self.config.dual_lr)]
        return [*super().parameter_groups(actor_lr, critic_lr), *groups]

    def trained_groups(self, phase: Phase) -> frozenset[str]:
        online = frozenset({"value", "gaussian", "duals"})
        return {"sft": frozenset({"gaussian"}), "warmup": frozenset({"value"})}.get(phase, online)
