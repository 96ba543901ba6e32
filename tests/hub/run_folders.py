"""Folders of finished runs, as the trainer writes them, without the training."""

import json
from pathlib import Path

import matplotlib
import torch

from poco_vla import ChunkCritic, EnvSpec, PocoConfig, TrainConfig, load_adapter
from poco_vla.checkpointing.checkpoint import save
from poco_vla.config import to_json
from poco_vla.files import write_json
from poco_vla.hub.rate import note_run

matplotlib.use("Agg")
CRITIC = {"critic_hidden": (8, 8)}


def evaluation(successes, episodes, env_steps, low, high):
    return {
        "label": "",
        "env_steps": env_steps,
        "update": env_steps,
        "successes": successes,
        "episodes": episodes,
        "mean_length": 50.0,
        "success_rate": successes / episodes,
        "interval_95": [low, high],
    }


BEFORE, AFTER = evaluation(8, 40, 0, 0.105, 0.348), evaluation(30, 40, 900, 0.598, 0.858)
BEST = evaluation(36, 40, 600, 0.769, 0.960)


def move(policy, seed=0):
    """Something was learned."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return policy


def write_run(run: Path, policy, adapter, **config) -> Path:
    """What a run leaves behind of `policy`, and of a better one on the way."""
    spec = policy.spec
    settings = TrainConfig(
        adapter=adapter,
        policy=policy.base,
        env=EnvSpec(task="cube-single-singletask-task1-v0"),
        horizon=spec.horizon,
        poco=PocoConfig(zeta="auto", **CRITIC),
        output_dir=run,
        **config,
    )
    run.mkdir(parents=True)
    policy.save_pretrained(run / "policy")
    if policy.base is not None:
        policy.save_head(run / "head")
    write_json(run / "config.json", to_json(settings))
    result = {
        "seed": 3,
        "command": ["recipes/x.py"],
        "env": to_json(settings.env),
        "before": BEFORE,
        "after": AFTER,
        "evaluations": [BEFORE, BEST, AFTER],
        "best": BEST | {"policy": "best"},
        "zeta": 0.25,
        "sft_steps": 100,
        "updates": 1000,
        "env_steps": 900,
        "seconds": 720.0,
        "adapter": adapter,
        "sizes": {"feature_dim": policy.feature_dim, "horizon": spec.horizon, "action_dim": spec.action_dim},
        "versions": {"python": "3.12.1", "lerobot": "0.6.1"},
        "device": "cpu",
        "fps": 20,
        "policy": "policy",
        "lerobot_arguments": ["--env.discover_packages_path=poco_vla.simulators"],
        "demonstrations": {"steps": 1234, "repo_id": settings.dataset.repo_id},
    }
    write_json(run / "result.json", result)
    sizes = (policy.feature_dim, spec.horizon, spec.action_dim)
    critics = {part: ChunkCritic(*sizes, hidden=(8, 8)) for part in ("critic", "target_critic")}
    weights = {f"{part}.{n}": t for part, critic in critics.items() for n, t in critic.state_dict().items()}
    nothing = {"state": {}, "param_groups": []}
    save(run / "checkpoints", 1000, weights=weights, optimizer=nothing, tensors={}, state={}, config=settings)
    from matplotlib import pyplot

    pyplot.figure(figsize=(1, 1)).savefig(run / "curve.png")
    pyplot.close("all")
    better = move(policy, seed=1)
    (better.save_head if policy.base else better.save_pretrained)(run / "best")
    for folder in (run / "policy", run / "head", run / "best"):
        note_run(folder, {"fps": 20})
    return run


def based_run(root: Path, adapter="pi05", base=None, seed=0, **options):
    """A run on a saved tiny base: the base's folder, the run's.

    Args:
        root: empty.
        adapter: which.
        base: where the base is; saved in `root` when None.
        seed: of what was learned.
        options: of `from_pretrained`.
    """
    if base is None:
        base = root / "base"
        load_adapter(adapter).tiny().save_pretrained(base)
    policy = move(load_adapter(adapter).from_pretrained(base, **options), seed)
    return base, write_run(root / "run", policy, adapter)


def about_of(hub, repo, revision="main"):
    return json.loads(hub.files(repo, revision)["poco.json"])
