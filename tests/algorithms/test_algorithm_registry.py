"""Algorithms by name: the library's own without an installation, others by entry points, and their options."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest

from poco_vla import Algorithm, Poco, PocoConfig, TrainConfig, available_algorithms, load_algorithm
from poco_vla.algorithms import options_of, registry
from poco_vla.algorithms.imitation import Imitation, ImitationConfig
from poco_vla.errors import ConfigError, UnknownNameError


@dataclass(frozen=True)
class OtherConfig:
    strength: float = 1.0


class Other(Algorithm):
    config_class = OtherConfig


@pytest.fixture
def installed(monkeypatch):
    """A distribution with one algorithm, and with something else under that group."""
    points = [EntryPoint(name, f"{__name__}:{value}", registry.GROUP) for name, value in (("other", "Other"),)]
    points.append(EntryPoint("nothing", f"{__name__}:OtherConfig", registry.GROUP))
    monkeypatch.setattr(registry, "entry_points", lambda group: points)


def test_the_librarys_own_are_there_without_entry_points(monkeypatch):
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    assert list(available_algorithms()) == sorted(registry.BUILT_IN)
    assert (load_algorithm("poco"), load_algorithm("bc")) == (Poco, Imitation)


def test_an_installed_algorithm_is_found_by_its_name(installed):
    assert list(available_algorithms()) == sorted([*registry.BUILT_IN, "nothing", "other"])
    assert load_algorithm("other") is Other


def test_a_mistyped_name_lists_what_there_is():
    with pytest.raises(UnknownNameError, match=r'no algorithm named "pocco".*bc, .*poco, .*Did you mean "poco"'):
        load_algorithm("pocco")


def test_what_is_no_algorithm_is_refused(installed):
    with pytest.raises(ConfigError, match=r'"nothing" is .*OtherConfig, which is not a subclass of poco_vla.Algorithm'):
        load_algorithm("nothing")


def test_options_are_the_runs_own_section_or_the_open_ones(installed):
    poco = PocoConfig(eta=0.5)
    assert options_of(TrainConfig(poco=poco, online_steps=0)) is poco
    imitation = TrainConfig(algorithm="bc", algorithm_options={"anchor": "demos"}, online_steps=0)
    assert options_of(imitation) == ImitationConfig(anchor="demos")
    other = TrainConfig(algorithm="other", algorithm_options={"strength": 2.0}, online_steps=0)
    assert options_of(other) == OtherConfig(2.0)


def test_a_mistyped_option_and_an_option_in_the_wrong_place_are_refused():
    with pytest.raises(UnknownNameError, match=r'ImitationConfig named "ancor".*Did you mean "anchor"'):
        options_of(TrainConfig(algorithm="bc", algorithm_options={"ancor": "all"}, online_steps=0))
    with pytest.raises(ConfigError, match='options of algorithm "poco" are in poco, not algorithm_options'):
        options_of(TrainConfig(algorithm_options={"eta": 1.0}, online_steps=0))
