"""`recipes/groot_pick_pen.py --tiny`, as a user types it: every stage, export, LeRobot's own command."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from poco_vla import load_adapter
from poco_vla.cli import run_recipe

pytest.importorskip("ogbench")
RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["--sft-steps", "2", "--warmup-steps", "2", "--online-steps", "100", "--updates-per-step", "0.1"]
SMALL += ["--log-every", "1", "--env.num-envs", "1", "--env.in-process", "--demonstrations.episodes", "2"]
SMALL += ["--demonstrations.workers", "1", "--eval.episodes", "1"]
# Rays draw these small pictures faster than a CPU's OpenGL, and on every machine.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MUJOCO_GL": "disable"}

# One worker runs them all: each leans on the run of the first.
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.xdist_group("groot_recipe")]


def launch(recipe, folder, *arguments):
    """A recipe in `folder`; what came of it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return subprocess.run(
        [*command, RECIPES / recipe, *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("recipe")
    done = launch("groot_pick_pen.py", folder, "--tiny", *SMALL, "--output-dir", "run")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run", done.stdout + done.stderr


def test_the_run_passes_through_every_stage_and_says_so(run):
    path, shown = run
    lines = (path / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["stage"] for line in lines} == {"sft", "warmup", "online"}
    for words in ("success after SFT", "success after POCO", "lerobot-eval", "groot_n1d6: 83,252 trained parameters"):
        assert words in shown
    assert json.loads((path / "result.json").read_text())["env_steps"] >= 100


def test_the_exported_policy_is_whole_and_was_trained(run):
    """Only the head differs from the random base that the run began with."""
    path, _ = run
    (base,) = (path.parent / "runs" / "tiny").glob("**/model.safetensors")
    adapter = load_adapter("groot_n1d6")
    before, after = (
        adapter.from_pretrained(folder, dtype="bfloat16").policy.state_dict()
        for folder in (base.parent, path / "policy")
    )
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not tensor.equal(after[name])}
    assert changed
    assert all(name.startswith("action_head.") for name in changed)


def test_lerobots_own_command_runs_the_exported_policy(run, tmp_path):
    """By the command line that the run printed."""
    path, shown = run
    line = next(line for line in shown.splitlines() if line.strip().startswith("lerobot-eval"))
    program = Path(sys.executable).parent / "lerobot-eval"
    done = subprocess.run(
        f"{program} {line.strip().removeprefix('lerobot-eval')} --output_dir={tmp_path}",
        shell=True,
        cwd=path.parent,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "eval_info.json").read_text())["overall"]["n_episodes"] == 1


@pytest.mark.parametrize("recipe", ["groot_pick_pen.py", "groot_hang_keychain.py"])
def test_without_the_checkpoint_it_says_what_to_do(recipe, run, monkeypatch, capsys):
    """On the small demonstrations of the run: the real weights are gated."""
    monkeypatch.chdir(run[0].parent)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = runpy.run_path(str(RECIPES / recipe))["config"]()
    gated = ["--tiny", *SMALL, "--policy", config.policy, "--output-dir", "bad"]
    with pytest.raises(SystemExit) as stop:
        run_recipe(config, gated, tiny=True)
    assert stop.value.code == 1
    assert '"nvidia/GR00T-N1.6-3B" is no local folder' in (words := capsys.readouterr().err)
    assert "accept their licence" in words
