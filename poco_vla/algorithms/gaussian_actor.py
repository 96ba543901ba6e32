"""Share between MPO and V-MPO: a Gaussian over a state's features imitates in SFT and acts in the flow's place."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from poco_vla.algorithms.contract import Algorithm, Phase
from poco_vla.dual import Duals, gaussian_kl, trust_region_loss
from poco_vla.gaussian import Gaussian, GaussianNetwork
from poco_vla.policy import FlowPolicy, Prefix


class GaussianActor(Algorithm):
    """An algorithm whose `gaussian` acts; learned within trust regions of mean and spread, whose multipliers are in
    `duals`."""

    config: Any
    gaussian: GaussianNetwork
    duals: Duals

    def network(self, policy: FlowPolicy, hidden: Sequence[int], log_std: tuple[float, float]) -> GaussianNetwork:
        """Return the network of a Gaussian over chunks."""
        spec = policy.spec
        return GaussianNetwork(
            policy.feature_dim, spec.horizon, spec.action_dim, hidden=hidden, activation="gelu", log_std=log_std
        )

    # -- acting ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, prefix: Prefix, n: int = 1, generator: torch.Generator | None = None) -> Float[Tensor, "B H A"]:
        """Return a sample of the Gaussian for each state, clipped to the range of chunks."""
        return self.executed(self.sampled(self.gaussian(prefix.features), generator))

    @torch.no_grad()
    def act_untrained(self, prefix: Prefix, generator: torch.Generator | None = None) -> Float[Tensor, "B H A"]:
        """Return what `act` returns: SFT has trained the Gaussian."""
        return self.act(prefix, generator=generator)

    def acts_with(self, n: int) -> tuple[str, ...]:
        return ("gaussian",)

    def sampled(self, g: Gaussian, generator: torch.Generator | None) -> Float[Tensor, "B H R"]:
        """Return a sample of a Gaussian for each state."""
        place = generator.device if generator is not None else g.mean.device
        return g.sample(torch.randn(g.mean.shape, generator=generator, device=place).to(g.mean))

    def executed(self, x: Float[Tensor, "B H R"]) -> Float[Tensor, "B H A"]:
        """Return samples as they are executed."""
        spec = self.policy.spec
        return spec.pad(x if spec.clip is None else x.clamp(*spec.clip))

    # -- learning -------------------------------------------------------------------------------------------------

    def trust_region_terms(
        self, kl_mean: Float[Tensor, "B D"], kl_std: Float[Tensor, "B D"]
    ) -> dict[str, Float[Tensor, " B"]]:
        """Return the penalties and the losses of the multipliers for each state (MPO Eq. 11)."""
        terms, cfg = {}, self.config
        for name, kl, epsilon in (("mean", kl_mean, cfg.epsilon_mean), ("std", kl_std, cfg.epsilon_std)):
            penalty, dual = trust_region_loss(kl, self.duals(f"alpha_{name}"), epsilon=epsilon)
            terms |= {f"kl_{name}_loss": penalty, f"alpha_{name}_loss": dual}
        return terms

    def chunks_per_state(self, phase: Phase) -> int:
        return 0


def split_kl(old: Gaussian, new: Gaussian) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
    """Return KL(old || new) of each number of a chunk, with the old spread in both, and with the old mean in both."""
    mean, std = old.mean.flatten(1), old.std.flatten(1)
    return gaussian_kl(mean, std, new.mean.flatten(1), std), gaussian_kl(mean, std, mean, new.std.flatten(1))
