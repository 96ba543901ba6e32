"""The end of a run: the exported policy, result.json and the report."""

import platform
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from poco_vla import report
from poco_vla.config import to_json
from poco_vla.evaluation import SuccessRate
from poco_vla.prefix_cache.identity import installed_versions
from poco_vla.training.evaluations import export
from poco_vla.training.run import TrainingRun

PACKAGES = ("poco-vla", "lerobot", "torch", "transformers", "accelerate", "peft")
"""Packages whose versions a run notes."""


@dataclass(frozen=True)
class TrainResult:
    """What a run ends with, also in ``result.json``.

    Attributes:
        output_dir: the run's folder.
        policy_dir: the exported LeRobot policy.
        before: success after SFT, None without an environment.
        after: success at the end, likewise.
        env_steps: environment steps taken online.
        seconds: wall time, interruptions left out.
    """

    output_dir: Path
    policy_dir: Path
    before: SuccessRate | None
    after: SuccessRate | None
    env_steps: int
    seconds: float


def finish(run: TrainingRun) -> TrainResult:
    """Export the policy, write result.json and the report, and return what they say."""
    context, policy = run.context, run.policy
    now, folder = context.progress, context.folder
    policy_dir, about = folder.path / "policy", run.evaluations.about
    rates = [SuccessRate.from_figures(e) for e in now.evaluations]
    before, after = (rates[0], rates[-1]) if rates else (None, None)
    run.updater.gather()
    if context.accelerator.is_main_process:
        context.display.say(f"writing the final policy to {policy_dir}")
        folder.write("the final policy", partial(export, policy.save_pretrained, policy_dir, about))
        if policy.base is not None:
            folder.write("the final head", partial(export, policy.save_head, folder.path / "head", about))
        folder.write_json("result.json", figures(run))
        context.display.say("writing the learning curve and the figures")
        folder.write("the report", lambda: report.finish(folder.path, context.display.console))
        run.collector.finish()
    context.accelerator.wait_for_everyone()
    return TrainResult(folder.path, policy_dir, before, after, now.env_steps, now.elapsed())


def figures(run: TrainingRun) -> dict[str, Any]:
    """Return the contents of result.json."""
    now, config, policy = run.context.progress, run.context.config, run.policy
    return {
        "seed": config.seed,
        "command": sys.argv,
        "env": to_json(run.env) if run.env else None,
        "before": now.evaluations[0] if now.evaluations else None,
        "after": now.evaluations[-1] if now.evaluations else None,
        "evaluations": now.evaluations,
        "best": now.best,
        **run.learner.algorithm.figures(),
        "sft_steps": config.sft_steps,
        "updates": now.update,
        "env_steps": now.env_steps,
        "online_episodes": now.episodes,
        "set_aside": run.admission.num_set_aside,
        "restored_heads": run.recovery.guard.restores,
        "stopped_early": now.stopped,
        "seconds": round(now.elapsed(), 1),
        "update_seconds": round(now.update_seconds, 3),
        "adapter": config.adapter,
        **run.evaluations.about,
        "sizes": {
            "feature_dim": policy.feature_dim,
            "horizon": policy.spec.horizon,
            "action_dim": policy.spec.action_dim,
        },
        "versions": {"python": platform.python_version()} | installed_versions(PACKAGES),
        "device": run.context.accelerator.device.type,
        "precision": config.precision,
        "prefixes": run.prefixes.figures() if run.prefixes is not None else {"on": False},
        "policy": "policy",
        "lerobot_arguments": [*policy.lerobot_arguments, *_discovery_arguments(run.data.env_config)],
        "demonstrations": {"steps": run.replay.num_demo_steps, "repo_id": run.data.config.repo_id},
    }


def _discovery_arguments(env_config: Any) -> list[str]:
    """Return what LeRobot's commands need for an environment type that neither they nor a plug-in registers."""
    module = type(env_config).__module__
    if env_config is None or module.startswith("lerobot"):
        return []
    package = module if hasattr(sys.modules[module], "__path__") else module.rpartition(".")[0] or module
    return [f"--env.discover_packages_path={package}"]
