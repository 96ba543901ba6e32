"""OGBench cube-triple, online: the paper's curve from an untrained policy to near 100 %.

    accelerate launch recipes/online_cube_triple.py [--seeds 42 43 44] [--smoke] [--help]
    poco-vla data ogbench --task cube-triple-singletask-task2-v0 --root runs/data/cube-triple-play && \\
        accelerate launch recipes/online_cube_triple.py --dataset.root runs/data/cube-triple-play

The paper's online setting: a policy that begins untrained, and offline data in the pool from the first update on.
Values that are not PocoConfig's defaults (the paper's) say where they come from; [code] is the authors' released code.
"""

from pathlib import Path

from poco_vla import DemonstrationConfig, EnvSpec, EvalConfig, PocoConfig, RewardConfig, TrainConfig
from poco_vla.cli import run_recipe


def config() -> TrainConfig:
    return TrainConfig(
        adapter="flow_mlp",
        # States and actions as they are [code].
        policy_options={"normalization_mapping": {"STATE": "IDENTITY", "ACTION": "IDENTITY"}},
        env=EnvSpec(type="ogbench", task="cube-triple-singletask-task2-v0"),  # OGBench's default task
        # The published set's recipe, run here; `--dataset.root` takes the published one instead.
        demonstrations=DemonstrationConfig(kind="play", episodes=3000, noise=0.1),
        reward=RewardConfig.named("sparse"),  # paper: 1 at success, else 0
        poco=PocoConfig(eta=0.1, beta=1.0, zeta=0.3),
        eval=EvalConfig(episodes=50, every=10_000),
        sft_steps=0,  # paper: online only
        warmup_steps=5_000,
        online_steps=1_000_000,
        output_dir=Path("runs/online_cube_triple/{time}"),
    )


if __name__ == "__main__":
    run_recipe(config(), smoke=True)
