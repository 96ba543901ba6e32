"""OGBench cube-single with a small MLP flow policy: imitates, then succeeds. What `make demo` runs.

accelerate launch recipes/mlp_cube.py [--seed 1] [--help]
"""

from pathlib import Path

from poco_vla.cli import run_recipe
from poco_vla.config import (
    DemonstrationConfig,
    EnvSpec,
    OptimConfig,
    PocoConfig,
    ReplayConfig,
    RewardConfig,
    TrainConfig,
)


def config() -> TrainConfig:
    return TrainConfig(
        adapter="flow_mlp",
        policy_options={
            "hidden_dims": [128, 128, 128],
            "num_inference_steps": 5,
            "normalization_mapping": {"STATE": "IDENTITY", "ACTION": "MIN_MAX"},
        },
        env=EnvSpec(type="ogbench", task="cube-single-singletask-task1-v0", options={"episode_length": 120}),
        demonstrations=DemonstrationConfig(episodes=30, noise=0.1),
        reward=RewardConfig(success=1.0, step=-1.0),
        horizon=5,
        poco=PocoConfig(
            num_candidates=8,
            eta=0.5,
            zeta=0.6,
            gamma=0.98,
            tau=0.01,
            aggregation="min",
            anchor="demos",
            critic_hidden=(128, 128, 128),
        ),
        optim=OptimConfig(batch_size=128, actor_lr=5e-4, critic_lr=1e-3, sft_lr=1e-3),
        replay=ReplayConfig(demo_fraction=0.5),
        sft_steps=3000,
        warmup_steps=1500,
        online_steps=15_000,
        updates_per_step=0.5,
        num_threads=1,
        output_dir=Path("runs/mlp_cube/{time}"),
    )


if __name__ == "__main__":
    run_recipe(config())
