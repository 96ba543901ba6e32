"""Meta-World by LeRobot's environment, observed by the whole state or by cameras of any size, with its expert."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from poco_vla.rendering.render import render
from poco_vla.simulators.metaworld_tasks import SEEN_DIM, STATE_DIM

try:
    from lerobot.envs.metaworld import MetaworldEnv
except ModuleNotFoundError as error:
    # LeRobot's discovery imports every module of this package, also where Meta-World is not installed.
    if error.name != "metaworld":
        raise
    MetaworldEnv: Any = gym.Env


class MetaWorldEnv(MetaworldEnv):
    """One task, which ends at its first success.

    Args:
        task: Meta-World's name, such as "push-v3".
        episode_length: time limit in control steps.
        cameras: names of Meta-World's cameras. With any, pictures by these are observed, and of the state only hand
            and gripper.
        image_size: height and width of a picture, in pixels.
    """

    def __init__(self, task: str, episode_length: int, cameras: Sequence[str] = (), image_size: int = 128) -> None:
        super().__init__(task)
        self.cameras, self.image_size = tuple(cameras), image_size
        self._max_episode_steps, self._taken = episode_length, 0
        size = SEEN_DIM if cameras else STATE_DIM
        spaces: dict[str, gym.Space] = {"agent_pos": gym.spaces.Box(-np.inf, np.inf, (size,), dtype=np.float32)}
        if cameras:
            picture = gym.spaces.Box(0, 255, (image_size, image_size, 3), dtype=np.uint8)
            spaces["pixels"] = gym.spaces.Dict(dict.fromkeys(self.cameras, picture))
        self.observation_space = gym.spaces.Dict(spaces)

    def reset(self, seed: int | None = None, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        self._taken = 0
        return super().reset(seed=seed, **options)

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self._ensure_env()
        simulator: Any = self._env
        state, reward, _, _, info = simulator.step(np.clip(action, -1, 1))
        self._taken += 1
        success = bool(info["success"])
        truncated = self._taken >= self._max_episode_steps and not success
        return self._format_raw_obs(state), float(reward), success, truncated, {"is_success": success}

    def render(self) -> np.ndarray:
        """RGB frame [height, width, 3] uint8 of LeRobot's camera, with or without a GL driver."""
        self._ensure_env()
        return self._picture(self.camera_name, 240)

    def expert(self, noise: float, rng: np.random.Generator) -> "ScriptedExpert":
        """Return Meta-World's scripted policy for this task, from the current state on."""
        return ScriptedExpert(self, noise, rng)

    def _format_raw_obs(self, raw_obs: np.ndarray) -> dict[str, Any]:
        self.state = raw_obs
        if not self.cameras:
            return {"agent_pos": raw_obs.astype(np.float32)}
        pictures = {name: self._picture(name, self.image_size) for name in self.cameras}
        return {"pixels": pictures, "agent_pos": raw_obs[:SEEN_DIM].astype(np.float32)}

    def _picture(self, camera: str, size: int) -> np.ndarray:
        simulator: Any = self._env
        picture = render(simulator, height=size, width=size, camera=camera)
        return picture[::-1, ::-1].copy() if camera == "corner2" else picture  # it hangs upside down (LeRobot)


class ScriptedExpert:
    """Meta-World's scripted policy of a task, with Gaussian noise on its actions.

    Args:
        env: in the state to begin from.
        noise: standard deviation, in units of the action's range [-1, 1].
        rng: draws the noise.
    """

    def __init__(self, env: MetaWorldEnv, noise: float, rng: np.random.Generator) -> None:
        self._env, self._noise, self._rng = env, noise, rng
        self._policy = type(env.expert_policy)()  # it may keep a state

    def action(self) -> np.ndarray:
        """Return the next action, in [-1, 1]."""
        action = self._policy.get_action(np.asarray(self._env.state, dtype=np.float64))
        noise = self._noise * self._rng.normal(size=len(action))
        return np.clip(action + noise, -1, 1).astype(np.float32)
