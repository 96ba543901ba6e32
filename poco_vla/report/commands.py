"""Command lines that are printed for people to run."""

import json
import shlex
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

DISCOVER = "--env.discover_packages_path="
IN_PROCESS = "--eval.use_async_envs=false"
"""LeRobot's worker processes import an environment's configuration, not the package that registers the environment."""


def lerobot_eval(
    path: object,
    env: Mapping[str, Any],
    *,
    arguments: Iterable[str] = (),
    device: str | None = None,
    episodes: int = 50,
) -> str | None:
    """Return the command line that evaluates a policy with LeRobot where its run did.

    None where LeRobot cannot find the environment type, because the run's own script has registered it.

    Args:
        path: folder or Hub id of a LeRobot policy.
        env: the run's environment: type, task and options.
        arguments: further ones that LeRobot needs to find policy and environment.
        device: torch device; None leaves the policy's own.
        episodes: how many.
    """
    arguments = list(arguments)
    module = next((word.removeprefix(DISCOVER) for word in arguments if word.startswith(DISCOVER)), None)
    if module in ("__main__", "__mp_main__"):
        return None
    program = ["lerobot-eval"]
    if module is not None and _is_one_file(module):
        program = ["python", "-c", f"import {module}; from lerobot.scripts.lerobot_eval import main; main()"]
        arguments = [word for word in arguments if not word.startswith(DISCOVER)]
    ours = (module or "").startswith("poco_vla.")
    words = [
        f"--policy.path={path}",
        *([f"--policy.device={device}"] if device else []),
        *arguments,
        f"--env.type={env['type']}",
        *([f"--env.task={env['task']}"] if env.get("task") else []),
        *(f"--env.{name}={shown(value)}" for name, value in (env.get("options") or {}).items()),
        f"--eval.n_episodes={episodes}",
        f"--eval.batch_size={min(10, episodes)}",
        *([] if ours else [IN_PROCESS]),
    ]
    return shlex.join([*program, *words])


def _is_one_file(module: str) -> bool:
    """Return True for a module that is no package: LeRobot imports packages only, by their `__path__`."""
    try:
        found = find_spec(module)
    except (ImportError, ValueError):
        return False
    return found is not None and found.submodule_search_locations is None


def shown(value: object) -> str:
    """Return a configuration's value as people write it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def acting_note(about: Mapping[str, Any], run: str = "RUN") -> str | None:
    """Return a sentence on a policy whose plain samples are not how its run acted; None where they are.

    Args:
        about: result.json of the run, or poco.json of the policy.
        run: the run's folder.
    """
    beside = about.get("acts_with")
    if not beside:
        return None
    return (
        f"Plain samples of this policy are not how it was trained to act: {about['title']} acts with networks beside "
        f"it ({', '.join(beside)}), which the run's checkpoints hold. `poco-vla eval {run}` acts with them."
    )
