"""Runs on the point mass that the tests share. As a script: the small one, every value overridable.

python tests/pointmass_run.py --output-dir ... --demonstrations.root ...
"""

from dataclasses import replace
from pathlib import Path

from pointmass import pointmass

from poco_vla.cli import run_recipe
from poco_vla.config import (
    DemonstrationConfig,
    EvalConfig,
    OptimConfig,
    PocoConfig,
    ReplayConfig,
    RewardConfig,
    TrainConfig,
)


def small(output_dir, data, **changes):
    """Every stage and every kind of bookkeeping, in a second or two: too small to learn."""
    config = TrainConfig(
        adapter="flow_mlp",
        policy_options={"hidden_dims": [16, 16], "num_inference_steps": 3},
        env=pointmass(num_envs=3),
        # Made in this process: workers would import LeRobot for seconds each.
        demonstrations=DemonstrationConfig(episodes=6, noise=0.3, workers=1, root=Path(data)),
        reward=RewardConfig(success=1.0, step=-1.0),
        horizon=5,
        poco=PocoConfig(num_candidates=4, eta=0.2, zeta=0.8, gamma=0.98, anchor="demos", critic_hidden=(16, 16)),
        optim=OptimConfig(batch_size=16, actor_lr=1e-3, critic_lr=1e-3),
        eval=EvalConfig(episodes=6, videos=False),
        sft_steps=40,
        warmup_steps=10,
        online_steps=300,
        updates_per_step=0.2,
        log_every=5,
        num_threads=1,
        output_dir=Path(output_dir),
    )
    return replace(config, **changes)


def learning(output_dir, data, **changes):
    """Large enough to learn: H 5, K 5, N 8, three layers of 96, demonstrations as the anchor."""
    config = small(output_dir, data)
    return replace(
        config,
        policy_options={"hidden_dims": [96, 96, 96], "num_inference_steps": 5},
        env=pointmass(num_envs=16),
        demonstrations=replace(config.demonstrations, episodes=50, noise=0.4),
        poco=PocoConfig(
            num_candidates=8,
            eta=0.2,
            zeta=0.8,
            beta=2.0,
            gamma=0.98,
            tau=0.02,
            aggregation="min",
            anchor="demos",
            critic_hidden=(96, 96, 96),
        ),
        optim=OptimConfig(batch_size=64, actor_lr=1e-3, critic_lr=2e-3),
        replay=ReplayConfig(demo_fraction=0.5),
        eval=EvalConfig(episodes=200, videos=False),
        sft_steps=2000,
        warmup_steps=500,
        online_steps=8_000,
        updates_per_step=0.33,
        log_every=50,
        **changes,
    )


if __name__ == "__main__":
    run_recipe(small("runs/pointmass", "runs/data"))
