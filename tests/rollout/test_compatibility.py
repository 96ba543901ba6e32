"""Policy, dataset and environment must offer and act in the same things: refused before the first update otherwise."""

import numpy as np
import pytest
from lerobot_policy_flow_mlp.adapter import FlowMlp
from tiny_env import PointConfig, faulty_spec

from poco_vla.config import EnvSpec
from poco_vla.data import DatasetInfo
from poco_vla.errors import ConfigError, DataError, SimulatorError
from poco_vla.rollout import EnvPool
from poco_vla.rollout.compatibility import check_fit, check_inputs, check_pictures, check_rollout
from poco_vla.simulators import environment

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


# -- cameras --------------------------------------------------------------------------------------------------------

IMAGE = {"dtype": "video", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}


@pytest.fixture(scope="module")
def cube():
    return environment(EnvSpec(options={"cameras": ("front", "wrist"), "image_size": 32}))


def cube_info(state_dim=19, camera="front"):
    features = {
        "observation.state": STATE | {"shape": (state_dim,)},
        f"observation.images.{camera}": IMAGE,
        "action": ACTION | {"shape": (5,)},
    }
    return DatasetInfo("local/cube", features, {}, 20)


def test_pictures_of_another_size_fit(cube):
    check_fit(cube_info(), cube)


def test_a_dataset_with_the_cubes_pose_in_its_state_does_not_fit_an_environment_with_cameras(cube):
    with pytest.raises(DataError, match=r'"observation.state" has shape \(28,\) .* \(19,\) .*choice of cameras'):
        check_fit(cube_info(state_dim=28), cube)


def test_a_camera_that_the_environment_does_not_have_is_told_with_those_it_has(cube):
    """The dataset has the camera, so that only the environment can tell."""
    policy = FlowMlp.tiny()
    policy.input_keys = ("observation.state", "observation.images.top")
    with pytest.raises(
        DataError,
        match=r'reads observation\.images\.top, which the environment "ogbench" does not offer: '
        r".*'observation\.images\.front', 'observation\.images\.wrist'",
    ):
        check_inputs(policy, cube_info(camera="top"), cube)


def test_pictures_that_stay_of_different_sizes_are_told_before_any_work():
    """A policy that brings them to one size may have both."""
    policy = FlowMlp.tiny()
    demos = {"observation.images.front": np.zeros((4, 32, 32, 3), dtype=np.uint8)}
    env = {"observation.images.front": np.zeros((2, 48, 64, 3), dtype=np.uint8)}
    check_pictures(policy, demos, demos)
    with pytest.raises(DataError, match="32x32 pixels in the dataset and 48x64 in the environment"):
        check_pictures(policy, demos, env)
    policy.resize_images = lambda images: images[:, :32, :32]
    check_pictures(policy, demos, env)


# -- a first rollout -------------------------------------------------------------------------------------------------


def first_rollout(fault, **options):
    said = []
    with EnvPool(faulty_spec(fault, 2, in_process=True, **options), 4, say=said.append) as pool:
        pool.reset(0)
        check_rollout(pool, np.full((3, 2), 0.01, np.float32), said.append)
        return said, pool


def test_a_first_rollout_of_a_sound_environment_is_short_and_says_nothing():
    said, pool = first_rollout("none")
    assert said == []
    assert pool.steps_in_flight <= 2 * 12


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("raise", SimulatorError, "failed 3 times in a row.*lost its way"),
        ("nan", SimulatorError, "failed 3 times in a row.*non-finite"),
        ("other name", ConfigError, "is_success"),
        ("no info", ConfigError, "returns None as info"),
    ],
)
def test_what_is_wrong_with_an_environment_is_told_by_its_first_rollout(fault, error, words):
    with pytest.raises(error, match=words):
        first_rollout(fault)


def test_an_environment_without_a_time_limit_is_told_what_holds():
    said, _ = first_rollout("endless")
    assert said == [
        'the environment "tiny_faulty" (task reach) declares no time limit: an episode is cut off after 2000 control '
        "steps (env.max_episode_steps sets another)"
    ]
