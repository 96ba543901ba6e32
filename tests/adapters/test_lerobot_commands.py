"""LeRobot's own commands on flow_mlp, as a user types them: training, then evaluation in the demo's environment."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

pytest.importorskip("ogbench")
TASK = "cube-single-singletask-task1-v0"
FEATURES = {
    "observation.state": {"dtype": "float32", "shape": (28,), "names": None},
    "action": {"dtype": "float32", "shape": (5,), "names": None},
}


def run(command, *arguments):
    """A LeRobot command line; its output."""
    done = subprocess.run(
        [Path(sys.executable).parent / command, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_lerobot_train_makes_a_policy_that_lerobot_eval_runs(tmp_path):
    rng = np.random.default_rng(0)
    dataset = LeRobotDataset.create("local/cube", fps=20, features=FEATURES, root=tmp_path / "data", use_videos=False)
    for _ in range(2):
        for _ in range(12):
            numbers = {name: rng.normal(size=f["shape"]).astype(np.float32) for name, f in FEATURES.items()}
            dataset.add_frame(numbers | {"task": "put the cubes on their targets"})
        dataset.save_episode()
    dataset.finalize()

    run(
        "lerobot-train",
        "--policy.type=flow_mlp",
        "--policy.push_to_hub=false",
        "--policy.device=cpu",
        "--policy.hidden_dims=[16,16]",
        "--dataset.repo_id=local/cube",
        f"--dataset.root={tmp_path / 'data'}",
        "--steps=3",
        "--batch_size=4",
        "--num_workers=0",
        "--wandb.enable=false",
        f"--output_dir={tmp_path / 'train'}",
    )
    policy = tmp_path / "train" / "checkpoints" / "last" / "pretrained_model"
    shown = run(
        "lerobot-eval",
        f"--policy.path={policy}",
        "--policy.device=cpu",
        "--env.discover_packages_path=poco_vla.rollout.environments",
        "--env.type=ogbench",
        f"--env.task={TASK}",
        "--env.episode_length=6",
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        f"--output_dir={tmp_path / 'eval'}",
    )
    assert "'pc_success': 0.0" in shown
    assert (tmp_path / "eval" / "eval_info.json").exists()
