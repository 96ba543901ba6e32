"""The paper's simulations: seven tasks of OGBench and RoboMimic, learned online; four of them offline to online, too.

    python recipes/simulations.py --task square --setting offline_to_online [--seeds 42 43 44] [--smoke] [--help]

online: the policy begins untrained, and the offline data are in the replay buffer from the first update on.
offline_to_online: SFT on the offline data, then POCO without a collapse; the values of the authors' released script.
The simulators' scripted experts make the offline data. The published data instead:

    poco-vla data ogbench --task scene-singletask-task1-v0 --root runs/data/scene-play
    python recipes/simulations.py --task scene --dataset.root runs/data/scene-play
    poco-vla data robomimic --task Can --episodes 30 --root runs/data/can-mh-30    # --episodes 30: offline_to_online
    python recipes/simulations.py --task can --setting offline_to_online --dataset.root runs/data/can-mh-30

Values that are not defaults (the paper's) say where they come from; [code] is the authors' released code.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from poco_vla import DemonstrationConfig, EnvSpec, EvalConfig, PocoConfig, PocoError, RewardConfig, TrainConfig
from poco_vla.cli import run_recipe

PLAY = DemonstrationConfig(kind="play", episodes=1000, noise=0.1)  # as OGBench's published sets
EXPERT = DemonstrationConfig(episodes=300, noise=0.1, recovery=0.2)  # in the place of RoboMimic's multi-human sets

TASKS = {
    "scene": (EnvSpec(type="ogbench", task="scene-singletask-task1-v0"), PLAY),  # task 1 [code]
    "puzzle_3x3": (EnvSpec(type="ogbench", task="puzzle-3x3-singletask-task1-v0"), PLAY),  # task 1 [code]
    "cube_double": (EnvSpec(type="ogbench", task="cube-double-singletask-task2-v0"), PLAY),  # OGBench's default task
    "cube_triple": (EnvSpec(type="ogbench", task="cube-triple-singletask-task2-v0"), replace(PLAY, episodes=3000)),
    "lift": (EnvSpec(type="robosuite", task="Lift", options={"episode_length": 300}), replace(EXPERT, noise=0.2)),
    "can": (EnvSpec(type="robosuite", task="Can", options={"episode_length": 300}), EXPERT),  # 300 steps [code]
    "square": (EnvSpec(type="robosuite", task="Square"), EXPERT),
}


class Values(NamedTuple):
    eta: float
    zeta: float
    sft_steps: int
    online_steps: int
    eval_every: int = 10_000
    episodes: int | None = None  # of the offline data; None: as many as TASKS has


SETTINGS = {
    "online": {  # online_steps: as far as the paper's curves go
        "scene": Values(eta=0.1, zeta=0.3, sft_steps=0, online_steps=500_000),
        "puzzle_3x3": Values(eta=0.1, zeta=0.3, sft_steps=0, online_steps=500_000),
        "cube_double": Values(eta=0.1, zeta=0.3, sft_steps=0, online_steps=500_000),
        "cube_triple": Values(eta=0.1, zeta=0.3, sft_steps=0, online_steps=1_000_000),
        "lift": Values(eta=0.001, zeta=0.15, sft_steps=0, online_steps=500_000),
        "can": Values(eta=0.001, zeta=0.15, sft_steps=0, online_steps=500_000),
        "square": Values(eta=0.001, zeta=0.15, sft_steps=0, online_steps=500_000),
    },
    "offline_to_online": {  # steps and evaluations [code]
        "scene": Values(eta=0.001, zeta=0.15, sft_steps=500_000, online_steps=500_000),
        "puzzle_3x3": Values(eta=0.001, zeta=0.15, sft_steps=500_000, online_steps=500_000),
        "can": Values(eta=0.001, zeta=0.3, sft_steps=300_000, online_steps=1_000_000, eval_every=50_000, episodes=30),
        "square": Values(eta=0.001, zeta=0.08, sft_steps=300_000, online_steps=1_000_000, eval_every=50_000),
    },
}


def config(task: str = "scene", setting: str = "online") -> TrainConfig:
    if task not in SETTINGS[setting]:
        raise PocoError(f"the paper has no {setting} run of {task}; it has {', '.join(SETTINGS[setting])}")
    values, (env, data) = SETTINGS[setting][task], TASKS[task]
    return TrainConfig(
        adapter="flow_mlp",
        # States and actions as they are [code].
        policy_options={"normalization_mapping": {"STATE": "IDENTITY", "ACTION": "IDENTITY"}},
        env=env,
        demonstrations=replace(data, episodes=values.episodes or data.episodes),
        # sparse: 1 at success, else 0 (paper); step_cost: the environment's own less 0.01 per step [code].
        reward=RewardConfig.named("sparse" if setting == "online" else "step_cost"),
        poco=PocoConfig(eta=values.eta, beta=1.0, zeta=values.zeta),
        eval=EvalConfig(episodes=50, every=values.eval_every),
        sft_steps=values.sft_steps,
        warmup_steps=5_000,
        online_steps=values.online_steps,
        output_dir=Path(f"runs/{setting}_{task}/{{time}}"),
    )


CHOICES = {"task": TASKS, "setting": SETTINGS}

if __name__ == "__main__":
    run_recipe(config, smoke=True, choices=CHOICES)
