"""LeRobot's command lines on what this library makes, as a user types them.

`LEROBOT_BIN` names the folder of another environment's console scripts, such as a fresh one made from wheels; the
tests' own is the default.
"""

import os
import subprocess
import sys
from pathlib import Path

BIN = Path(os.environ.get("LEROBOT_BIN", Path(sys.executable).parent))
TASK = "cube-single-singletask-task1-v0"


def run(command, *arguments, folder=BIN, home=None, begin=subprocess.run):
    """Output of a command that has to succeed. Rays draw its small pictures, faster than a CPU's OpenGL."""
    done = start(command, *arguments, folder=folder, home=home, begin=begin)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def start(command, *arguments, folder=BIN, home=None, begin=subprocess.run):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MUJOCO_GL": "disable"}
    return begin(
        [folder / command, *map(str, arguments)],
        env=env | ({"HOME": str(home)} if home else {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def training(root, output, *more):
    """`lerobot-train`: a fresh flow_mlp on a dataset."""
    return (
        "--policy.type=flow_mlp",
        "--policy.push_to_hub=false",
        "--policy.device=cpu",
        "--dataset.repo_id=local/cube",
        f"--dataset.root={root}",
        "--wandb.enable=false",
        f"--output_dir={output}",
        *more,
    )


def evaluation(policy, output, *more, episodes=1, steps=6):
    """`lerobot-eval`: an exported policy in this library's environment."""
    return (
        f"--policy.path={policy}",
        "--policy.device=cpu",
        "--env.discover_packages_path=poco_vla.simulators",
        "--env.type=ogbench",
        f"--env.task={TASK}",
        f"--env.episode_length={steps}",
        f"--eval.n_episodes={episodes}",
        f"--eval.batch_size={episodes}",
        "--eval.use_async_envs=false",  # as many interpreters as environments would start
        f"--output_dir={output}",
        *more,
    )


def rollout(policy, *more):
    """`lerobot-rollout`: an exported policy on the simulated arm, whose actions are velocities: nothing that brings it
    back to where it was, which LeRobot tries with joint positions."""
    return (
        f"--policy.path={policy}",
        "--policy.device=cpu",
        "--robot.discover_packages_path=poco_vla.robots",
        "--robot.type=simulated_arm",
        "--robot.seed=3",
        "--fps=20",
        "--return_to_initial_position=false",
        "--play_sounds=false",
        *more,
    )


def recording(name, root, *more):
    """`lerobot-rollout`: what it records."""
    return (
        f"--dataset.repo_id=you/rollout_{name}",
        f"--dataset.root={root}",
        "--dataset.fps=20",
        "--dataset.single_task=put the cube on its target",
        "--dataset.push_to_hub=false",
        *more,
    )


def picture(root, output, episode=0):
    """`lerobot-dataset-viz`: an episode of a dataset as a Rerun file."""
    words = ("--repo-id", "local/episodes", "--root", root, "--episode-index", episode, "--num-workers", 0)
    return (*words, "--save", 1, "--output-dir", output)
