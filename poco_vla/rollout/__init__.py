"""Acting: environments, the actor, demonstrations, and episodes written back as LeRobot datasets."""

from typing import TYPE_CHECKING

from poco_vla.lazy import load_on_demand

if TYPE_CHECKING:
    from poco_vla.rollout.actor import Actor
    from poco_vla.rollout.demonstrations import ensure_demonstrations
    from poco_vla.rollout.environments import environment
    from poco_vla.rollout.pool import EnvPool
    from poco_vla.rollout.recorder import EpisodeRecorder

__getattr__, __dir__ = load_on_demand(
    __name__,
    {
        "actor": ["Actor"],
        "demonstrations": ["ensure_demonstrations"],
        "environments": ["environment"],
        "pool": ["EnvPool"],
        "recorder": ["EpisodeRecorder"],
    },
)

__all__ = ["Actor", "EnvPool", "EpisodeRecorder", "ensure_demonstrations", "environment"]
