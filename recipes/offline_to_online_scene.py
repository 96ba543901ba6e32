"""OGBench scene, offline to online: imitate play data, then succeed without collapsing.

    accelerate launch recipes/offline_to_online_scene.py [--seeds 42 43 44] [--smoke] [--help]
    poco-vla data ogbench --task scene-singletask-task1-v0 --root runs/data/scene-play && \\
        accelerate launch recipes/offline_to_online_scene.py --dataset.root runs/data/scene-play

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
        env=EnvSpec(type="ogbench", task="scene-singletask-task1-v0"),
        # The published set's recipe, run here; `--dataset.root` takes the published one instead.
        demonstrations=DemonstrationConfig(kind="play", episodes=1000, noise=0.1),
        reward=RewardConfig.named("step_cost"),  # the environment's own less 0.01 per step [code]
        poco=PocoConfig(eta=0.001, beta=1.0, zeta=0.15),
        eval=EvalConfig(episodes=50, every=10_000),
        sft_steps=500_000,  # [code]
        warmup_steps=5_000,
        online_steps=500_000,  # [code]
        output_dir=Path("runs/offline_to_online_scene/{time}"),
    )


if __name__ == "__main__":
    run_recipe(config(), smoke=True)
