"""Command lines: help, overrides, one-line errors with exit status 1."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import forked
import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from pointmass_run import small
from published_files import collect, save_npz

from poco_vla import available_adapters
from poco_vla.cli import main, run_recipe, run_sweep
from poco_vla.cli.errors import guarded
from poco_vla.cli.smoke import smoke_run, tiny_pick_task
from poco_vla.config import EnvSpec, TrainConfig
from poco_vla.terminal import first_to_say
from poco_vla.training import train

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a small run that is done."""
    folder = tmp_path_factory.mktemp("cli")
    return train(small(folder / "run", folder / "data", online_steps=0)).output_dir


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """The folder of a small run that has online episodes."""
    folder = tmp_path_factory.mktemp("played")
    return train(small(folder / "run", folder / "data")).output_dir


def field_names(kind, prefix=""):
    for field in fields(kind):
        name = prefix + field.name.replace("_", "-")
        nested = field.default_factory if isinstance(field.default_factory, type) else type(field.default)
        if is_dataclass(nested):
            yield from field_names(nested, f"{name}.")
        else:
            yield name


def test_the_short_help_of_a_recipe_loads_neither_torch_nor_robotics():
    """`--help` lists what people set first, without paying for imports that only training needs."""
    code = (
        "import runpy, sys\n"
        "sys.argv = ['recipe', '--help']\n"
        "try:\n    runpy.run_path('recipes/mlp_cube.py', run_name='__main__')\n"
        "finally:\n    print('LOADED', sorted({'torch', 'lerobot', 'accelerate', 'mujoco'} & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=HERE.parent,
        env=os.environ | {"COLUMNS": "400"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout
    listed = set(re.findall(r"^│? ?(--[a-z][\w.-]*)", done.stdout, flags=re.MULTILINE))
    assert listed - {"--seeds"} == {
        *(
            "--adapter",
            "--algorithm",
            "--policy",
            "--dataset.repo-id",
            "--dataset.root",
            "--env.type",
            "--env.task",
            "--horizon",
        ),
        *("--sft-steps", "--online-steps", "--seed", "--output-dir", "--resume", "--memory"),
    }


def test_the_long_help_of_a_recipe_says_what_values_mean(monkeypatch, capsys):
    """`--help-all` lists every field, and the options of the recipe's adapter and environment."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys, "argv", ["recipe", "--help-all"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(HERE.parent / "recipes" / "mlp_cube.py"), run_name="__main__")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    names = [*field_names(TrainConfig), "policy-options.hidden-dims", "env.options.episode-length"]
    assert [name for name in names if f"--{name}" not in shown] == ["algorithm-options"], "POCO's options are --poco.*"
    for words in ("E-step temperature", "Clip of a candidate's flow error", "Transitions per update"):
        assert words in shown


def test_a_value_on_the_command_line_overrides_the_recipe(tmp_path):
    config = small(tmp_path / "run", tmp_path, online_steps=0)
    run_recipe(config, ["--sft-steps", "7", "--poco.eta", "0.3", "--optim.batch-size", "8", "--seed", "5"])
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["sft_steps"], saved["poco"]["eta"], saved["optim"]["batch_size"]) == (7, 0.3, 8)
    assert saved["poco"]["zeta"] == config.poco.zeta
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["updates"], result["seed"]) == (7, 5)


def test_adapters_lists_each_installed_one(capsys):
    main(["adapters"])
    shown = capsys.readouterr().out
    assert "flow_mlp" in available_adapters()
    for name, where in available_adapters().items():
        assert name in shown
        assert where in shown


def test_report_prints_a_table_and_draws_the_curves(run, tmp_path, capsys):
    main(["report", str(run), "--output", str(tmp_path / "curves.png")])
    assert "after POCO" in capsys.readouterr().out
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_eval_reports_the_success_of_an_exported_policy(run, capsys):
    """The policy of 40 updates docks in none of 4 episodes: 0 %, and Wilson's upper end 3.84 / (4 + 3.84) = 49 %."""
    env = '{"type": "pointmass", "task": "dock", "num_envs": 2, "in_process": true}'
    for where in (["--env", env], []):  # as asked, or as the policy's own run had it
        main(["eval", str(run / "policy"), *where, "--episodes", "4"])
        assert "success 0% [0%, 49%] of 4 episodes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], 'no command named "trian"'),
        (["data", "mkae"], 'Did you mean "make"?'),
        (["report", "{tmp}"], "no result.json in"),
        (["report", __file__], "is a file: give the run's folder"),
        (["export", "{tmp}/nowhere/at/all", "{tmp}/out"], "the folder does not exist"),
        (["data", "consolidate", "{tmp}", "--root", "{tmp}/out"], "no LeRobot dataset in"),
        (["eval", "{tmp}", "--adapter", "flow_mpl"], 'no adapter named "flow_mpl"'),
        (["eval", "{tmp}/nowhere"], "nowhere"),
        (["eval", "{tmp}", "--env", "{{}}", "--adapter", "flow_mlp"], "no policy in"),
        (["eval", "{tmp}", "--env", "ogbench", "--adapter", "flow_mlp"], "--env is no JSON object"),
        (["eval", "{tmp}", "--env", "{{}}"], "does not lie in a run's folder: say by which adapter"),
        (["train", "--output-dir", "{tmp}/run", "--adapter", "flow_mlp"], "no dataset"),
    ],
)
def test_an_error_is_one_line_and_exit_status_1(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([word.format(tmp=tmp_path) for word in arguments])
    assert stop.value.code == 1
    shown = capsys.readouterr().err
    assert words in shown
    assert len(shown.strip().splitlines()) == 1
    assert "Traceback" not in shown


def test_a_fault_of_the_system_is_one_line_and_a_bug_keeps_its_traceback(tmp_path, capsys):
    """A file where a folder belongs, say; what nobody foresaw is not hidden."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: (tmp_path / "file" / "run").mkdir())
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"NotADirectoryError: Not a directory: {tmp_path}/file/run\n"
    with pytest.raises(FileNotFoundError):
        guarded(lambda: (tmp_path / "none").read_text())


def test_two_processes_of_a_launch_say_the_same_once(monkeypatch):
    message = f"the same {os.getpid()}"
    assert [first_to_say(message) for _ in range(2)] == [True, True], "one process alone"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [first_to_say(message) for _ in range(2)] == [True, False]
    assert first_to_say(f"{message}, another"), "each has its own to say"
    assert first_to_say(message, seconds=-1.0), "a later launch"


def test_two_processes_of_a_launch_show_an_option_that_is_unknown_once(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    word = f"--option-{os.getpid()}"
    for first in (True, False):
        with pytest.raises(SystemExit) as stop:
            run_recipe(TrainConfig(env=EnvSpec()), [word, "1"])
        assert stop.value.code == 1
        assert (f'no option named "{word}"' in "".join(capsys.readouterr())) == first


def test_an_error_keeps_its_square_brackets(tmp_path, capsys):
    """Rich would take [name] for markup and swallow it, as in: pip install "poco-vla[ogbench]"."""
    config = small(tmp_path / "run[bold]", tmp_path, resume=True)
    with pytest.raises(SystemExit):
        run_recipe(config, [])
    assert "run[bold]" in capsys.readouterr().err


def test_a_value_that_cannot_work_is_refused_before_training(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_recipe(small(tmp_path / "run", tmp_path), ["--poco.eta", "0"])
    assert stop.value.code in (1, 2)
    assert "eta is 0" in "".join(capsys.readouterr())
    assert not (tmp_path / "run").exists()


def test_an_added_option_without_a_value_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        run_recipe(TrainConfig(env=EnvSpec()), ["--policy-options.clip"])
    assert stop.value.code == 1
    assert "--policy-options.clip needs a value" in capsys.readouterr().err


def test_seeds_runs_once_for_each(tmp_path):
    config = small(tmp_path / "{time}", tmp_path / "data", online_steps=0, sft_steps=2)
    run_recipe(config, ["--seeds", "3", "5", "--poco.eta", "0.3"])
    folders = sorted(tmp_path.glob("*-seed*"))
    assert [folder.name[-6:] for folder in folders] == ["-seed3", "-seed5"]
    runs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert [(run["seed"], run["poco"]["eta"]) for run in runs] == [(3, 0.3), (5, 0.3)]


def test_seeds_go_on_where_they_were_stopped(tmp_path):
    """Seed 3 is done, seed 4 was stopped after a checkpoint, seed 5 never began."""
    config = small(tmp_path / "{time}", tmp_path / "data", online_steps=0, sft_steps=4)
    run_recipe(config, ["--seeds", "3", "4"])
    done, stopped = sorted(tmp_path.glob("*-seed*"))
    (stopped / "result.json").unlink()
    before = (done / "result.json").stat().st_mtime_ns
    run_recipe(config, ["--seeds=3", "4", "5", "--resume"])
    assert (done / "result.json").stat().st_mtime_ns == before
    assert (stopped / "result.json").is_file()
    assert [folder.name[-1] for folder in sorted(tmp_path.glob("*-seed*"), key=lambda f: f.name[-1])] == ["3", "4", "5"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "0", "one"], "--seeds: takes whole numbers, not one"),
        (["--seeds"], "--seeds: expected at least one argument"),
        (["--seeds", "0", "1", "--seed", "2"], "--seed: not allowed with argument --seeds"),
    ],
)
def test_seeds_that_cannot_be_are_told(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        run_recipe(TrainConfig(env=EnvSpec()), words)
    assert stop.value.code == 1
    assert said in capsys.readouterr().err


def variants(tmp_path):
    """Two runs, the second from the first one's policy."""

    def configs(seed):
        root = tmp_path / f"seed{seed}"
        first = small(root / "first", tmp_path / "data", online_steps=0, sft_steps=2)
        second = replace(
            first, policy=str(root / "first" / "policy"), policy_options={}, statistics="checkpoint", sft_steps=0
        )
        return {"first": first, "second": replace(second, output_dir=root / "second")}

    return configs


def test_a_sweep_goes_on_by_itself_and_refuses_what_would_mix_its_runs(tmp_path, capsys):
    configs = variants(tmp_path)
    run_sweep(configs, ["--seeds", "0", "1", "--log-every", "1"])
    results = sorted(tmp_path.glob("seed*/*/result.json"))
    assert [str(path.parent.relative_to(tmp_path)) for path in results] == [
        *("seed0/first", "seed0/second"),
        *("seed1/first", "seed1/second"),
    ]
    assert (tmp_path / "report.html").is_file()
    made = [path.stat().st_mtime_ns for path in results]
    # Ended before its first checkpoint: begun anew. The others are done.
    half = tmp_path / "seed1" / "second"
    for name in ("result.json", "checkpoints"):
        shutil.rmtree(half / name) if (half / name).is_dir() else (half / name).unlink()
    run_sweep(configs, ["--seeds", "0", "1", "--log-every", "1"])
    assert [path.stat().st_mtime_ns for path in results][:3] == made[:3]
    assert results[3].is_file()
    for words, said in (
        (["--log-every", "1", "--sft-steps", "9"], "holds a run of another configuration (sft_steps: 2 -> 9"),
        (["--output-dir", "x"], "leave --output-dir out"),
        (["--seed", "1"], "leave --seed out, or use --seeds"),
        (["--seeds", "2", "--only", "second", "--policy", "runs/none"], "run that variant first"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_sweep(configs, words)
        assert stop.value.code == 1
        assert said in capsys.readouterr().err


def test_data_of_an_expert_are_made_once(tmp_path, capsys):
    words = [
        "data",
        "make",
        "--env.type",
        "pointmass",
        "--env.task",
        "dock",
        "--episodes",
        "2",
        "--root",
        str(tmp_path),
    ]
    for _ in range(2):
        main([*words, "--env.options.episode-length", "90"])
        root = Path(capsys.readouterr().out.strip().splitlines()[-1])
        assert (root / "meta" / "info.json").is_file()
        assert "episode_length-90" in root.name


def test_data_of_official_files(tmp_path, capsys):
    """A truncated file is one line; a good one becomes a dataset, of which `--episodes` takes the first."""
    task = "cube-single-singletask-task1-v0"
    path, root = tmp_path / "cube-single-play-v0.npz", tmp_path / "made"
    save_npz(path, collect("cube-single", trajectories=2, steps=20))
    words = ["data", "ogbench", "--task", task, "--root", str(root), "--path"]
    broken = tmp_path / "broken.npz"
    broken.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(SystemExit) as stop:
        main([*words, str(broken)])
    assert stop.value.code == 1
    shown = capsys.readouterr().err
    assert "it is truncated, damaged" in shown
    assert len(shown.strip().splitlines()) == 1
    assert not root.exists()
    main([*words, str(path), "--episodes", "1"])
    assert json.loads((root / "meta" / "info.json").read_text())["total_episodes"] == 1


def test_a_runs_episodes_become_a_compact_dataset(played, tmp_path, capsys):
    main(["data", "consolidate", str(played), "--root", str(tmp_path / "all")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "all")
    grown, compact = (
        LeRobotDataset("local/episodes", root=root).hf_dataset.with_format("arrow")[:]
        for root in (played / "episodes", tmp_path / "all")
    )
    assert compact.equals(grown)


@pytest.mark.parametrize(
    ("source", "root", "said"),
    [
        ("nothing", "all", "no LeRobot dataset in"),
        ("run", "somebodys", "is not replaced"),
        ("run", "run/episodes", "is not replaced"),
        ("compact", "all", "compact already"),
    ],
)
def test_what_cannot_be_made_compact_is_told_and_left_alone(source, root, said, played, tmp_path, capsys):
    (tmp_path / "somebodys").mkdir()
    (tmp_path / "somebodys" / "thesis.txt").write_text("x")
    (tmp_path / "run").symlink_to(played)
    main(["data", "consolidate", str(played), "--root", str(tmp_path / "compact")])
    with pytest.raises(SystemExit):
        main(["data", "consolidate", str(tmp_path / source), "--root", str(tmp_path / root)])
    assert said in capsys.readouterr().err
    assert (tmp_path / "somebodys" / "thesis.txt").exists()
    assert (played / "episodes" / "meta" / "info.json").exists()


def test_serve_answers_a_client_until_it_is_interrupted(run):
    from poco_vla.serving.client import PolicyClient

    command = [
        Path(sys.executable).with_name("poco-vla"),
        "serve",
        str(run / "policy"),
        "--port",
        "0",
        "--token",
        "secret",
    ]
    server = forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in server.stdout if line.startswith("serving"))  # LeRobot has something to say, too
        assert line.startswith("serving flow_mlp at ws://127.0.0.1:")
        url = line.split()[3].rstrip(";")
        with PolicyClient(url, token="secret") as client:
            state = np.zeros(client.metadata["observation"]["observation.state"]["shape"], dtype=np.float32)
            assert client.metadata["fps"] == 10, "the demonstrations' rate"
            chunk = client.chunk({"observation.state": state}, "dock")
        assert chunk.actions.shape == (5, 2)
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 130


@pytest.mark.parametrize(("adapter", "has_base"), [("flow_mlp", False), ("pi05", True)])
def test_a_tiny_run_has_a_base_where_the_model_starts_from_one(adapter, has_base, tmp_path, monkeypatch):
    """Fit a recipe whose own policy is a small network, as `--adapter pi05 --tiny` does."""
    monkeypatch.chdir(tmp_path)
    recipe = TrainConfig(adapter=adapter, env=EnvSpec())
    tiny, smoke = tiny_pick_task(recipe), smoke_run(recipe)
    assert (tiny.policy is not None) == has_base
    assert ("hidden_dims" in tiny.policy_options) == ("hidden_dims" in smoke.policy_options) == (not has_base)


def test_tiny_is_offered_by_recipes_of_large_models_only(capsys):
    for tiny, offered in ((True, True), (False, False)):
        with pytest.raises(SystemExit):
            run_recipe(TrainConfig(env=EnvSpec()), ["--help"], tiny=tiny)
        assert ("--tiny" in capsys.readouterr().out) == offered
