"""Statistics are those of the frames in use, and recorded ones that are of other data are noticed."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from poco_vla.data.statistics import meta_in_use, vector_statistics

FRAMES = np.random.default_rng(0).uniform(-1, 1, (1000, 2)).astype(np.float32)
MOMENTS = ("min", "max", "mean", "std")


def recorded(frames=FRAMES, **changes):
    return {"action": {name: getattr(frames, name)(axis=0) for name in MOMENTS} | {"count": [len(frames)]} | changes}


def action(frames, stats, **options):
    return vector_statistics({"action": frames}, stats, subset=False, name="d", **options)["action"]


def test_recorded_moments_of_the_data_are_kept_without_a_word(caplog):
    stats = recorded()
    found = action(FRAMES, stats)
    assert all(found[name] is stats["action"][name] for name in MOMENTS)
    assert not caplog.records


@pytest.mark.parametrize(
    "changes",
    [
        {"max": np.array([10.0, 1])},
        {"mean": np.array([np.nan, 0])},
        {"std": np.array([np.inf, 1])},
        {"min": np.array([-1.0])},
    ],
    ids=["of other data", "NaN", "infinite", "of another size"],
)
def test_recorded_moments_of_other_data_are_computed_anew_with_one_message(changes, caplog):
    caplog.set_level(logging.WARNING)
    found = action(FRAMES, recorded(**changes))
    for name in MOMENTS:
        np.testing.assert_allclose(found[name], getattr(FRAMES.astype(float), name)(axis=0))
    assert len(caplog.records) == 1
    assert 'does not describe its data: "action" has' in caplog.text


def test_a_constant_is_exact_whatever_rounding_recorded():
    frames = np.full((50, 1), 0.1, np.float32)
    found = action(frames, recorded(frames, mean=np.array([0.1000002]), std=np.array([3e-5])))
    assert found["mean"] == found["min"] == found["max"] == found["q01"] == np.float32(0.1)
    assert found["std"] == 0


def test_a_gripper_that_seldom_closes_has_its_range_as_quantiles():
    """5 of 1,000 frames: all quantiles of LeRobot's modes are 0, with noise of 1e-7 or without."""
    for noise in (0.0, 1e-7):
        frames = (noise * np.random.default_rng(0).normal(size=(1000, 1))).astype(np.float32)
        frames[:5] = 1
        found = action(frames, None)
        assert [found[name] for name in ("q01", "q99", "q10", "q90")] == [frames.min(), 1, frames.min(), 1]


def test_one_outlier_leaves_quantiles_as_they_are():
    frames = FRAMES.copy()
    frames[0, 0] = 1e6
    assert action(frames, None)["q99"][0] < 1


def test_the_description_of_a_dataset_knows_the_episodes_in_use():
    dataset = SimpleNamespace(meta=SimpleNamespace(root="d"), episodes=[1])
    assert meta_in_use(dataset).episodes_in_use == [1]
    assert not hasattr(dataset.meta, "episodes_in_use")
