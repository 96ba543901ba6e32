"""RoboMimic Square: what the clip zeta and the weight beta do (the paper's ablations), one run for each value.

    accelerate launch recipes/ablation_square.py [--seeds 42 43 44] [--only sft zeta-0.08 beta-10] [--smoke] [--help]

In the paper zeta 0.3 collapses early, 0.04 stays at imitation and 0.08 is best; beta 0.1 stays at imitation, 1 is best,
10 collapses. All begin from one SFT policy per seed. Run again, it goes on with what is missing.
"""

from dataclasses import replace
from pathlib import Path

from poco_vla import DemonstrationConfig, EnvSpec, EvalConfig, GuardConfig, PocoConfig, RewardConfig, TrainConfig
from poco_vla.cli import run_sweep

ZETAS = (0.04, 0.08, 0.15, 0.3)
BETAS = (0.0, 0.1, 10.0)  # 0 imitates only; 1 is zeta-0.08


def configs(seed: int) -> dict[str, TrainConfig]:
    root = Path(f"runs/ablation_square/seed{seed}")
    sft = TrainConfig(
        adapter="flow_mlp",
        # States and actions as they are [code: the authors' released script].
        policy_options={"normalization_mapping": {"STATE": "IDENTITY", "ACTION": "IDENTITY"}},
        env=EnvSpec(type="robosuite", task="Square"),
        # In the place of RoboMimic's multi-human set, which `--dataset.root` takes.
        demonstrations=DemonstrationConfig(episodes=300, noise=0.1, recovery=0.2),
        reward=RewardConfig.named("step_cost"),  # the environment's own less 0.01 per step [code]
        poco=PocoConfig(eta=0.001, beta=1.0, zeta=0.08),
        eval=EvalConfig(episodes=50, every=10_000),
        guard=GuardConfig(action="off"),  # a collapse is what this is about
        sft_steps=300_000,  # [code]
        warmup_steps=5_000,
        online_steps=0,
        output_dir=root / "sft",
    )
    online = replace(sft, policy=str(root / "sft" / "policy"), statistics="checkpoint", policy_options={})
    online = replace(online, sft_steps=0, online_steps=500_000)
    zetas = {f"zeta-{zeta:g}": replace(online.poco, zeta=zeta) for zeta in ZETAS}
    betas = {f"beta-{beta:g}": replace(online.poco, beta=beta) for beta in BETAS}
    runs = {name: replace(online, poco=poco, output_dir=root / name) for name, poco in (zetas | betas).items()}
    return {"sft": sft} | runs


if __name__ == "__main__":
    run_sweep(configs, smoke=True)
