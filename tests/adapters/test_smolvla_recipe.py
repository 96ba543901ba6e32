"""`recipes/smolvla_pick_pen.py --tiny`, as a user types it: both stages, export, LeRobot's own command; and another
model's recipe, unchanged, with this adapter."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from poco_vla import load_adapter

pytest.importorskip("ogbench")
RECIPES = Path(__file__).parents[2] / "recipes"
STEPS = ("--sft-steps", "4", "--warmup-steps", "3", "--online-steps", "100", "--updates-per-step", "0.1")
SMALL = (*STEPS, "--log-every", "2", "--env.num-envs", "1", "--env.in-process", "--demonstrations.episodes", "2")
SMALL += ("--demonstrations.workers", "1", "--eval.episodes", "1")
# Rays draw these small pictures faster than a CPU's OpenGL, and on every machine.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MUJOCO_GL": "disable"}

# One worker runs them all: each leans on the run of the first.
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.xdist_group("smolvla_recipe")]


def run_command(command, folder):
    """What it printed."""
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def launch(recipe, folder, *arguments):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return run_command([*command, RECIPES / recipe, "--tiny", *SMALL, *arguments], folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("recipe")
    shown = launch("smolvla_pick_pen.py", folder, "--output-dir", "run")
    return folder / "run", shown


def stages(run):
    return {json.loads(line)["stage"] for line in (run / "metrics.jsonl").read_text().splitlines()}


def test_the_run_passes_through_every_stage_and_says_so(run):
    path, shown = run
    assert stages(path) == {"sft", "warmup", "online"}
    for words in ("success after SFT", "success after POCO", "lerobot-eval", "136,832 trained parameters"):
        assert words in shown
    assert json.loads((path / "result.json").read_text())["env_steps"] >= 100


def test_the_head_alone_gives_the_exported_policy_again(run):
    path, _ = run
    adapter = load_adapter("smolvla")
    whole, head = (adapter.from_pretrained(path / name).policy.state_dict() for name in ("policy", "head"))
    assert all(head[name].equal(tensor) for name, tensor in whole.items())
    base = load_file(path.parent / "runs" / "tiny" / "smolvla_base" / "model.safetensors")
    assert {name for name, tensor in whole.items() if not base[name].equal(tensor)} == {
        name for name in whole if name.startswith(("model.action_", "model.vlm_with_expert.lm_expert."))
    }


def test_lerobots_own_command_runs_the_exported_policy(run, tmp_path):
    """By the command line that the run printed, without a plug-in for the policy."""
    path, shown = run
    (line,) = (line for line in shown.splitlines() if line.strip().startswith("lerobot-eval"))
    assert "plugin" not in line
    _, *arguments = shlex.split(line)
    program = Path(sys.executable).parent / "lerobot-eval"
    run_command([program, *arguments, f"--output_dir={tmp_path}"], path.parent)
    assert json.loads((tmp_path / "eval_info.json").read_text())["overall"]["n_episodes"] == 1


def test_another_models_recipe_runs_with_this_adapter_unchanged(run):
    """Its policy options, which are the other model's, are dropped."""
    folder = run[0].parent
    arguments = ("--adapter", "smolvla", "--output-dir", "other")
    launch("pi05_pick_pen.py", folder, *arguments)
    assert stages(folder / "other") == {"sft", "warmup", "online"}
    config = json.loads((folder / "other" / "config.json").read_text())
    assert (config["adapter"], config["policy_options"]) == ("smolvla", {})
    assert load_adapter("smolvla").from_pretrained(folder / "other" / "policy").spec.horizon == config["horizon"]
