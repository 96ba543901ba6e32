"""Algorithms: one file each, with its losses and how it acts. :mod:`contract` says what every one offers.

To add one, write a file here with a record of its options and a subclass of :class:`Algorithm` (`imitation` is the
shortest), name it in :data:`registry.BUILT_IN`, and give it a row in recipes/guides/other_algorithms.md; one that
learns from its latest rollouts goes into `on_policy`. Outside of this repository an entry point of the group
``poco_vla.algorithms`` does the same. `poco_vla.check_algorithm` tells whether it keeps the contract.

Shared parts: `critics` (options of critics), `soft_actor_critic` (RLPD, EXPO), `gaussian_actor` (MPO, V-MPO) and
`on_policy.flow_ppo` (ReinFlow, DPPO); `scaling` fits options to a recipe's sizes. Equations are in `poco_vla` itself.
"""

from typing import TYPE_CHECKING

from poco_vla.lazy import load_on_demand

if TYPE_CHECKING:
    from poco_vla.algorithms.contract import STAGES, Algorithm, ParameterGroup, Phase, Stage
    from poco_vla.algorithms.registry import available_algorithms, load_algorithm, options_of
    from poco_vla.algorithms.scaling import with_algorithm

__getattr__, __dir__ = load_on_demand(
    __name__,
    {
        "contract": ["STAGES", "Algorithm", "ParameterGroup", "Phase", "Stage"],
        "registry": ["available_algorithms", "load_algorithm", "options_of"],
        "scaling": ["with_algorithm"],
    },
)

__all__ = [
    "STAGES",
    "Algorithm",
    "ParameterGroup",
    "Phase",
    "Stage",
    "available_algorithms",
    "load_algorithm",
    "options_of",
    "with_algorithm",
]
