"""Meta-World's tasks, suites, cameras and sizes. Needs no simulator."""

import json
from importlib.resources import files

from poco_vla.errors import UnknownNameError

CAMERAS = ("corner", "corner2", "corner3", "topview", "behindGripper", "gripperPOV")
"""Cameras of Meta-World's scenes; LeRobot shows "corner2"."""
MT10 = (
    *("reach-v3", "push-v3", "pick-place-v3", "door-open-v3", "drawer-open-v3", "drawer-close-v3"),
    *("button-press-topdown-v3", "peg-insert-side-v3", "window-open-v3", "window-close-v3"),
)
STATE_DIM, SEEN_DIM, ACTION_DIM = 39, 4, 4
"""Numbers of the whole state (two frames of hand, gripper and objects, and the goal), of the hand and gripper alone,
and of an action (hand displacement, gripper)."""


def task_names(task: str) -> list[str]:
    """List the tasks that a name stands for.

    Raises:
        UnknownNameError: Meta-World has no such task.
    """
    suites, known = _suites()
    found: list[str] = []
    for name in (part.strip() for part in task.split(",") if part.strip()):
        if name not in suites and name not in known:
            raise UnknownNameError("Meta-World task or suite", name, [*suites, *known])
        found += suites.get(name, [name])
    return list(dict.fromkeys(found))


def _suites() -> tuple[dict[str, list[str]], list[str]]:
    """Return the suites and all tasks, as LeRobot's table names them; that needs no simulator."""
    table = json.loads((files("lerobot.envs") / "metaworld_config.json").read_text())
    every = sorted(table["TASK_DESCRIPTIONS"])
    return {"MT10": list(MT10), "MT50": every} | table["DIFFICULTY_TO_TASKS"], every
