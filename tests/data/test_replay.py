"""The pool against hand-derived TD quantities and against an obvious per-episode reference."""

import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace

import forked
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poco_vla.config import ReplayConfig, RewardConfig
from poco_vla.data import Episode, Replay, columns
from poco_vla.errors import ConfigError, DataError

RECORDED = RewardConfig(source="recorded")


def make(rewards, terminals, *, first=0, success=False, task="", state_dim=1):
    """An episode whose state and action at step k are both the number first + k."""
    length = len(rewards)
    numbers = np.arange(first, first + length, dtype=np.float32)[:, None]
    return Episode(
        obs={"observation.state": np.repeat(numbers, state_dim, axis=1)},
        action=numbers,
        reward=np.array(rewards, dtype=np.float32),
        success=np.array([success and k == length - 1 for k in range(length)]),
        terminal=np.array(terminals, dtype=bool),
        task=task,
    )


def all_transitions(episode, *, horizon, gamma):
    """Every transition of one episode, by the number of its start step."""
    replay = Replay(horizon=horizon, gamma=gamma, reward=RECORDED)
    replay.add(episode, is_demo=True)
    raw = replay.demo_transitions(1000, np.random.default_rng(0))
    return {
        int(raw.obs["observation.state"][i, 0]): {
            "next": raw.next_obs["observation.state"][i, 0],
            "actions": raw.actions[i, :, 0].tolist(),
            "valid": raw.valid[i].tolist(),
            "returns": raw.returns[i],
            "discount": raw.discount[i],
        }
        for i in range(len(raw.actions))
    }


# -- by hand: rewards 1, 2, 4, 8, 16 at steps 0 to 4, gamma 1/2, H 3 --------------------------------------------

REWARDS = (1, 2, 4, 8, 16)
ENDS = all_transitions(make(REWARDS, [0, 0, 0, 0, 1]), horizon=3, gamma=0.5)
CUT = all_transitions(make(REWARDS, [0, 0, 0, 0, 0]), horizon=3, gamma=0.5)


@pytest.mark.parametrize("transitions", [ENDS, CUT])
def test_a_chunk_inside_an_episode(transitions):
    """Start 0: 1 + 2/2 + 4/4 = 3; bootstraps from state 3 with (1/2)^3 = 1/8."""
    assert transitions[0] == {"next": 3, "actions": [0, 1, 2], "valid": [True] * 3, "returns": 3, "discount": 0.125}


def test_a_terminal_at_the_chunks_last_step():
    """Start 2, terminal at step 4: 4 + 8/2 + 16/4 = 12, no bootstrap, all three steps executed."""
    found = ENDS[2]
    assert (found["returns"], found["discount"]) == (12, 0)
    assert (found["actions"], found["valid"]) == ([2, 3, 4], [True, True, True])


def test_a_terminal_inside_the_chunk():
    """Start 3, terminal at step 4: 8 + 16/2 = 16, no bootstrap; a third step was not executed: the last repeats."""
    found = ENDS[3]
    assert (found["returns"], found["discount"]) == (16, 0)
    assert (found["actions"], found["valid"]) == ([3, 4, 4], [True, True, False])


def test_the_terminal_step_itself_starts_a_chunk():
    """Start 4: 16, no bootstrap, one step executed."""
    found = ENDS[4]
    assert (found["returns"], found["discount"], found["valid"]) == (16, 0, [True, False, False])


def test_a_time_limit_at_the_chunks_last_step():
    """Start 2: steps 2, 3, 4 were executed, but what followed step 4 is not stored. The last stored state is 4, reached
    after two steps: 4 + 8/2 = 8, bootstrap from it with (1/2)^2 = 1/4; the chunk itself stays whole."""
    assert CUT[2] == {"next": 4, "actions": [2, 3, 4], "valid": [True] * 3, "returns": 8, "discount": 0.25}


def test_a_time_limit_inside_the_chunk():
    """Start 3: one step to the last stored state: 8, bootstrap from state 4 with 1/2; two of three steps executed."""
    assert CUT[3] == {"next": 4, "actions": [3, 4, 4], "valid": [True, True, False], "returns": 8, "discount": 0.5}


def test_the_last_step_of_a_cut_off_episode_starts_nothing():
    assert sorted(CUT) == [0, 1, 2, 3]
    assert sorted(ENDS) == [0, 1, 2, 3, 4]


def test_a_terminal_in_mid_episode_stops_the_return_but_not_the_chunk():
    """Recording went on after success at step 1. Start 0: 1 + 2/2 = 2, no bootstrap, though step 2 was executed too.
    Start 2 lies behind it and is an ordinary chunk: 4 + 8/2 + 16/4 = 12, cut off at its last step: 8 and 1/4 from 4."""
    found = all_transitions(make(REWARDS, [0, 1, 0, 0, 0]), horizon=3, gamma=0.5)
    assert (found[0]["returns"], found[0]["discount"], found[0]["valid"]) == (2, 0, [True] * 3)
    assert (found[2]["returns"], found[2]["discount"], found[2]["next"]) == (8, 0.25, 4)


def test_success_is_an_end_even_where_the_environment_goes_on():
    """robosuite reports success and steps on. Start 3, success at step 4: 8 + 16/2 = 16 and no bootstrap, the same as
    after reading the episode back from a dataset."""
    found = all_transitions(make(REWARDS, [0] * 5, success=True), horizon=3, gamma=0.5)
    assert (found[3]["returns"], found[3]["discount"]) == (16, 0)


def test_a_horizon_of_one_is_one_step_td():
    """H 1 is ordinary TD: reward, gamma, next state; the terminal step has no next."""
    found = all_transitions(make(REWARDS, [0, 0, 0, 0, 1]), horizon=1, gamma=0.5)
    assert [(found[k]["returns"], found[k]["discount"]) for k in range(5)] == [
        (1, 0.5),
        (2, 0.5),
        (4, 0.5),
        (8, 0.5),
        (16, 0),
    ]
    assert [found[k]["next"] for k in range(4)] == [1, 2, 3, 4]


# -- against an obvious reference -------------------------------------------------------------------------------


def reference(episode, start, horizon, gamma):
    """One transition, step by step: walk until the horizon, a terminal, or the last state that is stored."""
    last = len(episode) - 1
    returns, discount, steps = 0.0, 1.0, 0
    for k in range(horizon):
        step = start + k
        if step > last or (step == last and not (episode.terminal[last] or episode.success[last])):
            break
        returns += gamma**k * float(episode.reward[step])
        discount *= gamma
        steps += 1
        if episode.terminal[step] or episode.success[step]:
            discount = 0.0
            break
    return {
        "next": float(episode.action[start + steps, 0]) if discount > 0 else None,
        "actions": [float(episode.action[min(start + k, last), 0]) for k in range(horizon)],
        "valid": [start + k <= last for k in range(horizon)],
        "returns": returns,
        "discount": discount,
        "is_success": bool(episode.success.any()),
        "task": episode.task,
    }


class ReferenceRing:
    """Which episodes live in a ring of `capacity` steps, cell by cell: an episode lies whole, and one whose cell is
    overwritten or skipped is gone."""

    def __init__(self, capacity):
        self.cells = [None] * capacity
        self.pointer = 0
        self.live = []

    def add(self, index, length):
        if self.pointer + length > len(self.cells):
            self._clear(range(self.pointer, len(self.cells)))
            self.pointer = 0
        taken = range(self.pointer, self.pointer + length)
        self._clear(taken)
        for cell in taken:
            self.cells[cell] = index
        self.pointer += length
        self.live.append(index)

    def _clear(self, cells):
        gone = {self.cells[cell] for cell in cells} - {None}
        self.cells = [None if owner in gone else owner for owner in self.cells]
        self.live = [index for index in self.live if index not in gone]


@st.composite
def episode_lists(draw, max_episodes=12, max_length=9):
    """Episodes with random lengths, rewards, ends and mid-episode terminals; steps are numbered throughout."""
    episodes, first = [], 0
    for _ in range(draw(st.integers(1, max_episodes))):
        length = draw(st.integers(1, max_length))
        rewards = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 3.0]), min_size=length, max_size=length))
        terminals = [False] * length
        terminals[-1] = draw(st.booleans())
        if draw(st.integers(0, 4)) == 0:
            terminals[draw(st.integers(0, length - 1))] = True
        task = draw(st.sampled_from(["push", "pull"]))
        episodes.append(make(rewards, terminals, first=first, success=draw(st.booleans()), task=task))
        first += length
    return episodes


def starts_of(episode):
    return len(episode) if episode.terminal[-1] or episode.success[-1] else len(episode) - 1


def compare(raw, expected):
    """Each sampled transition is that of its start step, and every expected start step was sampled."""
    seen = set()
    for i in range(len(raw.actions)):
        number = float(raw.obs["observation.state"][i, 0])
        assert number in expected, f"step {number} is not a live start"
        seen.add(number)
        want = expected[number]
        assert raw.actions[i, :, 0].tolist() == want["actions"]
        assert raw.valid[i].tolist() == want["valid"]
        assert raw.returns[i] == pytest.approx(want["returns"], abs=1e-5)
        assert raw.discount[i] == pytest.approx(want["discount"], abs=1e-7)
        if want["discount"] > 0:
            assert raw.next_obs["observation.state"][i, 0] == want["next"]
        assert bool(raw.is_success[i]) == want["is_success"]
        assert raw.tasks[i] == want["task"]
        assert bool(raw.is_demo[i]) == want["is_demo"]
    assert seen == set(expected)


@settings(max_examples=80, deadline=None)
@given(
    episodes=episode_lists(),
    num_demos=st.integers(0, 3),
    horizon=st.integers(1, 6),
    capacity=st.integers(9, 40),
    gamma=st.sampled_from([0.5, 0.98, 1.0]),
)
def test_every_sample_is_what_a_walk_through_its_episode_gives(episodes, num_demos, horizon, capacity, gamma):
    """Random episodes, horizons and capacities, far beyond a full ring. Each of at most 67 live start steps is missed
    by 3,000 uniform samples with a chance of e^-44."""
    replay = Replay(horizon=horizon, gamma=gamma, reward=RECORDED, config=ReplayConfig(capacity=capacity))
    ring = ReferenceRing(capacity)
    for i, episode in enumerate(episodes):
        replay.add(episode, is_demo=i < num_demos)
        if i >= num_demos:
            ring.add(i, len(episode))
    live = [*range(min(num_demos, len(episodes))), *ring.live]
    expected = {
        float(episodes[i].action[start, 0]): reference(episodes[i], start, horizon, gamma) | {"is_demo": i < num_demos}
        for i in live
        for start in range(starts_of(episodes[i]))
    }
    assert replay.num_online_steps == sum(len(episodes[i]) for i in ring.live)
    assert replay.num_online_episodes == len(ring.live)
    assert replay.num_demo_steps == sum(map(len, episodes[:num_demos]))
    if expected:
        compare(replay.sample(3000, np.random.default_rng(0)), expected)
    else:
        with pytest.raises(DataError, match="holds no transition"):
            replay.sample(1, np.random.default_rng(0))


def live_numbers(replay, count=4000):
    raw = replay.sample(count, np.random.default_rng(0))
    return set(raw.obs["observation.state"][:, 0].astype(int).tolist())


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=60), capacity=st.integers(8, 40))
def test_the_oldest_go_first_and_little_more_than_needed(lengths, capacity):
    """Whatever lives is an unbroken run of the newest steps; at most two gaps, each shorter than the longest episode,
    are lost to keeping episodes whole."""
    replay = Replay(horizon=3, gamma=0.9, config=ReplayConfig(capacity=capacity))
    total = 0
    for length in lengths:
        replay.add(make([0] * length, [0] * (length - 1) + [1], first=total), is_demo=False)
        total += length
        kept = replay.num_online_steps
        assert kept <= capacity
        assert kept >= min(total, capacity - 2 * (max(lengths) - 1))
    assert live_numbers(replay) == set(range(total - kept, total))


def test_a_full_ring_of_online_steps_leaves_all_demonstrations():
    """The published set-up fills the ring with offline data and overwrites it at once; here it stays."""
    replay = Replay(horizon=2, gamma=0.9, config=ReplayConfig(capacity=10))
    replay.extend([make([0] * 5, [0, 0, 0, 0, 1], first=5 * i) for i in range(4)], is_demo=True)
    for i in range(100):
        replay.add(make([0] * 5, [0, 0, 0, 0, 1], first=1000 + 5 * i), is_demo=False)
    assert live_numbers(replay) == set(range(20)) | set(range(1490, 1500))
    assert (replay.num_demo_steps, replay.num_online_steps, replay.num_online_episodes) == (20, 10, 2)


def test_demonstrations_come_in_one_call_or_many_alike():
    episodes = [make([i] * (3 + i), [0] * (2 + i) + [1], first=100 * i) for i in range(6)]
    together, apart, in_two = (Replay(horizon=3, gamma=0.9, reward=RECORDED) for _ in range(3))
    together.extend(episodes, is_demo=True)
    in_two.extend(episodes[:2], is_demo=True)
    in_two.extend(episodes[2:], is_demo=True)
    for episode in episodes:
        apart.add(episode, is_demo=True)
    first, *others = (replay.sample(500, np.random.default_rng(3)) for replay in (together, apart, in_two))
    for other in others:
        assert_same(first, other)


# -- sampling ---------------------------------------------------------------------------------------------------


def chi_square(numbers, cells):
    """Pearson's statistic of sampled step numbers against a uniform choice of `cells`, in standard deviations from its
    mean."""
    counts = np.array([(numbers == cell).sum() for cell in cells])
    assert counts.sum() == len(numbers)
    expected = len(numbers) / len(cells)
    freedom = len(cells) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def pool_of(demo_fraction=None, capacity=90):
    """25 demonstration starts in episodes of 1, 9 and 15 (numbers 0 to 24); online episodes of 1 to 15 steps that have
    wrapped the ring, every third cut off by a time limit."""
    replay = Replay(horizon=4, gamma=0.9, config=ReplayConfig(capacity=capacity, demo_fraction=demo_fraction))
    first, lengths = 0, (1, 9, 15)
    for length in lengths:
        replay.add(make([0] * length, [0] * (length - 1) + [1], first=first), is_demo=True)
        first += length
    rng, online = np.random.default_rng(1), []
    for i, length in enumerate(rng.integers(1, 16, size=40)):
        cut = i % 3 == 0
        replay.add(make([0] * length, [0] * (length - 1) + [not cut], first=first), is_demo=False)
        online.append(list(range(first, first + length - cut)))
        first += length
    kept = replay.num_online_episodes
    return replay, list(range(25)), [number for numbers in online[-kept:] for number in numbers]


def test_the_pool_is_sampled_uniformly():
    """6 standard deviations of chi-square: one seed in a billion fails, and a start step drawn twice as often does not
    pass (its cell alone contributes more than 1,000)."""
    replay, demos, online = pool_of()
    raw = replay.sample(100_000, np.random.default_rng(0))
    assert abs(chi_square(raw.obs["observation.state"][:, 0], demos + online)) < 6


def test_each_side_is_sampled_uniformly_under_a_demo_fraction():
    replay, demos, online = pool_of(demo_fraction=0.25)
    raw = replay.sample(100_000, np.random.default_rng(0))
    numbers = raw.obs["observation.state"][:, 0]
    assert raw.is_demo.sum() == 25_000
    assert abs(chi_square(numbers[raw.is_demo], demos)) < 6
    assert abs(chi_square(numbers[~raw.is_demo], online)) < 6


@pytest.mark.parametrize(("fraction", "num_demos"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_a_demo_fraction_is_exact_in_every_batch(fraction, num_demos):
    replay, *_ = pool_of(demo_fraction=fraction)
    rng = np.random.default_rng(0)
    assert {int(replay.sample(8, rng).is_demo.sum()) for _ in range(20)} == {num_demos}


@pytest.mark.parametrize("fraction", [None, 0.0, 0.5, 1.0])
def test_a_pool_with_one_side_empty_gives_the_other(fraction):
    """Stage 1 has no online episode yet; a pool without demonstrations is online-only RL."""
    episode = make([0] * 5, [0, 0, 0, 0, 1])
    for is_demo in (True, False):
        replay = Replay(horizon=2, gamma=0.9, config=ReplayConfig(demo_fraction=fraction))
        replay.add(episode, is_demo=is_demo)
        assert (replay.sample(16, np.random.default_rng(0)).is_demo == is_demo).all()


def test_demo_transitions_do_not_repeat_and_hold_no_online_step():
    replay, demos, _ = pool_of()
    raw = replay.demo_transitions(1000, np.random.default_rng(0))
    assert sorted(raw.obs["observation.state"][:, 0].astype(int).tolist()) == demos
    assert raw.is_demo.all()
    assert len(replay.demo_transitions(7, np.random.default_rng(0)).actions) == 7


def assert_same(a, b):
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, dict):
            for key, column in value.items():
                np.testing.assert_array_equal(column, other[key])
        else:
            np.testing.assert_array_equal(value, other)


def test_episodes_loaded_again_in_order_give_the_same_samples():
    """A resumed run fills a new pool with the recorded episodes: the ring has wrapped in between, samples agree."""
    rng = np.random.default_rng(5)
    episodes = [
        make(rng.normal(size=n), [0] * (n - 1) + [i % 2], first=100 * i) for i, n in enumerate(rng.integers(2, 12, 30))
    ]
    pools = []
    for _ in range(2):
        replay = Replay(horizon=4, gamma=0.9, reward=RECORDED, config=ReplayConfig(capacity=50))
        replay.extend(episodes[:3], is_demo=True)
        replay.extend(episodes[3:], is_demo=False)
        pools.append(replay.sample(200, np.random.default_rng(9)))
    assert_same(*pools)


def test_a_sample_is_a_copy():
    """What a caller does to a batch must not reach the pool."""
    replay, *_ = pool_of()
    before = replay.sample(50, np.random.default_rng(0))
    for column in (before.actions, before.obs["observation.state"], before.next_obs["observation.state"]):
        column += 1000
    after = replay.sample(50, np.random.default_rng(0))
    assert (after.actions == before.actions - 1000).all()
    assert (after.obs["observation.state"] == before.obs["observation.state"] - 1000).all()


def test_images_stay_bytes():
    image = np.arange(5 * 2 * 2 * 3, dtype=np.uint8).reshape(5, 2, 2, 3)
    plain = make([0] * 5, [0, 0, 0, 0, 1])
    episode = replace(plain, obs={**plain.obs, "observation.image": image})
    replay = Replay(horizon=2, gamma=0.9)
    replay.add(episode, is_demo=True)
    raw = replay.sample(30, np.random.default_rng(0))
    numbers = raw.obs["observation.state"][:, 0].astype(int)
    assert raw.obs["observation.image"].dtype == np.uint8
    np.testing.assert_array_equal(raw.obs["observation.image"], image[numbers])


# -- how much is kept -------------------------------------------------------------------------------------------

STEP_BYTES = 4 + 4 + 4 + 1
"""Of :func:`make`: a state and an action of one float32 each, a float32 reward, a terminal of one byte."""


@settings(max_examples=40, deadline=None)
@given(episodes=episode_lists(), capacity=st.integers(9, 40), max_bytes=st.integers(9 * STEP_BYTES, 40 * STEP_BYTES))
def test_the_smaller_of_steps_and_bytes_holds(episodes, capacity, max_bytes):
    """A budget in bytes is one in steps, by the bytes of a step."""
    smaller = min(capacity, max_bytes // STEP_BYTES)
    by_both = Replay(horizon=3, gamma=0.9, config=ReplayConfig(capacity=capacity, max_bytes=max_bytes))
    by_steps = Replay(horizon=3, gamma=0.9, config=ReplayConfig(capacity=smaller))
    for episode in episodes:
        for replay in (by_both, by_steps):
            replay.add(episode, is_demo=False)
        assert by_both.num_bytes == by_both.num_online_steps * STEP_BYTES <= max_bytes
        assert by_both.num_online_episodes == by_steps.num_online_episodes
    if any(map(starts_of, episodes[-by_both.num_online_episodes :])):
        assert_same(*(replay.sample(50, np.random.default_rng(0)) for replay in (by_both, by_steps)))


def test_bytes_count_pictures_and_no_demonstration():
    """4 x 4 pictures of 48 bytes: 61 bytes per step, two episodes of 4 steps in 500."""
    replay = Replay(horizon=2, gamma=0.9, config=ReplayConfig(max_bytes=500))
    for first in range(0, 400, 100):
        replay.add(pictured(make([0] * 4, [0, 0, 0, 1], first=first)), is_demo=True)
        replay.add(pictured(make([0] * 4, [0, 0, 0, 1], first=first)), is_demo=False)
    assert (replay.num_demo_steps, replay.num_online_steps) == (16, 8)
    assert replay.num_bytes == (16 + 8) * (STEP_BYTES + 48)


@settings(max_examples=40, deadline=None)
@given(episodes=episode_lists(), capacity=st.integers(9, 40))
def test_demonstrations_are_evicted_when_that_is_asked_for_and_only_then(episodes, capacity):
    """With a capacity of their own their ring is as the other; in one call or in many."""
    apart, together = (
        Replay(horizon=3, gamma=0.9, config=ReplayConfig(demo_capacity=capacity, capacity=9)) for _ in range(2)
    )
    ring = ReferenceRing(capacity)
    together.extend(episodes, is_demo=True)
    for i, episode in enumerate(episodes):
        ring.add(i, len(episode))
        apart.add(episode, is_demo=True)
    live = {float(k) for i in ring.live for k in episodes[i].action[: starts_of(episodes[i]), 0]}
    for replay in (apart, together):
        assert replay.num_demo_steps == sum(len(episodes[i]) for i in ring.live)
        if live:
            assert live_numbers(replay) == live


@pytest.mark.parametrize(
    ("settings_", "is_demo", "words"),
    [
        ({"max_bytes": 4 * STEP_BYTES + 3}, False, "replay buffer of 4 steps; raise replay.max_bytes"),
        ({"max_bytes": 9 * STEP_BYTES, "capacity": 4}, False, "replay buffer of 4 steps; raise replay.capacity"),
        ({"demo_capacity": 4}, True, "replay buffer of 4 steps; raise replay.demo_capacity"),
    ],
)
def test_an_episode_that_is_too_long_is_told_which_limit_to_raise(settings_, is_demo, words):
    replay = Replay(horizon=2, gamma=0.9, config=ReplayConfig(**settings_))
    with pytest.raises(DataError, match=f"of 5 steps does not fit a {words}"):
        replay.add(make([0] * 5, [0, 0, 0, 0, 1]), is_demo=is_demo)


@pytest.mark.parametrize(
    ("name", "value"),
    [("capacity", 0), ("max_bytes", 0), ("demo_capacity", 0), ("demo_fraction", 1.5)],
)
def test_limits_that_cannot_hold_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"replay\.{name} is "):
        ReplayConfig(**{name: value})


def test_what_is_noted_of_episodes_does_not_grow_with_those_that_are_gone():
    replay = Replay(horizon=2, gamma=0.9, config=ReplayConfig(capacity=20))
    for i in range(3000):
        replay.add(make([0] * 3, [0, 0, 1], first=3 * i), is_demo=False)
    assert len(replay._online._spans.begin) <= 64
    assert live_numbers(replay) == set(range(3 * 3000 - 18, 3 * 3000))


@pytest.mark.parametrize("limit", [1, 7, 64, 1000])
def test_a_column_that_grows_to_its_limit_copies_no_more_than_half_of_it(limit):
    """Old and new array together never take more than the full one and a half; it is copied once for each power of two
    in the limit (and made once); every row keeps what it held."""
    column, arrays = columns.MemoryColumn((2,), np.dtype(np.float32)), set()
    for steps in range(1, limit + 1):
        before = column.rows
        column.hold(steps, limit)
        assert steps <= len(column.rows) <= limit
        assert column.rows is before or 2 * len(before) <= limit
        arrays.add(len(column.rows))
        column.rows[steps - 1] = steps
    assert len(arrays) == limit.bit_length()
    assert column.rows[:, 1].tolist() == list(range(1, limit + 1))


# -- pictures in a mapped file ----------------------------------------------------------------------------------


def pictured(episode):
    """The same episode with 4 x 4 pictures, each of its own step's number and of noise."""
    numbers = episode.action[:, 0].astype(int)
    pictures = [np.random.default_rng(number).integers(0, 256, (4, 4, 3)) for number in numbers]
    return replace(episode, obs={**episode.obs, "observation.image": np.array(pictures, dtype=np.uint8)})


@settings(max_examples=25, deadline=None)
@given(episodes=episode_lists(), num_demos=st.integers(0, 3), capacity=st.integers(9, 40), step=st.integers(1, 600))
def test_mapped_pictures_are_those_in_memory(episodes, num_demos, capacity, step, tmp_path_factory):
    """Whatever the steps by which the file grows, before and after the ring is full, every batch is the same."""
    folder = tmp_path_factory.mktemp("mapped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "FILE_STEP", step)
        held, mapped = (
            Replay(horizon=3, gamma=0.9, config=ReplayConfig(capacity=capacity, images=images), folder=folder)
            for images in ("memory", "mapped")
        )
        for i, episode in enumerate(map(pictured, episodes)):
            for replay in (held, mapped):
                replay.add(episode, is_demo=i < num_demos)
            if any(map(starts_of, episodes[max(0, i + 1 - held.num_online_episodes) : i + 1])):
                assert_same(*(replay.sample(20, np.random.default_rng(i)) for replay in (held, mapped)))
    for ring in (mapped._demos, mapped._online):
        if ring.num_episodes:
            assert isinstance(ring["observation.image"].base, np.memmap)
            assert not isinstance(ring["observation.state"].base, np.memmap)
    assert not any(folder.iterdir())


@pytest.mark.parametrize(("limit", "sizes"), [(None, [5, 10, 15, 20]), (12, [5, 10, 12])])
def test_a_mapped_column_grows_in_steps_up_to_its_limit(limit, sizes, tmp_path, monkeypatch):
    """Steps of 5 rows of 3 bytes."""
    monkeypatch.setattr(columns, "FILE_STEP", 15)
    column, found = columns.MappedColumn((3,), np.dtype(np.uint8), tmp_path), []
    for steps in range(1, sizes[-1] + 1):
        column.hold(steps, limit)
        column.rows[steps - 1] = steps
        found.append(len(column.rows))
    assert list(dict.fromkeys(found)) == sizes
    assert column.rows[:, 2].tolist() == list(range(1, sizes[-1] + 1))


FILL = """
import sys, time
from pathlib import Path
import numpy as np
from poco_vla.config import ReplayConfig
from poco_vla.data import Episode, Replay
from poco_vla.errors import DataError

def episode(length):
    last = np.arange(length) == length - 1
    obs = {"observation.image": np.ones((length, 64, 64, 3), np.uint8)}
    return Episode(obs, np.zeros((length, 1), np.float32), last.astype(np.float32), last, last)

folder = Path(sys.argv[1])
replay = Replay(horizon=2, gamma=0.9, config=ReplayConfig(images="mapped", capacity=100_000), folder=folder)
"""


@pytest.mark.skipif(os.name != "posix", reason="other platforms delete the file when it is closed")
def test_nothing_is_left_behind_by_a_process_that_is_killed(tmp_path):
    program = FILL + "replay.add(episode(50), is_demo=False)\nprint('filled', flush=True)\ntime.sleep(60)"
    process = forked.Popen([sys.executable, "-c", program, tmp_path / "pool"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "filled\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not any((tmp_path / "pool").iterdir())


def test_a_disk_that_is_full_is_an_error_and_not_the_processes_end(tmp_path):
    """A file system of 4 MB in a name space of its own: 325 pictures of 64 x 64 fit, 400 do not. A hole in the mapped
    file would kill the process with SIGBUS when it is written."""
    program = FILL.replace("replay = ", "from poco_vla.data import columns\ncolumns.FILE_STEP = 1 << 20\nreplay = ") + (
        "replay.add(episode(100), is_demo=False)\n"
        "try:\n    replay.add(episode(300), is_demo=False)\n"
        "except DataError as error:\n    print(error)\n"
        "replay.add(episode(100), is_demo=False)\n"
        "raw = replay.sample(500, np.random.default_rng(0))\n"
        "print(replay.num_online_steps, raw.obs['observation.image'].min())\n"
    )
    inside = 'mount -t tmpfs -o size=4m pool "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", inside, "sh", tmp_path, sys.executable, program]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if "unshare" in ran.stderr or "mount" in ran.stderr:
        pytest.skip("this machine lets nobody mount in a name space of their own")
    assert ran.returncode == 0, ran.stderr
    told, left = ran.stdout.splitlines()
    assert f"{tmp_path} has no room for pictures of the replay buffer" in told
    assert left == "200 1"


def test_a_full_disk_leaves_the_pool_as_it_was(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(columns, "FILE_STEP", 1)
    replay = Replay(horizon=2, gamma=0.9, config=ReplayConfig(images="mapped"), folder=tmp_path)
    replay.add(pictured(make([0] * 4, [0, 0, 0, 1])), is_demo=False)
    before = replay.sample(50, np.random.default_rng(0))
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(DataError, match="No space left on device"):
        replay.add(pictured(make([0] * 4, [0, 0, 0, 1], first=10)), is_demo=False)
    assert (replay.num_online_steps, replay.num_online_episodes) == (4, 1)
    assert_same(before, replay.sample(50, np.random.default_rng(0)))


def test_mapped_pictures_need_a_folder():
    with pytest.raises(ConfigError, match="was given no folder"):
        Replay(horizon=2, gamma=0.9, config=ReplayConfig(images="mapped"))


# -- what cannot work -------------------------------------------------------------------------------------------


def test_an_episode_without_steps_is_refused():
    with pytest.raises(DataError, match="without a single step"):
        Replay(horizon=2, gamma=0.9).add(make([], []), is_demo=True)


def test_an_episode_longer_than_the_capacity_is_refused_and_the_pool_left_as_it_was():
    replay = Replay(horizon=2, gamma=0.9, config=ReplayConfig(capacity=4))
    replay.add(make([0] * 4, [0, 0, 0, 1]), is_demo=False)
    with pytest.raises(DataError, match=r"of 5 steps does not fit a replay buffer of 4 steps; raise replay.capacity"):
        replay.add(make([0] * 5, [0, 0, 0, 0, 1]), is_demo=False)
    assert live_numbers(replay) == {0, 1, 2, 3}


def test_an_episode_of_exactly_the_capacity_fits_again_and_again():
    replay = Replay(horizon=2, gamma=0.9, config=ReplayConfig(capacity=4))
    for first in (0, 10, 20):
        replay.add(make([0] * 4, [0, 0, 0, 1], first=first), is_demo=False)
        assert live_numbers(replay) == set(range(first, first + 4))


@pytest.mark.parametrize("first_is_demo", [True, False])
@pytest.mark.parametrize("second_is_demo", [True, False])
def test_episodes_of_another_shape_are_refused_when_they_come(first_is_demo, second_is_demo):
    """A dataset of another task beside the environment's episodes must not surface as an error in mid-training."""
    replay = Replay(horizon=2, gamma=0.9)
    replay.add(make([0] * 3, [0, 0, 1]), is_demo=first_is_demo)
    message = r'"observation.state" has shape \(2,\) per step, the replay buffer holds \(1,\)'
    with pytest.raises(DataError, match=message):
        replay.add(make([0] * 3, [0, 0, 1], state_dim=2), is_demo=second_is_demo)


def test_pictures_as_fractions_do_not_meet_pictures_as_bytes():
    """float32 in [0, 1] cut to bytes would be black."""
    replay = Replay(horizon=2, gamma=0.9)
    episode = pictured(make([0] * 3, [0, 0, 1]))
    replay.add(episode, is_demo=True)
    fractions = replace(episode, obs={k: v.astype(np.float32) for k, v in episode.obs.items()})
    with pytest.raises(DataError, match=r'"observation.image" is float32, the replay buffer holds uint8'):
        replay.add(fractions, is_demo=False)


def renamed(episode, *names):
    """The same episode with its state under these names."""
    state = episode.obs["observation.state"]
    return replace(episode, obs=dict.fromkeys(names, state))


@pytest.mark.parametrize("second_is_demo", [True, False])
def test_an_episode_that_lacks_a_column_is_refused_when_it_comes(second_is_demo):
    replay = Replay(horizon=2, gamma=0.9)
    replay.add(make([0] * 3, [0, 0, 1]), is_demo=True)
    other = renamed(make([0] * 3, [0, 0, 1]), "observation.other")
    with pytest.raises(
        DataError, match=r'no "observation.state", which the replay buffer holds; its columns: .*observation.other'
    ):
        replay.add(other, is_demo=second_is_demo)


def test_columns_beyond_the_pools_are_left_out():
    """Demonstrations are read with the policy's inputs only; the environment may show more."""
    replay = Replay(horizon=2, gamma=0.9)
    replay.add(make([0] * 3, [0, 0, 1]), is_demo=True)
    for first in (10, 20):
        replay.add(
            renamed(make([0] * 3, [0, 0, 1], first=first), "observation.other", "observation.state"), is_demo=False
        )
    raw = replay.sample(500, np.random.default_rng(0))
    assert set(raw.obs) == set(raw.next_obs) == {"observation.state"}
    assert live_numbers(replay) == {0, 1, 2, 10, 11, 12, 20, 21, 22}


def test_an_empty_pool_says_that_it_is_empty():
    replay = Replay(horizon=2, gamma=0.9)
    with pytest.raises(DataError, match="holds no transition"):
        replay.sample(4, np.random.default_rng(0))
    replay.add(make([0], [0]), is_demo=True)
    with pytest.raises(DataError, match="holds no transition"):
        replay.sample(4, np.random.default_rng(0))


def test_memory_is_taken_as_episodes_come_not_for_the_whole_capacity():
    """A pool of 10^9 steps of 1,000 numbers would be 4 TB; three short episodes in it are not."""
    replay = Replay(horizon=2, gamma=0.9, config=ReplayConfig(capacity=10**9))
    for first in (0, 10, 20):
        replay.add(make([0, 0, 1], [0, 0, 1], first=first, state_dim=1000), is_demo=False)
    assert replay.num_online_steps == 9
    assert len(replay._online["action"]) < 100


def test_a_growing_ring_wraps_at_its_capacity():
    """Capacity 7, episodes of 3: two fit, the third begins at 0 again and takes the first one's place."""
    replay = Replay(horizon=1, gamma=0.9, config=ReplayConfig(capacity=7))
    for first in (0, 10, 20):
        replay.add(make([0, 0, 1], [0, 0, 1], first=first), is_demo=False)
    assert replay.num_online_episodes == 2
    seen = replay.sample(200, np.random.default_rng(0)).obs["observation.state"]
    assert set(seen[:, 0]) == {10, 11, 12, 20, 21, 22}


# -- several instructions in one episode ------------------------------------------------------------------------------


def pick_then_place(length=6):
    """An episode whose state says the step, and whose instruction changes at half of it."""
    steps = np.arange(length, dtype=np.float32)
    return Episode(
        obs={"observation.state": steps[:, None]},
        action=np.zeros((length, 2), np.float32),
        reward=np.zeros(length, np.float32),
        success=steps == length - 1,
        terminal=steps == length - 1,
        task="pick",
        step_tasks=("pick",) * (length // 2) + ("place",) * (length - length // 2),
    )


@pytest.mark.parametrize("is_demo", [True, False])
def test_each_transition_has_the_instructions_of_its_own_two_states(is_demo):
    pool = Replay(horizon=2, gamma=0.9)
    pool.extend([replace(pick_then_place(4), step_tasks=None, task="wait"), pick_then_place()], is_demo=is_demo)
    drawn = pool.sample(200, np.random.default_rng(0))
    said = {("pick", step) for step in range(3)} | {("place", step) for step in range(3, 6)}
    said |= {("wait", step) for step in range(4)}
    assert {(t, int(x[0])) for t, x in zip(drawn.tasks, drawn.obs["observation.state"], strict=True)} == said
    nexts = {(t, int(x[0])) for t, x in zip(drawn.next_tasks, drawn.next_obs["observation.state"], strict=True)}
    assert nexts <= said
    assert ("place", 3) in nexts


def test_a_state_has_its_own_steps_instruction_by_its_id():
    pool = Replay(horizon=2, gamma=0.9)
    first = pool.add(pick_then_place(), is_demo=True)
    _, tasks = pool.observations(np.arange(first, first + 6))
    assert tasks == ["pick"] * 3 + ["place"] * 3


def test_instructions_of_evicted_episodes_are_forgotten_and_the_others_keep_theirs():
    pool = Replay(horizon=2, gamma=0.9, config=ReplayConfig(capacity=12))
    for _ in range(5):
        pool.add(pick_then_place(), is_demo=False)
    assert len(pool._online._spans.step_tasks) == pool.num_online_episodes == 2
    drawn = pool.sample(100, np.random.default_rng(0))
    for task, x in zip(drawn.tasks, drawn.obs["observation.state"], strict=True):
        assert task == ("pick" if x[0] < 3 else "place")
