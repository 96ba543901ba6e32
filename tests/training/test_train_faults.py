"""Runs that are cut short, damaged or fed with something else: what was trained is kept, and what happened is said."""

import errno
import json
import math
import shutil
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from pointmass_run import small

from poco_vla.checkpointing.progress import Progress
from poco_vla.checkpointing.provenance import Provenance
from poco_vla.checkpointing.schedule import CheckpointClock
from poco_vla.checkpointing.versions import AHEAD, ReservedVersions
from poco_vla.config import InteractionConfig, RewardConfig
from poco_vla.data import Episode
from poco_vla.data.dataset import describe_dataset
from poco_vla.errors import CheckpointError, NonFiniteError, OtherProcessError, PocoError, SimulatorError
from poco_vla.learner.failures import Failures
from poco_vla.run.outlook import Outlook
from poco_vla.training import Trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@contextmanager
def opened(config):
    trainer = Trainer(config)
    try:
        yield trainer
    finally:
        trainer.close()


def interrupted(config):
    """A run that was stopped in its online stage, after a few episodes; its trainer's last progress."""
    with opened(config) as trainer:
        after = trainer._after_update

        def stop_soon():
            trainer.interruption.requested = trainer.progress.episodes >= 2
            after()

        trainer._after_update = stop_soon
        with suppress(KeyboardInterrupt):
            trainer.run()
        return trainer.progress


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, data):
    """A run beside acting, stopped after some online episodes."""
    config = small(tmp_path_factory.mktemp("stopped") / "run", data, interaction=InteractionConfig(mode="asynchronous"))
    progress = interrupted(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    return config, progress


@pytest.fixture
def copied(stopped, tmp_path):
    """A copy of it, with the configuration that resumes it."""
    config, _ = stopped
    shutil.copytree(config.output_dir, tmp_path / "run")
    return replace(config, output_dir=tmp_path / "run", resume=True)


# -- work at risk ----------------------------------------------------------------------------------------------------


def test_what_imitation_has_trained_is_on_disk_before_an_evaluation_may_fail(tmp_path, data, monkeypatch):
    config = small(tmp_path / "run", data, online_steps=0)
    with opened(config) as trainer:
        monkeypatch.setattr(trainer, "_evaluate", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("it died")))
        with pytest.raises(RuntimeError, match="it died"):
            trainer.run()
        trained = [p.detach().clone() for p in trainer.updater.actor_parameters]
    with opened(replace(config, resume=True)) as again:
        assert (again.progress.stage, again.progress.stage_update) == ("sft", config.sft_steps)
        for p, expected in zip(again.updater.actor_parameters, trained, strict=True):
            assert torch.equal(p.detach(), expected)
        again.run()
    assert (config.output_dir / "result.json").is_file()


def test_a_checkpoint_by_time_waits_for_its_minutes_and_for_slow_disks(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("poco_vla.checkpointing.schedule.time.monotonic", lambda: now[0])
    clock, never = CheckpointClock(1.0), CheckpointClock(0.0)
    due = []
    for now[0] in (59.0, 61.0):
        due.append(clock.is_due())
    clock.began()
    now[0] += 10  # it takes 10 s: the next one is due after 200
    clock.ended()
    for now[0] in (250.0, 272.0):
        due.append(clock.is_due())
    assert due == [False, True, False, True]
    assert not never.is_due()


def test_a_run_saves_after_the_minutes_it_is_told(tmp_path, data):
    config = small(tmp_path / "run", data, online_steps=0, checkpoint_every=0, checkpoint_minutes=1e-9)
    with opened(config) as trainer:
        saved = []
        save = trainer._save
        trainer._save = lambda: saved.append(trainer.progress.update) or save()
        trainer.checkpoints.clock._took = 0.0
        trainer.checkpoints.clock.ended = lambda: None  # the disk of this test takes no time
        trainer.run()
    assert saved[:5] == [1, 2, 3, 4, 5]


# -- gradients that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_finite_loss_with_a_gradient_that_is_not_changes_nothing(value, tmp_path, data):
    with opened(small(tmp_path / "run", data, online_steps=0)) as trainer:
        with trainer.display.stage("by hand", 3) as bar:
            for _ in range(2):
                trainer.updater.update("sft", bar)
            weights = [p.detach().clone() for p in trainer.updater.algorithm.parameters()]
            moments = {
                k: v.clone() for e in trainer.updater.learner.optimizer_state()["state"].values() for k, v in e.items()
            }
            trainer.updater.actor_parameters[0].register_hook(lambda gradient: torch.full_like(gradient, value))
            with pytest.raises(
                NonFiniteError, match=r"update 2: the loss is \d.*its gradient not finite.*actor_grad_norm"
            ):
                trainer.updater.update("sft", bar)
        for p, old in zip(trainer.updater.algorithm.parameters(), weights, strict=True):
            assert torch.equal(p.detach(), old)
        now = {k: v for e in trainer.updater.learner.optimizer_state()["state"].values() for k, v in e.items()}
        assert all(torch.equal(now[name], old) for name, old in moments.items())
        assert (trainer.config.output_dir / "nonfinite_batch_0.safetensors").is_file()


def test_a_run_that_is_refused_leaves_neither_simulators_nor_a_folder_behind(tmp_path, data, monkeypatch):
    pools = []

    def refuse(pool, *_):
        pools.append(pool)
        raise SimulatorError("the first rollout")

    monkeypatch.setattr("poco_vla.experience.environments.check_rollout", refuse)
    with pytest.raises(SimulatorError, match="the first rollout"):
        Trainer(small(tmp_path / "run", data))
    assert [pool._envs.workers for pool in pools] == [[]]
    assert not (tmp_path / "run").exists()


# -- other data than before -------------------------------------------------------------------------------------------


def test_a_run_resumes_on_its_own_data_without_a_word(copied, capfd):
    with opened(copied) as trainer:
        assert trainer.progress.episodes >= 2
    assert "changed" not in capfd.readouterr().out


def test_other_demonstrations_are_refused_unless_they_are_accepted(copied, tmp_path, capfd):
    fewer = replace(copied.demonstrations, episodes=5, root=tmp_path)
    changed = copied.output_dir / "checkpoints"
    for path in changed.iterdir():  # as if the same folder now held other demonstrations
        config = json.loads((path / "config.json").read_text())
        config["demonstrations"] |= {"episodes": 5, "root": str(tmp_path)}
        (path / "config.json").write_text(json.dumps(config))
    other = replace(copied, demonstrations=fewer)
    with pytest.raises(
        CheckpointError, match=r"demonstrations in .* are not those.*6 episodes then, 5 now.*--accept-ch"
    ):
        Trainer(other)
    with opened(replace(other, accept_changed_data=True)):
        pass
    assert "have changed since the checkpoint: 6 episodes then, 5 now" in capfd.readouterr().out


def test_demonstrations_that_were_moved_are_known_again(copied, tmp_path, capfd):
    moved = shutil.copytree(copied.demonstrations.root, tmp_path / "moved")
    with opened(replace(copied, demonstrations=replace(copied.demonstrations, root=moved))) as trainer:
        assert trainer.parts.data.config.root is not None
        assert trainer.parts.data.config.root.is_relative_to(moved)
    assert "changed" not in capfd.readouterr().out


def test_other_statistics_of_the_dataset_are_told_and_the_runs_own_kept(copied, capfd, monkeypatch):
    def other(dataset):
        info = describe_dataset(dataset)
        action = info.stats["action"] | {"max": np.asarray(info.stats["action"]["max"]) + 1}
        return replace(info, stats={**info.stats, "action": action})

    monkeypatch.setattr("poco_vla.experience.dataset.describe_dataset", other)
    with opened(copied) as trainer:
        found, own = (
            trainer.parts.data.statistics.found["action"]["max"],
            trainer.parts.data.info.stats["action"]["max"],
        )
    np.testing.assert_array_equal(found - 1, own)
    assert "meta/stats.json" in capfd.readouterr().out.replace("\n", " ")


def test_an_edited_online_episode_is_refused_unless_it_is_accepted(copied, capfd):
    path = sorted((copied.output_dir / "episodes" / "data").rglob("*.parquet"))[1]
    table = pq.read_table(path)
    column = table.schema.get_field_index("action")
    actions = np.stack(table["action"].to_numpy(zero_copy_only=False)) * 0.5
    pq.write_table(
        table.set_column(column, table.field(column), pa.array(list(actions), table.field(column).type)), path
    )
    with pytest.raises(CheckpointError, match=r"episode 1 in .*episodes is not the one.*--accept-changed-data"):
        Trainer(copied)
    with opened(replace(copied, accept_changed_data=True)):
        pass
    assert "not what the run learned from before: episode 1" in capfd.readouterr().out


# -- files that a kill or a loss of power left ------------------------------------------------------------------------


def test_torn_and_emptied_log_lines_are_left_out_when_a_run_goes_on(copied):
    path = copied.output_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_bytes(
        lines[0].encode() + bytes(40) + b"\n" + b'{"update": 3}}\n[1]\n' + "".join(lines[1:]).encode() + b'{"up'
    )
    with opened(copied) as trainer:
        kept = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["update"] for line in kept] == [json.loads(line)["update"] for line in lines]
        assert trainer.progress.update >= kept[-1]["update"]


def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(copied, capfd):
    root = copied.output_dir / "checkpoints"
    older, newest = sorted(root.iterdir())[-1], root / "99999999"
    shutil.copytree(older, newest)
    (newest / "optimizer.safetensors").write_bytes(b"")
    with opened(copied) as trainer:
        assert trainer.progress.update == int(older.name)
    assert f"{newest.name} is damaged: optimizer.safetensors has 0 bytes" in capfd.readouterr().out
    assert [path.name for path in root.iterdir()] == [older.name]


# -- versions ---------------------------------------------------------------------------------------------------------


def test_after_a_kill_no_version_is_given_to_other_weights(stopped, copied):
    """Stopped in order, versions go on where they were; killed, above all that may have been seen."""
    _, progress = stopped
    with opened(copied) as trainer:
        assert trainer.parts.weights.version == progress.version == progress.update
    (copied.output_dir / "versions.json").write_text(json.dumps({"below": progress.update + 500}))
    with opened(copied) as trainer:
        assert trainer.progress.update == progress.update
        assert trainer.parts.weights.version == progress.update + 499
        with trainer.display.stage("by hand", 1) as bar:
            trainer.updater.update("online", bar)
        assert trainer.parts.weights.version == progress.update + 500


def test_versions_are_reserved_on_disk_before_anybody_sees_them(tmp_path):
    bound = ReservedVersions(tmp_path, lambda _, write: write(), used=True)
    bound.cover(7)
    assert ReservedVersions(tmp_path, lambda _, write: write(), used=True).newest_seen() == 7 + AHEAD - 1
    bound.settle(8)
    assert ReservedVersions(tmp_path, lambda _, write: write(), used=True).newest_seen() == 8
    (tmp_path / "versions.json").write_bytes(bytes(20))
    assert bound.newest_seen() == 0


# -- several processes ------------------------------------------------------------------------------------------------


def test_the_first_process_that_fails_says_why_and_the_others_name_it(tmp_path):
    first, second, third = (Failures(tmp_path, rank, 3) for rank in (1, 0, 2))
    with pytest.raises(PocoError, match="the column is missing"), first.watch():
        raise PocoError("the column is missing")
    with pytest.raises(OtherProcessError, match="process 0 stops because process 1 of this run"), second.watch():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")
    second.forget()
    with pytest.raises(OtherProcessError, match=r"process 2 has lost the others.*--resume"), third.watch():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")


def test_a_part_whose_tensors_would_be_lost_is_a_bug(tmp_path, data):
    """JSON would keep their first digits, as text."""

    class Forgotten:
        def state(self):
            return {"mean": [torch.ones(2)]}

    with opened(small(tmp_path / "run", data, online_steps=0)) as trainer:
        trainer.checkpoints.parts["forgotten"] = Forgotten()
        with pytest.raises(TypeError, match="the state of forgotten holds tensors: name it in WITH_TENSORS"):
            trainer.checkpoints.save()


# -- nothing succeeds -------------------------------------------------------------------------------------------------


def demos(*outcomes):
    zeros = np.zeros(2, np.float32)
    return [
        Episode({}, zeros[:, None], zeros, np.array([False, outcome]), np.array([False, True])) for outcome in outcomes
    ]


@pytest.mark.parametrize(
    ("outcomes", "successes", "online", "told"),
    [
        ((False, False), (0,), 0, "nothing has succeeded so far: 0 of 2 demonstrations, 0 of 10 evaluation episodes"),
        ((False, True), (0, 0), 30, "nothing but demonstrations has succeeded so far: 1 of 2 of them"),
        ((False, True), (0,), 0, None),
        ((False, False), (1,), 0, None),
    ],
)
def test_a_run_in_which_nothing_succeeds_says_so_once(outcomes, successes, online, told):
    lines = []
    outlook = Outlook(lines.append, RewardConfig(), gamma=0.99)
    outlook.demonstrated(demos(*outcomes))
    now = Progress(episodes=online, recent=[False] * min(20, online))
    for count in (*successes, 0):
        now.evaluations.append({"successes": count, "episodes": 10})
        outlook.evaluated(now)
        if told is None:
            break
    assert len(lines) == (told is not None)
    assert told is None or lines[0].startswith(told)


@pytest.mark.parametrize(
    ("reward", "largest"),
    [
        (RewardConfig(success=20.0, step=0.0), 20.0),
        (RewardConfig.named("minus_one"), 0.0),
        (RewardConfig(success=1.0, step=0.25), 0.25 / (1 - 0.9)),
        (RewardConfig.named("semi_sparse"), math.inf),
    ],
)
def test_no_episode_is_worth_more_than_the_largest_return(reward, largest):
    """Against every length of an episode that succeeds at its last step, and one that never does."""
    assert reward.largest_return(0.9) == pytest.approx(largest)
    if reward.source == "success":
        worth = [reward.step * (1 - 0.9**n) / 0.1 + reward.success * 0.9 ** (n - 1) for n in range(1, 400)]
        assert max(*worth, reward.step / 0.1) == pytest.approx(largest)


@pytest.mark.parametrize(
    ("means", "told"),
    [
        ({"q": 12.0, "candidate_q": 21.5, "target": 13.0}, "candidate_q is 21.5 in the mean"),
        ({"q": 12.0, "candidate_q": 20.9}, None),  # within a twentieth
        ({"q": 25.0, "entropy": 1.0}, None),
        ({"bc_loss": 30.0}, None),
    ],
)
def test_values_above_any_return_are_told_once(means, told):
    lines = []
    outlook = Outlook(lines.append, RewardConfig(success=20.0, step=0.0), gamma=0.99)
    for _ in range(2):
        outlook.learned(means)
    assert len(lines) == (told is not None)
    assert told is None or told in lines[0]


def test_a_run_says_that_its_critic_overestimates(tmp_path, data, capfd):
    """It begins far above: the last bias of its networks is 5, and nothing is worth more than 1."""
    with opened(small(tmp_path / "run", data, reward=RewardConfig())) as trainer:
        with torch.no_grad():
            for name, bias in trainer.updater.algorithm.critic.named_parameters():
                if name == "biases.2":  # of three layers
                    bias.fill_(5.0)
        trainer.run()
    assert "the critic overestimates" in " ".join(capfd.readouterr().out.split())


def test_the_number_of_successful_demonstrations_is_said_at_the_start(tmp_path, data, capfd):
    with opened(small(tmp_path / "run", data, online_steps=0)):
        pass
    assert "6 demonstrations (6 succeed)" in " ".join(capfd.readouterr().out.split())


def test_a_full_disk_pauses_the_final_policy_and_the_videos(tmp_path, data, monkeypatch):
    """The first write of each finds the disk full; the next one finds room."""
    monkeypatch.setattr("poco_vla.files._sleep", lambda seconds, end: None)
    refused = set()

    def once(write, name):
        def refusing(*args, **kwargs):
            if name not in refused:
                refused.add(name)
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(*args, **kwargs)

        return refusing

    config = small(tmp_path / "run", data, online_steps=0)
    with opened(replace(config, eval=replace(config.eval, videos=True, episodes=2))) as trainer:
        monkeypatch.setattr("poco_vla.training.results.report.finish", once(lambda *_: None, "report"))
        monkeypatch.setattr("poco_vla.training.evaluations.write_episode_video", once(lambda *_, **__: None, "video"))
        monkeypatch.setattr(
            trainer.parts.policy, "save_pretrained", once(trainer.parts.policy.save_pretrained, "policy")
        )
        told = []
        monkeypatch.setattr(trainer.display, "say", told.append)
        trainer.run()
    assert (config.output_dir / "policy" / "model.safetensors").is_file()
    assert refused == {"report", "video", "policy"}
    assert sum("the disk is full" in line for line in told) == 3


@pytest.mark.parametrize("column", [np.arange(2.0), np.arange(2, dtype=np.int64)[:, None], np.array([[True], [False]])])
def test_an_episode_is_known_again_whatever_its_columns_were_in_memory(column, tmp_path):
    """Files give numbers back as float32 [T, entries]."""
    (episode,) = demos(True)
    read = replace(episode, obs={"observation.state": column.astype(np.float32).reshape(2, 1)})
    there = Provenance({}, ["observation.state"])
    there.add(replace(episode, obs={"observation.state": column, "observation.unused": column}))
    assert Provenance({}, ["observation.state"]).check_episode(there.state(), 0, read, tmp_path, accept=False) is None
