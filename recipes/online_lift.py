"""RoboMimic Lift, online: the paper's curve from an untrained policy.

    accelerate launch recipes/online_lift.py [--seeds 42 43 44] [--smoke] [--help]
    poco-vla data robomimic --task Lift --root runs/data/lift-mh && \\
        accelerate launch recipes/online_lift.py --dataset.root runs/data/lift-mh

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
        env=EnvSpec(type="robosuite", task="Lift", options={"episode_length": 300}),  # [code]
        # In the place of RoboMimic's multi-human set, which `--dataset.root` takes.
        demonstrations=DemonstrationConfig(episodes=300, noise=0.2, recovery=0.2),
        reward=RewardConfig.named("sparse"),  # paper: 1 at success, else 0
        poco=PocoConfig(eta=0.001, beta=1.0, zeta=0.15),
        eval=EvalConfig(episodes=50, every=10_000),
        sft_steps=0,  # paper: online only
        warmup_steps=5_000,
        online_steps=500_000,
        output_dir=Path("runs/online_lift/{time}"),
    )


if __name__ == "__main__":
    run_recipe(config(), smoke=True)
