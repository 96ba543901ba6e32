"""Policy, dataset and environment must offer and act in the same things: refused before the first update otherwise."""

import pytest
from lerobot_policy_flow_mlp.adapter import FlowMlp
from tiny_env import PointConfig

from poco_vla.data import DatasetInfo
from poco_vla.errors import DataError
from poco_vla.rollout.fit import check_inputs

STATE = {"dtype": "float32", "shape": (6,), "names": None}
ACTION = {"dtype": "float32", "shape": (3,), "names": None}


def info(**features):
    return DatasetInfo("local/test", {"observation.state": STATE, "action": ACTION} | features, {}, 10)


def test_what_fits_is_accepted():
    check_inputs(FlowMlp.tiny(), info(), None)
    check_inputs(FlowMlp.tiny(), info(), PointConfig())


def test_an_input_that_the_environment_does_not_offer_is_named():
    policy = FlowMlp.tiny()
    policy.input_keys = ("observation.state", "observation.environment_state")
    features = info(**{"observation.environment_state": STATE})
    check_inputs(policy, features, None)
    with pytest.raises(DataError, match=r"observation\.environment_state.*the environment"):
        check_inputs(policy, features, PointConfig())


def test_an_input_that_the_dataset_lacks_is_named():
    policy = FlowMlp.tiny()
    policy.input_keys = ("observation.images.top",)
    with pytest.raises(DataError, match=r"observation\.images\.top.*the dataset"):
        check_inputs(policy, info(), None)


def test_another_action_dimension_is_refused():
    with pytest.raises(DataError, match="3 dimensions, local/test in 7"):
        check_inputs(FlowMlp.tiny(), info(action=ACTION | {"shape": (7,)}), None)
