"""What lies in a run's folder, read back; runs grouped by task and setting."""

import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from poco_vla.config import DemonstrationConfig, EnvSpec, TrainConfig, flat, to_json
from poco_vla.errors import DataError
from poco_vla.report.commands import lerobot_eval
from poco_vla.report.labels import labels_of
from poco_vla.roles import role_of

logger = logging.getLogger(__name__)

DEPTH = 3
"""Levels below a folder where :func:`find_runs` looks."""
LOGS = ("evaluations.jsonl", "metrics.jsonl")
"""Files that a run appends to; one of them and config.json make an unfinished run."""
EVALUATED = ("env_steps", "success_rate", "episodes", "interval_95")
"""What a report needs of an evaluation."""


def read_result(run: Path) -> dict[str, Any]:
    """Read ``result.json`` of a finished run.

    Raises:
        DataError: the folder holds none, a damaged one, or one that lacks what a report needs.
    """
    path = run / "result.json"
    if path.exists() and not path.is_file():
        raise DataError(f"{path} cannot be read: it is no regular file")
    try:
        result = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"no result.json in {run}: not the folder of a finished run") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    with _as_data_error(path, "not as a run that ended well writes it, run it again"):
        _check(result)
    return result


def read_run(folder: Path) -> "RunRecord":
    """Read a run, finished or not.

    Raises:
        DataError: the folder holds none, or a damaged one.
    """
    if not folder.exists():
        raise DataError(f"there is no folder {folder}")
    if folder.is_file():
        raise DataError(f"{folder} is a file: give the run's folder, {folder.parent}")
    if (folder / "result.json").is_file():
        return RunRecord(folder, read_result(folder), read_config(folder))
    config = read_config(folder)
    if not config or not any((folder / name).is_file() for name in LOGS):
        raise DataError(
            f"no result.json in {folder}: not the folder of a finished run, nor of one that has begun (config.json and "
            f"{' or '.join(LOGS)})"
        )
    with _as_data_error(folder, "its config.json and logs are not as a run writes them"):
        result = _so_far(folder, config)
        _check(result)
    return RunRecord(folder, result, config, finished=False)


def _so_far(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what result.json would hold of a run up to now, without a last evaluation. Raises KeyError or TypeError if
    a line of its logs or its configuration is malformed."""
    evaluations = read_lines(folder / "evaluations.jsonl", EVALUATED)
    metrics = read_lines(folder / "metrics.jsonl", ("update", "env_steps"))
    episodes = read_lines(folder / "episodes.jsonl", ("env_steps",))
    latest = [lines[-1] for lines in (evaluations, metrics, episodes) if lines]
    prefix = "env.options."
    options = {name.removeprefix(prefix): value for name, value in config.items() if name.startswith(prefix)}
    return {
        "seed": config["seed"],
        "env": {"type": config["env.type"], "task": config["env.task"], "options": options}
        if "env.task" in config
        else None,
        "before": evaluations[0] if evaluations else None,
        "after": None,
        "evaluations": evaluations,
        "updates": max((line.get("update", 0) for line in latest), default=0),
        "env_steps": max((line["env_steps"] for line in latest), default=0),
        "seconds": metrics[-1].get("seconds", 0) if metrics else 0,
        "adapter": config["adapter"],
        "policy": "policy",
    }


@contextmanager
def _as_data_error(path: Path, advice: str) -> Iterator[None]:
    """Raise KeyError and TypeError of a file's content as a DataError that names the file."""
    try:
        yield
    except (KeyError, TypeError) as error:
        told = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}: {told}; {advice}") from error


def _check(result: Any) -> None:
    """Raise KeyError or TypeError if `result` lacks what a report needs."""
    if not isinstance(result, dict):
        raise TypeError("it holds no JSON object")
    evaluations = [
        e for e in (result["before"], result["after"], result.get("best"), *result["evaluations"]) if e is not None
    ]
    numbers = [result[name] for name in ("seed", "updates", "env_steps", "seconds")]
    for e in evaluations:
        numbers += [*e["interval_95"], *(e[name] for name in ("env_steps", "success_rate", "episodes"))]
    if wrong := [value for value in numbers if not isinstance(value, int | float)]:
        raise TypeError(f"{wrong[0]!r} stands where a number belongs")
    env = {"type": "", "task": "", "options": {}} if result["env"] is None else result["env"]
    if not isinstance(result["policy"], str) or not isinstance(env, dict) or not isinstance(env["options"], dict):
        raise TypeError("env or policy is of another kind")
    if wrong := [env[name] for name in ("type", "task") if not isinstance(env[name], str)]:
        raise TypeError(f"{wrong[0]!r} stands where a name belongs")


def read_config(run: Path) -> dict[str, Any]:
    """Return ``config.json`` as one flat table "poco.eta" -> 0.1; empty if there is none.

    Raises:
        DataError: it is damaged.
    """
    try:
        return flat(json.loads((run / "config.json").read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{run / 'config.json'} cannot be read: {error}") from error


def read_lines(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """Read the objects of a .jsonl file; none if there is no file. A line that a crash cut short is left out, as is one
    without the `needed` names."""
    lines = []
    for number, text in enumerate(path.read_text(errors="replace").splitlines() if path.exists() else [], 1):
        try:
            line = json.loads(text)
            lines.append({name: line[name] for name in needed} | line)
        except (ValueError, TypeError, KeyError):
            logger.warning("%s: line %d is no object with %s and is left out", path, number, ", ".join(needed))
    return lines


def defaults() -> dict[str, Any]:
    """Return all defaults of :class:`TrainConfig`, of its environment and of its demonstrations, flat."""
    return flat(to_json(TrainConfig(env=EnvSpec(), demonstrations=DemonstrationConfig())))


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        path: its folder, as it was given.
        result: result.json; of an unfinished run what is known of it so far, "after" being None.
        config: config.json, flat.
        finished: whether it ended well.
    """

    path: Path
    result: dict[str, Any]
    config: dict[str, Any]
    finished: bool = True

    @property
    def task(self) -> str:
        env = self.result["env"]
        return str(env["task"] or env["type"]) if env else "no environment"

    @property
    def title(self) -> str:
        """Return the name of the run's algorithm; of an unfinished run as the command line has it."""
        name = self.config.get("algorithm", "poco")
        return str(self.result.get("title") or ("POCO" if name == "poco" else name))

    @property
    def latest(self) -> dict[str, Any] | None:
        """Return the run's last evaluation so far."""
        return self.result["evaluations"][-1] if self.result["evaluations"] else None

    @property
    def status(self) -> str:
        """Return the progress of an unfinished run as text: its files do not show whether it still runs."""
        steps, planned = self.result["env_steps"], self.config.get("online_steps")
        of = f" of {planned:,}" if isinstance(planned, int) else ""
        return f"running or stopped at {steps:,}{of} steps" + ("" if steps else f", {self.result['updates']:,} updates")

    @property
    def setting(self) -> dict[str, Any]:
        """Return the fields of the configuration that distinguish experiments, by their role: equal settings are one
        experiment."""
        own = dict(self.config) or {"adapter": self.result.get("adapter")} | flat({"env": self.result["env"] or {}})
        siblings, policy = Path(str(own.get("output_dir"))).parent, Path(str(own.get("policy")))
        if policy.is_relative_to(siblings):  # an earlier run of the same sweep and seed
            own["policy"] = str(policy.relative_to(siblings))
        return {name: value for name, value in (defaults() | own).items() if role_of(TrainConfig, name).setting}

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """Read metrics.jsonl, a row per line: stage, update, env_steps, seconds and scalars, NaN where a line lacks
        one."""
        needed = ("stage", "update", "env_steps")
        table = pd.DataFrame(read_lines(self.path / "metrics.jsonl", needed))
        return table if len(table) else pd.DataFrame({name: [] for name in needed})

    @property
    def warmup_steps(self) -> int:
        """Return the environment steps until the actor began to learn."""
        steps = self.metrics.loc[self.metrics["stage"] == "warmup", "env_steps"]
        return int(steps.max()) if len(steps) else 0

    @property
    def differences(self) -> dict[str, Any]:
        """Return the fields of its configuration that are not the library's defaults."""
        usual = defaults()
        return {name: v for name, v in self.config.items() if name not in usual or usual[name] != v}


@dataclass(frozen=True)
class Group:
    """Runs of one task and setting, by seed, unfinished ones last: they are shown and never counted among results.

    Attributes:
        runs: at least one.
        name: what tells the setting from the others of the same task, such as "poco.eta 0.1"; else its adapter.
    """

    runs: tuple[RunRecord, ...]
    name: str

    @property
    def task(self) -> str:
        return self.runs[0].task

    @property
    def title(self) -> str:
        """Return the name of its runs' algorithm."""
        return self.runs[0].title

    @property
    def warmup_steps(self) -> int:
        """Return the environment steps until the last of its actors began to learn."""
        return max(run.warmup_steps for run in self.runs)

    @property
    def finished(self) -> tuple[RunRecord, ...]:
        """Return the runs that ended without an error."""
        return tuple(run for run in self.runs if run.finished)

    @property
    def unfinished(self) -> tuple[RunRecord, ...]:
        """Return the runs that still run or were stopped."""
        return tuple(run for run in self.runs if not run.finished)

    @property
    def env_steps(self) -> int:
        """Return the environment steps of the shortest finished run; of the longest if none is finished."""
        if not self.finished:
            return max(run.result["env_steps"] for run in self.runs)
        return min(run.result["env_steps"] for run in self.finished)


def group_runs(paths: Sequence[Path]) -> list[Group]:
    """Return runs grouped by (task, setting), tasks and settings in the order in which they first appear."""
    tasks: dict[str, dict[str, list[RunRecord]]] = {}
    for path in paths:
        run = read_run(path)
        key = json.dumps(run.setting, sort_keys=True, default=str)
        tasks.setdefault(run.task, {}).setdefault(key, []).append(run)
    return [group for settings in tasks.values() for group in _named(list(settings.values()))]


def _named(settings: list[list[RunRecord]]) -> list[Group]:
    """Return groups of one task, each named by all fields in which the settings differ."""
    tables = [runs[0].setting for runs in settings]

    def by_seed(run: RunRecord) -> tuple[bool, Any]:
        return not run.finished, run.result["seed"]

    return [
        Group(tuple(sorted(runs, key=by_seed)), label or str(table["adapter"]))
        for label, table, runs in zip(labels_of(tables), tables, settings, strict=True)
    ]


def find_runs(folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Find runs in `folders`, finished or not, each a run or a folder with runs up to three levels below.

    Returns:
        The runs that can be reported, and one sentence about each that cannot.

    Raises:
        DataError: not one run can be reported.
    """
    runs: dict[Path, Path] = {}
    problems: list[str] = []
    for candidate in (c for folder in folders for c in _candidates(folder)):
        try:
            read_run(candidate)
            runs.setdefault(candidate.resolve(), candidate)
        except DataError as error:
            problems.append(str(error))
    if not runs:
        raise DataError("; ".join(problems) or "no run is given; name a run's folder, such as runs/mlp_cube/*")
    return list(runs.values()), problems


def _candidates(folder: Path) -> list[Path]:
    """Return the folders below that a run has begun to write; `folder` itself if it is one, or if there is none."""
    begun = (folder / "config.json").is_file() and any((folder / name).is_file() for name in LOGS)
    if begun or (folder / "result.json").is_file():
        return [folder]
    levels = ["/".join(["*"] * depth) for depth in range(1, DEPTH + 1)]
    marks = ("result.json", *LOGS)
    found = {path.parent for level in levels for mark in marks for path in folder.glob(f"{level}/{mark}")}
    return sorted(found) or [folder]


def eval_command(run: Path) -> str | None:
    """Return the lerobot-eval command line of a run's exported policy."""
    result = read_result(run)
    env = result["env"]
    if env is None:
        return None
    evaluated: dict[str, Any] = result["after"] or result["before"] or {"episodes": 50}
    return lerobot_eval(
        run / result["policy"],
        env,
        arguments=result.get("lerobot_arguments", ()),
        device=result.get("device", "cpu"),
        episodes=evaluated["episodes"] // max(1, len(evaluated.get("tasks", ()))),  # LeRobot counts a task's
    )


def train_command(run: RunRecord) -> str | None:
    """Return the command line that repeats a run; None if result.json has none that can be repeated."""
    command = run.result.get("command") or [""]
    given, seed = _without(command[1:], ("--seeds", "--seed", "--only", "--resume")), str(run.result["seed"])
    if command[0].endswith(".py"):
        return shlex.join(["accelerate", "launch", command[0], *given, "--seed", seed])
    return shlex.join(["poco-vla", *given, "--seed", seed]) if Path(command[0]).name == "poco-vla" else None


def _without(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Return a command line without these flags and their values."""
    kept, left_out = [], False
    for word in words:
        if word.startswith("--"):
            left_out = word.split("=")[0] in flags
        if not left_out:
            kept.append(word)
    return kept
