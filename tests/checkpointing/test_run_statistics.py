"""A run's statistics lie in its checkpoint, and demonstrations that do not fit them are noticed before training."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot_policy_flow_mlp.adapter import FlowMlp
from safetensors.torch import save_file

from poco_vla.checkpointing.statistics import RunStatistics
from poco_vla.config import TrainConfig
from poco_vla.data import DatasetInfo, Episode
from poco_vla.errors import CheckpointError, DataError

KEYS = {"observation.state": 3, "action": 2}
FEATURES = {key: {"dtype": "float32", "shape": (n,), "names": None} for key, n in KEYS.items()}
MODES = ("MIN_MAX", "MEAN_STD", "QUANTILES", "QUANTILE10")


def episode(scale=1.0, shift=0.0, seed=0, action=None):
    rng = np.random.default_rng(seed)
    state, other = (rng.uniform(-1, 1, (200, n)).astype(np.float32) for n in (3, 2))
    other = (scale * other + shift).astype(np.float32) if action is None else action
    flags = np.zeros(200, bool)
    return Episode({"observation.state": state}, other, flags.astype(np.float32), flags, flags, "do it")


def stats_of(one):
    columns = {"observation.state": one.obs["observation.state"], "action": one.action}
    quantiles = {"q01": 0.01, "q10": 0.1, "q90": 0.9, "q99": 0.99}
    return {
        key: {name: getattr(c, name)(axis=0) for name in ("min", "max", "mean", "std")}
        | {name: np.quantile(c, q, axis=0) for name, q in quantiles.items()}
        for key, c in columns.items()
    }


def policy_of(one, mode="MIN_MAX"):
    return FlowMlp.from_dataset(
        FEATURES, stats_of(one), horizon=4, hidden_dims=[8], normalization_mapping={"ACTION": mode}
    )


def checked(policy, demos, said=None, **options):
    config = TrainConfig(horizon=4, online_steps=0, **options)
    info = DatasetInfo("d", FEATURES, {}, 10)
    RunStatistics(config, info, (said if said is not None else []).append).check(policy, demos)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [57.3, 1 / 57.3, 1000.0, 0.001])
def test_other_units_are_refused_in_both_directions(mode, scale):
    with pytest.raises(DataError, match=r"statistics in use.*--statistics dataset.*--outside-statistics allow"):
        checked(policy_of(episode(), mode), [episode(scale, seed=1)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "demos",
    [
        episode(seed=1),
        episode(0.1, seed=1),
        episode(1.5, seed=1),
        episode(0.3, shift=0.9, seed=1),
        episode(action=np.stack([np.zeros(200), np.linspace(-1, 1, 200)], 1).astype("f4")),
        episode(action=np.stack([np.arange(200) < 3, np.linspace(-1, 1, 200)], 1).astype("f4")),
    ],
    ids=["alike", "small motions", "wider", "a corner", "a constant dimension", "a gripper that seldom closes"],
)
def test_good_data_is_not_refused(mode, demos):
    said = []
    checked(policy_of(episode(), mode), [demos], said)
    assert re.fullmatch(r"[0-9.]+ % of actions and 0\.[0-9] % of states lie outside the statistics in use", said[0])


def test_it_can_be_allowed():
    said = []
    checked(policy_of(episode()), [episode(90)], said, outside_statistics="allow")
    assert "lies far outside" in said[1]


def saved_run(folder, policy, stats):
    (folder / "checkpoints" / "00000001").mkdir(parents=True)
    first = RunStatistics(TrainConfig(output_dir=folder, online_steps=0), DatasetInfo("d", FEATURES, stats, 10), print)
    save_file(first.state(policy), folder / "checkpoints" / "00000001" / "statistics.safetensors")
    return TrainConfig(output_dir=folder, online_steps=0, resume=True)


def test_a_resumed_run_normalises_by_its_checkpoints_statistics(tmp_path: Path):
    old, wide = episode(), episode(10)
    config = saved_run(tmp_path, policy_of(old), stats_of(old))
    resumed = RunStatistics(config, DatasetInfo("d", FEATURES, stats_of(wide), 10), print)
    np.testing.assert_array_equal(resumed.info.stats["action"]["max"], old.action.max(axis=0))
    policy = resumed.put_on(policy_of(wide))
    top = policy.postprocess(torch.ones(1, 4, 2))[0, 0]
    torch.testing.assert_close(top, torch.from_numpy(old.action.max(axis=0)))


def test_a_resume_on_data_of_other_dimensions_names_both(tmp_path: Path):
    config = saved_run(tmp_path, policy_of(episode()), stats_of(episode()))
    features = FEATURES | {"observation.state": FEATURES["observation.state"] | {"shape": (5,)}}
    with pytest.raises(CheckpointError, match=r'"observation.state" has 3 dimensions.* has 5'):
        RunStatistics(config, DatasetInfo("d", features, {}, 10), print)
