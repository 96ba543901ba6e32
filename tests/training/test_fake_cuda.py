"""Device mismatches and host syncs of every adapter's update, without a GPU: see `fake_cuda`."""

import copy
import weakref

import numpy as np
import pytest
import torch
from fake_cuda import fake_gpu

from poco_vla import ChunkBatch, GlobalBatchRNG, Poco, PocoConfig, load_adapter
from poco_vla.algorithms import STAGES
from poco_vla.data import batches
from poco_vla.training import updates

STATES = 4
ANSWERS = {
    "pi05": {"prefix.py:_without_padding": [40, 44]},
    "groot_n1d6": {"tokens.py:sort_tokens": [8, 8, 16, 16], "backbone.py:_causal": False},
}
"""What the host is told where it waits for a number."""
WAITS = {
    "flow_mlp": {},
    "pi05": {
        "prefix.py:_without_padding": 2,  # shortest and longest prefix: shapes depend on them
        "prefix.py:encode > modeling_pi05.py:embed_prefix": 2,  # LeRobot makes a list of flags a tensor
    },
    "groot_n1d6": {
        "tokens.py:sort_tokens": 4,  # the shortest and the longest of both kinds: shapes depend on them
        "backbone.py:encode": 1,  # prompts that do not fit their images would give wrong features, silently
        "backbone.py:_causal": 1,  # without padding attention needs no mask
    },
    "smolvla": {
        "network.py:encode > modeling_smolvlm.py:forward": 6,  # transformers' SigLIP picks positions by masks
        "network.py:encode > modeling_smolvla.py:embed_prefix": 6,  # LeRobot makes lists of flags and scales tensors
    },
}
"""How often the host waits for the device each time that states are encoded, by the place. Nothing else waits."""


@pytest.fixture(scope="module", params=list(WAITS))
def adapter(request):
    policy = load_adapter(request.param).tiny()
    return request.param, policy, policy.example_obs(STATES)


# The last stage has the losses of the others.
@pytest.mark.parametrize("stage", [*(pytest.param(one, marks=pytest.mark.exhaustive) for one in STAGES[:-1]), "online"])
def test_an_update_keeps_to_its_device_and_does_not_wait_for_it(adapter, stage):
    name, policy, example = adapter
    answers = dict(ANSWERS.get(name, {}))
    if name == "groot_n1d6":
        (tokens,) = (value for key, value in example.items() if key.endswith("input_ids"))
        answers["backbone.py:encode"] = int((tokens == policy.policy.sizes.language.image_token).sum())
    policy = copy.deepcopy(policy)
    with fake_gpu(answers) as watch:
        poco, batch = on_gpu(policy, example)
        noise = poco.draw_noise(batch, stage)
        watch.waits.clear()
        loss, metrics = poco(batch, stage, noise)
        poco.after_step(stage)
    assert {loss.device.type, *(value.device.type for value in metrics.values())} == {"cuda"}
    encodings = 1 if stage == "sft" else 2
    assert dict(watch.waits) == {where: encodings * times for where, times in WAITS[name].items()}


def test_pictures_are_sent_as_bytes_without_waiting(monkeypatch):
    """From pinned memory; the GPU makes floats of them."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append((self.dtype, self.shape)) or self)
    obs = {"observation.images.front": np.zeros((4, 8, 6, 3), np.uint8), "observation.state": np.zeros((4, 2))}
    with fake_gpu() as watch:
        found = batches._tensors(obs, torch.device("cuda"))
    image = found["observation.images.front"]
    assert (image.device.type, image.dtype, image.shape) == ("cuda", torch.float32, (4, 3, 8, 6))
    assert found["observation.state"].device.type == "cpu"  # the pre-processor reads it
    assert pinned == [(torch.uint8, (4, 8, 6, 3))]
    assert not watch.waits


def test_what_is_kept_until_a_loss_is_looked_at_has_no_pictures_or_keys():
    """On a GPU that is while the next batch is learned from."""
    policy = load_adapter("pi05").tiny()
    obs = policy.example_obs(2)
    ones, chunks = torch.ones(2), torch.zeros(2, policy.spec.horizon, policy.spec.width)
    valid = torch.ones(2, policy.spec.horizon, dtype=torch.bool)
    signals = {"returns": ones, "discount": ones, "is_demo": ones.bool(), "is_success": ones.bool()}
    batch = ChunkBatch(obs=obs, next_obs=obs, actions=chunks, valid=valid, prefix=policy.encode(obs), **signals)
    gone = [weakref.ref(tensor) for tensor in (obs["observation.images.front"], batch.prefix.keys[0])]
    features, state = batch.prefix.features.clone(), obs["observation.state"].clone()
    kept = updates._without_pictures(batch)
    del batch, obs
    assert [ref() for ref in gone] == [None, None]
    assert torch.equal(kept.prefix.features, features)
    assert torch.equal(kept.next_obs["observation.state"], state)
    assert kept.next_prefix is None


def on_gpu(policy, example):
    """Return the algorithm and a batch of random states, on the fake device."""
    policy.to("cuda")
    obs = {key: torch.empty_like(value, device="cuda") for key, value in example.items() if torch.is_tensor(value)}
    spec, every = policy.spec, torch.ones(STATES, dtype=torch.bool, device="cuda")
    with torch.device("cuda"):
        config = PocoConfig(num_candidates=3, critic_hidden=(16,))
        poco = Poco(policy, config, GlobalBatchRNG(torch.Generator()))
        batch = ChunkBatch(
            obs=obs,
            next_obs=obs,
            actions=torch.zeros(STATES, spec.horizon, spec.width),
            valid=torch.ones(STATES, spec.horizon, dtype=torch.bool),
            returns=torch.zeros(STATES),
            discount=torch.ones(STATES),
            is_demo=every,
            is_success=every,
        )
    return poco, batch
