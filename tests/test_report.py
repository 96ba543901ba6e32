"""Table, curve and command line out of the files that a run leaves."""

import json

import pytest
from matplotlib import image
from rich.console import Console

from poco_vla import report
from poco_vla.errors import PocoError
from poco_vla.evaluate import SuccessRate


def evaluation(successes, episodes, env_steps):
    return {"label": "", "env_steps": env_steps} | SuccessRate(successes, episodes, 30.0).figures()


def written(folder, *, evaluations=None, episodes=(), **changes):
    """A run's folder, its result.json written by hand."""
    folder.mkdir()
    evaluations = [evaluation(8, 20, 0), evaluation(19, 20, 12_000)] if evaluations is None else evaluations
    result = {
        "seed": 3,
        "env": {"type": "ogbench", "task": "cube-task1-v0", "options": {"episode_length": 120}},
        "before": evaluations[0] if evaluations else None,
        "after": evaluations[-1] if evaluations else None,
        "evaluations": evaluations,
        "updates": 5960,
        "env_steps": 12_034,
        "seconds": 95.4,
        "policy": "policy",
    }
    (folder / "result.json").write_text(json.dumps(result | changes))
    (folder / "episodes.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in episodes))
    return folder


def shown(*runs):
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(report.result_table(runs))
    return console.export_text()


def test_a_row_says_before_after_gain_steps_and_time(tmp_path):
    """8 of 20 is 40 %, 19 of 20 is 95 %: a gain of 55 points; 95.4 s is 1 min 35 s. Wilson's intervals, z^2 = 3.84:
    (.4 + .096) / 1.192 +- 1.96 / 1.192 sqrt(.012 + .0024) = .416 +- .197, and .878 +- .114 likewise."""
    text = shown(written(tmp_path / "run"))
    for part in ("run", " 3 ", "40 [22, 61]", "95 [76, 99]", "+55", "12,034", "5,960", "1:35"):
        assert part in text


def test_several_runs_are_several_rows(tmp_path):
    text = shown(written(tmp_path / "a"), written(tmp_path / "b", updates=77))
    assert [line.split()[0] for line in text.splitlines() if " 3 " in line] == ["a", "b"]
    assert "77" in text


def test_a_run_without_an_environment_has_no_rates(tmp_path):
    run = written(tmp_path / "run", evaluations=[], env=None)
    rows = [line for line in shown(run).splitlines() if " 3 " in line]
    assert rows
    assert not any("[" in row for row in rows)
    assert report.eval_command(run) is None
    assert report.draw_curves([run], tmp_path / "curve.png").exists()


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
    monkeypatch.setattr(report.Figure, "savefig", lambda *_, **__: None)
    run = written(tmp_path / "run", evaluations=[evaluation(0, trials, 0), evaluation(trials, trials, 10)])
    report.draw_curves([run], tmp_path / "curve.png")


def test_the_running_average_is_over_twenty_episodes_and_starts_at_five(tmp_path):
    """Ten failures, then successes: after 5 episodes 0; after 15, 5/15; after 30, the last 20 hold no failure: 1."""
    episodes = [{"env_steps": 10 * i, "success": i >= 10, "length": 10} for i in range(30)]
    steps, averages = report._running_success(written(tmp_path / "run", episodes=episodes))
    assert steps[0] == 40
    assert averages[0] == 0
    assert averages[steps.index(140)] == pytest.approx(5 / 15)
    assert averages[-1] == 1


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


def test_a_folder_without_figures_is_one_clear_error(tmp_path):
    with pytest.raises(PocoError, match=r"no result.json in"):
        report.result_table([tmp_path])
