"""The report of a comparison, out of the files that its runs leave; numbers by hand."""

import json
from io import StringIO

import numpy as np
import pytest

from poco_vla.config import EnvSpec, TrainConfig, to_json
from poco_vla.errors import DataError
from poco_vla.report import write_comparison, write_comparisons
from poco_vla.report.aggregate import interquartile_mean, probability_of_improvement, stratified_interval
from poco_vla.report.comparison import compared, fisher_exact, read_comparison
from poco_vla.report.published import credit_of, published_by_source
from poco_vla.terminal import SafeConsole

TASK = "cube-double-singletask-task2-v0"


def write_run(root, name, seed, successes, *, policy="runs/sft/policy", finished=True, episodes=100, horizon=5):
    """A run with an evaluation at every 1,000 steps."""
    folder = root / name / f"seed{seed}"
    folder.mkdir(parents=True)
    env = EnvSpec(task=TASK)
    config = TrainConfig(env=env, algorithm=name, seed=seed, policy=policy, sft_steps=0, horizon=horizon)
    config = to_json(config) | {"warmup_steps": 100, "algorithm_options": {"tau": 0.1} if name == "qc" else {}}
    config["poco"]["zeta"] = 0.5
    evaluations = [
        {"env_steps": 1000 * i, "successes": n, "episodes": episodes, "success_rate": n / episodes}
        | {"interval_95": [0.0, 1.0], "mean_length": 9.0, "label": "x", "update": 1000 * i}
        for i, n in enumerate(successes)
    ]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(one) + "\n" for one in evaluations))
    last = evaluations[-1]["env_steps"]
    result = {"seed": seed, "env": to_json(env), "before": evaluations[0], "after": evaluations[-1]}
    result |= {
        "evaluations": evaluations,
        "updates": 1100,
        "env_steps": last,
        "seconds": 60.0 + seed,
        "policy": "policy",
    }
    result |= {
        "policy": "policy",
        "title": name.upper(),
        "sft_steps": 0,
        "update_seconds": 5.0,
        "restored_heads": seed,
        "best": None,
    }
    if finished:
        (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def root(tmp_path):
    """QC of three seeds, POCO of two and one that goes on, RLPD of one seed without SFT."""
    for seed, last in enumerate((50, 60, 70)):
        write_run(tmp_path, "qc", seed, (20, 10, last))
    for seed, last in enumerate((80, 70)):
        write_run(tmp_path, "poco", seed, (20, 40, last))
    write_run(tmp_path, "poco", 2, (20, 30), finished=False)
    write_run(tmp_path, "rlpd", 0, (0, 0, 5), policy=None, horizon=1)
    lines = [
        json.dumps({"run": run, "resumed": resumed, "cpu_seconds": seconds})
        for run, resumed, seconds in (
            *(("qc/seed0", False, 99.0), ("qc/seed0", False, 30.0), ("qc/seed0", True, 12.0)),
            ("poco/seed0", False, 7.0),
        )
    ]
    (tmp_path / "attempts.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "logs").mkdir()
    return tmp_path


def test_figures_are_those_of_the_runs(root):
    figures = compared(read_comparison(root))["algorithms"]
    qc, poco, rlpd = (figures[name] for name in ("qc", "poco", "rlpd"))
    assert (qc["start"], qc["final"], qc["successes"], qc["episodes"]) == pytest.approx((0.2, 0.6, 180, 300))
    # (20 + 10) / 2 and (10 + last) / 2, over two equal parts.
    assert qc["area"] == pytest.approx(np.mean([(15 + (10 + last) / 2) / 200 for last in (50, 60, 70)]))
    assert qc["worst_drop"] == pytest.approx(-0.1)
    assert qc["bootstrap_95"] == pytest.approx([0.5, 0.7])
    assert qc["cpu_seconds"] == 42.0, "of a run that began anew, and was resumed once"
    assert qc["ms_per_update"] == pytest.approx(5.0), "5 s over 1,100 updates, 100 of them of the warm-up"
    assert (qc["restored_heads"], qc["seconds"]) == (3, 61.0)
    assert (qc["options"], poco["options"]) == ({"algorithm_options.tau": 0.1}, {"poco.zeta": 0.5})
    assert (poco["seeds"], poco["unfinished"], poco["final"]) == ([0, 1], [2], 0.75)
    assert (rlpd["shared_sft"], rlpd["horizon"], rlpd["start"]) == (False, 1, 0.0)


def test_pairs_are_compared_by_the_seeds_that_both_have_and_by_all_episodes(root):
    pairs = {(one["a"], one["b"]): one for one in compared(read_comparison(root))["pairs"]}
    assert set(pairs) == {("poco", "qc"), ("poco", "rlpd"), ("qc", "rlpd")}
    both = pairs["poco", "qc"]
    assert (both["seeds"], both["difference"]) == ([0, 1], pytest.approx(0.2))
    assert both["bootstrap_95"] == pytest.approx([0.1, 0.3])
    assert both["fisher_p"] == fisher_exact(150, 200, 180, 300)
    assert pairs["qc", "rlpd"]["bootstrap_95"] == [None, None], "one seed has no spread"


def test_fishers_exact_test_is_that_of_textbooks_and_of_scipy():
    """The lady that tastes tea: 3 of 4 against 1 of 4 has p = 34 / 70."""
    assert fisher_exact(3, 4, 1, 4) == pytest.approx(34 / 70)
    assert fisher_exact(0, 10, 0, 10) == fisher_exact(10, 10, 10, 10) == 1.0
    scipy = pytest.importorskip("scipy.stats")
    for a, n, b, m in ((18, 100, 30, 100), (0, 50, 9, 60), (291, 300, 280, 300), (150, 200, 180, 300)):
        p = scipy.fisher_exact([[a, n - a], [b, m - b]])[1]
        assert fisher_exact(a, n, b, m) == pytest.approx(p, rel=1e-6)


def test_the_report_has_picture_page_data_and_table(root):
    written = write_comparison(root)
    console = SafeConsole(width=150, record=True, file=StringIO())
    console.print(written.table)
    rows = [line.split() for line in console.export_text().splitlines() if "[" in line and "%" not in line]
    assert [row[0] for row in rows] == ["POCO", "QC", "RLPD"]
    assert rows[0][1:4] == ["2", "of", "3"]
    assert rows[2][1:4] == ["*", "(H", "="]
    page = (root / "report.html").read_text()
    assert "POCO, seed 2 (running or stopped at 1,000 of 200,000 steps)" in page
    assert "DSRL" in page, "published by QAM"
    assert "2507.07969" in page
    assert "2601.14234" in page
    assert (root / "picture.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((root / "comparison.json").read_text())["sft"] == pytest.approx(0.2)
    narrow = SafeConsole(width=60, record=True, file=StringIO())
    narrow.print(written.table)
    text = narrow.export_text()
    assert "final" in text
    assert "CPU min" not in text


def test_a_comparison_of_which_nothing_is_finished_has_a_report_too(tmp_path):
    write_run(tmp_path, "qc", 0, (20, 30), finished=False)
    write_comparison(tmp_path)
    assert "Not finished" in (tmp_path / "report.html").read_text()


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no runs of a comparison"):
        write_comparison(tmp_path)


def test_published_curves_of_both_sources_are_found_by_the_environments_name():
    found = published_by_source(TASK)
    assert set(found) == {"QC", "QAM"}
    assert found["QAM"]["DSRL"].at(0) == pytest.approx(0.87, abs=0.005)
    assert found["QAM"]["DSRL"].at(100_000) == pytest.approx(0.96, abs=0.005)
    assert "arXiv 2601.14234" in credit_of("QAM")
    assert set(published_by_source("lift")) == {"QC"}
    assert published_by_source("cube-single-singletask-task1-v0") == {}


def test_aggregates_are_those_of_rliable():
    """rliable 1.2.0: aggregate_iqm and probability_of_improvement, runs in rows and tasks in columns."""
    x = np.array([[0.8, 0.5, 0.9], [0.7, 0.52, 0.85], [0.79, 0.6, 0.85], [0.9, 0.4, 0.9]])
    y = np.array([[0.8, 0.3, 0.9], [0.6, 0.5, 0.7], [0.75, 0.61, 0.95]])
    assert interquartile_mean(list(x.T)) == pytest.approx(0.765)
    assert interquartile_mean(list(y.T)) == pytest.approx(0.692)
    assert probability_of_improvement(list(x.T), list(y.T)) == pytest.approx(0.5555555555555556)
    low, high = stratified_interval(probability_of_improvement, list(x.T), list(y.T)) or [0.0, 0.0]
    assert 0.2 < low < 0.5556 < high < 0.9
    assert stratified_interval(interquartile_mean, [np.array([0.5]), np.array([0.7])]) is None, "no second seed"
    alike = [np.array([0.5, 0.5]), np.array([0.7])]
    assert stratified_interval(interquartile_mean, alike) == pytest.approx([0.5667, 0.5667], abs=1e-4)


def test_several_comparisons_make_one_page(tmp_path):
    """POCO has both tasks, QC ends below its start once, RLPD has one task."""
    for task, finals in {"one": ((80, 70), (60, 10)), "two": ((50, 50), (50, 40))}.items():
        for name, successes in zip(("poco", "qc"), finals, strict=True):
            for seed, last in enumerate(successes):
                write_run(tmp_path / task, name, seed, (20, 40, last))
        (tmp_path / task / "logs").mkdir()
    write_run(tmp_path / "one", "rlpd", 0, (0, 0, 5), policy=None)
    for task in ("one", "two"):
        write_comparison(tmp_path / task)
    written = write_comparisons(tmp_path)
    figures = json.loads((tmp_path / "comparisons.json").read_text())
    qc, rlpd = figures["algorithms"]["qc"], figures["algorithms"]["rlpd"]
    assert (qc["tasks"], qc["runs"], qc["below_start"], rlpd["tasks"]) == (2, 4, 1, 1)
    assert qc["final"] == pytest.approx(0.45), "the middle two of 10, 40, 50 and 60"
    assert qc["worst_drop"] == pytest.approx(-0.1)
    better = {(one["a"], one["b"]): one["probability"] for one in figures["improvement"]}
    assert better["poco", "qc"] == pytest.approx((1.0 + 0.75) / 2)
    assert better["qc", "poco"] == pytest.approx(1 - better["poco", "qc"])
    page = (tmp_path / "comparisons.html").read_text()
    assert "0.88" in page
    assert "1 of 2" in page
    assert (tmp_path / "comparisons.png").read_bytes()[:4] == b"\x89PNG"
    console = SafeConsole(width=100, record=True, file=StringIO())
    console.print(written.table)
    assert "75" in console.export_text()


def test_a_page_without_comparisons_or_of_older_ones_is_refused(tmp_path):
    with pytest.raises(DataError, match="no comparison in"):
        write_comparisons(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "comparison.json").write_text(json.dumps({"algorithms": {"qc": {"final": 1.0}}}))
    with pytest.raises(DataError, match=r"poco-vla compare .*one writes it again"):
        write_comparisons(tmp_path)
    (tmp_path / "one" / "comparison.json").write_text("[]")
    with pytest.raises(DataError, match="does not hold"):
        write_comparisons(tmp_path)
