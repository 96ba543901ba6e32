"""RoboMimic Can, offline to online: imitate 30 demonstrations, then succeed without collapsing.

    accelerate launch recipes/offline_to_online_can.py [--seeds 42 43 44] [--smoke] [--help]
    poco-vla data robomimic --task Can --episodes 30 --root runs/data/can-mh-30 && \\
        accelerate launch recipes/offline_to_online_can.py --dataset.root runs/data/can-mh-30

The paper's offline-to-online setting, with the values of the authors' released script: SFT on offline data, then POCO.
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
        env=EnvSpec(type="robosuite", task="Can", options={"episode_length": 300}),  # [code]
        # In the place of RoboMimic's multi-human set, which `--dataset.root` takes.
        demonstrations=DemonstrationConfig(episodes=30, noise=0.1, recovery=0.2),
        reward=RewardConfig.named("step_cost"),  # the environment's own less 0.01 per step [code]
        poco=PocoConfig(eta=0.001, beta=1.0, zeta=0.3),
        eval=EvalConfig(episodes=50, every=50_000),  # [code]
        sft_steps=300_000,  # [code]
        warmup_steps=5_000,
        online_steps=1_000_000,  # [code]
        output_dir=Path("runs/offline_to_online_can/{time}"),
    )


if __name__ == "__main__":
    run_recipe(config(), smoke=True)
