"""Batches that bring their prefixes: the same transitions in the same order, each state encoded once, nothing stale."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot_policy_flow_mlp.adapter import FlowMlp
from lerobot_policy_groot_n1d6.adapter import GrootN1d6Adapter
from lerobot_policy_groot_n1d6.processing.steps import ImageStep
from poco_vla_pi05.adapter import Pi05
from poco_vla_smolvla.adapter import SmolVla

from poco_vla import Poco, PocoConfig
from poco_vla.config import PrefixConfig, ReplayConfig
from poco_vla.data import BatchSource, Episode, Replay
from poco_vla.data.columns import MemoryColumn
from poco_vla.data.replay import ONLINE
from poco_vla.data.ring import Capacity, EpisodeRing
from poco_vla.noise import GlobalBatchRNG
from poco_vla.prefix_cache.identity import cache_folder, identity, identity_digest
from poco_vla.prefix_cache.source import AT_ONCE, Costs, Demand, PrefixSource, saves_time
from poco_vla.prefix_cache.store import PrefixStore

CPU = torch.device("cpu")
H = 4


def episode(policy, length, seed=0, *, task="pick up the cube", success=False):
    """Random columns that this policy reads."""
    rng = np.random.default_rng(seed)
    features = (policy.policy if hasattr(policy, "policy") else policy.model).config.input_features
    obs = {
        key: rng.integers(0, 256, (length, 64, 64, 3)).astype(np.uint8)
        if len(features[key].shape) == 3
        else rng.normal(size=(length, *features[key].shape)).astype(np.float32)
        for key in policy.input_keys
    }
    ends = np.arange(length) == length - 1
    return Episode(
        obs=obs,
        action=rng.uniform(-1, 1, (length, policy.spec.action_dim)).astype(np.float32),
        reward=rng.normal(size=length).astype(np.float32),
        success=ends & success,
        terminal=ends & success,
        task=task,
    )


def pool(policy, *, online=True, **options):
    replay = Replay(horizon=H, gamma=0.9, config=ReplayConfig(**options))
    demos = [episode(policy, length, seed, success=True) for seed, length in enumerate((9, 6))]
    replay.extend(demos, is_demo=True)
    if online:
        replay.add(episode(policy, 7, 7, task="open the drawer"), is_demo=False)
    return replay, demos


def short(adapter):
    """A tiny policy with chunks of H steps."""
    policy = adapter.tiny().eval()
    policy.spec = replace(policy.spec, horizon=H)
    return policy


VLAS = [Pi05, SmolVla, GrootN1d6Adapter]


def sources(policy, replay, *, store=None, batch_size=8, **options):
    """A plain source, and one with prefixes."""
    prefixes = PrefixSource(policy, replay, store, **options)
    return BatchSource(replay, policy, batch_size, seed=5), BatchSource(
        replay, policy, batch_size, seed=5, prefixes=prefixes
    )


def store(**options):
    return PrefixStore(PrefixConfig(mode="on", **options), CPU)


def losses(policy, batch, stage="online"):
    torch.manual_seed(0)
    poco = Poco(
        policy, PocoConfig(num_candidates=2, critic_hidden=(8,)), GlobalBatchRNG(torch.Generator().manual_seed(1))
    )
    return poco(batch, stage)[0]


# -- ids ------------------------------------------------------------------------------------------------------------


def numbers(length):
    return {"action": np.zeros((length, 1), np.float32), "row": np.arange(length, dtype=np.float32)[:, None]}


def test_ids_name_states_and_stay_when_older_episodes_go():
    """States are numbered as they come; a state's observation is found by its id alone, whatever the ring did."""
    policy = FlowMlp.tiny()
    replay = Replay(horizon=H, gamma=0.9, config=ReplayConfig(capacity=25))
    seen, rng = {}, np.random.default_rng(0)
    replay.extend([episode(policy, 9, 100)], is_demo=True)
    for number in range(8):
        replay.add(episode(policy, 5 + number, number), is_demo=False)
        raw = replay.sample(64, rng)
        assert (raw.is_demo == (raw.ids < ONLINE)).all()
        for which, obs in ((raw.ids, raw.obs), (raw.next_ids, raw.next_obs)):
            again, tasks = replay.observations(which)
            assert np.array_equal(again["observation.state"], obs["observation.state"])
            assert tasks == raw.tasks
            for key, state in zip(which.tolist(), obs["observation.state"].tolist(), strict=True):
                assert seen.setdefault(key, state) == state
    assert len({tuple(state) for state in seen.values()}) == len(seen), "two states, two ids"


def test_transitions_without_pictures_are_the_same_but_for_these():
    policy = short(Pi05)
    replay, _ = pool(policy)
    whole, bare = (replay.sample(16, np.random.default_rng(3), pictures=some) for some in (True, False))
    assert set(whole.obs) - set(bare.obs) == {"observation.images.front", "observation.images.wrist"}
    for name in ("actions", "ids", "next_ids", "returns", "discount"):
        assert np.array_equal(getattr(whole, name), getattr(bare, name))
    pictures, _ = replay.observations(whole.ids)
    assert all(np.array_equal(pictures[key], whole.obs[key]) for key in whole.obs)


# -- runs of consecutive chunks -------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 23), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(24, 60),
)
def test_every_start_step_lies_in_equally_many_arcs(episodes, run, stride, capacity):
    """Arcs that begin at each start step once hold each start step `run` times: a draw of arcs is uniform over them.
    A ring that has dropped episodes is no exception."""
    ring = EpisodeRing(Capacity(capacity, "steps"), lambda name, shape, dtype: MemoryColumn(shape, dtype))
    for length, ends in episodes:
        ring.add(numbers(length), length if ends else length - 1, succeeded=ends, task=0)
    if ring.num_starts == 0:
        return
    arcs = ring._spans.arcs(np.arange(ring.num_starts), run, stride)
    assert np.array_equal(np.bincount(arcs, minlength=ring.num_starts), np.full(ring.num_starts, run))
    starts = ring.starts(arcs)
    steps, last = starts.step.reshape(-1, run), starts.last.reshape(-1, run)
    assert (last == last[:, :1]).all(), "a run stays in its episode"
    leap = np.diff(steps, axis=1)
    assert ((leap == stride) | (leap <= 0)).all(), "one chunk follows on the other, or the first on the last"
    assert (leap % stride == 0).all()


def test_drawn_start_steps_are_uniform_with_runs_as_without():
    """60,000 draws over 3 episodes of 9, 4 and 2 start steps: each of the 15 within 5 standard deviations of 4,000.
    Runs of 3 correlate draws, by at most a factor of 3 in variance."""
    ring = EpisodeRing(Capacity(None, "steps"), lambda name, shape, dtype: MemoryColumn(shape, dtype))
    for length in (9, 4, 2):
        ring.add(numbers(length), length, succeeded=True, task=0)
    rng = np.random.default_rng(0)
    draws = np.concatenate([ring.sample(16, rng, run=3, stride=2).step for _ in range(3750)])
    assert np.abs(np.bincount(draws) - 4000).max() < 5 * np.sqrt(3 * 4000)


def test_one_transition_at_a_time_is_drawn_as_ever():
    policy = FlowMlp.tiny()
    plain, runs = (pool(policy, **options)[0] for options in ({}, {"consecutive": 1}))
    a, b = (replay.sample(32, np.random.default_rng(0)) for replay in (plain, runs))
    assert np.array_equal(a.ids, b.ids)


def test_consecutive_transitions_need_about_half_the_prefixes():
    """Long episodes, m = 8: 9 states for 8 transitions, but for runs that pass an episode's end."""
    policy = FlowMlp.tiny()
    counts = {}
    for run in (1, 8):
        replay = Replay(horizon=H, gamma=0.9, config=ReplayConfig(consecutive=run))
        replay.extend([episode(policy, 2000, seed, success=True) for seed in range(3)], is_demo=True)
        raw = replay.sample(64, np.random.default_rng(0))
        counts[run] = len(np.unique(np.concatenate([raw.ids, raw.next_ids])))
    assert counts[1] > 120
    assert counts[8] <= 72 + 4


@pytest.mark.parametrize("fraction", [None, 0.25])
def test_runs_keep_the_share_of_demonstrations(fraction):
    policy = FlowMlp.tiny()
    replay, _ = pool(policy, consecutive=3, demo_fraction=fraction)
    plain, _ = pool(policy, demo_fraction=fraction)
    rngs = [np.random.default_rng(0), np.random.default_rng(0)]
    shares = [
        [r.sample(40, rng).is_demo.sum() for _ in range(50)] for r, rng in zip((replay, plain), rngs, strict=True)
    ]
    if fraction is None:
        assert abs(np.mean(shares[0]) - np.mean(shares[1])) < 2
    else:
        assert set(shares[0]) == set(shares[1]) == {10}


# -- batches --------------------------------------------------------------------------------------------------------


def test_a_batch_with_stored_prefixes_is_bit_for_bit_the_plain_one_where_batch_mates_do_not_matter():
    """An MLP's prefix is its state: cold, warm, and with an episode that comes in between."""
    policy = FlowMlp.tiny()
    policy.spec = replace(policy.spec, horizon=H)
    replay, _ = pool(policy)
    plain, stored = sources(policy, replay, store=store())
    for number in range(12):
        bootstrap = number % 4 != 3
        a, b = plain.draw(bootstrap=bootstrap), stored.draw(bootstrap=bootstrap)
        assert torch.equal(policy.encode(a.obs).features, b.prefix.features)
        if bootstrap:
            matters = a.discount > 0
            assert torch.equal(policy.encode(a.next_obs).features[matters], b.next_prefix.features[matters])
            assert torch.equal(losses(policy, a), losses(policy, b))
        assert torch.equal(a.actions, b.actions)
        assert plain.rng.bit_generator.state == stored.rng.bit_generator.state, "drawn ahead is not drawn yet"
        if number == 5:
            replay.add(episode(policy, 8, 50), is_demo=False)
    stored.prefixes.close()


@pytest.mark.parametrize("adapter", VLAS, ids=lambda adapter: adapter.__name__)
def test_a_vlas_losses_are_the_plain_ones_but_for_rounding(adapter):
    """Batch mates change the order of sums: float32 losses agree to 1e-5, cold and warm."""
    policy = short(adapter)
    replay, _ = pool(policy)
    plain, stored = sources(policy, replay, store=store(), batch_size=6)
    for _ in range(5):
        a, b = plain.draw(), stored.draw()
        assert b.obs == b.next_obs == {}
        torch.testing.assert_close(losses(policy, a), losses(policy, b), rtol=1e-5, atol=1e-6)
        assert torch.equal(a.actions, b.actions)
    assert stored.prefixes.hits > 0
    stored.prefixes.close()


def test_eight_bit_prefixes_change_a_loss_by_little_and_the_same_cold_and_warm():
    policy = short(Pi05)
    replay, _ = pool(policy)
    plain, stored = sources(policy, replay, store=store(dtype="fp8"), batch_size=6, dtype="fp8")
    state = stored.rng.bit_generator.state
    exact, cold = losses(policy, plain.draw()), losses(policy, stored.draw())
    assert 0 < abs(cold - exact) < 0.02 * exact
    stored.rng.bit_generator.state = state
    assert torch.equal(losses(policy, stored.draw()), cold)
    stored.prefixes.close()


def test_each_state_is_encoded_once_and_its_pictures_are_not_looked_at_again(monkeypatch):
    policy = short(Pi05)
    replay, _ = pool(policy, online=False)
    _, stored = sources(policy, replay, store=store())
    asked, encoded = [], []
    observations, encode = replay.observations, policy.encode
    monkeypatch.setattr(replay, "observations", lambda ids: asked.extend(ids.tolist()) or observations(ids))

    def counted(obs):
        encoded.append(len(obs["observation.state"]))
        return encode(obs)

    monkeypatch.setattr(type(policy), "encode", lambda self, obs: counted(obs))
    for _ in range(4):  # trials look twice
        stored.draw()
    asked.clear()
    encoded.clear()
    for _ in range(12):
        stored.draw()
    assert len(asked) == len(set(asked)) == sum(encoded)
    assert max([0, *encoded]) <= AT_ONCE
    for _ in range(3):
        before = len(asked)
        stored.draw()
    assert len(asked) == before, "15 states, all known by now"
    stored.prefixes.close()


def test_without_a_store_a_batch_encodes_each_distinct_state_once(monkeypatch):
    policy = short(Pi05)
    replay, _ = pool(policy, online=False, consecutive=4)
    plain, sharing = sources(policy, replay, store=None, shares=True)
    a, b = plain.draw(), sharing.draw()
    torch.testing.assert_close(losses(policy, a), losses(policy, b), rtol=1e-5, atol=1e-6)
    raw = replay.sample(8, np.random.default_rng(5))
    assert sharing.prefixes.encoded == len(np.unique(np.concatenate([raw.ids, raw.next_ids[raw.discount > 0]])))
    assert sharing.prefixes.encoded < 16
    sharing.prefixes.close()


@pytest.mark.parametrize("world_size", [2])
def test_each_process_stores_what_its_rows_need(world_size):
    policy = FlowMlp.tiny()
    policy.spec = replace(policy.spec, horizon=H)
    replay, _ = pool(policy)
    whole = BatchSource(replay, policy, 16, seed=3)
    ranks = [
        BatchSource(
            *(replay, policy, 16), seed=3, rank=rank, world_size=2, prefixes=PrefixSource(policy, replay, store())
        )
        for rank in range(world_size)
    ]
    for _ in range(5):
        batch, shares = whole.draw(), [source.draw() for source in ranks]
        assert torch.equal(policy.encode(batch.obs).features, torch.cat([s.prefix.features for s in shares]))
        assert torch.equal(batch.actions, torch.cat([s.actions for s in shares]))
    for source in ranks:
        source.prefixes.close()


def test_pictures_that_are_augmented_are_not_stored():
    """Each time another: there is no prefix of the state."""
    policy = GrootN1d6Adapter.tiny()
    assert policy.can_pack
    (images,) = (step for step in policy.preprocess.steps if isinstance(step, ImageStep))
    images.augment = True
    assert not policy.can_pack


# -- nothing stale --------------------------------------------------------------------------------------------------


def changed(policy, what, demos):
    """(policy, demonstrations, settings) of which one thing is another."""
    settled = {"dtype": "exact"}
    if what == "statistics":
        for step in policy.preprocessor.steps:
            for stats in getattr(step, "_tensor_stats", {}).values():
                for name in stats:
                    stats[name] = stats[name] * 1.01
            for stats in (getattr(step, "stats", None) or {}).values():
                for name in stats:
                    stats[name] = stats[name] * 1.01
    elif what == "one frozen weight":
        weight = next(p for p in policy.parameters() if not p.requires_grad)
        weight.data.flatten()[3] += 1e-3
    elif what == "one pixel":
        demos = copy.deepcopy(demos)
        demos[1].obs["observation.images.front"][2, 3, 4, 0] ^= 1
    elif what == "the instruction":
        demos = [replace(demo, task="pick up the cubes") for demo in demos]
    elif what == "dtype":
        settled["dtype"] = "fp8"
    elif what == "the tokenizer":
        from lerobot.processor import TokenizerProcessorStep

        (step,) = (s for s in policy.preprocessor.steps if isinstance(s, TokenizerProcessorStep))
        plain = step.input_tokenizer

        class Shifted:
            def __call__(self, *args, **kwargs):
                out = plain(*args, **kwargs)
                out["input_ids"] = out["input_ids"] + 1
                return out

            def __getattr__(self, name):
                return getattr(plain, name)

        step.input_tokenizer = Shifted()
    elif what == "their order":
        demos = demos[::-1]
    return policy, demos, settled


CHANGES = ["statistics", "one frozen weight", "one pixel", "the instruction", "dtype", "the tokenizer", "their order"]


@pytest.mark.parametrize("what", CHANGES)
def test_an_entry_of_anything_else_lies_in_another_folder(what):
    policy = short(Pi05)
    _, demos = pool(policy)
    before = identity_digest(identity(policy, demos, dtype="exact"))
    assert identity_digest(identity(short(Pi05), pool(short(Pi05))[1], dtype="exact")) == before
    other, other_demos, settled = changed(policy, what, demos)
    assert identity_digest(identity(other, other_demos, **settled)) != before


def test_the_head_may_change_and_the_folder_stays():
    policy = short(Pi05)
    _, demos = pool(policy)
    before = identity_digest(identity(policy, demos))
    for p in policy.head.parameters():
        p.data.add_(0.1)
    assert identity_digest(identity(policy, demos)) == before


def test_a_second_run_starts_warm(tmp_path):
    policy = short(Pi05)
    replay, demos = pool(policy)
    about = identity(policy, demos)
    results = []
    for _ in range(2):
        config = PrefixConfig(mode="on", ram_bytes=0, disk_bytes=10**8)
        _, stored = sources(policy, replay, store=PrefixStore(config, CPU, cache_folder(tmp_path, about)))
        batches = [stored.draw() for _ in range(8)]
        results.append((stored.prefixes.encoded, [b.prefix.features for b in batches]))
        stored.prefixes.close()
    (cold, first), (warm, second) = results
    assert cold >= 20
    assert warm <= 7, "the online episode's states are of the run"
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    (folder,) = tmp_path.iterdir()
    assert ".Pi05" in (folder / "about.json").read_text()


def test_kept_prefixes_that_are_not_what_the_policy_makes_now_are_not_used(tmp_path):
    """What no digest can see, such as an adapter whose code changed under the same version: some are looked at."""
    policy = short(Pi05)
    replay, _ = pool(policy, online=False)
    config = PrefixConfig(mode="on", disk_bytes=10**8)
    _, stored = sources(policy, replay, store=PrefixStore(config, CPU, tmp_path))
    for _ in range(12):
        stored.draw()
    stored.prefixes.close()
    with torch.no_grad():
        for p in policy.parameters():
            if not p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape))
    said = []
    plain, stored = sources(policy, replay, store=PrefixStore(config, CPU, tmp_path), say=said.append)
    for _ in range(6):
        torch.testing.assert_close(losses(policy, plain.draw()), losses(policy, stored.draw()), rtol=1e-5, atol=1e-6)
    assert "differ from what this policy encodes" in said[0]
    stored.prefixes.close()


# -- whether it pays ------------------------------------------------------------------------------------------------


def test_it_pays_where_loading_is_cheaper_than_encoding_and_there_is_room():
    """A state of 10 MB that takes 50 ms to encode, 3 to load, 2 to keep; 1,000 states drawn 100,000 times. Room for
    all: 99 % found, 3.5 of 50 ms. For a twentieth: .05 * 3 + .95 * 52 = 49.6 of 50 ms saves less than a tenth."""
    costs = Costs(encode=0.05, keep=0.002, load=0.003, read=0.0, num_bytes=1e7)
    room = Demand(states=1000, num_sampled=100_000, memory=10**10, disk=0)
    assert room.hit_rate(1e7) == pytest.approx(0.99)
    assert saves_time(costs, room)
    assert not saves_time(costs, replace(room, memory=5 * 10**8))
    assert not saves_time(replace(costs, encode=0.003), room), "a state that is encoded as fast as it is loaded"
    assert not saves_time(costs, replace(room, num_sampled=900)), "each state is drawn once"
    on_disk = replace(room, memory=0, disk=10**10)
    assert on_disk.from_disk(1e7) == 1
    assert saves_time(costs, on_disk)
    assert not saves_time(replace(costs, read=0.045), on_disk), "a slow disk"


def test_auto_says_once_what_it_decided_and_goes_on_without():
    policy = short(Pi05)
    replay, _ = pool(policy)
    said = []
    never = Demand(states=10**9, num_sampled=10**9, memory=10**6, disk=0)
    plain, stored = sources(policy, replay, store=store(), demand=never, say=said.append)
    for _ in range(6):
        a, b = plain.draw(), stored.draw()
        torch.testing.assert_close(losses(policy, a), losses(policy, b), rtol=1e-5, atol=1e-6)
    (line,) = said
    assert line.startswith("prefix cache off: it saves no time: a state takes 0.0")
    assert not stored.prefixes.is_used
    assert b.prefix is None
    assert stored.prefixes.figures() == {"on": False}
    stored.prefixes.close()
