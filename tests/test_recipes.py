"""The recipes of the paper's simulations: the paper's numbers, tasks that exist, and a run that ends."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from poco_vla.cli.smoke import smoke_run
from poco_vla.config import RewardConfig, TrainConfig, flat, to_json
from poco_vla.errors import PocoError
from poco_vla.rendering.render import opengl_context
from poco_vla.simulators import environment

RECIPES = Path(__file__).parents[1] / "recipes"
ONLINE = ["scene", "puzzle_3x3", "cube_double", "cube_triple", "lift", "can", "square"]
OFFLINE_TO_ONLINE = ["scene", "puzzle_3x3", "can", "square"]
NAMES = [f"online_{task}" for task in ONLINE] + [f"offline_to_online_{task}" for task in OFFLINE_TO_ONLINE]
GOLDEN = json.loads((Path(__file__).parent / "golden" / "simulations.json").read_text())


def chosen(name):
    """Setting and task of a run's name."""
    setting = next(setting for setting in ("offline_to_online", "online") if name.startswith(setting))
    return setting, name.removeprefix(f"{setting}_")


def config_of(name):
    setting, task = chosen(name)
    return runpy.run_path(str(RECIPES / "simulations.py"))["config"](task, setting)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_a_run_is_the_one_that_was_reviewed(name):
    """tests/golden/simulations.json lists them: the values that all runs share, and those of each."""
    expected = GOLDEN["common"] | GOLDEN["runs"][name]
    found = flat(to_json(config_of(name)))
    assert {key: found.get(key) for key in expected} == expected
    open_ended = ("env.options.", "policy_options.")
    assert all(key in expected for key in found if key.startswith(open_ended))


def test_all_runs_of_the_recipe_are_reviewed_ones():
    settings = runpy.run_path(str(RECIPES / "simulations.py"))["SETTINGS"]
    assert {f"{setting}_{task}" for setting in settings for task in settings[setting]} == set(GOLDEN["runs"])
    assert set(NAMES) == set(GOLDEN["runs"])


def test_a_run_that_the_paper_does_not_have_is_refused():
    with pytest.raises(PocoError, match="no offline_to_online run of lift; it has scene, puzzle_3x3, can, square"):
        config_of("offline_to_online_lift")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_the_papers_numbers_and_a_task_that_exists(name):
    """Table of hyper-parameters of the paper: batch 256, learning rate 3e-4, gamma 0.99, H 5, N 32, K 10, networks of
    four layers of 512, warm-up 5k, 50 evaluation episodes. The pool holds 2M steps."""
    config = config_of(name)
    assert (config.optim.batch_size, config.optim.actor_lr, config.optim.critic_lr) == (256, 3e-4, 3e-4)
    assert (config.poco.gamma, config.horizon, config.poco.num_candidates, config.poco.beta) == (0.99, 5, 32, 1.0)
    assert config.poco.critic_hidden == (512,) * 4
    assert "hidden_dims" not in config.policy_options
    assert (config.warmup_steps, config.updates_per_step, config.eval.episodes) == (5000, 1, 50)
    assert config.replay.capacity == 2_000_000
    features = environment(config.env).features
    width = {"ogbench": 5, "robosuite": 7}[config.env.type]
    assert features["action"].shape == (width,)
    assert config.output_dir == Path(f"runs/{name}/{{time}}")


@pytest.mark.parametrize(
    ("name", "eta", "zeta", "sft_steps", "reward"),
    [
        *((f"online_{task}", 0.1, 0.3, 0, "sparse") for task in ONLINE[:4]),
        *((f"online_{task}", 0.001, 0.15, 0, "sparse") for task in ONLINE[4:]),
        ("offline_to_online_scene", 0.001, 0.15, 500_000, "step_cost"),
        ("offline_to_online_puzzle_3x3", 0.001, 0.15, 500_000, "step_cost"),
        ("offline_to_online_can", 0.001, 0.3, 300_000, "step_cost"),
        ("offline_to_online_square", 0.001, 0.08, 300_000, "step_cost"),
    ],
)
def test_what_differs_between_settings(name, eta, zeta, sft_steps, reward):
    config = config_of(name)
    assert (config.poco.eta, config.poco.zeta, config.sft_steps) == (eta, zeta, sft_steps)
    assert config.reward == RewardConfig.named(reward)


def test_the_ablation_changes_one_value_at_a_time_and_starts_from_one_policy():
    runs = runpy.run_path(str(RECIPES / "ablation_square.py"))["configs"](42)
    sft = runs.pop("sft")
    assert (sft.sft_steps, sft.online_steps) == (300_000, 0)
    found = {(config.poco.zeta, config.poco.beta) for config in runs.values()}
    assert found == {(0.04, 1), (0.08, 1), (0.15, 1), (0.3, 1), (0.08, 0), (0.08, 0.1), (0.08, 10)}
    for config in runs.values():
        assert config.policy == str(sft.output_dir / "policy")
        assert config.sft_steps == 0
    assert len({config.output_dir for config in [sft, *runs.values()]}) == len(runs) + 1


ROBOT_TASKS = {
    "pick_cube": (150, 0.1),
    "route_cable": (300, 0.1),
    "insert_usb": (450, 0.08),
    "assemble_ssd": (750, 0.08),
}


@pytest.mark.parametrize("task", ROBOT_TASKS)
def test_the_robot_recipe_has_the_papers_numbers(task):
    """Real robot, MLP: batch 256, learning rate 3e-4, gamma 0.99, H 4, N 32, eta 0.001, zeta 0.08 to 0.1, warm-up 5k,
    15 Hz, episodes of 150 to 750 steps, a frozen ResNet-10, sparse reward; the policy is served to the robot."""
    recipe = runpy.run_path(str(RECIPES / "robot_mlp.py"))
    config = recipe["config"](task)
    assert (15 * recipe["TASKS"][task].seconds, config.poco.zeta) == ROBOT_TASKS[task]
    assert (config.optim.batch_size, config.optim.actor_lr, config.optim.critic_lr) == (256, 3e-4, 3e-4)
    assert (config.horizon, config.poco.num_candidates, config.poco.eta, config.poco.beta) == (4, 32, 0.001, 1.0)
    assert (config.poco.gamma, config.warmup_steps, config.poco.critic_hidden) == (0.99, 5000, (512,) * 4)
    assert config.policy_options == {"vision_encoder": "lerobot/resnet10"}
    assert (config.reward, config.env, config.interaction.mode) == (RewardConfig.named("sparse"), None, "remote")
    assert (config.dataset.repo_id, config.output_dir) == (f"you/{task}", Path(f"runs/robot_mlp_{task}/{{time}}"))
    assert list(recipe["TASKS"]) == list(ROBOT_TASKS)


def launch(name, folder, *arguments):
    # Rays need no driver, and the pictures are few.
    env = os.environ | {"OMP_NUM_THREADS": "1", "MUJOCO_GL": "disable"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return subprocess.run(
        [*command, RECIPES / name, *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def run_here(tmp_path, monkeypatch, fresh_accelerate):
    """Run a recipe as a program, but in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUJOCO_GL", "disable")

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(RECIPES / name), run_name="__main__")

    yield run
    opengl_context.cache_clear()  # which has remembered that rays draw


@pytest.mark.slow
def test_smoke_runs_every_stage_of_a_recipe(run_here, tmp_path):
    # A film costs half a second a frame where rays draw it, a worker seconds to start; the run under the launcher has
    # both.
    few = ("--eval.no-videos", "--env.in-process", "--demonstrations.workers", "1")
    run_here("simulations.py", "--smoke", "--task", "scene", "--setting=offline_to_online", *few)
    check_smoke("offline_to_online_scene", tmp_path)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_smoke_runs_a_recipe_under_the_launcher(tmp_path):
    done = launch("simulations.py", tmp_path, "--smoke", "--task", "lift", "--setting=online")
    assert done.returncode == 0, done.stderr[-3000:]
    check_smoke("online_lift", tmp_path)


def check_smoke(name, tmp_path):
    setting, _ = chosen(name)
    (run,) = (tmp_path / "runs" / "smoke" / name).iterdir()
    result = json.loads((run / "result.json").read_text())
    config = smoke_run(config_of(name))
    assert result["env_steps"] >= config.online_steps
    assert result["updates"] > config.sft_steps + config.warmup_steps
    assert result["env"]["task"] == config.env.task
    assert result["command"][0].endswith("simulations.py")
    assert f"--setting={setting}" in result["command"]
    stages = {json.loads(line)["stage"] for line in (run / "metrics.jsonl").read_text().splitlines()}
    assert "online" in stages
    assert (run / "curve.parquet").is_file()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_robot_recipe_runs_with_tiny(tmp_path):
    """Both cameras through an image encoder of transformers, every stage, in a simulation in the robot's place."""
    steps = ["--sft-steps", "4", "--warmup-steps", "3", "--online-steps", "160", "--updates-per-step", "0.06"]
    few = ["--log-every", "2", "--demonstrations.episodes", "2", "--eval.episodes", "2", "--output-dir", "run"]
    done = launch("robot_mlp.py", tmp_path, "--tiny", "--task", "insert_usb", *steps, *few)
    assert done.returncode == 0, done.stderr[-3000:]
    stages = {json.loads(line)["stage"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()}
    assert stages == {"sft", "warmup", "online"}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["horizon"], config["interaction"]["mode"]) == (4, "synchronous")
    held = json.loads((tmp_path / "run" / "policy" / "config.json").read_text())
    cameras = {"observation.images.front", "observation.images.wrist"}
    assert cameras < set(held["input_features"])
    assert Path(held["vision_encoder"]).name == "encoder"


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_sweep_runs_what_is_asked_for_once_and_writes_one_report(tmp_path):
    first = launch("ablation_square.py", tmp_path, "--smoke", "--only", "sft", "zeta-0.08")
    assert first.returncode == 0, first.stderr[-3000:]
    root = tmp_path / "runs" / "smoke" / "ablation_square"
    assert sorted(p.name for p in (root / "seed0").iterdir()) == ["sft", "zeta-0.08"]
    assert json.loads((root / "seed0" / "zeta-0.08" / "config.json").read_text())["policy"].endswith("seed0/sft/policy")
    assert (root / "report.html").stat().st_size > 10_000
    made = {path: path.stat().st_mtime_ns for path in (root / "seed0").rglob("*")}
    again = launch("ablation_square.py", tmp_path, "--smoke", "--only", "sft", "zeta-0.08")
    assert again.returncode == 0, again.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in (root / "seed0").rglob("*")} == made


def test_the_sweep_refuses_a_variant_that_it_does_not_have(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablation_square.py", "--smoke", "--only", "zeta-9"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(RECIPES / "ablation_square.py"), run_name="__main__")
    assert stop.value.code == 1
    assert 'no variant named "zeta-9"' in capsys.readouterr().err


def test_smoke_keeps_the_task_and_the_data_and_shrinks_the_rest():
    config = config_of("offline_to_online_puzzle_3x3")
    small = smoke_run(config)
    assert isinstance(small, TrainConfig)
    assert (small.env.task, small.demonstrations.kind, small.reward) == (config.env.task, "play", config.reward)
    assert small.online_steps < 1000
    assert small.output_dir == Path("runs/smoke/offline_to_online_puzzle_3x3/{time}")


def test_smoke_takes_a_recipe_of_ones_own():
    """One that writes outside runs/, starts from a policy of the Hub, or has no environment."""
    own = TrainConfig(policy="you/policy", online_steps=0, output_dir=Path("/elsewhere/mine/{time}"))
    small = smoke_run(own)
    assert (small.policy, small.env, small.output_dir) == ("you/policy", None, Path("runs/smoke/{time}"))
    swept = smoke_run(replace(config_of("online_lift"), policy="runs/sft/policy"))
    assert (swept.policy, swept.output_dir) == ("runs/smoke/sft/policy", Path("runs/smoke/online_lift/{time}"))
