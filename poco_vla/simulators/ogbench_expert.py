"""An expert for OGBench's single tasks, out of OGBench's own oracles.

The oracles know one subgoal each (move a cube, press a button, slide drawer or window) and follow a plan with
correlated noise; the expert strings them together until the task's goal is met.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from poco_vla.errors import ConfigError
from poco_vla.simulators.seeding import draw_seed, numpy_seed

if TYPE_CHECKING:
    from poco_vla.simulators.ogbench_gym import OGBenchEnv

_DRAWER_OPEN = -0.16
"""Position of the open drawer, in metres along its slide."""


@dataclass(frozen=True)
class Subgoal:
    """What one oracle is asked to do.

    Attributes:
        kind: "cube", "button", "drawer" or "window".
        target: the oracle's ``privileged/*`` entries, which OGBench fills in only while it collects data.
    """

    kind: str
    target: dict[str, Any] = field(default_factory=dict)


class PlanExpert:
    """OGBench's plan oracles, one subgoal after another, each planned from the current state.

    Args:
        env: in the state to begin from.
        noise: the oracles' own noise level; 0.1 is that of the published play data.
        rng: seeds their random numbers.
    """

    def __init__(self, env: "OGBenchEnv", noise: float, rng: np.random.Generator) -> None:
        self._env, self._rng = env, rng
        self._oracles = plan_oracles(env.simulator, env.task, noise)
        self._info: dict[str, Any] = {}
        self._oracle: Any = None

    def action(self) -> np.ndarray | None:
        """The next action in [-1, 1], or None when the goal is met."""
        if self._oracle is None or self._oracle.done:
            subgoal = next_subgoal(self._env.simulator, self._rng)
            if subgoal is None:
                return None
            self._oracle, self._target = self._oracles[subgoal.kind], subgoal.target
            with numpy_seed(draw_seed(self._rng)):
                self._oracle.reset(None, self._env.info | self._target)
        return self._oracle.select_action(None, self._env.info | self._target).astype(np.float32)


def next_subgoal(simulator: Any, rng: np.random.Generator) -> Subgoal | None:
    """The first thing to do towards the goal of the simulator's task; None when nothing is left."""
    if hasattr(simulator, "_num_rows"):
        return _next_button(simulator)
    if hasattr(simulator, "_target_drawer_pos"):
        return _next_in_scene(simulator)
    return _next_cube(simulator, rng)


def _next_cube(simulator: Any, rng: np.random.Generator) -> Subgoal | None:
    """A cube that can go to its target now; else one that is in the way, to a free place."""
    at = _cubes(simulator)
    goals = simulator._data.mocap_pos[simulator._cube_target_mocap_ids]
    lowest_first = np.argsort(goals[:, 2], kind="stable").tolist()
    unmet = [i for i in lowest_first if np.linalg.norm(at[i] - goals[i]) > 0.035]
    for i in unmet:
        if _supported(at, goals[i]) and not _on_top(at, i) and not _taking(at, goals[i], i):
            return _move_cube(i, goals[i])
    for i in unmet:
        free = [j for j in [*_on_top(at, i), *_taking(at, goals[i], i)] if not _on_top(at, j)]
        if free:
            return _move_cube(free[0], _free_place(simulator, np.concatenate([at, goals]), rng))
    return None


def _cubes(simulator: Any) -> np.ndarray:
    return np.array([simulator._data.joint(f"object_joint_{i}").qpos[:3] for i in range(simulator._num_cubes)])


def _beside(a: np.ndarray, b: np.ndarray, distance: float = 0.05) -> bool:
    return bool(np.linalg.norm(a[:2] - b[:2]) < distance)


def _on_top(cubes: np.ndarray, index: int) -> list[int]:
    """Cubes that stand on one; not its neighbours, which may be as near as 4 cm."""
    one = cubes[index]
    return [j for j, other in enumerate(cubes) if _beside(other, one, 0.03) and other[2] > one[2] + 0.02]


def _taking(cubes: np.ndarray, place: np.ndarray, but: int) -> list[int]:
    """Cubes that are where a cube would have to be, or higher there, `but` one left out."""
    return [j for j, one in enumerate(cubes) if j != but and _beside(one, place) and one[2] > place[2] - 0.02]


def _supported(cubes: np.ndarray, place: np.ndarray) -> bool:
    """A place on the table, or on a cube that is there."""
    return bool(place[2] < 0.03) or any(_beside(one, place) and one[2] < place[2] for one in cubes)


def _free_place(simulator: Any, taken: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    while True:
        place = np.array([*rng.uniform(*simulator._target_sampling_bounds), 0.02])
        if not any(_beside(place, other, 0.08) for other in taken):
            return place


def _move_cube(index: int, place: np.ndarray) -> Subgoal:
    return Subgoal(
        "cube",
        {
            "privileged/target_block": index,
            "privileged/target_block_pos": place.copy(),
            "privileged/target_block_yaw": np.zeros(1),
        },
    )


def _next_in_scene(simulator: Any) -> Subgoal | None:
    """Cube first (into the drawer, if that is its place), then drawer, window, and the buttons that lock them."""
    joints = simulator._data.joint
    drawer, window = float(joints("drawer_slide").qpos[0]), float(joints("window_slide").qpos[0])
    cube, goal = _cubes(simulator)[0], simulator._data.mocap_pos[simulator._cube_target_mocap_ids[0]]
    if goal[1] < -0.3:  # where the closed drawer would carry it
        if not simulator._is_in_drawer(cube):
            if drawer > -0.12:
                return _slide_drawer(simulator, drawer, _DRAWER_OPEN)
            return _move_cube(0, simulator._drawer_center)
    elif np.linalg.norm(cube - goal) > 0.035:
        return _move_cube(0, goal)
    if abs(drawer - simulator._target_drawer_pos) > 0.035:
        return _slide_drawer(simulator, drawer, simulator._target_drawer_pos)
    if abs(window - simulator._target_window_pos) > 0.035:
        return _slide_window(simulator, window, simulator._target_window_pos)
    wrong = np.flatnonzero(simulator._cur_button_states != simulator._target_button_states)
    return _press(simulator, int(wrong[0])) if len(wrong) else None


def _slide_drawer(simulator: Any, now: float, target: float) -> Subgoal:
    if simulator._cur_button_states[0] == 0:
        return _press(simulator, 0)  # it is locked
    handle = simulator._data.site_xpos[simulator._drawer_site_id]
    return Subgoal("drawer", {"privileged/target_drawer_handle_pos": handle + np.array([0, now - target, 0])})


def _slide_window(simulator: Any, now: float, target: float) -> Subgoal:
    if simulator._cur_button_states[1] == 0:
        return _press(simulator, 1)
    handle = simulator._data.site_xpos[simulator._window_site_id]
    return Subgoal("window", {"privileged/target_window_handle_pos": handle + np.array([target - now, 0, 0])})


def _next_button(simulator: Any) -> Subgoal | None:
    flips = (simulator._cur_button_states + simulator._target_button_states) % 2
    presses = lights_out(flips, simulator._num_rows, simulator._num_cols)
    if presses is None:
        raise ConfigError(f"the pattern {flips.tolist()} cannot be reached by pressing buttons")
    return _press(simulator, presses[0]) if presses else None


def lights_out(flips: np.ndarray, rows: int, columns: int) -> list[int] | None:
    """Buttons to press so that exactly `flips` change, each press flipping a button and its neighbours; None when no
    set of presses does. Gaussian elimination over the field of two elements."""
    count = rows * columns
    place = np.stack(np.unravel_index(np.arange(count), (rows, columns)), axis=1)
    near = np.abs(place[:, None] - place[None]).sum(axis=-1) <= 1
    system = np.concatenate([near, np.asarray(flips, dtype=bool)[:, None]], axis=1)
    pivots: list[int] = []
    for column in range(count):
        row = len(pivots)
        candidates = np.flatnonzero(system[row:, column])
        if len(candidates) == 0:
            continue
        system[[row, row + candidates[0]]] = system[[row + candidates[0], row]]
        others = system[:, column].copy()
        others[row] = False
        system[others] ^= system[row]
        pivots.append(column)
    if system[len(pivots) :, -1].any():
        return None
    return [column for row, column in enumerate(pivots) if system[row, -1]]


def _press(simulator: Any, button: int) -> Subgoal:
    top = simulator._data.site_xpos[simulator._button_site_ids[button]].copy()
    return Subgoal("button", {"privileged/target_button_top_pos": top})


def plan_oracles(simulator: Any, task: str, noise: float) -> dict[str, Any]:
    """OGBench's plan-following oracle of each kind of subgoal, for a task or its scene."""
    from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
    from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
    from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

    return {
        "cube": CubePlanOracle(env=simulator, noise=noise),
        "button": ButtonPlanOracle(env=simulator, noise=noise, gripper_always_closed=task.startswith("puzzle")),
        "drawer": DrawerPlanOracle(env=simulator, noise=noise),
        "window": WindowPlanOracle(env=simulator, noise=noise),
    }
