"""Options of POCO. They load no torch, so that `--help` does not."""

from dataclasses import dataclass
from typing import Literal

from poco_vla.config.checks import require


@dataclass(frozen=True)
class PocoConfig:
    """The algorithm (sections and equations of the paper)."""

    num_candidates: int = 32
    """N, candidate chunks per state in the E-step (paper: 32 for an MLP, 16 for a VLA)."""
    eta: float = 0.1
    """E-step temperature, in units of discounted reward (paper: 0.1 OGBench, 0.001 RoboMimic and robots)."""
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
    aggregation: Literal["mean", "min"] = "mean"
    """How the critics' values become one, in the target and in the E-step (authors' code: mean)."""
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
        require(self.num_candidates >= 1, f"num_candidates (N) is {self.num_candidates}; it must be at least 1")
        require(self.eta > 0, f"eta is {self.eta}; the E-step temperature must be above 0 (0.001 is nearly greedy)")
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
