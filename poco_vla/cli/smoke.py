"""`--tiny` and `--smoke`: a recipe's whole run on a CPU within minutes, before anybody rents a GPU for it.

Every stage is the real one; nothing is learned that would transfer. With `--tiny` a VLA's model is the recipe's own at
small random weights, the task a simulated one: OGBench's cube-single, seen by two cameras. With `--smoke` a
simulation's task stays, and data, networks and steps are few.
"""

import os
import time
from dataclasses import replace
from pathlib import Path

from poco_vla.config import DatasetConfig, DemonstrationConfig, EnvSpec, EvalConfig, TrainConfig


def tiny_pick_task(config: TrainConfig) -> TrainConfig:
    """`config` with a tiny base model, made here, and the simulated pick task in the place of the robot's."""
    from poco_vla.registry import load_adapter  # loads torch, for which no recipe's --help waits

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


def smoke_run(config: TrainConfig) -> TrainConfig:
    """A simulation's `config` on little data, with small networks and few steps: under a minute on a CPU."""
    root = Path("runs/smoke")
    demos, env = config.demonstrations, config.env
    # An expert needs its time to succeed, play does not; and updates wait for the end of a first episode.
    limit = 250 if demos is None or demos.kind == "expert" else 30
    if demos is not None:
        demos = replace(demos, episodes=2, steps=60, recovery=0.0, root=root / "data")
    policy, options = None, config.policy_options | {"hidden_dims": [32, 32], "num_inference_steps": 2}
    if config.policy:  # what an earlier run of a sweep has written, which has its sizes; or somebody's own
        swept = Path(config.policy).parts[0] == "runs"
        policy, options = str(_below(root, Path(config.policy))) if swept else config.policy, config.policy_options
    return replace(
        config,
        policy=policy,
        policy_options=options,
        demonstrations=demos,
        env=replace(env, options=env.options | {"episode_length": limit}, num_envs=2) if env else None,
        poco=replace(config.poco, num_candidates=2, critic_hidden=(32, 32)),
        optim=replace(config.optim, batch_size=16),
        eval=replace(config.eval, episodes=2, every=0),
        sft_steps=min(20, config.sft_steps),
        warmup_steps=5,
        online_steps=min(3 * limit, config.online_steps),
        output_dir=_below(root, config.output_dir),
    )


def _below(root: Path, path: Path) -> Path:
    """Return `path` below `root`: without its "runs", or its last name alone where it lies elsewhere."""
    return root / (path.relative_to("runs") if path.parts[:1] == ("runs",) else path.name)
