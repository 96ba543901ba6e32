"""Adapters by name, from real distributions written to a temporary folder."""

import pytest

from poco_vla import FlowPolicy, PocoError, PolicyError, available_adapters, load_adapter
from poco_vla.errors import UnknownAdapterError

MODULE = """
from poco_vla import FlowPolicy
class Arm(FlowPolicy): pass
class Stone: pass
imported = True
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A distribution with two entry points, one of which is no policy, and one whose module cannot be imported."""
    (tmp_path / "toy_arm.py").write_text(MODULE)
    info = tmp_path / "toy_arm-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-arm\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[poco_vla.adapters]\ntoy_arm = toy_arm:Arm\ntoy_stone = toy_arm:Stone\ntoy_broken = no_such_module:Arm\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
def test_installed_adapters_are_listed_without_being_imported():
    """The broken one is listed, too: listing imports nothing."""
    known = available_adapters()
    assert known["toy_arm"] == "toy_arm:Arm"
    assert known["toy_broken"] == "no_such_module:Arm"
    assert list(known) == sorted(known)


@pytest.mark.usefixtures("installed")
def test_an_adapter_is_loaded_by_name():
    loaded = load_adapter("toy_arm")
    assert issubclass(loaded, FlowPolicy)
    assert loaded.__name__ == "Arm"


@pytest.mark.usefixtures("installed")
def test_an_unknown_name_lists_the_known_and_guesses():
    with pytest.raises(
        UnknownAdapterError, match=r'no adapter named "toy_arn".*toy_arm.*Did you mean "toy_arm"\?'
    ) as error:
        load_adapter("toy_arn")
    assert isinstance(error.value, PocoError)


@pytest.mark.usefixtures("installed")
def test_what_is_no_policy_is_refused():
    with pytest.raises(PolicyError, match="toy_arm:Stone, which is not a subclass"):
        load_adapter("toy_stone")
