"""Videos of recorded episodes, and encoders kept quiet."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from poco_vla.config import EnvSpec
from poco_vla.data import Episode
from poco_vla.errors import SimulatorError
from poco_vla.recording.encoding import silent_stderr
from poco_vla.rollout.chunk_env import TimeLimits
from poco_vla.rollout.workers import LocalWorker, Worker, close_all, time_limit, wait, worker_context
from poco_vla.simulators import env_source, environment, name_of
from poco_vla.simulators.observations import as_picture


def write_episode_video(episode: Episode, env: EnvSpec, path: Path, *, every: int = 1, hold: int = 15) -> Path:
    """Run a recorded episode again from its seed and its actions, and write it as an mp4.

    Args:
        episode: of an environment that repeats under a seed.
        env: that environment.
        path: where the video goes; written under a temporary name first.
        every: control steps per video frame.
        hold: frames for which the last image stays.

    Raises:
        SimulatorError: the simulator fails at it.
    """
    from lerobot.utils.io_utils import write_video

    fps = environment(env).fps
    frames = _replay_frames(episode, env, every)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    try:
        with silent_stderr():
            write_video(partial, frames + [frames[-1]] * hold, fps // every)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _replay_frames(episode: Episode, env: EnvSpec, every: int) -> list[np.ndarray]:
    """Yield the frames of an episode that is played again, in a worker process unless the environment runs in this
    one."""
    limits = TimeLimits(env.step_timeout, env.reset_timeout)
    source = env_source(env)
    build = partial(_Player, source.make, limits)
    context = worker_context(source.preload)
    worker = LocalWorker(build) if env.in_process else Worker(context, build, "video", within=limits.reset)
    try:
        worker.ask("begin", episode.seed, within=limits.reset)
        wait([worker])
        for k in range(0, len(episode), every):  # one by one: requests and frames that wait would fill both pipes
            worker.ask("play", episode.action[k : k + every], within=limits.step and limits.step * every + limits.reset)
            wait([worker])
        if worker.failure is not None:
            words = f"{name_of(env)} failed when an episode was run again for a video: {worker.failure.words}"
            raise SimulatorError(words) from worker.failure.cause()
        return list(worker.answers)
    finally:
        close_all([worker])


class _Player:
    """An environment that shows what it plays."""

    def __init__(self, make: Callable[[], gym.Env], limits: TimeLimits) -> None:
        self.sim: Any = make().unwrapped
        self.limits = limits

    def begin(self, seed: int | None) -> np.ndarray:
        """Reset; give the first frame."""
        with time_limit(self.limits.reset):
            self.sim.reset(seed=seed)
            return as_picture(np.asarray(self.sim.render()))

    def play(self, actions: np.ndarray) -> np.ndarray:
        """Execute actions; give the frame after the last."""
        for action in actions:
            with time_limit(self.limits.step and self.limits.step + self.limits.reset):
                self.sim.step(action)
        with time_limit(self.limits.step and self.limits.step + self.limits.reset):
            return as_picture(np.asarray(self.sim.render()))

    def close(self) -> None:
        self.sim.close()
