"""Acting on a Ray cluster of two nodes on this machine: what comes back is whole, what dies is replaced.

Workers take seconds to start: a test asks much of each.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from lerobot.processor import DeviceProcessorStep
from pointmass_run import small
from test_interaction import HORIZON, episodes_of, point_policy, wait_until
from tiny_env import FPS, assert_same_episode, point_spec

from poco_vla import Poco, PocoConfig, load_adapter
from poco_vla.config import InteractionConfig, TrainConfig
from poco_vla.errors import ConfigError, PocoError
from poco_vla.experience.interactions import Acting
from poco_vla.recording.recorder import EpisodeRecorder
from poco_vla.rollout import Actor, EnvPool, cluster, cluster_worker, object_store
from poco_vla.rollout.actor import WeightsVersion, learned_parameters
from poco_vla.rollout.cluster import ClusterInteraction
from poco_vla.training import Trainer

os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # read at import: the loopback interface alone
pytest.importorskip("ray")
pytestmark = pytest.mark.xdist_group("ray")

HERE = Path(__file__).parent
FIRST_SEED = 100
NODE = {"num_cpus": 2, "node_ip_address": "127.0.0.1"}
PATIENCE = 600
"""Seconds that workers may take on a busy machine."""


@pytest.fixture(scope="module")
def nodes():
    """Two nodes, this process being the driver."""
    own = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": f"{HERE}:{HERE.parent}",  # where workers find the tests' environments
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    import ray
    from ray.cluster_utils import Cluster

    quickly = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}
    head = {"object_store_memory": 200 * 1024**2, "_system_config": quickly, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=NODE | head)
    try:
        nodes.add_node(**NODE)
        ray.init(address=nodes.address, log_to_driver=False)
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def acting(nodes, tmp_path):
    """Makes interactions, and closes them."""
    made, told = [], []

    def make(policy, env, workers=2, **changes):
        weights, recorder = WeightsVersion(), EpisodeRecorder(tmp_path / "episodes", FPS)
        settings = InteractionConfig(mode="ray", workers=workers)
        arguments = (env, HORIZON, Actor(policy, 0), weights, recorder, FIRST_SEED)
        made.append(ClusterInteraction(*arguments, settings=settings, seed=0, say=told.append, **changes))
        made[-1].told = told
        return made[-1]

    yield make
    for one in made:
        one.close()


def played(interaction, until, holds):
    """Everything that comes until `holds(received)`."""
    received, deadline = [], time.monotonic() + PATIENCE
    interaction.act(best_of_n=1, until=until)
    while not holds(received):
        assert time.monotonic() < deadline, f"waited in vain; {interaction.told}"
        received.append(interaction.receive(wait=True))
    return received


def steps_of(received):
    return sum(one.steps for one in received)


def pid_of(interaction, index):
    import ray

    return ray.get(interaction._slots[index].actor.__ray_call__.remote(lambda self: os.getpid()))


def assert_whole(episodes):
    """From the state that the seed begins with to an end, and of no seed two."""
    seeds = [episode.seed for episode in episodes]
    assert len(set(seeds)) == len(seeds)
    for episode in episodes:
        with EnvPool(point_spec(1), HORIZON) as pool:
            pool.reset(episode.seed)
            np.testing.assert_array_equal(episode.obs["observation.state"][0], pool.obs["observation.state"][0])
        assert episode.terminal[-1] or len(episode) == 12
        assert not episode.terminal[:-1].any()


# -- what workers play ------------------------------------------------------------------------------------------------


def test_workers_play_what_pools_here_would_play_with_the_same_weights_up_to_the_limit(acting, tmp_path):
    """Weights that are not those the policy had when it was sent. At most one worker's round of 2 chunks of 4 steps is
    begun below the limit; what a pool here plays with a worker's seeds and noise is the same, bit for bit."""
    policy, env = point_policy(), point_spec(2)
    interaction = acting(policy, env)
    with torch.no_grad(), interaction.weights.change(7):
        for parameter in policy.parameters():
            parameter.mul_(1.3)
    received = played(interaction, 200.0, lambda got: steps_of(got) >= 200)
    time.sleep(0.3)
    received.append(interaction.receive(wait=False))
    assert 200 <= steps_of(received) < 200 + 8
    episodes = episodes_of(received)
    assert len(episodes) >= 12
    assert_whole(episodes)
    assert set(np.concatenate([one.versions for one in received])) == {7}
    assert all((episode.policy_version == 7).all() for episode in episodes)
    recorded = interaction.recorder.load(["observation.state"])[: len(episodes)]  # a round may still be under way
    for a, b in zip(recorded, episodes, strict=True):
        np.testing.assert_array_equal(a.action, b.action)
    for index in range(2):
        noise = int(np.random.SeedSequence((0, FIRST_SEED, index, 0)).generate_state(1)[0])
        actor = Actor(policy, noise)
        mine = [episode for episode in episodes if (episode.seed - FIRST_SEED) % 4 // 2 == index]
        with EnvPool(env, HORIZON, stride=4) as pool:
            pool.reset([FIRST_SEED + 2 * index, FIRST_SEED + 2 * index + 1])
            twins = []
            while len(twins) < len(mine):
                twins += pool.step(actor.chunks(pool.obs, pool.tasks), 7)[0]
        for a, b in zip(mine, twins, strict=True):
            assert_same_episode(a, b)
    with torch.no_grad(), interaction.weights.change(8):
        next(policy.parameters()).fill_(torch.nan)
    with pytest.raises(PocoError, match=r"worker . cannot act: NonFiniteError: the policy sampled a non-finite action"):
        played(interaction, 1e9, lambda got: len(got) > 10_000)


@pytest.mark.parametrize("node_too", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_a_killed_worker_and_a_killed_node_are_replaced_and_no_half_of_an_episode_is_kept(acting, nodes, node_too):
    """SIGKILL to one of two workers, after some episodes: the seeds that it was in never come; later ones of its place
    do. Then to a whole node; another takes its place."""
    interaction = acting(point_policy(), point_spec(2, in_process=False))
    received = played(interaction, 1e9, lambda got: len(episodes_of(got)) >= 4)
    os.kill(pid_of(interaction, 0), signal.SIGKILL)
    wait_until(lambda: interaction._slots[0].lives == 2, PATIENCE)
    first_of_second_life = min(interaction._slots[0].seeds)
    with interaction.weights.change(3):
        pass

    def both_go_on(got):
        seeds = [episode.seed for episode in episodes_of(got)]
        mine = [seed for seed in seeds if (seed - FIRST_SEED) % 4 < 2]
        return mine and max(mine) >= first_of_second_life

    received += played(interaction, 1e9, both_go_on)
    if node_too:
        lives = sum(slot.lives for slot in interaction._slots)
        nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
        nodes.add_node(**NODE)
        wait_until(lambda: sum(slot.lives for slot in interaction._slots) > lives, PATIENCE)
    seen = max(episode.seed for episode in episodes_of(received))
    received += played(interaction, 1e9, lambda got: {e.seed % 2 for e in episodes_of(got) if e.seed > seen} == {0, 1})
    interaction.close()
    received.append(interaction.receive(wait=False))
    episodes = episodes_of(received)
    assert_whole(episodes)
    assert len(interaction.recorder.load(["observation.state"])) == len(episodes)
    assert any("Ray worker 0 died and is replaced" in text for text in interaction.told)
    assert {0, 3} >= {int(v) for episode in episodes for v in episode.policy_version}
    assert episodes[-1].policy_version[-1] == 3


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_again_and_again_ends_in_an_error(acting, monkeypatch):
    """Its simulator kills it at the third step. Twice, here."""
    monkeypatch.setattr(cluster, "MOST_DEATHS", 1)
    interaction = acting(point_policy(), point_spec(1, kind="Deadly"), workers=1)
    with pytest.raises(PocoError, match="worker 0 died 2 times without finishing an episode"):
        played(interaction, 1e9, lambda got: len(got) > 10_000)
    assert interaction.recorder.num_episodes == 0
    interaction.close()
    interaction.close()


def test_without_ray_or_with_another_kind_of_address_words_say_what_to_do(monkeypatch):
    monkeypatch.setattr("poco_vla.experience.interactions.find_spec", lambda name: None)
    parts = object.__new__(Acting)  # what is looked at when a run is put together
    object.__setattr__(parts, "config", TrainConfig(online_steps=0, interaction=InteractionConfig(mode="ray")))
    with pytest.raises(ConfigError, match=r'pip install "poco-vla\[ray\]"'):
        parts.__post_init__()
    monkeypatch.undo()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    for settings, words in (
        (InteractionConfig(mode="ray", address=address), rf"no Ray cluster at {address}: .*ray start --address"),
        (InteractionConfig(mode="ray", workers=3, worker_gpus=50.0), "3 workers with worker_gpus 50.0 need 150 GPUs"),
    ):
        object.__setattr__(parts, "config", TrainConfig(online_steps=0, interaction=settings))
        with pytest.raises(ConfigError, match=words):
            parts.__post_init__()
    with pytest.raises(ConfigError, match="has no object store"):
        InteractionConfig(mode="ray", address="ray://head:10001")
    for changes in ({"workers": 0}, {"worker_cpus": 0.0}, {"worker_gpus": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            InteractionConfig(mode="ray", **changes)


# -- policies on their way --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["flow_mlp", "pi05", "groot_n1d6", "smolvla"])
def test_a_policy_arrives_as_it_was_sent_and_what_is_frozen_is_shared(nodes, adapter):
    """Through the object store: the same chunks from the same noise; what trains can be written to."""
    import ray

    policy = load_adapter(adapter).tiny()
    algorithm = Poco(policy, PocoConfig(critic_hidden=(8,))).for_acting(2)
    with object_store.tensors_as_bytes():
        sent = ray.put(algorithm)
    with object_store.read_only_tensors():
        there = ray.get(sent)
    arrived = there.policy
    obs = policy.example_obs(2)
    noise = torch.randn(2, 1, policy.spec.horizon, policy.spec.width, generator=torch.Generator().manual_seed(0))
    t = torch.full((2, 1), 0.3)
    one, other = policy.encode(obs), arrived.encode(obs)
    assert torch.equal(one.features, other.features)
    assert torch.equal(policy.velocity(one, noise, t), arrived.velocity(other, noise, t))
    assert {name for name, p in arrived.named_parameters() if p.requires_grad} == {
        name for name, p in policy.named_parameters() if p.requires_grad
    }
    own, learned = learned_parameters(there), learned_parameters(algorithm)
    assert len(own) == len(learned) > 4
    for a, b in zip(own, learned, strict=True):
        a.detach().copy_(object_store.from_bytes(object_store.to_bytes(b + 1), b.dtype, b.shape))
        assert torch.equal(a, b + 1)
    frozen = [p for p in arrived.parameters() if not p.requires_grad]
    again = [p for p in ray.get(sent).policy.parameters() if not p.requires_grad]
    assert [p.data_ptr() for p in frozen] == [p.data_ptr() for p in again], "one copy for all workers of a node"
    actions = noise[:, 0, :, : policy.spec.action_dim]
    assert torch.equal(policy.postprocess(actions), arrived.postprocess(actions))


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_run_trains_on_the_cluster_and_its_checkpoint_opens_with_more_workers(nodes, tmp_path):
    settings = InteractionConfig(mode="ray", ahead=60, workers=1)
    config = small(tmp_path / "run", tmp_path / "data", interaction=settings, online_steps=300, best_of_n=2)
    before = signal.getsignal(signal.SIGTERM)
    trainer = Trainer(config)
    try:
        result = trainer.run()
        assert result.env_steps >= 300
        assert trainer.progress.update > config.sft_steps + config.warmup_steps
    finally:
        trainer.close()
        AcceleratorState._reset_state(reset_partial_state=True)
    again = Trainer(replace(config, resume=True, interaction=replace(settings, workers=2)))
    again.close()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert again.progress.env_steps >= 300
    assert again.progress.update == trainer.progress.update
    episodes = EpisodeRecorder(config.output_dir / "episodes", 10).load(["observation.state"])
    assert len(episodes) >= 5
    assert max(e.policy_version[-1] for e in episodes) > config.sft_steps
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("adapter", ["flow_mlp", "groot_n1d6", "pi05", "smolvla"])
def test_a_policys_processors_move_with_it(adapter, monkeypatch):
    """A learner's worker may act on another kind of device."""
    moved = []
    monkeypatch.setattr(DeviceProcessorStep, "__post_init__", lambda step: moved.append(step.device))
    policy = load_adapter(adapter).tiny()
    moved.clear()
    assert cluster_worker._set_device(policy, "cuda") == "cuda"
    assert moved == ["cuda"]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_ctrl_c_saves_and_no_process_of_the_runs_own_cluster_is_left(tmp_path):
    """Ctrl-C reaches the whole process group, as at a terminal."""
    run, shown = tmp_path / "run", tmp_path / "shown"
    words = ["--output-dir", run, "--demonstrations.root", tmp_path / "data", "--online-steps", 100_000]
    words += ["--interaction.mode", "ray", "--interaction.workers", 1, "--interaction.ahead", 60]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    log = run / "episodes.jsonl"
    command = [sys.executable, str(HERE.parent / "pointmass_run.py"), *map(str, words)]
    with shown.open("w") as file:
        process = subprocess.Popen(command, env=environ, stdout=file, stderr=file, start_new_session=True)
    try:
        wait_until(lambda: process.poll() is not None or (log.exists() and log.read_text().count("\n") >= 3), PATIENCE)
        started = descendants(process.pid)
        assert any("ray::RolloutWorker" in name for name in started.values()), started
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(PATIENCE) == 130, shown.read_text()
    finally:
        process.kill()
    assert "saved in" in shown.read_text()
    wait_until(lambda: not [pid for pid in started if name_of(pid)], 60)


def descendants(pid):
    """Processes that come from this one -> their titles."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found, waiting = {}, [pid]
    while waiting:
        one = waiting.pop()
        children = [child for child, parent in parents.items() if parent == one]
        found |= {child: name_of(child) for child in children}
        waiting += children
    return found


def name_of(pid):
    """A process's title; empty when it is gone, or waits to be."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_text()
    except OSError:
        return ""
