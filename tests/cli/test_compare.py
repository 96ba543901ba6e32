"""`poco-vla compare`: what runs, from what, and what is refused before anything runs."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from poco_vla.cli import main
from poco_vla.cli.compare import SFT, Compare, Plan, split_compare
from poco_vla.cli.parser import parse

ROOT = Path(__file__).parents[2]
CUBE = str(ROOT / "recipes" / "mlp_cube.py")


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["compare", *words])
    assert stop.value.code == 1
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([CUBE], "no algorithm is given: --algorithms poco qc"),
        ([CUBE, "--algorithms", "qcc"], 'Did you mean "qc"?'),
        ([CUBE, "--algorithms", "qc", "qc"], "algorithm qc is given more than once"),
        ([CUBE, "--algorithms", "qc", "--seeds", "1", "1"], "seed 1 is given more than once"),
        ([CUBE, "--algorithms", "qc", "--jobs", "0"], "--jobs is 0; at least 1 run at a time"),
        (["recipes/none.py", "--algorithms", "qc"], "recipes/none.py: there is no such file; give a recipe"),
        ([str(ROOT / "README.md"), "--algorithms", "qc"], "that is no Python file"),
        ([str(ROOT / "recipes" / "ablation_square.py"), "--algorithms", "qc"], "has no function config()"),
        ([CUBE, "--algorithms", "qc", "--seed", "1"], "--seed is not for the runs of a comparison: --seeds 0 1 2"),
        ([CUBE, "--algorithms", "qc", "--bc.anchor", "all"], 'is an option of algorithm "bc", which is not compared'),
        ([CUBE, "--algorithms", "qc", "--online-step", "9"], 'Did you mean "--online-steps"?'),
        ([CUBE, "--algorithms", "qc", "--online-steps", "0"], "needs an environment (env) and environment steps"),
        ([CUBE, "poco"], '"poco" belongs to no option; the algorithms follow --algorithms'),
        (["--algorithms", "qc"], "the recipe comes first"),
        ([CUBE, "--algorithms", "bc", "dppo", "qc", "reinflow", "--best-of-n", "2"], "bc: best_of_n is 2"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_work(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_all_algorithms_that_cannot_run_are_named_at_once(capsys):
    words = ["--algorithms", "qc", "reinflow", "dppo", "--interaction.mode", "asynchronous"]
    said = refused(capsys, CUBE, *words)
    assert 'reinflow: algorithm "reinflow" learns' in said
    assert 'dppo: algorithm "dppo" learns' in said


def recipe(folder):
    """A recipe of the point mass that trains in seconds."""
    path = folder / "small.py"
    path.write_text(f"""
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, {str(ROOT / "tests")!r})
from pointmass_run import small

from poco_vla.cli import run_recipe


def config():
    return replace(small("runs/small/{{time}}", {str(folder / "data")!r}), checkpoint_every=5)


if __name__ == "__main__":
    run_recipe(config())
""")
    return path


def compare(path, root, *words):
    program = str(Path(sys.executable).parent / "poco-vla")
    return [program, "compare", str(path), "--output", str(root), *words]


def wait_for(holds, process=None, seconds=300):
    end = time.monotonic() + seconds
    while not holds():
        assert process is None or process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.05)


def runs_in(root):
    """Return the command lines of the runs that are at work below a folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            lines.append(path.read_bytes().decode(errors="replace"))
    return [line for line in lines if f"--output-dir\0{root}/" in line]


def started(command, folder):
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.exhaustive
def test_a_comparison_that_is_killed_goes_on_and_another_algorithm_runs_alone(tmp_path):
    """Two algorithms and two seeds; killed while one learns online, stopped by Ctrl-C, then run to the end."""
    path, root = recipe(tmp_path), tmp_path / "compared"
    first = compare(path, root, "--algorithms", "bc", "qc", "--seeds", "0", "1", "--jobs", "2")
    for number, ended in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = started(first, tmp_path)
        begun = {path for path in root.glob("*/seed*/checkpoints/*") if path.is_dir()}
        wait_for(lambda begun=begun: set(root.glob("*/seed*/checkpoints/[0-9]*")) - begun, process)
        os.kill(process.pid, number)
        assert process.wait(300) == ended
        wait_for(lambda: not runs_in(root))  # they save once they notice that they are alone
    whole = subprocess.run(first, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    lines = [json.loads(line) for line in (root / "attempts.jsonl").read_text().splitlines()]
    assert any(line["resumed"] for line in lines)
    results = {path.parent.relative_to(root): path for path in root.glob("*/*/result.json")}
    assert {str(run) for run in results} == {
        *(f"{name}/seed{seed}" for name in ("bc", "qc") for seed in (0, 1)),
        *(f"{SFT}/h5-seed{seed}" for seed in (0, 1)),
    }
    for seed in (0, 1):
        runs = [root / SFT / f"h5-seed{seed}", *(root / name / f"seed{seed}" for name in ("bc", "qc"))]
        starts = [json.loads((run / "result.json").read_text())["before"]["successes"] for run in runs]
        assert len(set(starts)) == 1, "all begin with the same SFT policy, evaluated from the same starts"
    made = {path: path.stat().st_mtime_ns for path in results.values()}
    third = [*first[: first.index("--seeds")], "dsrl", *first[first.index("--seeds") :]]
    more = subprocess.run(third, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert more.returncode == 0, more.stdout + more.stderr
    assert {path: path.stat().st_mtime_ns for path in made} == made
    figures = json.loads((root / "comparison.json").read_text())
    assert [(name, one["seeds"]) for name, one in figures["algorithms"].items()] == [
        *(("bc", [0, 1]), ("dsrl", [0, 1]), ("qc", [0, 1])),
    ]
    assert len(figures["pairs"]) == 3
    assert (root / "report.html").stat().st_size > 10_000
    for words in (["--online-steps", "200"], ["--qc.tau", "0.5"]):
        other = subprocess.run([*first, *words], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert other.returncode == 1
        assert "holds runs of other settings" in other.stderr
        assert words[0].lstrip("-").rpartition(".")[2].replace("-", "_") in other.stderr
    elsewhere = compare(path, root, "--algorithms", "poco", "--seeds", "0", "--eval.episodes", "7")
    other = subprocess.run(elsewhere, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert "eval.episodes: 6 -> 7" in other.stderr, "runs that are not asked for now count, too"


def test_runs_start_from_one_sft_run_of_their_horizon_and_have_their_own_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--qc.num-candidates", "3", "--sft-steps", "30", "--fql.alpha=9.5"]
    own, rest = split_compare([str(recipe(tmp_path)), "--algorithms", "qc", "fql", "rlpd_ac", "mpo", *words])
    plan = Plan(replace(parse(Compare, own), options=tuple(rest)), Path("compared"))
    members = {(member.name, member.folder.name): member for member in plan.members if member.seed == 0}
    assert list(members) == [
        *((SFT, "h5-seed0"), ("qc", "seed0"), (SFT, "h1-seed0"), ("fql", "seed0")),
        *(("rlpd_ac", "seed0"), ("mpo", "seed0")),
    ]
    needs = {name: member.needs and member.needs.name for (name, _), member in members.items() if name != SFT}
    assert needs == {"qc": "h5-seed0", "fql": "h1-seed0", "rlpd_ac": None, "mpo": None}
    lines = {key: " ".join(member.command) for key, member in members.items()}
    assert [key for key, line in lines.items() if "--qc.num-candidates 3" in line] == [("qc", "seed0")]
    assert [key for key, line in lines.items() if "--fql.alpha=9.5" in line] == [("fql", "seed0")]
    assert [key for key, line in lines.items() if "--sft-steps 30" in line] == [
        *((SFT, "h5-seed0"), (SFT, "h1-seed0"), ("rlpd_ac", "seed0"), ("mpo", "seed0")),
    ]
    assert all("--sft-steps 0" in lines[name, "seed0"] for name in ("qc", "fql"))
