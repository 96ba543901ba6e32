"""The control rate of a policy's data travels with the policy."""

import json

import pytest
from lerobot_policy_flow_mlp.adapter import FlowMlp

from poco_vla.errors import ConfigError
from poco_vla.hub.rate import note_run, rate_of
from poco_vla.pretrained.heads import read_about


@pytest.fixture
def policy(tmp_path):
    folder = tmp_path / "run" / "policy"
    FlowMlp.tiny().save_pretrained(folder)
    return folder


def put(path, **values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def test_a_policy_says_its_rate_wherever_it_is_copied_to(policy, tmp_path):
    note_run(policy, {"fps": 10})
    copied = policy.rename(tmp_path / "elsewhere")
    assert rate_of(str(copied)) == 10
    assert read_about(copied)["adapter"] == "flow_mlp", "what was there stays"


def test_a_run_says_it_for_its_policy(policy):
    put(policy.parent / "result.json", fps=12.5)
    assert rate_of(str(policy)) == 12.5


def test_an_older_runs_online_episodes_say_it(policy):
    put(policy.parent / "result.json", adapter="flow_mlp")
    put(policy.parent / "episodes" / "meta" / "info.json", fps=30)
    assert rate_of(str(policy)) == 30


@pytest.mark.parametrize("fps", [None, 0, -5, float("nan"), "10", True])
def test_where_nobody_says_it_the_option_is_named(policy, fps):
    put(policy.parent / "result.json", fps=fps)
    with pytest.raises(ConfigError, match=r"does not say .* give --fps"):
        rate_of(str(policy))
