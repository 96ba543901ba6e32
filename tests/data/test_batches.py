"""From raw transitions to the network's units: LeRobot's processors, padding, and each process's share."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from lerobot_on_disk import FPS, STATE_ONLY, random_columns, write
from lerobot_policy_flow_mlp.adapter import FlowMlp

from poco_vla import ChunkBatch
from poco_vla.config import DatasetConfig
from poco_vla.data import BatchSource, Replay, chunk_batch, open_dataset, preprocess_obs, read_episodes
from poco_vla.data.dataset import describe_dataset
from poco_vla.errors import ConfigError

HORIZON = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A real dataset: (its info, its episodes)."""
    columns = [random_columns(length, STATE_ONLY, seed) for seed, length in enumerate((6, 9, 4))]
    for episode in columns:  # far from the unit range, every dimension otherwise
        episode["observation.state"] = episode["observation.state"] * np.float32([1, 10, 100]) + np.float32([0, 5, -50])
        episode["action"] = episode["action"] * np.float32([0.1, 30]) + np.float32([2, -7])
    root = write(tmp_path_factory.mktemp("batches") / "data", columns, STATE_ONLY, fps=FPS)
    config = DatasetConfig(repo_id="local/test", root=root)
    dataset = open_dataset(config)
    return describe_dataset(dataset), read_episodes(dataset, config, ["observation.state"])


@pytest.fixture
def policy(data):
    info, _ = data
    return FlowMlp.from_dataset(info.features, info.stats, horizon=HORIZON, hidden_dims=[8])


@pytest.fixture
def replay(data):
    replay = Replay(horizon=HORIZON, gamma=0.9)
    replay.extend(data[1][:2], is_demo=True)
    replay.extend(data[1][2:], is_demo=False)
    return replay


def test_normalisation_is_the_closed_form_of_the_datasets_statistics(data, policy, replay):
    """States (x - mean) / std, actions 2 (a - min) / (max - min) - 1; LeRobot adds 1e-8 to the divisors."""
    stats = data[0].stats
    raw = replay.sample(64, np.random.default_rng(0))
    batch = chunk_batch(policy, raw)
    state, action = stats["observation.state"], stats["action"]
    for normalised, column in ((batch.obs, raw.obs), (batch.next_obs, raw.next_obs)):
        expected = (column["observation.state"] - state["mean"]) / state["std"]
        np.testing.assert_allclose(normalised["observation.state"], expected, rtol=1e-4, atol=1e-5)
    expected = 2 * (raw.actions - action["min"]) / (action["max"] - action["min"]) - 1
    np.testing.assert_allclose(batch.actions, expected, rtol=1e-4, atol=1e-5)


def test_demonstrated_actions_span_the_normalised_range(policy, data):
    replay = Replay(horizon=HORIZON, gamma=0.9)
    replay.extend(data[1], is_demo=True)
    actions = chunk_batch(policy, replay.demo_transitions(100, np.random.default_rng(0))).actions.flatten(0, 1)
    torch.testing.assert_close(actions.amin(dim=0), -torch.ones(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(actions.amax(dim=0), torch.ones(2), atol=1e-5, rtol=0)


def test_postprocessing_brings_a_batchs_actions_back_to_the_robots_units(policy, replay):
    raw = replay.sample(16, np.random.default_rng(0))
    back = policy.postprocess(chunk_batch(policy, raw).actions)
    np.testing.assert_allclose(back, raw.actions, rtol=1e-4, atol=1e-4)


def test_signals_pass_unchanged(policy, replay):
    raw = replay.sample(16, np.random.default_rng(0))
    batch = chunk_batch(policy, raw)
    for name in ("valid", "returns", "discount", "is_demo", "is_success"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(raw, name))
    assert len(batch) == 16


def test_actions_are_padded_with_zeros_to_the_networks_width(policy, replay):
    """A VLA's network is wider (32 for pi0.5) than the robot's 2 actions."""
    raw = replay.sample(16, np.random.default_rng(0))
    narrow = chunk_batch(policy, raw).actions
    policy.spec = replace(policy.spec, width=32)
    wide = chunk_batch(policy, raw).actions
    assert wide.shape == (16, HORIZON, 32)
    assert torch.equal(wide[..., :2], narrow)
    assert not wide[..., 2:].any()


def test_acting_sees_states_as_training_does(policy, replay):
    raw = replay.sample(16, np.random.default_rng(0))
    acting = preprocess_obs(policy, raw.obs, raw.tasks)
    training = chunk_batch(policy, raw).obs
    assert set(acting) == set(training) == {"observation.state"}
    assert torch.equal(acting["observation.state"], training["observation.state"])


def test_images_become_channels_first_floats_in_the_unit_range():
    """LeRobot's own loader gives float32 [3, height, width] in [0, 1]; a processor without statistics leaves it so."""
    image = np.zeros((2, 4, 6, 3), np.uint8)
    image[1, 2, 5] = (255, 51, 0)
    policy = FlowMlp.tiny()
    obs = {"observation.state": np.zeros((2, 6), np.float32), "observation.image": image}
    out = preprocess_obs(policy, obs, ["", ""])["observation.image"]
    assert out.shape == (2, 3, 4, 6)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[1, :, 2, 5], torch.tensor([1.0, 0.2, 0.0]))
    assert not out[0].any()


def columns_of(batch):
    for field in fields(batch):
        value = getattr(batch, field.name)
        for key, column in value.items() if isinstance(value, dict) else [("", value)] if value is not None else []:
            yield f"{field.name}{key}", column


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_processes_batches_concatenate_to_one_processs(policy, replay, world_size):
    whole = BatchSource(replay, policy, 16, seed=3)
    ranks = [BatchSource(replay, policy, 16, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(5):
        batch, shares = next(whole), [next(source) for source in ranks]
        assert {len(share) for share in shares} == {16 // world_size}
        together = [dict(columns_of(share)) for share in shares]
        for name, column in columns_of(batch):
            assert torch.equal(column, torch.cat([columns[name] for columns in together])), name


def test_batches_follow_the_seed(policy, replay):
    a, b, other = (next(BatchSource(replay, policy, 16, seed=seed)).actions for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, other)


def test_a_source_goes_on_from_its_generators_state(policy, replay):
    """What a checkpoint stores of it."""
    source = BatchSource(replay, policy, 16, seed=1)
    next(source)
    state = source.rng.bit_generator.state
    expected = next(source).actions
    resumed = BatchSource(replay, policy, 16, seed=99)
    resumed.rng.bit_generator.state = state
    assert torch.equal(next(resumed).actions, expected)


def test_a_batch_that_the_processes_cannot_share_is_refused(policy, replay):
    with pytest.raises(ConfigError, match="batch_size 16 is not a multiple of the 3 processes"):
        BatchSource(replay, policy, 16, seed=0, rank=0, world_size=3)


def test_moving_a_batch_moves_every_tensor(policy, replay):
    """The meta device stands for an accelerator."""
    moved = next(BatchSource(replay, policy, 4, seed=0)).to("meta")
    assert isinstance(moved, ChunkBatch)
    assert {column.device.type for _, column in columns_of(moved)} == {"meta"}
