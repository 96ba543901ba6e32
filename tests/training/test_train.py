"""The trainer as its user meets it: real `train()`, real LeRobot data on disk, real processes."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from lerobot.configs.policies import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot_policy_flow_mlp.adapter import FlowMlp
from pointmass import PointmassEnv, pointmass
from pointmass_run import learning, small
from safetensors.torch import load_file

from poco_vla.config import DatasetConfig, EvalConfig, PocoConfig, TrainConfig, from_json, to_json
from poco_vla.data import Episode, open_dataset, read_episodes
from poco_vla.demonstrations.scripted import demonstrations_root, ensure_demonstrations
from poco_vla.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    UnknownAdapterError,
    UnknownNameError,
)
from poco_vla.recording.recorder import write_dataset
from poco_vla.training import Trainer, train

HERE = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def metrics_of(run):
    """metrics.jsonl without the wall time, the one figure in it that never repeats."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


# -- learning -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory, data):
    run = tmp_path_factory.mktemp("learned") / "run"
    return train(learning(run, data))


@pytest.mark.slow
@pytest.mark.xdist_group("learning")
def test_poco_makes_a_policy_that_imitates_badly_succeed(learned):
    """Success over 200 episodes, after SFT and at the end (8,000 environment steps, 2,600 online updates), seeds 0 and
    1: .38 -> .97, .58 -> .95."""
    assert 0.25 < learned.before.rate < 0.55
    assert learned.after.rate > 0.85
    assert learned.after.interval[0] > learned.before.interval[1]


@pytest.mark.slow
@pytest.mark.xdist_group("learning")
def test_a_run_leaves_figures_a_curve_and_its_logs(learned):
    result = json.loads((learned.output_dir / "result.json").read_text())
    assert result["before"]["success_rate"] == learned.before.rate
    assert result["after"]["success_rate"] == learned.after.rate
    assert result["env_steps"] == learned.env_steps >= 8_000
    assert (learned.output_dir / "curve.png").stat().st_size > 10_000
    stages = {}
    for line in metrics_of(learned.output_dir):
        stages.setdefault(line["stage"], line.keys())
    assert stages["sft"] >= {"bc_loss", "actor_grad_norm"}
    assert stages["warmup"] >= {"critic_loss", "q", "target", "critic_grad_norm"}
    assert "actor_grad_norm" not in stages["warmup"]
    assert stages["online"] >= {
        "bc_loss",
        "posterior_loss",
        "candidate_loss",
        "q",
        "target",
        "critic_loss",
        "effective_sample_size",
        "clipped_fraction",
        "surviving_weight",
        "actor_grad_norm",
        "critic_grad_norm",
        "train_success",
    }


@pytest.mark.slow
@pytest.mark.xdist_group("learning")
def test_online_episodes_open_as_a_lerobot_dataset(learned):
    dataset = LeRobotDataset("local/episodes", root=learned.output_dir / "episodes")
    lines = [json.loads(line) for line in (learned.output_dir / "episodes.jsonl").read_text().splitlines()]
    assert dataset.num_episodes == len(lines)
    assert dataset.num_frames == sum(line["length"] for line in lines)
    columns = dataset.hf_dataset.with_format("numpy")[:]
    successes = np.bincount(columns["episode_index"], columns["next.success"].reshape(-1)) > 0
    assert successes.tolist() == [line["success"] for line in lines]
    assert dataset[0]["task"] == PointmassEnv.task_description


@pytest.mark.slow
@pytest.mark.xdist_group("learning")
def test_the_exported_folder_succeeds_under_lerobots_own_loader(learned):
    """LeRobot's loader, processors and `select_action`, without this library: 24 episodes.

    At a true rate of .9 fewer than 16 successes have a probability below .001.
    """
    config = PreTrainedConfig.from_pretrained(str(learned.policy_dir))
    policy = get_policy_class(config.type).from_pretrained(str(learned.policy_dir), config=config)
    preprocess, postprocess = make_pre_post_processors(config, pretrained_path=str(learned.policy_dir))
    torch.manual_seed(0)
    successes = 0
    for seed in range(24):
        env = PointmassEnv()
        observation, info = env.reset(seed=seed)
        policy.reset()
        ended = False
        while not ended:
            batch = {"observation.state": torch.from_numpy(observation["agent_pos"]), "task": env.task_description}
            action = postprocess(policy.select_action(preprocess(batch)))
            observation, _, terminated, truncated, info = env.step(action[0].numpy())
            ended = terminated or truncated
        successes += info["is_success"]
    assert successes >= 16


def test_a_run_in_which_no_episode_ends_says_that_nothing_was_learned_online(tmp_path, data, capfd):
    """Episodes of up to 50 steps, of which three environments take 15 at a time."""
    train(small(tmp_path / "run", data, online_steps=15))
    told = " ".join(capfd.readouterr().out.split())
    assert (
        "no episode was added to the replay buffer within 15 steps: neither critic nor actor was trained online" in told
    )
    assert "--online-steps" in told


# -- resume ---------------------------------------------------------------------------------------------------------


def interruptible(output_dir, data, **changes):
    """A small run with many checkpoints, evaluations between, and a partly filled log window at each of them."""
    config = small(output_dir, data, sft_steps=300, online_steps=600, checkpoint_every=16, **changes)
    return replace(config, eval=EvalConfig(episodes=5, every=250, videos=False), updates_per_step=0.4)


def start(config, *, script=(sys.executable, HERE / "pointmass_run.py"), ctrl_c_ignored=False, **environment):
    """The same run in a process of its own, its configuration given on the command line; with `ctrl_c_ignored` in a
    group of its own whose first process ignores Ctrl-C, as in `make demo`."""
    flags = {
        "--output-dir": config.output_dir,
        "--demonstrations.root": config.demonstrations.root,
        "--sft-steps": config.sft_steps,
        "--online-steps": config.online_steps,
        "--updates-per-step": config.updates_per_step,
        "--checkpoint-every": config.checkpoint_every,
        "--log-every": config.log_every,
        "--eval.episodes": config.eval.episodes,
        "--eval.every": config.eval.every,
    }
    command = [*script, *(word for pair in flags.items() for word in pair), *(["--resume"] if config.resume else [])]
    program = subprocess.Popen if ctrl_c_ignored else forked.Popen
    return program(
        [str(word) for word in command],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=ctrl_c_ignored,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_IGN) if ctrl_c_ignored else None,
    )


def wait_for_update(process, run, update):
    """Return once the run has logged this update."""
    path = run / "metrics.jsonl"
    while True:
        assert process.poll() is None, process.communicate()[0]
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["update"] >= update:
            return
        time.sleep(0.005)


def everything(run):
    """Each thing that a run leaves and that the next update, or a reader of its figures, depends on."""
    last = sorted((run / "checkpoints").iterdir())[-1]
    result = json.loads((run / "result.json").read_text())
    return {
        "policy": (run / "policy" / "model.safetensors").read_bytes(),
        **{name: (last / f"{name}.safetensors").read_bytes() for name in ("weights", "optimizer", "random")},
        "metrics": metrics_of(run),
        "episodes": (run / "episodes.jsonl").read_text(),
        "result": {name: value for name, value in result.items() if name not in ("seconds", "update_seconds")},
    }


def assert_same(a, b):
    assert [name for name in a if a[name] != b[name]] == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(interruptible(run, data))
    return everything(run)


@pytest.mark.slow
@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize("seed", [0])
def test_a_run_killed_twice_resumes_bit_for_bit(seed, tmp_path, data, uninterrupted):
    """SIGKILL at a random moment of SFT, of the online stage, then to the end: equal weights, moments, random states,
    every logged number and every episode. SFT is updates 1 to 300; some 230 online updates follow."""
    rng = random.Random(seed)
    config = interruptible(tmp_path / "run", data)
    for update in (rng.randint(20, 200), rng.randint(330, 480)):
        process = start(config)
        wait_for_update(process, config.output_dir, update)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        config = replace(config, resume=True)
    train(config)
    assert_same(everything(config.output_dir), uninterrupted)


@pytest.mark.slow
@pytest.mark.xdist_group("resume")
def test_ctrl_c_saves_says_where_and_resumes_bit_for_bit(tmp_path, data, uninterrupted):
    config = interruptible(tmp_path / "run", data)
    process = start(config)
    wait_for_update(process, config.output_dir, 350)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    saved = sorted((config.output_dir / "checkpoints").iterdir())[-1]
    assert f"saved in {saved}" in output
    assert "--resume" in output
    assert "Traceback" not in output
    train(replace(config, resume=True))
    assert_same(everything(config.output_dir), uninterrupted)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.xdist_group("resume")
def test_ctrl_c_under_the_launcher_of_make_demo_saves_before_it_returns(tmp_path, data):
    """A terminal sends Ctrl-C to the whole group: make's shell and the launcher ignore it and wait for the run."""
    config = interruptible(tmp_path / "run", data)
    options = [
        "--quiet",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    script = (Path(sys.executable).parent / "accelerate", "launch", *options, HERE / "pointmass_run.py")
    process = start(config, script=script, ctrl_c_ignored=True)
    wait_for_update(process, config.output_dir, 200)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 1, output
    saved = sorted((config.output_dir / "checkpoints").iterdir())[-1]
    assert f"saved in {saved}" in output
    assert "Traceback" not in output


@pytest.mark.xdist_group("resume")
def test_resuming_a_finished_run_changes_nothing(tmp_path, data):
    config = small(tmp_path / "run", data)
    train(config)
    before = everything(config.output_dir)
    train(replace(config, resume=True))
    assert_same(everything(config.output_dir), before)


# -- bad input ------------------------------------------------------------------------------------------------------


def recorded(folder, *, state=4, action=2, length=12, fps=10, spoil=None, drop=None):
    """A LeRobot dataset of three random episodes; `spoil` puts a NaN into a column, `drop` takes one away."""
    rng = np.random.default_rng(0)
    columns = {
        "observation.state": rng.normal(size=(3, length, state)),
        "action": rng.uniform(-1, 1, (3, length, action)),
    }
    if spoil:
        columns[spoil][1, 3, 0] = np.nan
    ends = np.arange(length) == length - 1
    episodes = [
        Episode(
            obs={"observation.state": columns["observation.state"][i].astype(np.float32)},
            action=columns["action"][i].astype(np.float32),
            reward=ends.astype(np.float32),
            success=ends,
            terminal=ends,
            task="stop in the dock",
        )
        for i in range(3)
    ]
    if drop is None:
        write_dataset(episodes, folder, fps=fps, repo_id="local/recorded")
        return folder
    features = {"observation.state": {"dtype": "float32", "shape": (state,), "names": None}}
    dataset = LeRobotDataset.create("local/recorded", fps=fps, features=features, root=folder, use_videos=False)
    for episode in episodes:
        for row in episode.obs["observation.state"]:
            dataset.add_frame({"observation.state": row, "task": episode.task})
        dataset.save_episode()
    dataset.finalize()
    return folder


@pytest.mark.parametrize(
    ("recording", "words"),
    [
        ({"drop": "action"}, "no column action.*observation.state"),
        ({"fps": 30}, "30 fps.*10"),
        ({"state": 7}, r'"observation.state" has shape \(7,\).*\(4,\)'),
        ({"action": 3}, r'"action" has shape \(3,\).*\(2,\)'),
        ({"spoil": "observation.state"}, '"observation.state" is not finite at frame 3'),
        ({"spoil": "action"}, 'episode 1: "action" is not finite at frame 3'),
        ({"length": 4}, "the longest of 4 steps.*chunk of 5"),
    ],
)
def test_an_unfit_dataset_is_refused_before_any_update(recording, words, tmp_path):
    root = recorded(tmp_path / "data", **recording)
    config = small(tmp_path / "run", tmp_path, demonstrations=None, dataset=DatasetConfig(root=root))
    with pytest.raises(DataError, match=words):
        train(config)
    assert not (config.output_dir / "metrics.jsonl").exists()


def test_a_missing_dataset_folder_is_named(tmp_path):
    config = small(tmp_path / "run", tmp_path, demonstrations=None, dataset=DatasetConfig(root=tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"nowhere: meta/info.json is missing"):
        train(config)


def test_an_unknown_adapter_lists_those_installed(tmp_path, data):
    with pytest.raises(UnknownAdapterError, match=r'"flow_mpl".*Known:.*flow_mlp.*Did you mean "flow_mlp"'):
        train(small(tmp_path / "run", data, adapter="flow_mpl"))


def test_an_unknown_environment_lists_those_registered(tmp_path, data):
    with pytest.raises(UnknownNameError, match=r'"pointmas".*Did you mean "pointmass"'):
        train(small(tmp_path / "run", data, env=pointmass(type="pointmas")))


def test_an_unknown_field_in_json_lists_the_fields():
    values = to_json(TrainConfig(online_steps=0))
    values["poco"]["etta"] = 1.0
    with pytest.raises(UnknownNameError, match=r'PocoConfig named "etta".*Did you mean "eta"'):
        from_json(TrainConfig, values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"zeta": 0.0}, "zeta is 0.0; it must be above 0"),
        ({"zeta": -0.1}, "zeta is -0.1; it must be above 0"),
        ({"eta": 0.0}, "eta is 0.0.*above 0"),
        ({"num_candidates": 0}, r"num_candidates \(N\) is 0.*at least 1"),
    ],
)
def test_impossible_values_are_refused_when_the_configuration_is_built(values, words):
    with pytest.raises(ConfigError, match=words):
        PocoConfig(**values)


def test_a_folder_that_holds_a_run_is_not_overwritten(finished, data):
    before = everything(finished)
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume"):
        train(small(finished, data))
    assert_same(everything(finished), before)


def test_a_run_that_ended_before_its_first_checkpoint_is_not_told_to_resume(tmp_path, data):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no checkpoint yet") as caught:
        train(small(tmp_path, data))
    assert "--resume" not in str(caught.value)


def test_a_folder_named_by_its_start_time_is_found_again(tmp_path, data):
    config = small(tmp_path / "of {time}", data, online_steps=0)
    first = train(config).output_dir
    assert first.parent == tmp_path
    assert "{time}" not in first.name
    assert train(replace(config, resume=True)).output_dir == first


def test_a_run_of_imitation_alone_shows_no_online_stage_and_says_what_it_writes(tmp_path, data, capfd):
    result = train(small(tmp_path / "run", data, sft_steps=1, online_steps=0))
    shown = capfd.readouterr().out
    assert "SFT: 1/1" in shown
    assert "online" not in shown.replace("online-", "")
    for file in (result.output_dir / "best", result.policy_dir):
        assert re.search(rf"writing the \w+ policy.* to {re.escape(str(file))}", shown)
    assert shown.index("writing the learning curve") < shown.index("learning curve  ")


def test_resume_without_a_checkpoint_is_refused(tmp_path, data):
    with pytest.raises(CheckpointError, match="nothing to resume"):
        train(small(tmp_path / "run", data, resume=True))
    assert not (tmp_path / "run").exists()


def test_resume_into_another_configuration_lists_the_differences(finished, data):
    config = small(finished, data, resume=True, sft_steps=41, seed=3)
    with pytest.raises(CheckpointError) as caught:
        train(replace(config, poco=replace(config.poco, eta=0.9)))
    for line in ("poco.eta: 0.2 -> 0.9", "sft_steps: 40 -> 41", "seed: 0 -> 3"):
        assert line in str(caught.value)
    assert "zeta" not in str(caught.value)


def test_a_truncated_checkpoint_is_named_as_damaged(tmp_path, data):
    config = small(tmp_path / "run", data, online_steps=0)
    train(config)
    weights = sorted((config.output_dir / "checkpoints").iterdir())[-1] / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"checkpoint .*00000040 is damaged"):
        train(replace(config, resume=True))


def test_an_output_dir_that_cannot_be_written_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("in the way")
    missing = DatasetConfig(root=tmp_path / "nowhere")
    config = small(tmp_path / "file" / "run", tmp_path, demonstrations=None, dataset=missing)
    with pytest.raises(CheckpointError, match="cannot write in output_dir"):
        train(config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """The folder of a small run that is done."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(small(run, data))
    AcceleratorState._reset_state(reset_partial_state=True)
    return run


# -- options --------------------------------------------------------------------------------------------------------


def finite(run):
    return all(np.isfinite(value) for line in metrics_of(run) for value in line.values() if not isinstance(value, str))


def test_bf16_stays_finite_and_still_trains_the_actor(tmp_path, data):
    """Candidates are proposed without gradient first; the weights that autocast casts there must not stay without."""
    config = small(tmp_path / "run", data, mixed_precision="bf16")
    train(config)
    online = [line for line in metrics_of(config.output_dir) if line["stage"] == "online"]
    assert finite(config.output_dir)
    assert all(line["actor_grad_norm"] > 0 and line["critic_grad_norm"] > 0 for line in online)


def test_max_grad_norm_bounds_the_step_of_each_group(tmp_path, data):
    """Adam's first moment after one update is (1 - beta1) = 0.1 of the gradient: its norm is 0.1 * 0.01 when the
    gradient, whose own norm is logged and larger, is clipped to 0.01."""
    config = small(tmp_path / "run", data, sft_steps=1, online_steps=0, log_every=1)
    train(replace(config, optim=replace(config.optim, max_grad_norm=0.01)))
    (line,) = metrics_of(config.output_dir)
    assert line["actor_grad_norm"] > 0.1
    moments = load_file(sorted((config.output_dir / "checkpoints").iterdir())[-1] / "optimizer.safetensors")
    norm = torch.stack([value.norm() for name, value in moments.items() if name.endswith("exp_avg")]).norm()
    assert norm.item() == pytest.approx(0.001, rel=1e-3)


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, data):
    with pytest.raises(UnknownNameError, match=r'no installed tracker named "tensorbored"'):
        train(small(tmp_path / "run", data, trackers=("tensorbored",)))


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_the_scalars(tmp_path, data):
    config = small(tmp_path / "run", data, online_steps=0, trackers=("tensorboard",))
    train(config)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(config.output_dir / "poco_vla"))
    events.Reload()
    logged = [line["bc_loss"] for line in metrics_of(config.output_dir)]
    assert [event.value for event in events.Scalars("sft/bc_loss")] == pytest.approx(logged)


def test_the_best_policy_is_that_of_the_best_evaluation(tmp_path, data, monkeypatch):
    """The second of four evaluations, then one that is as good, which is newer: that one's weights are in best/."""
    trainer = Trainer(small(tmp_path / "run", data, eval=EvalConfig(episodes=6, every=100, videos=False)))
    keep, rates, kept = trainer.evaluations.keep_best, iter([0.1, 0.6, 0.6, 0.3]), []

    def flattered(figures):
        keep(figures | {"success_rate": next(rates)})
        kept.append([p.detach().clone() for p in trainer.updater.actor_parameters])

    monkeypatch.setattr(trainer.evaluations, "keep_best", flattered)
    try:
        trainer.run()
    finally:
        trainer.close()
    run = trainer.config.output_dir
    result = json.loads((run / "result.json").read_text())
    assert len(kept) == 4
    assert (result["best"]["label"], result["best"]["policy"]) == (result["evaluations"][2]["label"], "best")
    best = FlowMlp.from_pretrained(run / "best")
    for p, expected in zip([p for p in best.parameters() if p.requires_grad], kept[2], strict=True):
        assert torch.equal(p, expected)
    assert not torch.equal(kept[2][0], kept[3][0])
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert lines == result["evaluations"]


def test_best_of_n_acting_executes_what_the_critic_prefers(tmp_path, data):
    """The same run but for the choice among candidates, made once the critic is warm, ends with other episodes."""
    plain, best = (small(tmp_path / f"run_{n}", data, best_of_n=n, warmup_steps=5) for n in (1, 4))
    train(plain)
    result = train(best)
    assert result.env_steps >= 300
    chunks = [
        LeRobotDataset("local/episodes", root=config.output_dir / "episodes")[-1]["action"] for config in (plain, best)
    ]
    assert not torch.equal(*chunks)


def test_zeta_auto_becomes_a_quantile_of_the_demonstrations_errors(tmp_path, data):
    """By its definition a tenth of the demonstrations' errors lie above it; two tenths lie above the .8 quantile."""
    found = {}
    for quantile in (0.8, 0.9):
        config = small(tmp_path / f"run_{quantile}", data)
        train(replace(config, poco=replace(config.poco, zeta="auto", zeta_quantile=quantile)))
        assert finite(config.output_dir)
        last = sorted((config.output_dir / "checkpoints").iterdir())[-1]
        found[quantile] = load_file(last / "weights.safetensors")["zeta"].item()
        bc_loss = metrics_of(config.output_dir)[7]["bc_loss"]
        assert found[quantile] > bc_loss
    assert found[0.8] < found[0.9]


def test_the_actor_is_frozen_during_warm_up_unless_warmup_bc(tmp_path, data):
    def actor_after(steps, **options):
        config = small(tmp_path / f"run_{steps}_{len(options)}", data, warmup_steps=10_000, online_steps=steps)
        train(replace(config, poco=replace(config.poco, **options)))
        return (config.output_dir / "policy" / "model.safetensors").read_bytes()

    imitated = actor_after(0)
    assert actor_after(300) == imitated
    assert actor_after(300, warmup_bc=True) != imitated


def test_demo_fraction_one_never_learns_from_online_data(tmp_path, data):
    """With all of every batch from demonstrations the anchor "all" equals the anchor "demos"."""
    losses = []
    for anchor in ("all", "demos"):
        config = small(tmp_path / f"run_{anchor}", data)
        train(
            replace(config, poco=replace(config.poco, anchor=anchor), replay=replace(config.replay, demo_fraction=1.0))
        )
        losses.append([line.get("bc_loss") for line in metrics_of(config.output_dir)])
    assert losses[0] == losses[1]


def test_videos_of_a_failure_before_and_nothing_without_a_success(tmp_path, data):
    """The small run imitates for 40 updates and fails; its first failure is played again from seed and actions."""
    config = small(tmp_path / "run", data, online_steps=0, eval=EvalConfig(episodes=3))
    result = train(config)
    assert result.before.rate == 0
    assert (config.output_dir / "failure_before.mp4").stat().st_size > 1000
    assert not (config.output_dir / "success_after.mp4").exists()


def test_demonstrations_are_made_once_and_hold_successes_only(tmp_path, data):
    config = small(tmp_path / "run", data)
    first = ensure_demonstrations(config.env, config.demonstrations)
    stamp = (first / "meta" / "info.json").stat().st_mtime_ns
    again = ensure_demonstrations(config.env, config.demonstrations)
    assert again == first == demonstrations_root(config.env, config.demonstrations)
    assert (again / "meta" / "info.json").stat().st_mtime_ns == stamp
    config = DatasetConfig(repo_id="local/demonstrations", root=first)
    episodes = read_episodes(open_dataset(config), config, ["observation.state"])
    assert [episode.succeeded for episode in episodes] == [True] * 6


def test_a_loss_that_is_not_finite_ends_the_run_before_the_step_and_keeps_the_batch(tmp_path, data):
    config = small(tmp_path / "run", data, online_steps=0)
    trainer = Trainer(config)
    try:
        with torch.no_grad():
            next(iter(trainer.updater.actor_parameters)).fill_(float("nan"))
        before = [p.detach().clone() for p in trainer.updater.actor_parameters[1:]]
        with pytest.raises(NonFiniteError, match=r"sft update 0: the loss is nan .* batch is kept in .*\.safetensors"):
            trainer.run()
    finally:
        trainer.close()
    for p, old in zip(trainer.updater.actor_parameters[1:], before, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=0, atol=0)
    kept = load_file(config.output_dir / "nonfinite_batch_0.safetensors")
    assert kept["actions"].shape[:2] == (config.optim.batch_size, config.horizon)
    assert kept["obs.observation.state"].shape[0] == config.optim.batch_size


def test_two_runs_in_one_folder_are_refused_and_the_first_goes_on(tmp_path, data):
    config = small(tmp_path / "run", data, online_steps=0)
    first = Trainer(config)
    try:
        with pytest.raises(CheckpointError, match="another process is training in"):
            Trainer(config)
        first.run()
    finally:
        first.close()
    assert (config.output_dir / "result.json").is_file()
