"""Videos of recorded episodes, and encoders kept quiet."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from poco_vla.config import EnvSpec
from poco_vla.data import Episode
from poco_vla.rollout.environments import environment
from poco_vla.rollout.pool import make_env


def write_episode_video(episode: Episode, env: EnvSpec, path: Path, *, every: int = 1, hold: int = 15) -> Path:
    """Run a recorded episode again from its seed and its actions, and write it as an mp4.

    Args:
        episode: of an environment that repeats under a seed.
        env: that environment.
        path: where the video goes; written under a temporary name first.
        every: control steps per video frame.
        hold: frames for which the last image stays.
    """
    from lerobot.utils.io_utils import write_video

    config = environment(env)
    sim: Any = make_env(config.package_name, config.gym_id, config.gym_kwargs).unwrapped
    sim.reset(seed=episode.seed)
    frames = [sim.render()]
    for k, action in enumerate(episode.action):
        sim.step(action)
        if (k + 1) % every == 0 or k + 1 == len(episode):
            frames.append(sim.render())
    sim.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    try:
        with silent_stderr():
            write_video(partial, frames + [frames[-1]] * hold, config.fps // every)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


@contextmanager
def silent_stderr() -> Iterator[None]:
    """LeRobot and datasets draw a bar per episode and per file on stderr, and video encoders, which are C, write to
    its file descriptor; the run shows its own progress. Exceptions pass."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def keep_scheduling() -> Iterator[None]:
    """As root, SVT-AV1 puts the thread that calls it, and all that it starts later, ahead of everything else on the
    machine (SCHED_FIFO 99), and leaves it there."""
    if not hasattr(os, "sched_getscheduler"):  # macOS
        yield
        return
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, priority)
