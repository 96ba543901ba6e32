"""Algorithms: one file each, with its losses and how it acts. :mod:`contract` says what every one offers."""

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
