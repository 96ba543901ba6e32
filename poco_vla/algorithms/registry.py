"""Algorithms by name: entry points of group ``poco_vla.algorithms``, and those of the library itself."""

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from poco_vla.algorithms.contract import Algorithm
from poco_vla.config import ALGORITHM_SECTIONS, TrainConfig, from_json
from poco_vla.errors import ConfigError, UnknownNameError

GROUP = "poco_vla.algorithms"
BUILT_IN = {
    "bc": "poco_vla.algorithms.imitation:Imitation",
    "dppo": "poco_vla.algorithms.on_policy.dppo:Dppo",
    "dsrl": "poco_vla.algorithms.noise_steering:Dsrl",
    "expo": "poco_vla.algorithms.edit:Expo",
    "fql": "poco_vla.algorithms.one_step:Fql",
    "mpo": "poco_vla.algorithms.mpo:Mpo",
    "poco": "poco_vla.algorithms.poco:Poco",
    "qc": "poco_vla.algorithms.best_of_n:BestOfN",
    "qc_fql": "poco_vla.algorithms.one_step:QcFql",
    "reinflow": "poco_vla.algorithms.on_policy.reinflow:ReinFlow",
    "rlpd": "poco_vla.algorithms.rlpd:Rlpd",
    "rlpd_ac": "poco_vla.algorithms.rlpd:RlpdAc",
    "vmpo": "poco_vla.algorithms.on_policy.vmpo:Vmpo",
}
"""Name -> class of the library's own, which need no entry point."""


def available_algorithms() -> dict[str, str]:
    """Return the algorithms that are installed: name -> where the class lives ("module:Class")."""
    return dict(sorted(({point.name: point.value for point in entry_points(group=GROUP)} | BUILT_IN).items()))


def load_algorithm(name: str) -> type[Algorithm]:
    """Return the algorithm class of a name.

    Raises:
        UnknownNameError: nothing installed offers it; the message lists what is.
        ConfigError: what is registered under the name is no Algorithm.
    """
    known = available_algorithms()
    if name not in known:
        raise UnknownNameError("algorithm", name, known)
    module, _, attribute = known[name].partition(":")
    loaded = getattr(import_module(module), attribute)
    if not (isinstance(loaded, type) and issubclass(loaded, Algorithm)):
        raise ConfigError(f'algorithm "{name}" is {known[name]}, which is not a subclass of poco_vla.Algorithm')
    return loaded


def options_of(config: TrainConfig) -> Any:
    """Return the options of the algorithm that a run is of: the section of its name in `config`, or else
    `algorithm_options`, checked.

    Raises:
        UnknownNameError: it has no option of a name.
        ConfigError: an option's value cannot work, or `algorithm_options` is given beside that section.
    """
    if config.algorithm not in ALGORITHM_SECTIONS:
        return from_json(load_algorithm(config.algorithm).config_class, config.algorithm_options)
    if config.algorithm_options:
        raise ConfigError(
            f'the options of algorithm "{config.algorithm}" are in {config.algorithm}, not algorithm_options'
        )
    return getattr(config, config.algorithm)
