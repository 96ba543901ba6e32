"""A point that is to reach the origin: the Gymnasium side, which worker processes import."""

import os
import signal
import time
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


class FaultyEnv(PointEnv):
    """Misbehaves at step `at` of the episodes with these seeds; `fault` says how. Its instruction names its seed."""

    def __init__(self, fault="none", at=2, seeds=None, **options):
        super().__init__(**options)
        self.fault, self.at, self.seeds = fault, at, seeds
        if fault == "endless":
            self._max_episode_steps = None

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        self.bad = self.seeds is None or seed in self.seeds
        self.task_description = "" if self.fault == "silent" else f"task {seed}"
        if self.bad and self.fault == "hang in reset":
            time.sleep(1000)
        return observation, info

    def step(self, action):
        if self.fault == "endless" and self.bad:
            return self._observation(), 0.0, False, False, {"is_success": False}
        if self._max_episode_steps is None:
            self._max_episode_steps = 12
        answer = super().step(action)
        return self._spoilt(*answer) if self.bad and self.steps == self.at else answer

    def _spoilt(self, observation, reward, terminated, truncated, info):
        if self.fault == "hang":
            time.sleep(1000)
        if self.fault == "raise":
            raise RuntimeError("the simulator lost its way")
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "nan":
            observation["agent_pos"][1] = np.nan
        if self.fault == "shape":
            observation["agent_pos"] = observation["agent_pos"][:3]
        if self.fault == "key":
            observation = {"state": observation["agent_pos"]}
        answer = {
            "nan reward": (observation, float("nan"), False, False, info),
            "no info": (observation, reward, False, False, None),
            "two successes": (observation, reward, False, False, {"is_success": np.array([True, False])}),
            "four values": (observation, reward, False, info),
            "other name": (observation, reward, True, False, {"was_successful": True}),
        }
        return answer.get(self.fault, (observation, reward, terminated, truncated, info))

    def expert(self, noise, rng):
        return PointExpert(self, noise, rng)


gym.register(id="tiny/Faulty-v0", entry_point=FaultyEnv)
