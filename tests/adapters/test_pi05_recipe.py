"""`recipes/pi05_pick_pen.py --tiny`, as a user types it: both stages, export, LeRobot's own command."""

import io
import json
import runpy
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.scripts.lerobot_eval import eval_main
from lerobot.utils.import_utils import register_third_party_plugins
from safetensors.torch import load_file

from poco_vla import load_adapter
from poco_vla.algorithms import load_algorithm
from poco_vla.cli import run_recipe
from poco_vla.rendering.render import opengl_context

pytest.importorskip("ogbench")
RECIPE = Path(__file__).parents[2] / "recipes" / "pi05_pick_pen.py"
STEPS = ("--sft-steps", "4", "--warmup-steps", "3", "--online-steps", "100", "--updates-per-step", "0.1")
# One environment in the run's own process: a worker would import LeRobot for seconds. Its first episode has 80 steps.
SMALL = (*STEPS, "--log-every", "2", "--env.num-envs", "1", "--env.in-process", "--demonstrations.episodes", "2")
SMALL += ("--demonstrations.workers", "1", "--eval.episodes", "1", "--eval.no-videos")
SMALL += ("--env.options.image-size", "32")

# One worker runs them all: each leans on the run of the first.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pi05_recipe")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working folder of all runs, where rays draw: faster than a CPU's OpenGL, and on every machine."""
    made = tmp_path_factory.mktemp("recipe")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("MUJOCO_GL", "disable")
        yield made
    opengl_context.cache_clear()  # which has remembered that rays draw


def recipe_of(*arguments):
    """Run the recipe by its command line, in this process; test_recipes.py starts one by the launcher."""
    run_recipe(runpy.run_path(str(RECIPE))["config"](), arguments, tiny=True)


@pytest.fixture(scope="module")
def run(folder):
    """A finished run, and what it printed."""
    shown = io.StringIO()
    with redirect_stdout(shown):
        recipe_of("--tiny", *SMALL, "--output-dir", "run")
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder / "run", shown.getvalue()


def stages(run):
    return [json.loads(line)["stage"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_run_passes_through_every_stage_and_says_so(run):
    path, shown = run
    assert set(stages(path)) == {"sft", "warmup", "online"}
    for words in ("success after SFT", "success after POCO", "lerobot-eval", "72,480 trained parameters"):
        assert words in shown
    assert json.loads((path / "result.json").read_text())["env_steps"] >= 100


def test_the_demonstrations_are_a_lerobot_dataset_with_two_cameras_as_video(run):
    (root,) = (run[0].parent / "runs" / "tiny" / "data").iterdir()
    dataset = LeRobotDataset(f"local/{root.name}", root=root)
    cameras = ["observation.images.front", "observation.images.wrist"]
    assert dataset.meta.video_keys == cameras
    assert [tuple(dataset[0][key].shape) for key in cameras] == [(3, 32, 32)] * 2


def test_the_head_alone_gives_the_exported_policy_again(run):
    path, _ = run
    adapter = load_adapter("pi05")
    whole, head = (adapter.from_pretrained(path / name) for name in ("policy", "head"))
    weights = head.policy.state_dict()
    assert all(weights[name].float().equal(tensor.float()) for name, tensor in whole.policy.state_dict().items())
    assert (path / "head" / "head.safetensors").stat().st_size < (
        path / "policy" / "model.safetensors"
    ).stat().st_size / 3


def test_lerobots_own_command_runs_the_exported_policy(run, tmp_path, monkeypatch, capsys):
    """By the command line that the run printed, in this process; test_lerobot_commands.py starts one."""
    _, shown = run
    (line,) = (line for line in shown.splitlines() if line.strip().startswith("lerobot-eval"))
    short = "--env.episode_length=10"  # each frame of its film costs half a second
    monkeypatch.setattr(sys, "argv", [*shlex.split(line), short, f"--output_dir={tmp_path}"])
    register_third_party_plugins()
    eval_main()
    assert "All keys loaded successfully!" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval_info.json").read_text())["overall"]["n_episodes"] == 1


@pytest.fixture
def recipe(run):
    """The recipe by its command line, on the data of the first run."""
    yield recipe_of
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["bc", "qc", "dsrl", "expo", "reinflow"])
def test_another_algorithm_runs_from_sft_to_export(name, recipe, folder, capsys):
    """It says so where plain samples of the exported policy are not how the algorithm acts."""
    # 100 steps are 10 chunks: three rollouts, of which the first is the value's.
    few = ("--reinflow.rollout-steps", "3") if name == "reinflow" else ()
    recipe("--tiny", *SMALL, *few, "--log-every", "1", "--algorithm", name, "--output-dir", name)
    shown, kind, path = capsys.readouterr().out, load_algorithm(name), folder / name
    for words in ("success after SFT", f"success after {kind.title}", "lerobot-eval"):
        assert words in shown
    assert set(stages(path)) == set(kind.stages())
    assert ("are not how it was trained to act" in shown) == (name in ("qc", "dsrl", "expo"))
    base, policy = (load_file(one / "model.safetensors") for one in (folder / "runs/tiny/pi05_base", path / "policy"))
    changed = {key for key in base if not base[key].equal(policy[key])}
    assert changed
    assert all(policy[key].isfinite().all() for key in changed)


@pytest.mark.exhaustive
def test_a_lora_run_goes_on_after_its_checkpoint_and_exports_a_plain_policy(recipe, folder, capsys):
    """SFT alone, stopped half-way; only LoRA matrices are in the checkpoint and in the head's file."""
    options = ("--tiny", *SMALL, "--policy-options.lora", "2", "--online-steps", "0", "--output-dir", "lora")
    recipe(*options, "--checkpoint-every", "2")
    path = folder / "lora"
    last = max((path / "checkpoints").iterdir())
    shutil.rmtree(last)
    recipe(*options, "--checkpoint-every", "2", "--resume")
    assert "resumed from" in capsys.readouterr().out
    assert all("lora_" in name for name in load_file(path / "head" / "head.safetensors"))
    adapter = load_adapter("pi05")
    merged = adapter.from_pretrained(path / "policy")
    assert sum(p.numel() for p in merged.parameters() if p.requires_grad) == 72_480
    assert adapter.from_pretrained(path / "head").lora.rank == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dataset.root", "nowhere"), "no LeRobot v3 dataset in nowhere"),
        ((), 'the dataset "you/pick_pen" on the Hub cannot be opened'),
        (("--tiny", "--policy", "you/pi05"), 'the policy "you/pi05" is no local folder and cannot be had from the Hub'),
        (("--tiny", "--horizon", "60"), "trained with chunks of 50 steps, asked for 60"),
        (("--tiny", "--policy-options.cameras", '["observation.images.top"]'), "no camera observation.images.top"),
        (("--tiny", "--policy-options.lorra", "2"), 'named "lorra". Known: asset, base'),
    ],
)
def test_what_is_missing_is_told_in_one_sentence(recipe, arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        recipe(*arguments, *(SMALL if "--tiny" in arguments else ()), "--output-dir", "bad")
    assert stop.value.code == 1
    assert words in capsys.readouterr().err
