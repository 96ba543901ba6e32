"""SmolVLA on Pick Pen: a pen is picked up and put into a holder, with the paper's numbers for larger models.

    accelerate launch recipes/smolvla_pick_pen.py --dataset.repo-id you/pick_pen [--env.type ...] [--help]
    accelerate launch recipes/smolvla_pick_pen.py --tiny    # on a CPU within minutes, a simulated pick task

Supervised fine-tuning on your demonstrations, online POCO where `env` says, evaluation, a plain LeRobot policy.
"""

from pathlib import Path

from poco_vla import DatasetConfig, EnvSpec, EvalConfig, OptimConfig, PocoConfig, RewardConfig, TrainConfig
from poco_vla.cli import run_recipe


def config() -> TrainConfig:
    return TrainConfig(
        adapter="smolvla",
        policy="lerobot/smolvla_base",  # or a smolvla that was fine-tuned on the same data, with --sft-steps 0
        statistics="dataset",  # the base brings those of its own robot
        dataset=DatasetConfig(repo_id="you/pick_pen"),  # your demonstrations
        # The paper's robot is a real one. Until yours has a LeRobot environment type, this is the simulated pick task.
        env=EnvSpec(
            type="ogbench",
            task="cube-single-singletask-task1-v0",
            options={"cameras": ["front", "wrist"], "image_size": 224},
            num_envs=1,
        ),
        reward=RewardConfig(success=1.0, step=0.0),  # sparse
        horizon=10,
        poco=PocoConfig(num_candidates=16, eta=0.001, beta=1.0, zeta=0.01, gamma=0.99),
        optim=OptimConfig(batch_size=64, actor_lr=5e-5, critic_lr=3e-4),
        eval=EvalConfig(episodes=30),  # as the paper's trials
        sft_steps=20_000,
        warmup_steps=2_000,
        online_steps=15_000,
        output_dir=Path("runs/smolvla_pick_pen/{time}"),
    )


if __name__ == "__main__":
    run_recipe(config(), tiny=True)
