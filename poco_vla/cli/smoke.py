"""`--tiny` and `--smoke`: a recipe's whole run on a CPU within minutes, before anybody rents a GPU for it.

Every stage is the real one; nothing is learned that would transfer. With `--tiny` a VLA's model is the recipe's own at
small random weights, the task a simulated one: OGBench's cube-single, seen by two cameras. With `--smoke` a
simulation's task stays, and data, networks and steps are few.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from poco_vla.config import (
    DatasetConfig,
    DemonstrationConfig,
    EnvSpec,
    EvalConfig,
    InteractionConfig,
    TrainConfig,
)
from poco_vla.files import atomic_folder


def tiny_pick_task(config: TrainConfig) -> TrainConfig:
    """`config` with a tiny base model, made here, and a simulated task: the recipe's own where it is seen by cameras,
    else the pick task in the place of the robot's."""
    from poco_vla.registry import load_adapter  # loads torch, for which no recipe's --help waits
    from poco_vla.simulators import num_tasks

    env = config.env
    if env is None or not env.options.get("cameras"):
        env = EnvSpec(type="ogbench", task="cube-single-singletask-task1-v0", options={"cameras": ["front", "wrist"]})
    env = replace(env, options={"episode_length": 80} | env.options | {"image_size": 64}, num_envs=2)
    tasks = num_tasks(env)

    root = Path("runs/tiny")
    policy, options = None, config.policy_options
    if config.policy is None and (small := _small_network(config)):  # in the place of a large one, random like that
        options = options | small | {"vision_encoder": str(_written(root / "encoder", _save_encoder))}
    else:
        policy = str(_written(root / f"{config.adapter}_base", load_adapter(config.adapter).tiny().save_pretrained))
    return replace(
        config,
        policy=policy,
        policy_options=options,
        statistics="dataset",
        dataset=DatasetConfig(),
        demonstrations=DemonstrationConfig(episodes=-(-8 // tasks), root=root / "data"),
        env=env,
        interaction=InteractionConfig() if config.interaction.mode == "remote" else config.interaction,
        # The paper's clip is for a pretrained model, whose flow error is a hundred times smaller.
        poco=replace(config.poco, num_candidates=4, zeta="auto", critic_hidden=(64, 64)),
        algorithm_options=_tiny_options(config),
        optim=replace(config.optim, batch_size=16, actor_lr=1e-3),
        eval=EvalConfig(episodes=-(-4 // tasks)),
        sft_steps=200,
        warmup_steps=100,
        online_steps=640,
        output_dir=root / config.adapter / "{time}",
    )


def _small_network(config: TrainConfig) -> dict[str, Any]:
    """Return options of a network that takes milliseconds, where the adapter builds its policy from a dataset; none
    where it starts from a pretrained one."""
    from poco_vla.registry import load_adapter

    small = {"hidden_dims": [32, 32], "num_inference_steps": 2}
    names = load_adapter(config.adapter).option_names(pretrained=False)
    return small if names is not None and small.keys() <= names else {}


def _tiny_options(config: TrainConfig) -> dict[str, Any]:
    """Return `algorithm_options` with which an update takes milliseconds."""
    from poco_vla.algorithms import load_algorithm  # loads torch

    return {**config.algorithm_options, **load_algorithm(config.algorithm).tiny_options}


def _written(folder: Path, write: Callable[[Path], object]) -> Path:
    """Return `folder`, which one process of a launch writes unless it is there."""
    if not folder.is_dir() and os.environ.get("LOCAL_RANK", "0") == "0":
        write(folder)
    for _ in range(600):  # another process of this launch is writing it
        if folder.is_dir():
            break
        time.sleep(0.1)
    return folder


def _save_encoder(folder: Path) -> None:
    """Write an image encoder of transformers with small random weights."""
    from transformers import ResNetConfig, ResNetModel

    sizes = {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "embedding_size": 8, "layer_type": "basic"}
    with atomic_folder(folder) as partial:
        ResNetModel(ResNetConfig(**sizes)).save_pretrained(partial)


def smoke_run(config: TrainConfig) -> TrainConfig:
    """A simulation's `config` on little data, with small networks and few steps: under a minute on a CPU."""
    root = Path("runs/smoke")
    demos, env = config.demonstrations, config.env
    # An expert needs its time to succeed, play does not; and updates wait for the end of a first episode.
    limit = 250 if demos is None or demos.kind == "expert" else 30
    if demos is not None:
        demos = replace(demos, episodes=2, steps=60, recovery=0.0, root=root / "data")
    policy, options = None, config.policy_options | _small_network(config)
    if config.policy:  # what an earlier run of a sweep has written, which has its sizes; or somebody's own
        swept = Path(config.policy).parts[0] == "runs"
        policy, options = str(_below(root, Path(config.policy))) if swept else config.policy, config.policy_options
    return replace(
        config,
        policy=policy,
        policy_options=options,
        demonstrations=demos,
        env=replace(_limited(env, limit), num_envs=2) if env else None,
        poco=replace(config.poco, num_candidates=2, critic_hidden=(32, 32)),
        algorithm_options=_tiny_options(config),
        optim=replace(config.optim, batch_size=16),
        eval=replace(config.eval, episodes=2, every=0),
        sft_steps=min(20, config.sft_steps),
        warmup_steps=5,
        online_steps=min(3 * limit, config.online_steps),
        output_dir=_below(root, config.output_dir),
    )


def _limited(env: EnvSpec, steps: int) -> EnvSpec:
    """Return `env` with episodes of at most `steps`: its own option where it has one, else the run's limit."""
    from poco_vla.simulators import environment

    if hasattr(environment(env), "episode_length"):
        return replace(env, options=env.options | {"episode_length": steps})
    return replace(env, max_episode_steps=steps)


def _below(root: Path, path: Path) -> Path:
    """Return `path` below `root`: without its "runs", or its last name alone where it lies elsewhere."""
    return root / (path.relative_to("runs") if path.parts[:1] == ("runs",) else path.name)
