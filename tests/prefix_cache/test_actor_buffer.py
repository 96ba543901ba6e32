"""What acting has encoded is not encoded again: found by the bytes of its state, and only by them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lerobot_policy_flow_mlp.adapter import FlowMlp
from test_source import VLAS, H, episode, pool, short, store

from poco_vla.data import BatchSource, Replay, preprocess_obs
from poco_vla.prefix_cache.actor_buffer import ActorPrefixBuffer
from poco_vla.prefix_cache.entries import Entry
from poco_vla.prefix_cache.source import TRIALS, Demand, PrefixSource, _alike
from poco_vla.rollout import Actor


def acting(policy, kept, budget=10**9, **options):
    """An actor whose prefixes are noted."""
    acted = ActorPrefixBuffer(policy, kept.to_ram, budget, **options)
    actor = Actor(policy, seed=0)
    actor.on_encoded = acted.add
    return acted, actor


def act_on(actor, played, steps):
    """Act on these steps of an episode, one by one, as its environment would show them."""
    for step in steps:
        actor.chunks({key: column[step : step + 1] for key, column in played.obs.items()}, [played.task])


def shrunk(policy, played):
    return played.with_images(policy.resize_images)


def transitions(replay, ids):
    """As if these states had been drawn, which nothing follows."""
    raw = replay.sample(len(ids), np.random.default_rng(0), pictures=False)
    return replace(raw, ids=np.array(ids), next_ids=np.array(ids), discount=np.zeros(len(ids), np.float32))


@pytest.mark.parametrize("adapter", VLAS, ids=lambda adapter: adapter.__name__)
def test_learning_takes_over_what_acting_encoded(adapter):
    """Chunks of 4 at steps 0, 4 and 8: of 11 states, 8 are left to encode, and all come out the same."""
    policy = short(adapter)
    replay = Replay(horizon=H, gamma=0.9)
    replay.add(shrunk(policy, episode(policy, 9, success=True)), is_demo=True)
    kept = store()
    acted, actor = acting(policy, kept)
    played = shrunk(policy, episode(policy, 11, 21))
    act_on(actor, played, (0, 4, 8))
    source = PrefixSource(policy, replay, kept, actor_buffer=acted)
    first = replay.add(played, is_demo=False)
    source.add_from_actor(played, first)
    raw = transitions(replay, range(first, first + 11))
    found, _ = source.prefixes(raw, bootstrap=False)
    assert (source.hits, source.encoded) == (3, 8)
    fresh = policy.encode(preprocess_obs(policy, *replay.observations(raw.ids)))
    torch.testing.assert_close(found.features, fresh.features, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(policy.pack(found), policy.pack(fresh), strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    assert source.figures() == {"on": False}, "no trial has been made yet"
    source.close()


def test_pictures_that_the_pool_shrinks_are_found_as_well():
    """Cameras that are larger than the network's pictures, as robots have them. The policy acted on the pictures
    themselves, the pool's are rounded to whole numbers: that is all that their prefixes differ by."""
    policy = short(VLAS[0])
    kept = store()
    acted, actor = acting(policy, kept)
    played = episode(policy, 3, 1)
    size = 3 * max(x.shape[1] for x in shrunk(policy, played).obs.values() if x.dtype == np.uint8)
    played = played.with_images(lambda x: x.repeat(size // 64 + 1, axis=1).repeat(size // 64 + 1, axis=2))
    act_on(actor, played, (0, 2))
    assert shrunk(policy, played).obs["observation.images.front"].shape[1] < size
    found = acted.take(shrunk(policy, played))
    assert sorted(found) == [0, 2]
    fresh = policy.encode(
        preprocess_obs(policy, {k: x[[0, 2]] for k, x in shrunk(policy, played).obs.items()}, [played.task] * 2)
    )
    for entry, tensors in zip(found.values(), policy.pack(fresh), strict=True):
        assert _alike(entry, Entry.of(tensors))


@pytest.fixture(scope="module")
def encoded():
    """A policy, an episode of three steps that it acted on, and what its actor told of each step."""
    policy, noted = short(VLAS[0]), []
    actor = Actor(policy, seed=0)
    actor.on_encoded = lambda *told: noted.append(told)
    played = shrunk(policy, episode(policy, 3, 2))
    act_on(actor, played, range(3))
    return policy, played, noted


@pytest.mark.parametrize("what", ["picture", "state", "task"])
def test_whatever_differs_is_not_found(what, encoded):
    policy, played, noted = encoded
    acted, _ = acting(policy, store())
    for told in noted:
        acted.add(*told)
    obs = {key: column.copy() for key, column in played.obs.items()}
    other = replace(played, obs=obs, task="another" if what == "task" else played.task)
    if what == "picture":
        obs["observation.images.wrist"][1, 5, 5, 2] ^= 1
    elif what == "state":
        obs["observation.state"][1, 0] = np.nextafter(obs["observation.state"][1, 0], np.float32(9))
    assert sorted(acted.take(other)) == {"task": []}.get(what, [0, 2])
    assert sorted(acted.take(played)) == ([0, 1, 2] if what == "task" else [1])
    assert acted.take(played) == {}, "given away"
    assert acted.num_taken == 3


def test_a_state_that_comes_again_is_found_again():
    """Acted on at steps 0 and 2; the states of steps 0 to 2 are one, the last is another."""
    policy = FlowMlp.tiny()
    acted, actor = acting(policy, store())
    played = episode(policy, 4, 6)
    played.obs["observation.state"][:3] = played.obs["observation.state"][0]
    act_on(actor, played, (0, 2))
    assert sorted(acted.take(played)) == [0, 1, 2]


def test_what_no_episode_came_for_goes_first():
    """Room for two states of five."""
    policy = FlowMlp.tiny()
    kept = store()
    whole, actor = acting(policy, kept)
    played = episode(policy, 5, 3)
    act_on(actor, played, range(5))
    size = next(iter(whole.take(played).values())).num_bytes
    acted, actor = acting(policy, kept, budget=2 * size)
    act_on(actor, played, range(5))
    assert sorted(acted.take(played)) == [3, 4]
    act_on(actor, played, range(5))
    assert sorted(acted.take(played)) == [3, 4], "what was taken makes room"


def test_in_eight_bits_what_acting_encoded_is_what_learning_would_have_kept():
    policy = short(VLAS[0])
    acted, actor = acting(policy, store(), dtype="fp8")
    played = shrunk(policy, episode(policy, 1, 4))
    act_on(actor, played, [0])
    (entry,) = acted.take(played).values()
    assert any(dtype == torch.float8_e4m3fn for _, dtype, _ in entry.layout)


def test_once_a_store_does_not_pay_nothing_is_kept(monkeypatch):
    policy = short(FlowMlp)
    replay, _ = pool(policy)
    kept = store()
    acted, actor = acting(policy, kept)
    demand = Demand(states=10, num_sampled=10, memory=10**6, disk=0)
    source = PrefixSource(policy, replay, kept, actor_buffer=acted, demand=demand)
    batches = BatchSource(replay, policy, 8, seed=0, prefixes=source)
    played = episode(policy, H, 5)
    act_on(actor, played, [0])
    for _ in range(TRIALS + 1):
        batches.draw()
    assert source.store is None
    source.add_from_actor(played, replay.add(played, is_demo=False))
    monkeypatch.setattr(type(policy), "pack", lambda *_: pytest.fail("packed for nothing"))
    act_on(actor, played, [0])
    assert acted.take(played) == {}
    source.close()
