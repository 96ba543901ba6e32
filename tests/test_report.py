"""Tables, curves over seeds, published curves, one page and a command line out of the files that runs leave."""

import json
import os
import re
import shlex
import subprocess
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib import image
from matplotlib.figure import Figure
from rich.console import Console

from poco_vla import report
from poco_vla.cli import main
from poco_vla.config import DemonstrationConfig, EnvSpec, PocoConfig, TrainConfig, to_json
from poco_vla.errors import DataError
from poco_vla.evaluation import SuccessRate
from poco_vla.report.curves import bootstrap_interval, common_grid, curve_of, over_seeds, points, rate_of
from poco_vla.report.labels import labels_of
from poco_vla.report.page import _folded
from poco_vla.report.plots import draw_group, metric, spread
from poco_vla.report.published import published_name
from poco_vla.report.runs import RunRecord, train_command

TASK = "cube-task1-v0"


def evaluation(successes, episodes, env_steps):
    return {"label": "", "env_steps": env_steps} | SuccessRate(successes, episodes, 30.0).figures()


def lines(values):
    return "".join(f"{json.dumps(line)}\n" for line in values)


def written(folder, *, evaluations=None, episodes=(), metrics=(), config=None, task=TASK, **changes):
    """A run's folder, its files written by hand."""
    folder.mkdir(parents=True)
    evaluations = [evaluation(8, 20, 0), evaluation(19, 20, 12_000)] if evaluations is None else evaluations
    result = {
        "seed": 3,
        "env": {"type": "ogbench", "task": task, "options": {"episode_length": 120}},
        "before": evaluations[0] if evaluations else None,
        "after": evaluations[-1] if evaluations else None,
        "evaluations": evaluations,
        "updates": 5960,
        "env_steps": 12_034,
        "seconds": 95.4,
        "policy": "policy",
    } | changes
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "episodes.jsonl").write_text(lines(episodes))
    (folder / "metrics.jsonl").write_text(lines(metrics))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(to_json(config)))
    return folder


def configured(folder, *, seed=0, eta=0.1, task=TASK, **changes):
    """A run with its config.json."""
    parts = {"env": EnvSpec(task=task), "demonstrations": DemonstrationConfig(), "poco": PocoConfig(eta=eta)}
    config = TrainConfig(**parts, seed=seed, output_dir=folder)
    return written(folder, config=config, seed=seed, task=task, **changes)


def unfinished(folder, *, evaluations=(), **changes):
    """A run that still runs or was stopped: its configuration and its logs."""
    run = configured(folder, **changes)
    (run / "result.json").unlink()
    if evaluations:
        (run / "evaluations.jsonl").write_text(lines(evaluations))
    return run


def shown(*runs):
    console = Console(width=200, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    console.print(report.result_table(runs))
    return console.export_text()


def of_suite(successes, env_steps):
    """An evaluation of two tasks, 20 episodes each."""
    tasks = tuple((name, SuccessRate(number, 20, 30.0)) for name, number in successes.items())
    total = sum(successes.values())
    return {"label": "", "env_steps": env_steps} | SuccessRate(total, 40, 30.0, tasks).figures()


def test_a_suite_has_a_row_and_a_bar_for_each_task_and_lerobot_counts_episodes_per_task(tmp_path, capsys):
    """8 and 12 of 20, then 18 and 12: 40 % and 60 %, 90 % and 60 %; the mean goes from 50 to 75."""
    evaluations = [of_suite({"reach": 8, "push": 12}, 0), of_suite({"reach": 18, "push": 12}, 9_000)]
    run = configured(tmp_path / "run", evaluations=evaluations)
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    report.finish(run, console)
    text = console.export_text()
    assert re.search(r"run .*50 \[.*75 \[", text)
    assert re.search(r"reach +40 \[22, 61\] +90 \[70, 97\] +\+50", text)
    assert re.search(r"push +60 .* +60 .* \+0", text)
    assert "--eval.n_episodes=20" in text
    page = report.write_page([run], tmp_path / "page.html").read_text()
    for name, rates in {"reach": "from 40 to 90 %", "push": "from 60 to 60 %"}.items():
        assert re.search(rf"<td>{name}</td>.*?{rates}", page, re.DOTALL)


# -- table and command lines ----------------------------------------------------------------------------------------


def test_a_row_says_before_after_gain_steps_and_time(tmp_path):
    """8 of 20 is 40 %, 19 of 20 is 95 %: a gain of 55 points; 95.4 s is 1 min 35 s. Wilson's intervals, z^2 = 3.84:
    (.4 + .096) / 1.192 +- 1.96 / 1.192 sqrt(.012 + .0024) = .416 +- .197, and .878 +- .114 likewise."""
    text = shown(written(tmp_path / "run"))
    for part in ("run", " 3 ", "40 [22, 61]", "95 [76, 99]", "+55", "12,034", "5,960", "1:35"):
        assert part in text


def test_several_runs_are_several_rows_and_namesakes_are_told_by_their_folder(tmp_path):
    text = shown(written(tmp_path / "a"), written(tmp_path / "b", updates=77))
    assert [line.split()[0] for line in text.splitlines() if " 3 " in line] == ["a", "b"]
    assert "77" in text
    text = shown(written(tmp_path / "x" / "seed[0]"), written(tmp_path / "y" / "seed[0]"))
    assert [line.split()[0] for line in text.splitlines() if " 3 " in line] == ["x/seed[0]", "y/seed[0]"]


@pytest.mark.parametrize("width", [60, 80, 90, 120])
def test_a_narrow_terminal_shows_success_in_full(width, tmp_path):
    """Names of folders are folded, and updates, time and steps left out, before a rate is cut off."""
    sure = {"success_rate": 1.0, "interval_95": [0.93, 1.0], "episodes": 50, "env_steps": 1_000_000}
    names = ("20261130-141502-seed0", "20261130-141502-seed1-with-a-long-name-of-an-experiment")
    more = {"after": sure, "env_steps": 1_000_000, "updates": 1_020_000, "seconds": 72_000}
    console = Console(width=width, record=True, soft_wrap=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    console.print(report.result_table([written(tmp_path / name, **more) for name in names]))
    text = console.export_text()
    assert text.count("100 [93, 100]") == 2
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_a_run_without_an_environment_has_no_rates(tmp_path):
    run = written(tmp_path / "run", evaluations=[], env=None)
    rows = [line for line in shown(run).splitlines() if " 3 " in line]
    assert rows
    assert not any("[" in row for row in rows)
    assert report.eval_command(run) is None
    assert report.draw_curves([run], tmp_path / "curve.png").exists()
    assert "No evaluations" in report.write_page([run], tmp_path / "page.html").read_text()


def test_the_command_line_names_policy_environment_and_options(tmp_path):
    run = written(tmp_path / "run")
    command = report.eval_command(run)
    for part in (
        f"--policy.path={run}/policy",
        "--env.type=ogbench",
        "--env.task=cube-task1-v0",
        "--env.episode_length=120",
    ):
        assert part in command


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ({"command": ["recipes/a.py"]}, "accelerate launch recipes/a.py --seed 7"),
        ({"command": ["recipes/a.py", "--seed", "1", "--poco.eta", "2"]}, "launch recipes/a.py --poco.eta 2 --seed 7"),
        ({"command": ["recipes/a.py", "--seeds", "7", "8", "--resume", "--smoke"]}, "recipes/a.py --smoke --seed 7"),
        ({"command": ["/x/bin/poco-vla", "train", "--a", "b c"]}, "poco-vla train --a 'b c' --seed 7"),
        ({"command": ["/x/bin/pytest", "-q"]}, None),
        ({}, None),
    ],
)
def test_the_training_command_is_as_far_as_the_run_tells_it(told, line, tmp_path):
    command = train_command(RunRecord(tmp_path, told | {"seed": 7}, {}))
    assert command is line if line is None else command.endswith(line)


def test_a_folder_without_figures_is_one_clear_error(tmp_path):
    with pytest.raises(DataError, match=r"no result.json in"):
        report.result_table([tmp_path])


@pytest.mark.parametrize("text", ["{", "[]", '"x"', '{"seed": 1}', "\x00"])
def test_damaged_figures_are_an_error_that_names_the_file(text, tmp_path):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(DataError, match=r"result\.json"):
        report.read_result(tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"seed": "<b>"}, "'<b>' stands where a number belongs"),
        ({"before": {}}, "lacks 'interval_95'"),
        ({"best": {"interval_95": [0.1, 0.2], "env_steps": 1, "episodes": 2}}, "lacks 'success_rate'"),
        ({"after": {"interval_95": [0.1, 0.2], "env_steps": None, "success_rate": 1.0, "episodes": 2}}, "None stands"),
        ({"evaluations": None}, "result.json"),
        ({"evaluations": [3]}, "result.json"),
        ({"env": {"type": "x", "options": {}}}, "lacks 'task'"),
        ({"env": {"type": "x", "task": 1, "options": {}}}, "1 stands where a name belongs"),
        ({"env": []}, "env or policy"),
        ({"policy": None}, "env or policy"),
    ],
)
def test_figures_of_another_kind_are_told(damage, words, tmp_path):
    path = written(tmp_path / "run") / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(DataError, match=re.escape(words)):
        report.read_result(path.parent)


# -- one run's curve ------------------------------------------------------------------------------------------------

EPISODES = [{"env_steps": 10 * i, "success": i >= 10, "length": 10} for i in range(30)]


def test_the_running_average_is_over_twenty_episodes_and_starts_at_five(tmp_path):
    """Ten failures, then successes: after 5 episodes 0; after 15, 5/15; after 30, the last 20 hold no failure: 1."""
    table = points(written(tmp_path / "run", episodes=EPISODES), "training").set_index("env_steps")
    assert table.index[0] == 40
    assert table["success"].loc[[40, 140, 290]].tolist() == pytest.approx([0, 5 / 15, 1])
    assert table["episodes"].loc[[40, 140, 290]].tolist() == [5, 15, 20]
    assert table[["low", "high"]].isna().all(axis=None)


def test_a_finished_run_leaves_its_curve_as_a_table(tmp_path):
    first, last = evaluation(8, 20, 0), evaluation(19, 20, 12_000) | {"update": 70}
    run = written(tmp_path / "run", evaluations=[first, last], episodes=EPISODES)
    built = report.read_curve(run)
    report.finish(run, Console(quiet=True))
    kept = pd.read_parquet(run / "curve.parquet")
    pd.testing.assert_frame_equal(kept, built)
    pd.testing.assert_frame_equal(kept, report.read_curve(run))
    assert list(kept) == ["kind", "env_steps", "success", "low", "high", "episodes", "update"]
    rows = kept[kept["kind"] == "evaluation"]
    assert rows["success"].tolist() == [0.4, 0.95]
    assert rows["low"].tolist() == [first["interval_95"][0], last["interval_95"][0]]
    assert rows["update"].isna().tolist() == [True, False]
    assert not list(run.glob(".*partial"))


def test_a_table_that_is_older_than_its_run_is_not_believed(tmp_path):
    run = written(tmp_path / "run")
    report.finish(run, Console(quiet=True))
    assert len(report.read_curve(run)) == 2
    (run / "episodes.jsonl").write_text(lines(EPISODES))
    later = (run / "curve.parquet").stat().st_mtime + 10
    os.utime(run / "episodes.jsonl", (later, later))
    assert len(report.read_curve(run)) == 2 + 26


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    run = written(tmp_path / "run", episodes=EPISODES)
    with (run / "episodes.jsonl").open("a") as file:
        file.write('{"env_steps": 300}\n{"env_steps": 30')
    assert len(points(run, "training")) == 26


# -- groups and intervals over seeds --------------------------------------------------------------------------------


def test_runs_that_differ_in_seed_and_folder_alone_are_one_group(tmp_path):
    runs = [configured(tmp_path / f"{seed}", seed=seed) for seed in (1, 0)]
    other = configured(tmp_path / "eta", eta=0.5)
    elsewhere = configured(tmp_path / "task", task="lift")
    groups = report.group_runs([*runs, other, elsewhere])
    assert [[run.path for run in group.runs] for group in groups] == [runs[::-1], [other], [elsewhere]]
    assert [group.name for group in groups] == ["poco.eta 0.1", "poco.eta 0.5", "flow_mlp"]
    assert [group.task for group in groups] == [TASK, TASK, "lift"]


def test_settings_are_named_by_all_their_differences(tmp_path):
    """The one that tells most apart comes first; a long value is shortened, many differences are counted."""
    runs = [configured(tmp_path / name) for name in "abc"]
    changes = {
        "b": {"horizon": 7, "poco": {"beta": 3.0}},
        "c": {"horizon": 9, "policy": "a/very/long/path/of/a/policy/that/nobody/reads", "poco": {"beta": 3.0}},
    }
    for name, change in changes.items():
        values = json.loads((tmp_path / name / "config.json").read_text())
        values["poco"] |= change["poco"]
        (tmp_path / name / "config.json").write_text(json.dumps(values | change | {"poco": values["poco"]}))
    names = [group.name for group in report.group_runs(runs)]
    assert names == [
        "horizon 5, poco.beta 1.0, policy null",
        "horizon 7, poco.beta 3.0, policy null",
        "horizon 9, poco.beta 3.0, policy a/very/long/path/of/a/pol...",
    ]
    many = [{"adapter": "a"} | {f"poco.x{i}": j for i in range(9)} for j in range(2)]
    assert labels_of(many)[1] == "poco.x0 1, poco.x1 1, poco.x2 1, poco.x3 1 and 5 more differences"


@pytest.mark.parametrize("change", [{"memory": "24GB"}, {"checkpoint_keep_every": 7}, {"interaction": {"port": 1}}])
def test_what_does_not_change_learning_makes_no_other_setting(change, tmp_path):
    runs = [configured(tmp_path / name) for name in "ab"]
    values = json.loads((runs[1] / "config.json").read_text())
    (runs[1] / "config.json").write_text(json.dumps(values | change))
    assert len(report.group_runs(runs)) == 1


def test_a_sweeps_variant_is_one_group_over_seeds_though_each_starts_from_its_own_sft_policy(tmp_path):
    runs = [configured(tmp_path / f"seed{seed}" / "zeta", seed=seed) for seed in (0, 1)]
    for run in runs:
        values = json.loads((run / "config.json").read_text())
        values |= {"policy": str(run.parent / "sft" / "policy"), "output_dir": str(run)}
        (run / "config.json").write_text(json.dumps(values))
    assert len(report.group_runs(runs)) == 1


def test_a_setting_that_an_older_configuration_lacks_is_the_default(tmp_path):
    new, old = configured(tmp_path / "new"), configured(tmp_path / "old")
    values = json.loads((old / "config.json").read_text())
    del values["poco"]["beta"], values["demonstrations"]["noise"]
    (old / "config.json").write_text(json.dumps(values))
    assert len(report.group_runs([new, old])) == 1


def test_a_setting_that_is_none_and_one_that_is_absent_are_told_apart(tmp_path):
    """The fields that tell groups apart are searched until they do; here "not set" against null."""
    runs = [configured(tmp_path / name) for name in "ab"]
    values = json.loads((runs[0] / "config.json").read_text())
    values["env"]["options"]["episode_length"] = None
    (runs[0] / "config.json").write_text(json.dumps(values))
    names = [group.name for group in report.group_runs(runs)]
    assert names == ["env.options.episode_length null", "env.options.episode_length not set"]


def test_seeds_meet_on_the_grid_of_the_one_that_ended_first():
    """0, 10, 20 and 0, 8, 30: the first ends first. 5, 15 and 0, 8, 30: nothing before 5, where the first begins."""
    a = np.array
    assert common_grid([a([0.0, 10, 20]), a([0.0, 8, 30])]).tolist() == [0, 10, 20]
    assert common_grid([a([5.0, 40]), a([0.0, 8, 30])]).tolist() == [8, 30]
    assert common_grid([a([5.0]), a([0.0, 3])]).tolist() == [3]


def test_a_seed_is_read_on_the_line_between_its_own_evaluations(tmp_path):
    """0 and 1 at steps 0 and 40; the other 0, .5, .5 at 0, 10, 20. At 10: (.25 + .5) / 2; at 20: (.5 + .5) / 2."""
    a = configured(tmp_path / "a", evaluations=[evaluation(0, 20, 0), evaluation(20, 20, 40)])
    b = configured(tmp_path / "b", seed=1, evaluations=[evaluation(k, 20, s) for k, s in ((0, 0), (10, 10), (10, 20))])
    curve = curve_of(report.group_runs([a, b])[0])
    assert curve.steps.tolist() == [0, 10, 20]
    assert curve.mean.tolist() == pytest.approx([0, 0.375, 0.5])
    assert curve.at(15) == pytest.approx(0.4375)


def test_the_bootstrap_over_three_seeds_is_what_counting_gives():
    """0, 0, 1 drawn three times: the mean is 0 in 8 of 27 draws, 1 in 1 of 27 = 3.7 % > 2.5 %: the interval is [0, 1].
    Seeds that agree leave no width. Twenty seeds, half of them 1: .5 +- 1.96 sqrt(.25 / 20) = .5 +- .22."""
    low, high = bootstrap_interval(np.array([[0.0, 0.7], [0.0, 0.7], [1.0, 0.7]]))
    assert (low[0], high[0]) == (0, 1)
    assert (low[1], high[1]) == pytest.approx((0.7, 0.7))
    low, high = bootstrap_interval(np.array([[0.0]] * 10 + [[1.0]] * 10))
    assert (low[0], high[0]) == pytest.approx((0.28, 0.72), abs=0.03)


def test_the_bootstrap_repeats():
    values = np.random.default_rng(1).random((5, 7))
    assert np.array_equal(bootstrap_interval(values), bootstrap_interval(values))


def test_two_seeds_have_the_interval_of_their_pooled_episodes(tmp_path):
    """8 and 19 of 20 are 27 of 40; three seeds, not two, are enough for a bootstrap over seeds."""
    rates, episodes = np.array([[0.4], [0.95]]), np.full((2, 1), 20.0)
    mean, low, high = over_seeds(rates, episodes)
    pooled = SuccessRate(27, 40, 1.0)
    assert mean[0] == pytest.approx(pooled.rate)
    assert (low[0], high[0]) == pytest.approx(pooled.interval)
    _, low, high = over_seeds(np.full((3, 1), 0.4), np.full((3, 1), 20.0))
    assert (low[0], high[0]) == pytest.approx((0.4, 0.4))


def test_what_the_interval_is_over_is_said(tmp_path):
    runs = [configured(tmp_path / f"{seed}", seed=seed) for seed in range(3)]
    labels = [curve_of(report.group_runs(runs[:count])[0]).label for count in (1, 2, 3)]
    assert labels == ["95 % Wilson, 20 episodes", "95 % Wilson, 40 episodes of 2 seeds", "95 % bootstrap over 3 seeds"]
    assert rate_of(report.group_runs(runs)[0], "after") == pytest.approx((0.95, 0.95, 0.95))


# -- runs that did not end ------------------------------------------------------------------------------------------

IMITATED = [{"stage": "sft", "update": 50, "env_steps": 0, "seconds": 1.0, "bc_loss": 1.0}]
ONLINE = [{"stage": "online", "update": 4000, "env_steps": 4100, "seconds": 61.0, "q": 1.0}]


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"metrics": ONLINE}, "4,100 of 200,000 steps"),
        ({"metrics": ONLINE, "evaluations": [evaluation(1, 20, 5000)]}, "5,000 of 200,000 steps"),
        ({"metrics": ONLINE, "episodes": [{"env_steps": 4200, "success": True}]}, "4,200 of 200,000 steps"),
        ({"metrics": IMITATED}, "0 of 200,000 steps, 50 updates"),
        ({}, "0 of 200,000 steps, 0 updates"),
    ],
)
def test_an_unfinished_run_is_as_far_as_its_last_line(changes, status, tmp_path):
    run = report.read_run(unfinished(tmp_path / "run", **changes))
    assert run.status == f"running or stopped at {status}"
    assert not run.finished
    assert run.result["after"] is None


def test_an_unfinished_run_has_its_row_and_a_line_that_says_so(tmp_path):
    """Seed 4 was evaluated twice; seed 5 has not been evaluated."""
    figures = [evaluation(8, 20, 0), evaluation(19, 20, 3000)]
    runs = [
        configured(tmp_path / "whole", seed=3),
        unfinished(tmp_path / "part", seed=4, evaluations=figures, metrics=ONLINE),
        unfinished(tmp_path / "new", seed=5, metrics=IMITATED),
    ]
    text = shown(*runs)
    row = next(line for line in text.splitlines() if line.startswith(" part"))
    assert "40 [22, 61]" in row
    assert "unfinished" in row
    assert "+" not in row
    assert "1:01" in row
    assert "part (seed 4): running or stopped at 4,100 of 200,000 steps; success 95 [76, 99] at 3,000" in text
    assert "new (seed 5): running or stopped at 0 of 200,000 steps, 50 updates; not evaluated yet" in text
    assert "running" not in shown(runs[0])


def test_unfinished_runs_are_in_no_mean(tmp_path):
    """Two seeds ended at 95 %. Two more stand at 5 % and 0 %, one of them on its way to other steps."""
    ended = [configured(tmp_path / f"{seed}", seed=seed) for seed in (1, 2)]
    alone = report.group_runs(ended)[0]
    others = [
        unfinished(tmp_path / "a", seed=0, evaluations=[evaluation(1, 20, 0), evaluation(1, 20, 700)]),
        unfinished(tmp_path / "b", seed=1, evaluations=[evaluation(0, 20, 0)], metrics=ONLINE),
    ]
    (group,) = report.group_runs([others[0], *ended, others[1]])
    assert [run.path for run in group.runs] == [*ended, *others]
    for when in ("before", "after"):
        assert rate_of(group, when) == rate_of(alone, when) is not None
    for name, values in vars(curve_of(alone)).items():
        assert np.array_equal(getattr(curve_of(group), name), values), name
    assert group.env_steps == alone.env_steps
    text = Page(report.write_page([*others, *ended], tmp_path / "page.html").read_text()).text
    assert re.search(r"2\s*40 \[26, 55\]\s*95 \[83, 99\]\s*\+55\s*12,034\s*1:35", text), "16 and 38 of 40"
    assert "4 runs in 1 setting, 2 of them unfinished" in text
    assert "Seed 0: running or stopped at 700 of 200,000 steps; 5 [1, 24] % at 700" in text
    assert "Seed 1: running or stopped at 4,100 of 200,000 steps; 0 [0, 16] % at 0" in text


def test_the_curve_of_an_unfinished_run_is_drawn_as_far_as_it_goes(tmp_path):
    figures = [evaluation(8, 20, 0), evaluation(19, 20, 3000)]
    run = unfinished(tmp_path / "run", evaluations=figures, episodes=EPISODES)
    curve = curve_of(report.group_runs([run])[0])
    assert (curve.steps.tolist(), curve.mean.tolist()) == ([0, 3000], [0.4, 0.95])
    assert curve.label == "95 % Wilson, 20 episodes, unfinished"
    assert rate_of(report.group_runs([run])[0], "after") is None
    text = report.write_page([run], tmp_path / "page.html").read_text()
    assert "POCO 95 %" in text
    assert "lerobot-eval" not in text
    assert report.draw_curves([run], tmp_path / "curve.png").exists()


def test_training_episodes_of_an_unfinished_seed_are_drawn_beside_the_others(tmp_path):
    """Evaluated at step 0 alone, it would be invisible."""
    ended = [configured(tmp_path / f"{seed}", seed=seed) for seed in (1, 2)]
    figures = {"evaluations": [evaluation(8, 20, 0)], "episodes": EPISODES}
    group = report.group_runs([*ended, unfinished(tmp_path / "a", **figures)])[0]
    axes = Figure().subplots()
    draw_group(axes, group, {})
    dotted = [line.get_xydata() for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert len(dotted) == 1
    assert dotted[0][-1].tolist() == [290, 1]


def test_a_run_that_was_never_evaluated_is_shown(tmp_path):
    run = unfinished(tmp_path / "run", metrics=IMITATED * 3)
    assert curve_of(report.group_runs([run])[0]) is None
    text = Page(report.write_page([run], tmp_path / "page.html").read_text()).text
    assert "Seed 0: running or stopped at 0 of 200,000 steps, 50 updates; not evaluated yet" in text
    assert "imitation loss" in text


def test_unfinished_runs_are_found_and_one_given_by_itself_too(tmp_path, capsys):
    runs = [unfinished(tmp_path / name, metrics=ONLINE) for name in "ab"]
    (runs[1] / "metrics.jsonl").unlink()
    (runs[1] / "evaluations.jsonl").write_text(lines([evaluation(8, 20, 0)]))
    (runs[0] / "policy").mkdir()
    (runs[0] / "policy" / "config.json").write_text("{}")
    assert report.find_runs([tmp_path]) == (runs, [])
    configured(runs[0] / "earlier")
    assert report.find_runs(runs) == (runs, []), "what lies below a run belongs to it"
    main(["report", str(tmp_path), "--output", str(tmp_path / "report.html")])
    assert "running or stopped at 4,100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", "[", "config.json cannot be read"),
        ("config.json", '{"adapter": "x"}', "lacks 'seed'"),
        ("evaluations.jsonl", lines([evaluation(8, 20, 0) | {"episodes": "many"}]), "'many' stands where a number"),
        ("evaluations.jsonl", lines([evaluation(8, 20, 0) | {"env_steps": "x"}]), "run: '>' not supported"),
        (
            "evaluations.jsonl",
            lines([evaluation(8, 20, 0) | {"interval_95": 1}]),
            "run: Value after * must be an iterable",
        ),
    ],
)
def test_a_damaged_unfinished_run_is_told(file, text, words, tmp_path):
    run = unfinished(tmp_path / "run", metrics=ONLINE)
    (run / file).write_text(text)
    with pytest.raises(DataError, match=re.escape(words)):
        report.find_runs([run])


def test_a_folder_that_no_run_has_begun_to_write_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"nor of one that has begun \(config.json and evaluations.jsonl or metrics"):
        report.find_runs([tmp_path])


def test_an_evaluation_that_a_crash_cut_short_is_left_out(tmp_path):
    run = unfinished(tmp_path / "run", evaluations=[evaluation(8, 20, 0)])
    with (run / "evaluations.jsonl").open("a") as file:
        file.write('{"env_steps": 300, "succ')
    assert len(report.read_run(run).result["evaluations"]) == 1


def test_the_best_evaluation_is_told_beside_the_last_one(tmp_path):
    best = evaluation(20, 20, 8000) | {"policy": "best"}
    run = configured(tmp_path / "run", best=best)
    text = Page(report.write_page([run], tmp_path / "page.html").read_text()).text
    assert "best evaluation" in text
    assert "100 [84, 100] at 8k" in text
    console = Console(width=200, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    report.finish(run, console)
    assert f"{run}/best  100 [84, 100] at 8,000 steps" in console.export_text()
    plain = configured(tmp_path / "plain", best=None)
    assert "best evaluation" not in report.write_page([plain], tmp_path / "page.html").read_text()


# -- published curves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("scene-singletask-task1-v0", "scene-play-task1"),
        ("scene-play-singletask-task5-v0", "scene-play-task5"),
        ("scene-singletask-v0", "scene-play-task2"),
        ("puzzle-3x3-singletask-v0", "puzzle-3x3-play-task4"),
        ("cube-double-singletask-task3-v0", "cube-double-play-task3"),
        ("cube-triple-singletask-task2-v0", "cube-triple-play-task2"),
        ("cube-double-singletask-v0", "cube-double-play-task2"),
        ("cube-triple-singletask-v0", "cube-triple-play-task2"),
        ("Lift", "lift"),
        ("PickPlaceCan", "can"),
        ("square", "square"),
        ("cube-double", "cube-double"),
    ],
)
def test_every_published_task_is_found_by_its_environments_name(task, name):
    curves = report.published(task)
    assert published_name(task) == name
    assert {"QC", "QC-FQL", "RLPD", "RLPD-AC", "FQL", "FQL-n", "BFN", "BFN-n"} <= set(curves)
    for curve in curves.values():
        assert curve.steps.tolist() == [100_000 * k for k in range(11)]
        assert np.all((curve.low <= curve.mean) & (curve.mean <= curve.high))
        assert np.all((curve.low >= 0) & (curve.high <= 1))
        assert name in curve.label


def test_published_figures_are_those_of_the_source():
    """Read off the source by hand: can, QC, x = 1.0 (end of offline training), 1.5, 2.0; RLPD starts from nothing."""
    curves = report.published("can")
    assert [curves["QC"].at(step) for step in (0, 500_000, 1_000_000)] == [0.8484, 0.9119, 0.9044]
    assert (curves["QC"].low[-1], curves["QC"].high[-1]) == (0.86, 0.932)
    assert curves["RLPD"].mean[0] == 0
    assert report.published("cube-double")["QC"].label == "mean of 5 cube-double tasks"


@pytest.mark.parametrize("task", ["cube-single-singletask-task1-v0", "scene-noisy-singletask-task1-v0", "dock", ""])
def test_what_was_not_published_has_no_curves(task):
    assert report.published(task) == {}


# -- pictures -------------------------------------------------------------------------------------------------------


def test_a_learning_curve_is_drawn_from_episodes_and_evaluations(tmp_path):
    episodes = [{"env_steps": 100 * i, "success": i > 10, "length": 30} for i in range(40)]
    path = report.draw_curves([written(tmp_path / "run", episodes=episodes)], tmp_path / "curve.png")
    drawn = image.imread(path)
    empty = image.imread(report.draw_curves([written(tmp_path / "none", evaluations=[])], tmp_path / "empty.png"))
    assert drawn.shape == (630, 1080, 4)  # 7.2 x 4.2 inches at 150 dots
    assert (drawn != empty).any(axis=-1).mean() > 0.005


@pytest.mark.parametrize("trials", range(1, 61))
def test_perfect_and_hopeless_runs_can_be_drawn(trials, tmp_path, monkeypatch):
    """Rates of exactly 0 and 1: no error bar may come out as -1e-16, which Matplotlib refuses."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: path.touch())
    for name, points_ in (("many", [(0, 0), (trials, 10)]), ("one", [(trials, 0)])):
        run = written(tmp_path / name, evaluations=[evaluation(k, trials, steps) for k, steps in points_])
        report.draw_curves([run], tmp_path / "curve.png")


def test_labels_keep_their_distance_and_their_order():
    """Three at .5 with a gap of .1 stand at .4, .5, .6; two near the top move down."""
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert spread([0.2, 0.8], 0.1) == pytest.approx([0.2, 0.8])
    assert spread([1.0, 1.0], 0.1) == pytest.approx([0.9, 1.0])
    heights = spread(sorted(np.random.default_rng(0).random(8)), 0.07)
    assert all(b - a > 0.07 - 1e-9 for a, b in pairwise(heights))
    assert spread([], 0.1) == []


# -- the page -------------------------------------------------------------------------------------------------------

METRICS = [
    {"stage": "sft", "update": 50, "env_steps": 0, "seconds": 1.0, "bc_loss": 1.0},
    {"stage": "warmup", "update": 60, "env_steps": 900, "seconds": 2.0, "q": 1.0, "critic_loss": 0.5},
    *(
        {"stage": "online", "update": 60 + k, "env_steps": 1000 * k, "seconds": 3.0, "q": 0.1 * k, "bc_loss": 0.3}
        for k in range(1, 13)
    ),
]
EVIL = '<script>alert("1")</script>&$x_$'


class Page(HTMLParser):
    """Tags, addresses and ids of an HTML text; fails where tags do not close in the order in which they opened."""

    EMPTY = frozenset({"meta", "br", "wbr", "link", "img", "input", "hr"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.ids, self.open, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "poster")]
        self.addresses += re.findall(r"url\(([^)]*)\)", " ".join(value or "" for _, value in attrs))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def runs(tmp_path):
    """Three seeds of a published task, and one run of a task with a hostile name."""
    settings = {"episodes": EPISODES, "metrics": METRICS, "device": "cpu", "command": ["recipes/lift.py"]}
    runs = [configured(tmp_path / "lift" / f"seed{k}", seed=k, task="lift", **settings) for k in range(3)]
    runs.append(configured(tmp_path / "evil" / "<b>run", task=EVIL, metrics=METRICS))
    (runs[0] / "failure_before.mp4").write_bytes(b"1" * 100)
    (runs[1] / "failure_before.mp4").write_bytes(b"2" * 100)
    (runs[3] / "success_after.mp4").write_bytes(b"3" * 100)
    return runs


def test_the_page_holds_everything_it_shows(runs, tmp_path):
    text = report.write_page(runs, tmp_path / "out" / "page.html").read_text()
    page = Page(text)
    assert all(address.startswith(("#", "data:video/mp4;base64,")) for address in page.addresses)
    inside = {address[1:] for address in page.addresses if address[0] == "#"}
    assert inside <= set(page.ids)
    assert len(inside) > 10, "the pictures' own marks"
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "@import" not in text
    assert "url(" not in text.split("</style>")[0]
    assert page.tags.count("video") == 3
    assert page.tags.count("svg") > 10
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["page.html"]


def test_the_page_says_what_the_runs_brought(runs, tmp_path):
    """Three seeds of 8 and 19 in 20: 40 % and 95 %, no spread between seeds. Wilson of the single run: [76, 99]."""
    page = Page(report.write_page(runs, tmp_path / "page.html", "My <title>").read_text())
    for part in (
        "My <title>",
        "40 [40, 40]",
        "95 [95, 95]",
        "95 [76, 99]",
        "+55",
        "1:35",
        "95 % bootstrap over 3 seeds",
    ):
        assert part in page.text, part
    assert "accelerate launch recipes/lift.py" in page.text
    assert "The settings differ" in page.text
    assert "Li, Zhou and Levine" in page.text
    assert "QC-FQL, FQL, FQL-n, BFN, BFN-n, published" in page.text
    for title in ("imitation loss", "value Q", "critic loss"):
        assert page.text.count(title) == 2
    assert "effective candidates" not in page.text, "no such scalar was written"


def test_what_a_run_calls_itself_is_text_and_never_markup(runs, tmp_path):
    text = report.write_page(runs, tmp_path / "page.html").read_text()
    assert "<script" not in text
    assert "<b>" not in text
    assert EVIL in Page(text).text


def test_colours_follow_the_readers_scheme(runs, tmp_path):
    text = report.write_page(runs, tmp_path / "page.html").read_text()
    assert "prefers-color-scheme: dark" in text
    pictures = " ".join(re.findall(r'<svg role="img".*?</svg>', text, flags=re.DOTALL))
    assert "var(--poco)" in pictures
    assert not re.findall(r"(?:fill|stroke): #(?!0{6}|f{6})\w+", pictures), "a colour that no scheme can change"


def test_videos_beyond_the_budget_are_left_out_and_named(runs, tmp_path):
    """Each group's first seed comes before any second one: of three times 100 bytes, 250 take in the first two."""
    text = report.write_page(runs, tmp_path / "page.html", max_video_bytes=250).read_text()
    page = Page(text)
    assert page.tags.count("video") == 2
    assert "MTEx" in text
    assert "MzMz" in text
    assert "MjIy" not in text
    assert f"Left out to keep this page small: after SFT, a failure ({runs[1]})" in page.text
    assert "Seed 0 has no video of: after SFT, a success; after POCO, a failure; after POCO, a success." in page.text


def test_a_run_that_does_not_tell_its_command_can_be_trained_again_by_its_configuration(runs, tmp_path):
    page = Page(report.write_page(runs[3:], tmp_path / "page.html").read_text())
    program = page.text[page.text.index("import json") : page.text.index("train(replace(")]
    scope = {}
    exec(program, scope)
    assert scope["config"].env.task == EVIL
    assert scope["config"].output_dir == runs[3]


def test_a_folded_command_is_the_same_to_a_shell():
    """An option in quotes stays whole, and no option has a line but its own."""
    command = "poco-vla train --a 'b --c' --d=1"
    assert _folded(command) == "poco-vla train \\\n  --a 'b --c' \\\n  --d=1"
    told = subprocess.run(["sh", "-c", f"printf '%s|' {_folded(command)}"], capture_output=True, text=True, check=True)
    assert told.stdout.split("|")[:-1] == shlex.split(command)


def test_changed_settings_come_before_all_of_them(tmp_path):
    run = configured(tmp_path / "run", eta=0.7)
    text = Page(report.write_page([run], tmp_path / "page.html").read_text()).text
    assert re.search(r"not the default\s*value\s*default\s*(env\.task\s*\S+\s*)?poco\.eta\s*0\.7\s*0\.1", text)
    assert "critic_layer_norm_eps" in text[text.index("all settings") :]
    assert "critic_layer_norm_eps" not in text[: text.index("all settings")]


def test_a_loss_that_ran_away_and_a_broken_line_leave_the_rest_to_see(tmp_path):
    bad = [{"stage": "online", "update": 90, "env_steps": 20_000, "q": float("inf")}, {"q": 1.0}]
    run = configured(tmp_path / "run", metrics=[*METRICS, *bad])
    assert np.isfinite(metric(report.group_runs([run])[0].runs[0], "q")).all()
    assert "value Q" in Page(report.write_page([run], tmp_path / "page.html").read_text()).text


def test_a_run_that_only_imitated_shows_its_loss_against_updates(tmp_path):
    run = written(tmp_path / "run", evaluations=[], env=None, env_steps=0, metrics=METRICS[:1] * 3)
    text = Page(report.write_page([run], tmp_path / "page.html").read_text()).text
    assert "Against updates" in text
    assert "imitation loss" in text


# -- which runs there are, and the command line ---------------------------------------------------------------------


def test_runs_are_found_up_to_three_levels_below(runs, tmp_path):
    deep = configured(tmp_path / "a" / "b" / "c")
    configured(tmp_path / "a" / "b" / "c2" / "d")
    found, problems = report.find_runs([tmp_path, runs[0]])
    assert sorted(found) == sorted([*runs, deep])
    assert problems == []


def test_damaged_runs_are_named_and_the_rest_is_reported(runs, tmp_path, capsys):
    (runs[0] / "result.json").write_text('{"seed":')
    (runs[1] / "result.json").unlink()
    (runs[1] / "config.json").unlink()
    (runs[2] / "config.json").write_text("[")
    main(["report", str(tmp_path / "lift"), str(runs[3]), "--output", str(tmp_path / "report.html")])
    shown = capsys.readouterr()
    assert [word in shown.err for word in ("seed0/result.json cannot be read", "no result.json in")] == [True, True]
    assert "seed2/config.json cannot be read" in shown.err
    assert len(shown.err.strip().splitlines()) == 3
    assert "after POCO" in shown.out
    assert Page((tmp_path / "report.html").read_text()).tags.count("h2") == 1


def test_no_run_left_is_one_error(tmp_path, capsys):
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        report.find_runs([tmp_path])
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("suffix", "begins"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml"), ("html", b"<!doctype html>")]
)
def test_the_outputs_name_says_its_kind(suffix, begins, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["report", str(runs[0]), "--output", f"out.{suffix}"])
    assert (tmp_path / f"out.{suffix}").read_bytes().startswith(begins)


def test_another_kind_of_output_is_refused(runs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(runs[0]), "--output", str(tmp_path / "out.docx")])
    assert ".html, .png, .pdf or .svg" in capsys.readouterr().err
