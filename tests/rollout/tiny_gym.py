"""A point that is to reach the origin: the Gymnasium side, which worker processes import."""

import os
import signal
from typing import ClassVar

import gymnasium as gym
import numpy as np

GOAL, BORDER = 0.15, 1.5


class PointEnv(gym.Env):
    """Success and the end within GOAL of the origin, failure and the end beyond BORDER, a time limit otherwise.

    Steps are noisy, so that an episode repeats only if its seed reaches the dynamics too.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}
    render_mode = "rgb_array"

    def __init__(self, task="reach", episode_length=12, pixels=False):
        self.task, self.task_description = task, "reach the origin"
        self._max_episode_steps, self.pixels = episode_length, pixels
        spaces = {"agent_pos": gym.spaces.Box(-np.inf, np.inf, (4,), dtype=np.float32)}
        if pixels:
            spaces["pixels"] = gym.spaces.Dict({"top": gym.spaces.Box(0, 255, (64, 64, 3), dtype=np.uint8)})
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = gym.spaces.Box(-1, 1, (2,), dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        angle = self.np_random.uniform(0, 2 * np.pi)
        self.place = np.array([np.cos(angle), np.sin(angle)])
        self.speed, self.steps = np.zeros(2), 0
        return self._observation(), {"is_success": False}

    def step(self, action):
        self.speed = 0.3 * np.clip(action, -1, 1) + 0.02 * self.np_random.normal(size=2)
        self.place = self.place + self.speed
        self.steps += 1
        distance = np.linalg.norm(self.place)
        success, failure = bool(distance < GOAL), bool(distance > BORDER)
        truncated = self.steps >= self._max_episode_steps and not (success or failure)
        return self._observation(), -float(distance), success or failure, truncated, {"is_success": success}

    def render(self):
        return self._picture()

    def _observation(self):
        out = {"agent_pos": np.concatenate([self.place, self.speed]).astype(np.float32)}
        return out | {"pixels": {"top": self._picture()}} if self.pixels else out

    def _picture(self):
        """All of one brightness, which videos keep: by the distance."""
        return np.full((64, 64, 3), min(255, int(120 * np.linalg.norm(self.place))), dtype=np.uint8)


class ExpertPointEnv(PointEnv):
    def expert(self, noise, rng):
        return PointExpert(self, noise, rng)


class PointExpert:
    """Walks straight to the origin; `noise` is the standard deviation of what is added."""

    def __init__(self, env, noise, rng):
        self.env, self.noise, self.rng = env, noise, rng

    def action(self):
        wanted = -self.env.place / 0.3 + self.noise * self.rng.normal(size=2)
        return np.clip(wanted, -1, 1).astype(np.float32)


class ListEnv(PointEnv):
    """Observations as a bare array, which is not LeRobot's way."""

    def __init__(self, **options):
        super().__init__(**options)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), dtype=np.float32)


gym.register(id="tiny/Point-v0", entry_point=PointEnv)
gym.register(id="tiny/ExpertPoint-v0", entry_point=ExpertPointEnv)
gym.register(id="tiny/List-v0", entry_point=ListEnv)


class DeadlyEnv(PointEnv):
    """Takes its whole process along at the third step, as a simulator that crashes does."""

    def step(self, action):
        if self.steps == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


gym.register(id="tiny/Deadly-v0", entry_point=DeadlyEnv)
