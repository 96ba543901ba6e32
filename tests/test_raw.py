"""Raw observations: `act` takes them as robots give them, `encode` tells them from processed ones."""

import numpy as np
import pytest
import torch
from lerobot_policy_flow_mlp.adapter import FlowMlp
from poco_vla_smolvla.adapter import SmolVla

from poco_vla import DataError, PolicyError
from poco_vla.raw import raw_batch, refuse_raw

STATE, FRONT, WRIST = "observation.state", "observation.images.front", "observation.images.wrist"


def degrees(size=2):
    """A policy whose states and actions are degrees: means of 90, deviations of 20."""
    features = {key: {"dtype": "float32", "shape": (size,), "names": None} for key in (STATE, "action")}
    stats = {
        key: {
            "mean": np.full(size, 90.0),
            "std": np.full(size, 20.0),
            "min": np.full(size, 30.0),
            "max": np.full(size, 150.0),
        }
        for key in (STATE, "action")
    }
    return FlowMlp.from_dataset(features, stats, horizon=3, hidden_dims=[8])


def noise():
    return torch.Generator().manual_seed(0)


def test_act_gives_the_chunk_of_the_whole_way_in_the_robots_units():
    policy = degrees()
    found = policy.act({STATE: np.array([100.0, 80.0])}, generator=noise())
    expected = policy.act({STATE: torch.tensor([[100.0, 80.0]])}, ["anything"], generator=noise())
    assert found.shape == (1, 3, 2)
    assert found.equal(expected)
    assert float(found.min()) > 29
    assert float(found.max()) < 151


def test_act_takes_pictures_in_either_form():
    policy = SmolVla.tiny()
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    first = torch.from_numpy(picture).permute(2, 0, 1)
    forms = [picture, first, first.float() / 255, picture[None]]
    chunks = [
        policy.act({STATE: np.zeros(6), FRONT: form, WRIST: form, "task": "pick"}, generator=noise()) for form in forms
    ]
    assert all(torch.allclose(chunk, chunks[0], atol=1e-5) for chunk in chunks)


@pytest.mark.parametrize(
    ("observation", "words"),
    [
        ({}, f"the observation lacks {STATE}"),
        ({STATE: "north"}, "holds no numbers"),
        ({STATE: np.zeros((2, 3)), "task": ["one"]}, "different numbers of states: observation.state 2, 1 instr"),
        ({STATE: np.full((4, 4, 3), 255.0)}, "reaches 255; pictures are uint8"),
    ],
)
def test_an_observation_that_cannot_be_read_is_refused(observation, words):
    with pytest.raises(DataError, match=words):
        raw_batch(observation, [STATE], None)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ({STATE: np.zeros((1, 2))}, "ndarray"),
        ({STATE: torch.zeros(2)}, "no batch axis"),
        ({STATE: torch.zeros(1, 2), FRONT: torch.zeros(1, 4, 4, 3, dtype=torch.uint8)}, "bytes"),
        ({}, f"lacks {STATE}"),
    ],
)
def test_raw_observations_are_told_by_their_form(raw, why):
    with pytest.raises(PolicyError, match=rf"raw observation \(.*{why}.*policy\.act\(observation, task\)"):
        refuse_raw(raw, [STATE])


def test_raw_numbers_are_told_by_their_size():
    """90 degrees are 0 deviations; as a normalised state they would lie 90 deviations out."""
    policy = degrees()
    state = torch.tensor([[100.0, 80.0], [60.0, 120.0]])
    with pytest.raises(PolicyError, match=r"raw observation.*policy\.act"):
        policy.encode({STATE: state})
    policy.encode(policy.preprocess({STATE: state, "task": ["", ""]}))


@pytest.mark.parametrize("state", [[[1.0, -2.0]], [[25.0, 0.0]], [[5000.0, 0.0]], [[30.0, 90.0], [0.1, 0.2]]])
def test_processed_states_are_never_taken_for_raw_ones(state):
    """Outliers of a normalised state stay what they are: their size alone is no sign."""
    degrees().encode({STATE: torch.tensor(state)})


def test_a_column_of_one_number_a_state_is_no_sign_of_a_raw_one():
    refuse_raw({STATE: torch.zeros(1, 2), "observation.own.robot_id": torch.zeros(1)}, [STATE])


def test_a_vla_that_is_given_a_raw_observation_says_what_to_call():
    with pytest.raises(PolicyError, match=r"lacks observation\.language\.tokens.*policy\.act"):
        SmolVla.tiny().encode({STATE: torch.zeros(1, 6)})
