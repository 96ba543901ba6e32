"""Options of POCO. They load no torch, so that `--help` does not."""

import math
from dataclasses import dataclass
from typing import Literal

from poco_vla.config.checks import check_choices, require


@dataclass(frozen=True)
class PocoConfig:
    """The algorithm (sections and equations of the paper)."""

    num_candidates: int = 32
    """N, candidate chunks per state in the E-step (paper: 32 for an MLP, 16 for a VLA)."""
    eta: float = 0.1
    """E-step temperature, in units of discounted reward (paper: 0.1 OGBench, 0.001 RoboMimic and robots)."""
    eta_bound: float | None = None
    """Learn eta, by MPO's dual (MPO Eq. 8) from `eta` on, with the critic's learning rate: the bound, in nats, of the
    divergence of the candidates' weights from equal ones (acme: 0.1). None keeps eta."""
    beta: float = 1.0
    """Weight of the posterior loss beside the anchor (paper: 1)."""
    zeta: float | Literal["auto"] = 0.3
    """Clip of a candidate's flow error, in units of the BC loss (paper: 0.01 to 0.3 by task). "auto" takes
    `zeta_quantile` of the demonstrations' errors after SFT."""
    zeta_quantile: float = 0.9
    """Quantile for zeta = "auto", in (0, 1)."""
    gamma: float = 0.99
    """Discount per control step (paper)."""
    tau: float = 0.005
    """Share of the critic mixed into its target at every update (paper)."""
    aggregation: Literal["mean", "min", "mean_minus_std"] = "mean"
    """How the critics' values become one, in the target and in the E-step (authors' code: mean). "mean_minus_std" is
    for ensembles, such as critic_members 10."""
    std_weight: float = 1.0
    """c, standard deviations of the critics' values that "mean_minus_std" takes off their mean."""
    anchor: Literal["all", "demos", "demos_and_successes"] = "all"
    """What the BC term of Eq. 23 imitates: all of D (paper), the demonstrations, or those and own successes."""
    flow_steps: int | None = None
    """K, Euler steps when sampling candidates; None is the model's own number (paper: 10)."""
    sampling_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the E-step's candidates are sampled. bfloat16 rounds what is proposed, not what is learned of
    it; where a CPU or GPU has it, an MLP's update takes about half the time. A VLA samples in its own."""
    warmup_bc: bool = False
    """Go on imitating during critic warm-up (default of the authors' code; paper: the actor is frozen)."""
    drop_crossing: bool = False
    """Leave chunks whose episode ended before their last step out of the critic loss (authors' code). False keeps
    them with their exact n-step return."""
    error_mean: Literal["valid", "all"] = "valid"
    """Denominator of masked means: entries that count, or all of them (authors' code)."""
    critic_hidden: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden widths of each critic (paper)."""
    critic_members: int = 2
    """E, critics in the ensemble (paper)."""
    critic_activation: Literal["silu", "gelu", "relu"] = "silu"
    """Critic activation (paper: silu; authors' code: tanh-approximated gelu)."""
    critic_layer_norm_eps: float = 1e-5
    """LayerNorm epsilon (authors' code: 1e-6)."""

    def __post_init__(self) -> None:
        check_choices(self)
        require(self.num_candidates >= 1, f"num_candidates (N) is {self.num_candidates}; it must be at least 1")
        require(self.eta > 0, f"eta is {self.eta}; the E-step temperature must be above 0 (0.001 is nearly greedy)")
        bound, most = self.eta_bound, math.log(self.num_candidates)
        require(
            bound is None or 0 < bound < most,
            f"eta_bound is {bound}; it must lie between 0 and log num_candidates ({most:.3g}), the divergence of all "
            "weight on one candidate",
        )
        require(self.std_weight >= 0, f"std_weight is {self.std_weight}; it must not be negative")
        require(self.beta >= 0, f"beta is {self.beta}; it must not be negative (0 is pure imitation)")
        require(
            self.zeta == "auto" or (isinstance(self.zeta, int | float) and self.zeta > 0),
            f'zeta is {self.zeta!r}; it must be above 0, or "auto" (to switch the posterior term off, set beta to 0)',
        )
        require(0 < self.zeta_quantile < 1, f"zeta_quantile is {self.zeta_quantile}; it must lie in (0, 1)")
        require(0 < self.gamma <= 1, f"gamma is {self.gamma}; it must lie in (0, 1]")
        require(0 < self.tau <= 1, f"tau is {self.tau}; it must lie in (0, 1]")
        require(self.flow_steps is None or self.flow_steps >= 1, f"flow_steps is {self.flow_steps}; at least 1")
        require(self.critic_members >= 1, f"critic_members is {self.critic_members}; at least 1")
        require(
            len(self.critic_hidden) > 0 and min(self.critic_hidden) > 0,
            f"critic_hidden is {self.critic_hidden}; it needs at least one positive width",
        )
