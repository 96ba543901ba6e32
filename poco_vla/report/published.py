"""Published learning curves of the same tasks, for comparison: Q-chunking (QC) and its baselines.

Source: the figures that the authors of QC publish with their code (MIT): Li, Zhou and Levine, Reinforcement Learning
with Action Chunking, arXiv 2507.07969. ``published_curves.json`` beside this file says what was kept.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from poco_vla.report.curves import Curve

OGBENCH = re.compile(r"(scene|puzzle-3x3|cube-double|cube-triple)(?:-play)?(?:-sparse)?-singletask(?:-task([1-5]))?-v0")
DEFAULT_TASK = {"scene": 2, "puzzle-3x3": 4, "cube-double": 2, "cube-triple": 2}
"""OGBench's single task where a name gives none."""
ROBOMIMIC = {"lift": "lift", "can": "can", "pickplacecan": "can", "square": "square", "nutassemblysquare": "square"}


@cache
def _file(name: str = "published_curves.json") -> dict[str, Any]:
    return json.loads((Path(__file__).parent / name).read_text())


def source() -> str:
    """Return the source of the curves and its authors."""
    return f"{_file()['source']}. {_file()['credit']}"


def published_name(task: str) -> str | None:
    """Return the name of an environment's task in the published file; None for a task that is not in it."""
    if found := OGBENCH.fullmatch(task):
        scene, number = found.groups()
        return f"{scene}-play-task{number or DEFAULT_TASK[scene]}"
    name = ROBOMIMIC.get(task.lower(), task)
    return name if name in _file()["tasks"] else None


def published(task: str) -> dict[str, Curve]:
    """Return published curves of a task by method, online part only; none for a task that was not published.

    Args:
        task: as an environment names it ("scene-singletask-task1-v0", "lift"), or as the file does; an OGBench scene's
            bare name ("scene") is the mean of its five tasks.
    """
    name = published_name(task)
    if name is None:
        return {}
    label = f"mean of 5 {name} tasks" if name in DEFAULT_TASK else name
    return {method: _curve(figures, label) for method, figures in _file()["tasks"][name].items()}


def _curve(figures: dict[str, list[float | None]], label: str, file: str = "published_curves.json") -> Curve:
    steps, mean, low, high = (
        np.array(numbers, dtype=float)
        for numbers in (_file(file)["steps"], *(figures[end] for end in ("mean", "low", "high")))
    )
    here = np.isfinite(mean)  # what had no offline stage has no point at 0
    return Curve(steps[here], mean[here], low[here], high[here], label)


QAM = "published_curves_qam.json"
"""Runs of twelve seeds that the authors of QAM publish: Li and Levine, arXiv 2601.14234."""
SOURCES = {"QC": "published_curves.json", "QAM": QAM}
"""Whose runs, and the file of their curves."""


def published_by_source(task: str) -> dict[str, dict[str, Curve]]:
    """Return the published curves of a task by whose runs they are, and by method.

    Args:
        task: as :func:`published` takes it.
    """
    name = published_name(task)
    found = {who: _file(file)["tasks"].get(name, {}) for who, file in SOURCES.items()}
    return {
        who: {method: _curve(figures, str(name), SOURCES[who]) for method, figures in methods.items()}
        for who, methods in found.items()
        if methods
    }


def credit_of(who: str) -> str:
    """Return the source of somebody's curves and its authors."""
    return f"{_file(SOURCES[who])['source']}. {_file(SOURCES[who])['credit']}"
