"""The algorithm's options: the paper's defaults, and values that cannot work."""

import re
from copy import copy
from dataclasses import FrozenInstanceError
from typing import get_type_hints

import pytest

from poco_vla import DemonstrationConfig, EvalConfig, PocoConfig, PocoError, TrainConfig
from poco_vla.algorithms import available_algorithms, load_algorithm
from poco_vla.config import (
    GuardConfig,
    InteractionConfig,
    PrefixConfig,
    ReplayConfig,
    RewardConfig,
    from_json,
)
from poco_vla.errors import ConfigError, UnknownNameError
from poco_vla.hints import choices_of


def test_defaults_are_the_papers():
    """Table of hyper-parameters, online simulation on OGBench."""
    c = PocoConfig()
    assert (c.num_candidates, c.eta, c.beta, c.zeta, c.gamma, c.tau) == (32, 0.1, 1.0, 0.3, 0.99, 0.005)
    assert (c.critic_hidden, c.critic_members, c.critic_activation) == ((512,) * 4, 2, "silu")
    assert (c.anchor, c.aggregation, c.warmup_bc) == ("all", "mean", False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_candidates", 0),
        ("eta", 0.0),
        ("eta", -1.0),
        ("beta", -0.1),
        ("zeta", 0.0),
        ("zeta", -0.3),
        ("zeta_quantile", 0.0),
        ("zeta_quantile", 1.0),
        ("gamma", 0.0),
        ("gamma", 1.01),
        ("tau", 0.0),
        ("tau", 1.5),
        ("flow_steps", 0),
        ("critic_members", 0),
        ("std_weight", -0.5),
        ("critic_hidden", ()),
        ("critic_hidden", (64, 0)),
        ("eta", float("nan")),
        ("beta", float("nan")),
        ("zeta", float("nan")),
    ],
)
def test_values_that_cannot_work_are_named(field, value):
    with pytest.raises(ConfigError) as error:
        PocoConfig(**{field: value})
    assert isinstance(error.value, PocoError)
    assert field in str(error.value)
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("zeta", "auto"),
        ("zeta", float("inf")),
        ("beta", 0.0),
        ("gamma", 1.0),
        ("tau", 1.0),
        ("flow_steps", 1),
        ("eta", 1e-3),
    ],
)
def test_border_values_that_do_work(field, value):
    assert getattr(PocoConfig(**{field: value}), field) == value


def test_a_config_never_changes():
    with pytest.raises(FrozenInstanceError):
        PocoConfig().eta = 0.2


@pytest.mark.parametrize("seed", [-1, 2**31])
@pytest.mark.parametrize("kind", [TrainConfig, EvalConfig, DemonstrationConfig])
def test_a_seed_that_a_generator_does_not_take_is_refused(kind, seed):
    with pytest.raises(ConfigError, match=r"seed is .* a seed is a number from 0 to 2147483647"):
        kind(seed=seed)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("eta", "no", "a number"),
        ("eta", True, "a number"),
        ("num_candidates", 1.5, "a whole number"),
        ("num_candidates", None, "a whole number"),
        ("warmup_bc", "no", "true or false"),
        ("critic_hidden", "512", "a list, each item a whole number"),
        ("critic_hidden", [512, "512"], "a list, each item a whole number"),
        ("anchor", "alle", "one of all, demos, demos_and_successes"),
        ("zeta", "aut", "a number or one of auto"),
    ],
)
def test_a_value_of_another_type_is_refused_when_a_configuration_is_read(name, value, expected):
    """Also of `algorithm_options`, which a recipe gives: an unchecked text would choose nothing and say nothing."""
    with pytest.raises(ConfigError, match=re.escape(f"{name} of PocoConfig is {value!r}; expected {expected}")):
        from_json(PocoConfig, {name: value})


RECORDS = [RewardConfig, DemonstrationConfig, ReplayConfig, PrefixConfig, InteractionConfig, GuardConfig, TrainConfig]
RECORDS += [load_algorithm(name).config_class for name in available_algorithms()]
CHOSEN = [(record, name) for record in RECORDS for name, hint in get_type_hints(record).items() if choices_of(hint)]


@pytest.mark.parametrize(("record", "name"), CHOSEN, ids=[f"{record.__name__}.{name}" for record, name in CHOSEN])
def test_a_choice_that_there_is_not_is_refused_when_a_record_is_built(record, name):
    """In Python too: an unknown aggregation would be taken for another one and say nothing. Here a record's `__init__`
    checks types by itself (jaxtyping), so that what a user's calls is called alone."""
    built = copy(TrainConfig(online_steps=0) if record is TrainConfig else record())
    object.__setattr__(built, name, "nonsense")
    with pytest.raises(UnknownNameError, match=f'no {name} named "nonsense". Known: '):
        built.__post_init__()


def test_the_choices_of_every_algorithm_are_among_them():
    assert {(PocoConfig, "aggregation"), (TrainConfig, "precision")} < set(CHOSEN)
    assert len(CHOSEN) >= 30


@pytest.mark.parametrize(("name", "value"), [("flow_steps", None), ("zeta", "auto"), ("critic_hidden", (8, 8))])
def test_a_value_of_the_fields_type_is_read(name, value):
    assert getattr(from_json(PocoConfig, {name: value}), name) == value
