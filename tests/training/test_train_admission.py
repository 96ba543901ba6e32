"""Runs that meet an episode which training cannot use: it is set aside, and neither run nor resume ends at it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from pointmass import PointmassEnv
from pointmass_run import small
from test_train_interaction import STATE, Robot, assert_pool_is, beside, lines_of, recorded, robots_for

from poco_vla.errors import PocoError
from poco_vla.recording.admission import Admission
from poco_vla.recording.recorder import INTERVENTION
from poco_vla.serving.client import RefusedError
from poco_vla.training import Trainer, train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def poisoned(monkeypatch):
    """Every third episode of training observes 1e6 at its fourth step."""
    observe = PointmassEnv._observation

    def observation(self):
        found = observe(self)
        if self.np_random_seed % 3 == 0 and self.np_random_seed >= 1_000_000 and self._steps == 3:
            found["agent_pos"][2] = 1e6
        return found

    monkeypatch.setattr(PointmassEnv, "_observation", observation)


def bearable(episodes):
    return all(np.abs(episode.obs[STATE]).max() < 1e5 for episode in episodes)


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_a_simulators_outlier_is_set_aside_and_the_run_goes_on_to_its_end(mode, tmp_path, data, poisoned):
    config = small(tmp_path / "run", data) if mode == "synchronous" else beside(tmp_path, data, online_steps=500)
    trainer = Trainer(config)
    try:
        trainer.run()
        episodes = recorded(config)
        assert_pool_is(trainer, episodes[: trainer.progress.episodes])
    finally:
        trainer.close()
    assert bearable(episodes)
    result = json.loads((config.output_dir / "result.json").read_text())
    lines = (config.output_dir / "set_aside" / "episodes.jsonl").read_text().splitlines()
    assert result["set_aside"] == len(lines) >= 2
    assert result["online_episodes"] >= 2
    assert result["env_steps"] >= config.online_steps, "steps of what was set aside were taken"


def figures_of(run):
    """Its log lines without wall times, and how many episodes it set aside."""
    lines = [*lines_of(run, "metrics.jsonl"), *lines_of(run, "episodes.jsonl")]
    count = json.loads((run / "result.json").read_text())["set_aside"]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines], count


def test_a_run_with_episodes_set_aside_repeats_bit_for_bit_when_it_is_resumed(tmp_path, data, poisoned):
    whole = train(small(tmp_path / "whole", data))
    config = small(tmp_path / "run", data, checkpoint_every=10)
    trainer = Trainer(config)
    after_update = trainer._after_update

    def killed():
        if trainer.progress.update >= 77:
            raise RuntimeError("killed")
        after_update()

    trainer._after_update = killed
    try:
        with pytest.raises(RuntimeError, match="killed"):
            trainer.run()
    finally:
        trainer.close()
    train(replace(config, resume=True))
    lines, count = figures_of(config.output_dir)
    assert (lines, count) == figures_of(whole.output_dir)
    assert count > 0


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_a_run_that_died_of_what_it_recorded_resumes_without_it_and_ends_well(mode, tmp_path, data, monkeypatch):
    """Resume a run that recorded 3e38 before there was a check; the newest checkpoint may know of it."""
    observe = PointmassEnv._observation

    def observation(self):
        found = observe(self)
        if self.np_random_seed == 1_000_000 and self._steps == 3:
            found["agent_pos"][2] = 3e38
        return found

    monkeypatch.setattr(PointmassEnv, "_observation", observation)
    config = small(tmp_path / "run", data) if mode == "synchronous" else beside(tmp_path, data, online_steps=500)
    config = replace(config, checkpoint_every=5)
    with monkeypatch.context() as old:
        old.setattr(Admission, "require", lambda *_: None)
        with pytest.raises(PocoError):
            train(config)
    before = recorded(config)
    assert not bearable(before)
    result = train(replace(config, resume=True))
    assert result.env_steps >= config.online_steps
    figures = json.loads((config.output_dir / "result.json").read_text())
    assert figures["set_aside"] == 1
    assert len((config.output_dir / "episodes.jsonl").read_text().splitlines()) == figures["online_episodes"]
    assert len(recorded(config)) >= figures["online_episodes"]


class BadRobot(Robot):
    """Sends an episode with one wild action after each good one."""

    def __init__(self, url, seed):
        super().__init__(url, seed)
        self.refused = []

    def play(self, client):
        record, kept = client.record, []
        client.record = lambda episode, key: kept.append((episode, key))
        super().play(client)
        client.record = record
        ((good, key),) = kept
        bare = replace(good, interventions=None, policy_version=None) if len(self.sent) % 2 else good
        record(bare, key)
        wild = replace(good, action=np.where(np.arange(2) == 1, 3e38, good.action).astype(np.float32))
        try:
            record(wild, f"{key}-wild")
        except RefusedError as error:
            self.refused.append(str(error))


def test_a_robots_wild_episode_is_refused_with_the_reason_and_good_ones_go_on(tmp_path, data, monkeypatch):
    monkeypatch.setattr("test_train_interaction.Robot", BadRobot)
    config = beside(tmp_path, data, "remote", ahead=200, online_steps=500)
    trainer = Trainer(config)
    robots = robots_for(trainer, 1)
    try:
        trainer.run()
        episodes = recorded(config)
        assert_pool_is(trainer, episodes[: trainer.progress.episodes])
        assert INTERVENTION in trainer.collector.recorder._disk.info.features
    finally:
        trainer.close()
    robots[0].join(timeout=60)
    assert robots[0].done, robots[0].error
    assert len(robots[0].refused) == len(robots[0].sent) == len(episodes)
    assert "set aside" in robots[0].refused[0]
    assert bearable(episodes)
