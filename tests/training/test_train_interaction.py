"""Training with acting beside it, in a thread or on a robot's machine: what is logged, what a kill costs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import forked
import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from pointmass import PointmassEnv
from pointmass_run import small

from poco_vla.config import InteractionConfig, PrefixConfig, ReplayConfig
from poco_vla.data import Episode
from poco_vla.errors import ConfigError
from poco_vla.progress import Display
from poco_vla.recording.recorder import EpisodeRecorder
from poco_vla.serving.client import PolicyClient, Retry
from poco_vla.training import Trainer, train

HERE = Path(__file__).parents[1]
STATE = "observation.state"
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def beside(folder, data, mode="asynchronous", ahead=60, **changes):
    settings = InteractionConfig(mode=mode, ahead=ahead, port=0)
    return small(folder / "run", data, interaction=settings, **({"online_steps": 900} | changes))


def lines_of(run, name):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def recorded(config):
    return EpisodeRecorder(config.output_dir / "episodes", 10).load([STATE])


def assert_pool_is(trainer, episodes):
    """The pool's online columns are these episodes', one after the other."""
    ring = trainer.replay._online
    assert trainer.replay.num_online_episodes == len(episodes)
    for name, column in {
        STATE: [e.obs[STATE] for e in episodes],
        "action": [e.action for e in episodes],
        "reward": [e.rewards(trainer.config.reward) for e in episodes],
        "terminal": [e.terminal | e.success for e in episodes],
    }.items():
        expected = np.concatenate(column)
        np.testing.assert_array_equal(ring[name][: len(expected)], expected, err_msg=name)


# -- in a thread ------------------------------------------------------------------------------------------------------


def test_every_episode_is_on_disk_and_in_the_pool(tmp_path, data):
    config = beside(tmp_path, data)
    trainer = Trainer(config)
    try:
        result = trainer.run()
        trainer.collector.interaction.close()
        assert result.env_steps >= 900
        episodes = recorded(config)
        assert_pool_is(trainer, episodes[: trainer.progress.episodes])
    finally:
        trainer.close()
    assert len(episodes) - trainer.progress.episodes <= 3, "ended after the last step that counts"
    for episode in episodes:
        assert (np.diff(episode.policy_version) >= 0).all()
        assert not episode.interventions.any()
    assert episodes[-1].policy_version[-1] > episodes[0].policy_version[0]


def test_neither_side_runs_further_ahead_than_it_may(tmp_path, data):
    """0.2 updates a step, 60 steps ahead: an update needs 5 steps, of which 60 may be to come; acting goes beyond 60
    steps of what is learned by a round of 3 chunks of 5 at most, once it has been within them: before the first episode
    has come, nobody learns, and acting goes on."""
    config = beside(tmp_path, data)
    train(config)
    online = [line for line in lines_of(config.output_dir, "metrics.jsonl") if line["stage"] != "sft"]
    assert len(online) > 20
    free = 0
    within = False
    for line in online:
        update, steps = line["update"] - config.sft_steps, line["env_steps"]
        assert update <= 0.2 * (steps + 60)
        within = within or steps <= update / 0.2 + 60
        if within:
            assert steps <= update / 0.2 + 60 + 2 * 15
        else:
            free = steps
        assert line["utd"] == update / steps
    assert within
    ages = [line["weight_age"] for line in online if "weight_age" in line]
    assert ages
    # Of weights that were learned from up to 60 + 2 x 15 steps less, or of the first ones.
    assert all(0 <= age <= 0.2 * (60 + max(60, free + 2 * 15) + 2 * 15) for age in ages)


@pytest.mark.parametrize("mode", ["asynchronous", "remote"])
def test_learning_takes_over_the_prefix_of_every_state_that_acting_saw(mode, tmp_path, data):
    """One of five states of each episode in the pool, those at which a chunk was chosen; and any that is the same, as
    at a wall."""
    config = beside(tmp_path, data, mode, ahead=200, prefixes=PrefixConfig(mode="on"))
    trainer = Trainer(config)
    if mode == "remote":
        robots_for(trainer)
    try:
        trainer.run()
        episodes = recorded(config)[: trainer.progress.episodes]
        chosen = sum(-(-len(episode) // 5) for episode in episodes)
        assert 150 < chosen <= trainer.parts.prefixes.actor_buffer.num_taken < 1.3 * chosen
    finally:
        trainer.close()
    assert json.loads((config.output_dir / "result.json").read_text())["prefixes"]["acted"] > 150


def start(config):
    """The same run in a process of its own."""
    flags = {
        "--output-dir": config.output_dir,
        "--demonstrations.root": config.demonstrations.root,
        "--online-steps": config.online_steps,
        "--checkpoint-every": config.checkpoint_every,
        "--interaction.mode": config.interaction.mode,
        "--interaction.ahead": config.interaction.ahead,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    return forked.Popen(
        [sys.executable, str(HERE / "pointmass_run.py"), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_episodes(process, run, count):
    path = run / "episodes.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_run_loses_no_finished_episode_and_counts_on(tmp_path, data):
    """SIGKILL between two checkpoints: what is on disk comes back into the pool, episodes that no checkpoint covers
    too, and every step of it counts; the running ones are gone."""
    config = beside(tmp_path, data, online_steps=100_000, checkpoint_every=30)
    process = start(config)
    wait_for_episodes(process, config.output_dir, 20)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    seen = len([line for line in (config.output_dir / "episodes.jsonl").read_text().splitlines() if line[-1:] == "}"])
    before = recorded(config)
    assert len(before) >= seen >= 20
    assert LeRobotDataset("local/episodes", root=config.output_dir / "episodes").num_episodes == len(before)
    trainer = Trainer(replace(config, resume=True))
    try:
        assert_pool_is(trainer, before)
        now = trainer.progress
        assert now.episodes == len(before) == len(lines_of(config.output_dir, "episodes.jsonl"))
        assert now.env_steps == sum(map(len, before))
        assert now.owed_updates == pytest.approx(0.2 * now.env_steps - now.stage_update)
    finally:
        trainer.close()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_goes_on_to_its_end(tmp_path, data):
    config = beside(tmp_path, data, online_steps=2500, checkpoint_every=0)
    process = start(config)
    wait_for_episodes(process, config.output_dir, 10)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "saved in" in output
    before = len(recorded(config))
    result = train(replace(config, resume=True))
    assert result.env_steps >= 2500
    assert len(recorded(config)) > before >= 10


def test_an_episode_that_is_too_long_for_the_pool_stays_on_disk_and_the_run_goes_on(tmp_path, data):
    """A pool of 49 steps: an episode to its time limit of 50 does not fit, a success does."""
    config = beside(tmp_path, data, replay=ReplayConfig(capacity=49))
    trainer = Trainer(config)
    try:
        trainer.run()
    finally:
        trainer.close()
    assert trainer.progress.episodes >= 15
    assert len(recorded(config)) >= trainer.progress.episodes
    assert trainer.replay.num_online_steps < 50
    resumed = Trainer(replace(config, resume=True, output_dir=config.output_dir))
    resumed.close()


def test_a_bound_that_lets_neither_side_go_on_is_refused(tmp_path, data):
    with pytest.raises(ConfigError, match="not enough for one update"):
        beside(tmp_path, data, ahead=4)


@pytest.mark.parametrize(("changes", "said"), [({"host": "0.0.0.0"}, "POCO_VLA_TOKEN"), ({"host": "192.0.2.1"}, "192")])
def test_an_address_that_cannot_be_served_is_refused_before_training(tmp_path, data, monkeypatch, changes, said):
    monkeypatch.setenv("POCO_VLA_TOKEN", "secret") if said == "192" else monkeypatch.delenv("POCO_VLA_TOKEN", False)
    config = beside(tmp_path, data, "remote")
    with pytest.raises(ConfigError, match=said):
        Trainer(replace(config, interaction=replace(config.interaction, **changes)))
    with pytest.raises(ConfigError, match="from 1 to 65535"):
        replace(config.interaction, port=99999)


# -- robots -----------------------------------------------------------------------------------------------------------


class Robot(threading.Thread):
    """Plays the point mass by what a policy elsewhere says, until it hears that training is over."""

    def __init__(self, url, seed):
        super().__init__(daemon=True)
        self.url, self.seed, self.sent, self.done, self.error = url, seed, [], False, None

    def run(self):
        try:
            with PolicyClient(self.url, retry=Retry(budget=20.0)) as client:
                while not (status := client.status())["done"]:
                    if status["act"]:
                        self.play(client)
                    else:
                        time.sleep(0.01)
            self.done = True
        except Exception as error:
            self.error = error  # whatever it is: the test waits for this thread
            os.kill(os.getpid(), signal.SIGINT)

    def play(self, client):
        env, rows, versions = PointmassEnv(), [], []
        observation, _ = env.reset(seed=self.seed)
        self.seed += 1
        ended = False
        while not ended:
            chunk = client.chunk({STATE: observation["agent_pos"]}, env.task_description)
            for action in chunk.actions:
                before = observation["agent_pos"]
                observation, reward, terminated, truncated, info = env.step(action)
                rows.append((before, action, reward, info["is_success"], terminated))
                versions.append(chunk.weights_version)
                ended = terminated or truncated
                if ended:
                    break
        state, action, reward, success, terminal = (np.array(column) for column in zip(*rows, strict=True))
        episode = Episode(
            {STATE: state.astype(np.float32)},
            action.astype(np.float32),
            reward.astype(np.float32),
            success.astype(bool),
            terminal.astype(bool),
            env.task_description,
            policy_version=np.array(versions),
            interventions=np.zeros(len(rows), dtype=bool),
        )
        client.record(episode, str(uuid.uuid4()))
        self.sent.append(episode)


def robots_for(trainer, count=2):
    """Robots that come as soon as the trainer serves."""
    robots = []

    def come():
        while trainer.collector.interaction is None or trainer.collector.interaction.server.port == 0:
            time.sleep(0.01)
        robots.extend(Robot(trainer.collector.interaction.server.url, 1000 * i) for i in range(count))
        for robot in robots:
            robot.start()

    threading.Thread(target=come, daemon=True).start()
    return robots


def test_robots_act_with_ever_newer_weights_and_lose_no_episode(tmp_path, data):
    config = beside(tmp_path, data, "remote", ahead=200, online_steps=800)
    trainer = Trainer(config)
    robots = robots_for(trainer)
    try:
        result = trainer.run()
        episodes = recorded(config)
        assert_pool_is(trainer, episodes[: trainer.progress.episodes])
    finally:
        trainer.close()
    for robot in robots:
        robot.join(timeout=60)
        assert robot.done, robot.error
    assert result.env_steps >= 800
    sent = [episode for robot in robots for episode in robot.sent]
    assert len(sent) == len(episodes)
    by_start = {tuple(e.obs[STATE][0]): e for e in sent}
    for episode in episodes:
        twin = by_start[tuple(episode.obs[STATE][0])]
        np.testing.assert_array_equal(episode.action, twin.action)
        np.testing.assert_array_equal(episode.policy_version, twin.policy_version)
    assert max(e.policy_version[-1] for e in episodes) > config.sft_steps + 50


def test_without_an_environment_the_warm_up_says_how_well_the_imitating_policy_does(tmp_path, data):
    """Nothing to evaluate in: the guard compares with the episodes of the critic's warm-up."""
    seeded = beside(tmp_path, data, "remote")
    first = Trainer(replace(seeded, online_steps=0))  # makes the demonstrations
    root = first.parts.data.config.root
    first.close()
    config = replace(
        seeded,
        output_dir=tmp_path / "robot",
        env=None,
        demonstrations=None,
        dataset=replace(seeded.dataset, repo_id="local/demonstrations", root=root),
        warmup_steps=60,
        online_steps=800,
    )
    trainer = Trainer(config)
    robots_for(trainer, 1)
    try:
        trainer.run()
    finally:
        trainer.close()
    successes, episodes = trainer.recovery.guard.reference
    lines = lines_of(config.output_dir, "episodes.jsonl")
    assert 0 < episodes < len(lines)
    assert successes == sum(line["success"] for line in lines[:episodes])
    result = json.loads((config.output_dir / "result.json").read_text())
    assert result["before"] is None
    assert result["online_episodes"] == len(lines)


# -- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_on_a_full_disk_training_pauses_says_so_and_goes_on_when_there_is_room(mode, small_disk, data, monkeypatch):
    """The disk is filled to its last byte once the first episodes are there, and emptied when the run has said so."""
    told, say = [], Display.say

    def heard(display, text):
        say(display, text)
        if "the disk is full" in text:
            told.append(text)
            (small_disk / "filler").unlink(missing_ok=True)

    monkeypatch.setattr(Display, "say", heard)
    monkeypatch.setattr("poco_vla.files.wait_for_space.__kwdefaults__", {"give_up": lambda: False, "every": 0.1})
    config = beside(small_disk, data, mode, checkpoint_every=20, online_steps=450)
    log = config.output_dir / "episodes.jsonl"

    def fill():
        while not (log.exists() and len(log.read_text().splitlines()) >= 3):
            time.sleep(0.001)
        with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    threading.Thread(target=fill, daemon=True).start()
    result = train(config)
    assert result.env_steps >= 450
    assert told
    assert "free" in told[0]
    lines = lines_of(config.output_dir, "metrics.jsonl")
    assert [line["update"] for line in lines] == list(range(5, lines[-1]["update"] + 1, 5))
    assert len(recorded(config)) >= len(lines_of(config.output_dir, "episodes.jsonl")) >= 9
