"""Algorithms: one file each, with its losses and how it acts. :mod:`contract` says what every one offers.

To add one, write a file here with a record of its options and a subclass of :class:`Algorithm`, name it in
:data:`registry.BUILT_IN`, and give it a row in recipes/guides/other_algorithms.md; one that learns from its latest
rollouts goes into `on_policy`. Begin from `imitation` if it has no critic, else from `best_of_n`, which shows what a
critic adds: `parameter_groups`, `trained_groups`, `draw_noise`, `after_step`, `act`. Options named `num_candidates`
and ``*_hidden`` are scaled to a small recipe by their names (`scaling`). `poco_vla.check_algorithm` tells whether it
keeps the contract, and tests/conformance asks that of every name; give it tests of its own in tests/algorithms, of its
resume in tests/training/test_train_algorithms.py, and golden numbers in tests/golden where official code exists.
Outside of this repository an entry point of the group ``poco_vla.algorithms`` does the same.

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
