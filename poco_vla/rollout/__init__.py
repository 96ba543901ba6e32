"""Acting: environments, the actor, demonstrations, and episodes written back as LeRobot datasets."""

from poco_vla.rollout.actor import Actor
from poco_vla.rollout.demonstrations import ensure_demonstrations
from poco_vla.rollout.environments import environment
from poco_vla.rollout.pool import EnvPool
from poco_vla.rollout.recorder import EpisodeRecorder

__all__ = ["Actor", "EnvPool", "EpisodeRecorder", "ensure_demonstrations", "environment"]
