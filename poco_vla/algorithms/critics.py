"""Options that algorithms with a critic share, and the chunk critic that they describe."""

from dataclasses import dataclass
from typing import Literal

from poco_vla.config import PocoConfig
from poco_vla.config.checks import check_choices, check_counts, check_shares, check_widths
from poco_vla.critic import Activation, ChunkCritic
from poco_vla.policy import FlowPolicy


@dataclass(frozen=True)
class TdOptions:
    """Options of critics that learn by temporal differences ("authors": of the algorithm's own code)."""

    gamma: float = 0.99
    """Discount per control step (authors)."""
    tau: float = 0.005
    """Share of the critics mixed into their targets at every update (authors)."""
    target_mixes: Literal["after", "before"] = "after"
    """Critic parameters that are mixed into the target: those from after the optimizer step (RLPD's authors), or before
    it (those of QC and POCO)."""
    drop_crossing: bool = False
    """Leave chunks whose episode ended before their last step out of the critic loss (authors of QC and POCO). False
    keeps them with their exact n-step return."""
    error_mean: Literal["valid", "all"] = "valid"
    """Denominator of masked means: entries that count, or all of them (authors of QC and POCO)."""
    critic_members: int = 2
    """E, critics in the ensemble (authors)."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_shares(self, "gamma", "tau")
        check_counts(self, "critic_members")


@dataclass(frozen=True)
class CriticOptions(TdOptions):
    """Add the options of the critic's network."""

    critic_hidden: tuple[int, ...] = (512, 512, 512, 512)
    """Hidden widths of each critic (authors)."""
    critic_activation: Activation = "gelu"
    """Critic activation (authors: tanh-approximated gelu)."""
    critic_layer_norm_eps: float = 1e-6
    """Epsilon of the critics' LayerNorms (authors)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_widths(self, "critic_hidden")


def chunk_critic(policy: FlowPolicy, options: CriticOptions | PocoConfig) -> ChunkCritic:
    """Return the critic of a policy's features and chunks that options describe."""
    return ChunkCritic(
        policy.feature_dim,
        policy.spec.horizon,
        policy.spec.action_dim,
        hidden=options.critic_hidden,
        members=options.critic_members,
        activation=options.critic_activation,
        layer_norm_eps=options.critic_layer_norm_eps,
    )
