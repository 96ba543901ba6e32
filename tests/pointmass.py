"""The tests' own task: a point mass with inertia, a wall with a narrow and a wide gap, and a sparse dock behind it.

Importing this registers LeRobot environment type ``pointmass``. The scripted expert goes through either gap; what
imitates it averages and mistimes its turns and ends up at the wall or beside the dock in more than half of the
episodes. An episode costs about a millisecond.
"""

import math
from dataclasses import dataclass, field

import gymnasium as gym
import numpy as np
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_STATE

from poco_vla.config import EnvSpec

GYM_ID = "pointmass/Pointmass-v0"
FPS = 10
PUSH, DRAG = 0.012, 0.9
"""Velocity gained per step of full push, and kept from one step to the next (lengths are in arena half-widths)."""
WALL = 0.05
"""Half the wall's thickness; its middle is x = 0."""
GAPS = {"narrow": (0.25, 0.07), "wide": (-0.65, 0.2)}
"""Centre and half-width of each gap along y."""
DOCK, DOCK_RADIUS, DOCK_SPEED = (0.75, 0.25), 0.06, 0.025
"""Success: inside this circle, and no faster than this per step."""


def pointmass(**options):
    """An EnvSpec of this environment, stepped inside the test's own process."""
    return EnvSpec(**({"type": "pointmass", "task": "dock", "num_envs": 4, "in_process": True} | options))


class PointmassEnv(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012 (gymnasium's own convention)
    render_mode = "rgb_array"
    task = "dock"
    task_description = "stop in the dock"
    observation_space = gym.spaces.Dict({"agent_pos": gym.spaces.Box(-np.inf, np.inf, (4,), dtype=np.float32)})
    action_space = gym.spaces.Box(-1, 1, (2,), dtype=np.float32)

    def __init__(self, episode_length=50):
        self._max_episode_steps = episode_length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.y = self.np_random.uniform((-0.9, -0.5), (-0.6, 0.6)).tolist()
        self.vx = self.vy = 0.0
        self._steps = 0
        return self._observation(), {"is_success": False}

    def step(self, action):
        ax, ay = (min(max(a, -1.0), 1.0) for a in action.tolist())
        self.vx, self.vy = DRAG * self.vx + PUSH * ax, DRAG * self.vy + PUSH * ay
        x, y = self.x + self.vx, self.y + self.vy
        if self._blocked(x, y):
            self.vx = self.vy = 0.0
        else:
            self.x, self.y = x, y
        self._steps += 1
        near = math.hypot(self.x - DOCK[0], self.y - DOCK[1]) < DOCK_RADIUS
        success = near and math.hypot(self.vx, self.vy) < DOCK_SPEED
        truncated = self._steps >= self._max_episode_steps and not success
        return self._observation(), float(success), success, truncated, {"is_success": success}

    def expert(self, noise, rng):
        return Expert(self, noise, rng)

    def render(self, size=64):
        """RGB frame [size, size, 3]: wall grey, dock green, the point red."""
        y, x = np.mgrid[1 : -1 : size * 1j, -1 : 1 : size * 1j]
        frame = np.full((size, size, 3), 255, dtype=np.uint8)
        frame[(abs(x) < WALL) & np.logical_and.reduce([abs(y - c) > w for c, w in GAPS.values()])] = 120
        frame[np.hypot(x - DOCK[0], y - DOCK[1]) < DOCK_RADIUS] = (40, 170, 80)
        frame[np.hypot(x - self.x, y - self.y) < 0.05] = (200, 40, 40)
        return frame

    @staticmethod
    def _blocked(x, y):
        if max(abs(x), abs(y)) > 1:
            return True
        return abs(x) < WALL and not any(abs(y - centre) < half for centre, half in GAPS.values())

    def _observation(self):
        return {"agent_pos": np.array([self.x, self.y, 10 * self.vx, 10 * self.vy], dtype=np.float32)}


class Expert:
    """Steers through a gap chosen at random, then to the dock; `noise` is the standard deviation of its push."""

    def __init__(self, env, noise, rng):
        self.env, self.noise, self.rng = env, noise, rng
        gap = GAPS[rng.choice(list(GAPS))][0]
        self.route = [(-0.15, gap), (0.15, gap), DOCK]

    def action(self):
        env = self.env
        while len(self.route) > 1 and self._passed(*self.route[0]):
            self.route.pop(0)
        x, y = self.route[0]
        push = 15.0 * np.array([x - env.x, y - env.y]) - 40.0 * np.array([env.vx, env.vy])
        push /= max(1.0, np.abs(push).max())
        return np.clip(push + self.noise * self.rng.normal(size=2), -1, 1).astype(np.float32)

    def _passed(self, x, y):
        return math.hypot(self.env.x - x, self.env.y - y) < 0.06 or self.env.x > max(x, WALL)


@EnvConfig.register_subclass("pointmass")
@dataclass
class PointmassConfig(EnvConfig):
    """LeRobot's description of the task."""

    task: str | None = "dock"
    fps: int = FPS
    episode_length: int = 50
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            ACTION: PolicyFeature(FeatureType.ACTION, (2,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (4,)),
        }
    )
    features_map: dict[str, str] = field(default_factory=lambda: {ACTION: ACTION, "agent_pos": OBS_STATE})

    @property
    def package_name(self):
        return __name__

    @property
    def gym_id(self):
        return GYM_ID

    @property
    def gym_kwargs(self):
        return {"episode_length": self.episode_length}


gym.register(id=GYM_ID, entry_point=PointmassEnv)
