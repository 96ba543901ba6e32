"""The tiny environments as LeRobot types: importing this registers them, as a third party's package would."""

from dataclasses import dataclass, field

import numpy as np
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

from poco_vla.config import EnvSpec

FPS = 10


@EnvConfig.register_subclass("tiny_point")
@dataclass
class PointConfig(EnvConfig):
    task: str | None = "reach"
    fps: int = FPS
    episode_length: int = 12
    pixels: bool = False
    kind: str = "Point"
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (2,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (4,)),
        }
    )
    features_map: dict[str, str] = field(default_factory=lambda: {"action": "action", "agent_pos": "observation.state"})

    package_name = "tiny_gym"

    @property
    def gym_id(self):
        return f"tiny/{self.kind}-v0"

    @property
    def gym_kwargs(self):
        return {"task": self.task, "episode_length": self.episode_length, "pixels": self.pixels}


@EnvConfig.register_subclass("tiny_absent")
@dataclass
class AbsentConfig(PointConfig):
    """Its simulator is not installed."""

    package_name = "a_simulator_that_nobody_installed"
    gym_id = "absent/Nothing-v0"


def point_spec(num_envs=3, *, in_process=True, type="tiny_point", **options):
    return EnvSpec(type=type, task="reach", options=options, num_envs=num_envs, in_process=in_process)


def homing_chunks(obs, horizon):
    """Chunks that walk towards the origin, a bit wrongly, as a function of the observation alone."""
    place = obs["observation.state"][:, None, :2].repeat(horizon, axis=1)
    wobble = 0.3 * place[..., ::-1]
    return (-place + wobble).clip(-1, 1).astype("float32")


def assert_same_episode(a, b):
    assert (a.seed, a.task, len(a)) == (b.seed, b.task, len(b))
    assert set(a.obs) == set(b.obs)
    for name in ("action", "reward", "success", "terminal"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert getattr(a, name).dtype == getattr(b, name).dtype
    for key in a.obs:
        np.testing.assert_array_equal(a.obs[key], b.obs[key], err_msg=key)


@EnvConfig.register_subclass("tiny_faulty")
@dataclass
class FaultyConfig(PointConfig):
    """Misbehaves on request."""

    fault: str = "none"
    at: int = 2
    seeds: tuple[int, ...] | None = None

    gym_id = "tiny/Faulty-v0"

    @property
    def gym_kwargs(self):
        return super().gym_kwargs | {"fault": self.fault, "at": self.at, "seeds": self.seeds}


def faulty_spec(fault, num_envs=1, *, at=2, seeds=None, in_process=False, **limits):
    """An environment that misbehaves, with time limits that a test can wait for."""
    limits = {"step_timeout": 2.0} | limits
    options = {"fault": fault, "at": at, "seeds": seeds}
    return EnvSpec("tiny_faulty", "reach", options, num_envs, in_process, **limits)
