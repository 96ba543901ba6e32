"""Acting in step with a learner and beside it: the same episodes, never mixed weights, never too far ahead."""

import threading
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from lerobot_policy_flow_mlp.adapter import FlowMlp
from tiny_env import FPS, assert_same_episode, point_spec

from poco_vla import load_adapter
from poco_vla.errors import NonFiniteError
from poco_vla.recording.recorder import EpisodeRecorder
from poco_vla.rollout import Actor, EnvPool
from poco_vla.rollout import actor as actor_module
from poco_vla.rollout.actor import ActingCopy, WeightsVersion
from poco_vla.rollout.interaction import AsynchronousInteraction, SynchronousInteraction

HORIZON = 4


def point_policy():
    """Reads the point's 4 numbers, gives 2: not trained."""
    torch.manual_seed(0)
    features = {
        "observation.state": {"dtype": "float32", "shape": (4,), "names": None},
        "action": {"dtype": "float32", "shape": (2,), "names": None},
    }
    numbers = {"min": -1.0, "max": 1.0, "mean": 0.0, "std": 1.0}
    stats = {
        key: {name: np.full(size, value) for name, value in numbers.items()}
        for key, size in (("observation.state", 4), ("action", 2))
    }
    return FlowMlp.from_dataset(features, stats, horizon=HORIZON, hidden_dims=[16, 16], num_inference_steps=2)


@pytest.fixture
def policy():
    return point_policy()


@pytest.fixture
def recorder(tmp_path):
    return EpisodeRecorder(tmp_path / "episodes", FPS)


def synchronous(policy, recorder, seed=0):
    actor, weights = Actor(policy, seed), WeightsVersion()
    return SynchronousInteraction(EnvPool(point_spec(3), HORIZON), actor, weights, recorder, 100)


def asynchronous(policy, recorder, **settings):
    weights = WeightsVersion()
    copy = ActingCopy(Actor(policy, 0), weights, 1)
    return AsynchronousInteraction(EnvPool(point_spec(3), HORIZON), copy, recorder, 100, **settings), weights


def rounds(interaction, count, until=1e9):
    """Everything that `count` rounds bring."""
    received = []
    for _ in range(count):
        interaction.act(best_of_n=1, until=until)
        received.append(interaction.receive(wait=True))
    return received


def episodes_of(received):
    return [episode for one in received for episode in one.episodes]


def wait_until(holds, seconds=20):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


# -- an actor's own weights -------------------------------------------------------------------------------------------


def test_on_a_gpu_acting_waits_neither_for_the_learner_nor_for_its_weights(policy, monkeypatch):
    """The stream and the copy are stood in for: new weights are acted with as soon as they have arrived, not before."""
    arrived, entered = [], []

    class Event:
        def record(self):
            pass

        def query(self):
            return bool(arrived)

        def synchronize(self):
            assert self.query() or not entered, "a chunk waits for weights"

    monkeypatch.setattr(actor_module, "_own_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered.append(stream) or nullcontext())
    weights, obs = WeightsVersion(), {"observation.state": np.zeros((1, 4), np.float32)}
    copy, untrained = ActingCopy(Actor(policy, 0), weights, 1), Actor(point_policy(), 1)
    with torch.no_grad(), weights.change(1):
        for p in policy.head.parameters():
            p.mul_(2)
    assert np.array_equal(copy.chunks(obs, [""]), untrained.chunks(obs, [""]))
    assert (copy.weights_version, entered) == (0, ["stream"])
    arrived.append(True)
    trained = Actor(policy, 1)
    trained.generator.set_state(untrained.generator.get_state())
    assert np.array_equal(copy.chunks(obs, [""]), trained.chunks(obs, [""]))
    assert copy.weights_version == 1


# -- in step ----------------------------------------------------------------------------------------------------------


def test_in_step_the_same_seed_gives_the_same_episodes(policy, tmp_path):
    played = []
    for name in ("a", "b"):
        interaction = synchronous(policy, EpisodeRecorder(tmp_path / name, FPS))
        played.append(episodes_of(rounds(interaction, 12)))
        interaction.close()
    assert len(played[0]) >= 6
    for a, b in zip(*played, strict=True):
        assert_same_episode(a, b)


def test_in_step_running_episodes_go_on_from_a_state(policy, tmp_path):
    whole = synchronous(policy, EpisodeRecorder(tmp_path / "a", FPS))
    rounds(whole, 5)
    state, generator = whole.state(), whole.actor.generator.get_state()
    expected = episodes_of(rounds(whole, 5))
    again = synchronous(policy, EpisodeRecorder(tmp_path / "b", FPS), seed=9)
    again.actor.generator.set_state(generator)
    again.restore(state)
    for a, b in zip(episodes_of(rounds(again, 5)), expected, strict=True):
        assert_same_episode(a, b)
        np.testing.assert_array_equal(a.policy_version, b.policy_version)


def test_every_step_knows_the_weights_that_chose_it(policy, recorder):
    """The version goes up by one a round: within an episode it is the round of each chunk of 4 steps."""
    interaction = synchronous(policy, recorder)
    received = []
    for version in range(8):
        with interaction.weights.change(version):
            pass
        received += rounds(interaction, 1)
        assert set(received[-1].versions) == {version}
        assert len(received[-1].versions) == received[-1].steps
    for episode in episodes_of(received):
        chunk = np.arange(len(episode)) // HORIZON
        assert (episode.policy_version - episode.policy_version[0] == chunk).all()
        assert not episode.interventions.any()


def test_an_episode_is_on_disk_before_the_next_round(policy, recorder):
    interaction, seen = synchronous(policy, recorder), 0
    for _ in range(12):
        seen += len(episodes_of(rounds(interaction, 1)))
        assert recorder.num_episodes == seen
    assert seen >= 6


# -- beside -----------------------------------------------------------------------------------------------------------


def test_beside_the_learner_acting_goes_on_by_itself_and_stops_where_it_may_not_go_on(policy, recorder):
    """At most one more round of 3 chunks of 4 steps is begun below the limit."""
    interaction, _ = asynchronous(policy, recorder)
    steps = []
    interaction.act(best_of_n=1, until=60.0)
    wait_until(lambda: steps.append(interaction.receive(wait=False).steps) or sum(steps) >= 60)
    time.sleep(0.3)
    steps.append(interaction.receive(wait=False).steps)
    assert sum(steps) < 60 + 12
    interaction.act(best_of_n=1, until=100.0)
    wait_until(lambda: steps.append(interaction.receive(wait=True).steps) or sum(steps) >= 100)
    interaction.close()


def test_beside_the_learner_everything_received_is_on_disk_in_the_same_order(policy, recorder):
    interaction, weights = asynchronous(policy, recorder)
    received = []
    for version in range(30):
        with weights.change(version):
            pass
        received += rounds(interaction, 1)
    interaction.close()
    received.append(interaction.receive(wait=False))
    episodes = episodes_of(received)
    assert len(episodes) >= 5
    for a, b in zip(recorder.load(["observation.state"]), episodes, strict=True):
        for name in ("action", "reward", "success", "terminal", "policy_version", "interventions"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    versions = [episode.policy_version for episode in episodes]
    assert all((np.diff(v) >= 0).all() for v in versions)
    assert len({int(v[0]) for v in versions}) > 1


def test_what_fails_beside_the_learner_is_raised_where_it_listens(policy, recorder):
    interaction, weights = asynchronous(policy, recorder)
    with torch.no_grad(), weights.change(1):
        next(policy.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteError):
        rounds(interaction, 100)
    interaction.close()


def test_closing_twice_or_before_the_first_step_is_fine(policy, recorder):
    interaction, _ = asynchronous(policy, recorder)
    interaction.close()
    interaction.close()
    assert threading.active_count() < 20


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["flow_mlp", "pi05", "groot_n1d6"])
def test_a_copy_owns_what_trains_and_shares_what_is_frozen(adapter):
    policy = load_adapter(adapter).tiny()
    copy = ActingCopy(Actor(policy, 0), WeightsVersion(), 1)
    for own, learned in zip(copy.policy.parameters(), policy.parameters(), strict=True):
        assert (own is learned) == (not learned.requires_grad)
        assert torch.equal(own, learned)
    assert not any(p.requires_grad for p in copy.policy.parameters())
    assert any(p.requires_grad for p in policy.parameters())


def test_a_copy_takes_new_weights_with_the_next_chunk_and_only_when_they_are_published(policy):
    obs, tasks = {"observation.state": np.zeros((2, 4), dtype=np.float32)}, [""] * 2
    weights = WeightsVersion()
    copy = ActingCopy(Actor(policy, 0), weights, 1)
    own, learned = next(copy.policy.parameters()), next(policy.parameters())
    before = learned.clone()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1)
    copy.chunks(obs, tasks)
    assert torch.equal(own, before)
    with weights.change(7):
        pass
    copy.chunks(obs, tasks)
    assert torch.equal(own, learned)
    assert copy.weights_version == 7


def test_a_copy_never_mixes_the_weights_of_two_updates(policy):
    """The learner adds 1 to every weight per update, as fast as it can: in a copy all have grown by as many."""
    weights = WeightsVersion()
    copy = ActingCopy(Actor(policy, 0), weights, 1)
    start = [parameter.clone() for parameter in copy.policy.parameters()]
    stop = threading.Event()

    @torch.no_grad()
    def learn():
        while not stop.is_set():
            with weights.change(weights.version + 1):
                for parameter in policy.parameters():
                    parameter.add_(1)
            time.sleep(1e-4)  # an update is more than its last step

    learner = threading.Thread(target=learn, daemon=True)
    learner.start()
    seen = set()
    while len(seen) < 50:
        copy._renew()
        grown = {round(float((p - s).mean())) for p, s in zip(copy.policy.parameters(), start, strict=True)}
        assert grown == {copy.weights_version}
        seen |= grown
    stop.set()
    learner.join()


def test_weights_that_go_back_are_renewed_too(policy):
    """What the collapse guard does: other weights, no update."""
    weights = WeightsVersion()
    copy = ActingCopy(Actor(policy, 0), weights, 1)
    with torch.no_grad(), weights.change(weights.version):
        for parameter in policy.parameters():
            parameter.zero_()
    copy.chunks({"observation.state": np.zeros((1, 4), dtype=np.float32)}, [""])
    assert not any(parameter.any() for parameter in copy.policy.parameters())
