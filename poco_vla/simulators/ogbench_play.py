"""Play data: trajectories without a purpose, in the way of OGBench's published sets, and a task's rewards on them."""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from poco_vla.data import Episode
from poco_vla.simulators.ogbench_expert import plan_oracles
from poco_vla.simulators.ogbench_tasks import make_simulator, sentence
from poco_vla.simulators.seeding import draw_seed, numpy_seed


@dataclass(frozen=True)
class Trajectory:
    """One trajectory in OGBench's own columns: row k holds the state s_k, and the action a_k that was taken in it.

    Attributes:
        observations: [T, state_dim] float32.
        actions: [T, action_dim] float32, in [-1, 1].
        qpos: [T, nq]: MuJoCo's positions in s_k (OGBench saves them as ``info["prev_qpos"]``).
        button_states: [T, num_buttons] int64 in s_k; None where the scene has no buttons.
    """

    observations: np.ndarray
    actions: np.ndarray
    qpos: np.ndarray
    button_states: np.ndarray | None = None


def relabelled(task: str, trajectory: Trajectory) -> Episode:
    """A play trajectory with the reward of one OGBench task, as an episode.

    OGBench's relabel says what holds in s_k; a row here holds what action k brought, which is what holds in s_{k+1}:
    reward[k] = -(number of unmet subgoals) in s_{k+1}, success[k] = terminal[k] = all are met there. So do OGBench's
    environments under ``success_timing="post"``. The last row's next state is not on disk: its reward is that of
    s_{T-1}, and it ends cut off; the pool starts no transition there (:class:`poco_vla.data.Replay`).

    Args:
        task: OGBench id of a single task, e.g. "cube-double-singletask-task2-v0"; without a number its default task.
        trajectory: T states and actions in the task's scene, whatever was done there.
    """
    reward, success = _labels(task, trajectory)
    success = np.append(success[1:], False)
    return Episode(
        obs={"observation.state": trajectory.observations.astype(np.float32)},
        action=trajectory.actions.astype(np.float32),
        reward=np.append(reward[1:], reward[-1]),
        success=success,
        terminal=success.copy(),
        task=sentence(task),
    )


def _labels(task: str, trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray]:
    """Reward [T] float32 and success [T] bool of the states themselves, by OGBench's own relabel."""
    from ogbench.relabel_utils import relabel_dataset

    columns: dict[str, Any] = {"qpos": trajectory.qpos, "button_states": trajectory.button_states}
    relabel_dataset(task, task_simulator(task), columns)
    return columns["rewards"], columns["masks"] == 0


@cache
def task_simulator(task: str) -> Any:
    """The task's simulator, made once; relabelling asks it for the goal only."""
    return make_simulator(task, "post")


class Play:
    """One random subgoal after another (github.com/seohongpark/ogbench, data_gen_scripts/generate_manipspace.py).

    Args:
        family: OGBench's name of the scene, such as "cube-double" or "puzzle-3x3".
        kind: "play" follows plans, "noisy" the closed-loop oracles with Gaussian noise and random actions.
        noise: of the plans, or the most that a noisy trajectory has; 0.1 in the published sets.
    """

    def __init__(self, family: str, kind: Literal["play", "noisy"], noise: float) -> None:
        self.family, self.kind, self.noise = family, kind, noise
        self._simulator = gym.make(
            f"{family}-v0", terminate_at_goal=False, mode="data_collection", disable_env_checker=True
        ).unwrapped
        make = plan_oracles if kind == "play" else _markov_oracles
        self._oracles = make(self._simulator, family, noise)

    def trajectory(self, steps: int, rng: np.random.Generator) -> Trajectory:
        """One trajectory of `steps` rows."""
        with numpy_seed(draw_seed(rng)):
            while True:
                trajectory = self._roll_out(steps, int(rng.integers(2**31)), rng)
                if self.family != "scene" or _cube_in_sight(trajectory.qpos[:, 14:17]):
                    return trajectory

    def _roll_out(self, steps: int, seed: int, rng: np.random.Generator) -> Trajectory:
        simulator: Any = self._simulator
        observation, info = simulator.reset(seed=seed)
        stacking = rng.uniform(*_STACKING.get(self.family, (0.5, 0.5)))
        jitter = rng.uniform(0, self.noise) * np.array([1, 1, 1, 3, 10])
        oracle = self._begin(observation, info)
        rows: list[dict[str, Any]] = []
        for _ in range(steps):
            action = self._action(oracle, observation, info, jitter, rng)
            row = {"observations": observation, "actions": action, "qpos": info["qpos"]}
            rows.append(row | ({"button_states": info["button_states"]} if "button_states" in info else {}))
            observation, _, _, _, info = simulator.step(action)
            if oracle.done:
                # The target is new; where the robot is stays the same.
                observation, info = simulator.set_new_target(p_stack=stacking)
                oracle = self._begin(observation, info)
        columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        buttons = columns.pop("button_states", None)
        states = {name: column.astype(np.float32) for name, column in columns.items()}
        return Trajectory(**states, button_states=None if buttons is None else buttons.astype(np.int64))

    def _begin(self, observation: np.ndarray, info: dict[str, Any]) -> Any:
        oracle = self._oracles[info["privileged/target_task"]]
        oracle.reset(observation, info)
        return oracle

    def _action(
        self, oracle: Any, observation: np.ndarray, info: dict[str, Any], jitter: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        if self.kind == "noisy" and rng.random() < (0.2 if self.family.startswith("puzzle") else 0.1):
            return rng.uniform(-1, 1, 5).astype(np.float32)
        action = np.asarray(oracle.select_action(observation, info))
        if self.kind == "noisy":
            action = action + rng.normal(0, jitter)
        return np.clip(action, -1, 1).astype(np.float32)


_STACKING = {
    "cube-single": (0.0, 0.0),
    "cube-double": (0.0, 0.25),
    "cube-triple": (0.05, 0.35),
    "cube-quadruple": (0.1, 0.5),
    "cube-octuple": (0.0, 0.35),
}
"""Range of a trajectory's probability that a cube goes on top of another (OGBench's generator)."""


def _cube_in_sight(cube: np.ndarray) -> bool:
    """OGBench's health check of a scene's trajectory: the cube [T, 3] stays in view, or in the drawer."""
    too_far_right = cube[:, 1] >= 0.29
    beside_the_drawer = (cube[:, 1] <= -0.3) & ((cube[:, 2] < 0.06) | (cube[:, 2] > 0.08))
    return not (too_far_right | beside_the_drawer).any()


def _markov_oracles(simulator: Any, task: str, noise: float) -> dict[str, Any]:
    from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
    from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
    from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
    from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle

    limit = {"max_step": 100} if task.startswith("scene") else {}
    return {
        "cube": CubeMarkovOracle(env=simulator, **limit),
        "button": ButtonMarkovOracle(env=simulator, gripper_always_closed=task.startswith("puzzle")),
        "drawer": DrawerMarkovOracle(env=simulator),
        "window": WindowMarkovOracle(env=simulator),
    }
