"""Another algorithm in POCO's place in a recipe: its options at sizes that compare with POCO's there.

A recipe departs from the paper's values of POCO where a machine or a budget asks for it. One rule carries that over to
every algorithm, field by field; a recipe that keeps the paper's value of a field leaves the authors' own:

    critic_hidden           width and depth of every network that the algorithm adds
    num_candidates          N is divided as POCO's is
    gamma, tau, anchor      the recipe's value
    aggregation             "min" where the recipe has it and a target reads a pair of critics
    optim.batch_size        chunks in a minibatch of those that learn from rollouts
    optim.actor_lr          learning rates that authors give for those are multiplied as POCO's are

Everything else stays its authors'; so do the fields that an algorithm names in `own_options`.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from types import MappingProxyType
from typing import Any

from poco_vla.algorithms.contract import Algorithm
from poco_vla.algorithms.registry import load_algorithm
from poco_vla.config import ALGORITHM_SECTIONS, OptimConfig, PocoConfig, TrainConfig

SHARED = ("gamma", "tau", "anchor")
"""Options that mean the same in POCO and in others."""


def with_algorithm(config: TrainConfig, name: str, authors: Mapping[str, Any] = MappingProxyType({})) -> TrainConfig:
    """Return a recipe's configuration with another algorithm in POCO's place, its options by the rule of this module.

    Args:
        config: the recipe's, with POCO's options in it.
        name: of the algorithm.
        authors: values that its authors have for the recipe's task, in the place of the algorithm's defaults.

    Raises:
        UnknownNameError: nothing installed offers it.
    """
    config = replace(config, algorithm=name, algorithm_options={})
    if name in ALGORITHM_SECTIONS:
        return config
    kind = load_algorithm(name)
    options = scaled_options(kind, config.poco, config.optim, authors)
    return replace(config, algorithm_options=options, optim=scaled_rates(kind, config.optim))


def scaled_options(
    kind: type[Algorithm], poco: PocoConfig, optim: OptimConfig, authors: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Return the options of an algorithm that are not its defaults in a recipe.

    Args:
        kind: the algorithm.
        poco: what the recipe gives POCO.
        optim: what the recipe gives every algorithm.
        authors: values that its authors have for the recipe's task.
    """
    usual, own = PocoConfig(), _defaults(kind) | dict(authors)
    shrunk, out = poco.critic_hidden != usual.critic_hidden, dict(authors)
    pair = (own.get("target_members") or own.get("critic_members")) == usual.critic_members
    shared = [*SHARED, "aggregation"] if pair and poco.aggregation == "min" else SHARED
    for option in own.keys() - kind.own_options:
        if option.split("_")[-1] == "hidden" and shrunk:
            out[option] = list(poco.critic_hidden)
        elif option in shared and getattr(poco, option) != getattr(usual, option):
            out[option] = getattr(poco, option)
    if "num_candidates" in own and poco.num_candidates != usual.num_candidates:
        out["num_candidates"] = max(1, round(own["num_candidates"] * poco.num_candidates / usual.num_candidates))
    if "minibatch" in own and optim.batch_size != OptimConfig().batch_size:
        out["minibatch"] = optim.batch_size
    return dict(sorted(out.items()))


def scaled_rates(kind: type[Algorithm], optim: OptimConfig) -> OptimConfig:
    """Return a recipe's optimisation with the learning rates of an algorithm's authors, where these have their own,
    multiplied as the recipe multiplies POCO's. SFT keeps the recipe's."""
    if kind.learning_rates is None:
        return optim
    usual, (actor_lr, critic_lr) = OptimConfig(), kind.learning_rates
    end, sft_lr = optim.actor_lr_end, optim.actor_lr if optim.sft_lr is None else optim.sft_lr
    return replace(
        optim,
        actor_lr=_rounded(actor_lr * optim.actor_lr / usual.actor_lr),
        critic_lr=_rounded(critic_lr * optim.critic_lr / usual.critic_lr),
        actor_lr_end=None if end is None else _rounded(end * actor_lr / usual.actor_lr),
        sft_lr=sft_lr,
    )


def _rounded(rate: float) -> float:
    """Return a learning rate with three digits, as people write it."""
    return float(f"{rate:.3g}")


def _defaults(kind: type[Algorithm]) -> dict[str, Any]:
    """Return the options of an algorithm and their defaults."""
    return {one.name: one.default for one in fields(kind.config_class) if one.default is not MISSING}
