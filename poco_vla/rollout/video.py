"""Videos of recorded episodes."""

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
    write_video(partial, frames + [frames[-1]] * hold, config.fps // every)
    partial.rename(path)
    return path
