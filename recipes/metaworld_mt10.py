"""Ten tasks of Meta-World with one policy: imitates its scripted experts, then succeeds more often.

    accelerate launch recipes/metaworld_mt10.py [--seeds 0 1 2] [--smoke] [--help]
    accelerate launch recipes/metaworld_mt10.py --sees cameras --adapter pi05 (--policy lerobot/pi05_base | --tiny)

The MLP reads the state and the task as a one-hot vector (`observation.environment_state`), a VLA (pi05, smolvla,
groot_n1d6) two cameras and the instruction. With --tiny a VLA has small random weights. What differs from the paper's
values, so that two CPU cores show the effect, says why.
"""

from pathlib import Path

from poco_vla import (
    DemonstrationConfig,
    EnvSpec,
    EvalConfig,
    OptimConfig,
    PocoConfig,
    ReplayConfig,
    RewardConfig,
    TrainConfig,
)
from poco_vla.cli import run_recipe


def config(sees: str = "state") -> TrainConfig:
    cameras = {"cameras": ["corner2", "gripperPOV"], "image_size": 224} if sees == "cameras" else {}
    return TrainConfig(
        adapter="flow_mlp",
        policy_options={
            "hidden_dims": [256, 256, 256],  # paper: 4 x 512
            "num_inference_steps": 5,  # paper: 10; half the cost of a candidate
        },
        env=EnvSpec(type="metaworld_mt", task="MT10", options={"episode_length": 150} | cameras, num_envs=5),
        demonstrations=DemonstrationConfig(episodes=2, noise=0.1),  # of each task; with 5, SFT leaves little to show
        reward=RewardConfig(success=20.0, step=0.0),  # sparse; the scale suits the critic's learning rate
        horizon=5,
        poco=PocoConfig(
            num_candidates=8,  # paper: 32
            eta=0.1,
            zeta=0.8,
            gamma=0.98,  # paper: 0.99; an episode is 30 chunks long
            tau=0.01,  # paper: 0.005; fewer updates
            aggregation="min",  # safer than the mean at this size (measured on cube-single)
            anchor="demos_and_successes",  # paper: all of D, failures too
            critic_hidden=(256, 256, 256),  # paper: 4 x 512
        ),
        optim=OptimConfig(batch_size=256, actor_lr=1e-3, actor_lr_end=1e-4, critic_lr=1e-3),
        replay=ReplayConfig(demo_fraction=0.5),
        eval=EvalConfig(episodes=20, every=20_000),  # of each task
        sft_steps=4_000,
        warmup_steps=3_000,
        online_steps=60_000,
        num_threads=1,  # the other core runs the simulators
        output_dir=Path("runs/metaworld_mt10/{time}"),
    )


if __name__ == "__main__":
    run_recipe(config, tiny=True, smoke=True, choices={"sees": ("state", "cameras")})
