"""`--tiny`: a recipe's whole run on a CPU within minutes, before anybody rents a GPU for it.

The model is the recipe's own at small random weights, the task a simulated one: OGBench's cube-single, seen by two
cameras. Every stage is the real one; nothing is learned that would transfer.
"""

import os
import time
from dataclasses import replace
from pathlib import Path

from poco_vla.config import DatasetConfig, DemonstrationConfig, EnvSpec, EvalConfig, TrainConfig
from poco_vla.registry import load_adapter


def tiny_pick_task(config: TrainConfig) -> TrainConfig:
    """`config` with a tiny base model, made here, and the simulated pick task in the place of the robot's."""
    root = Path("runs/tiny")
    base = root / f"{config.adapter}_base"
    if not base.is_dir():
        if os.environ.get("LOCAL_RANK", "0") == "0":
            load_adapter(config.adapter).tiny().save_pretrained(base)
        for _ in range(600):  # another process of this launch is writing it
            if base.is_dir():
                break
            time.sleep(0.1)
    return replace(
        config,
        policy=str(base),
        statistics="dataset",
        dataset=DatasetConfig(),
        demonstrations=DemonstrationConfig(episodes=8, root=root / "data"),
        env=EnvSpec(
            type="ogbench",
            task="cube-single-singletask-task1-v0",
            options={"cameras": ["front", "wrist"], "image_size": 64, "episode_length": 80},
            num_envs=2,
        ),
        # The paper's clip is for a pretrained model, whose flow error is a hundred times smaller.
        poco=replace(config.poco, num_candidates=4, zeta="auto", critic_hidden=(64, 64)),
        optim=replace(config.optim, batch_size=16, actor_lr=1e-3),
        eval=EvalConfig(episodes=4),
        sft_steps=200,
        warmup_steps=100,
        online_steps=640,
        output_dir=root / config.adapter / "{time}",
    )
