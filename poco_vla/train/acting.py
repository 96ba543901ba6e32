"""Which interaction a run has, from its configuration."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from poco_vla.config import EnvSpec, TrainConfig
from poco_vla.data import DatasetInfo, Episode
from poco_vla.rollout import Actor, EnvPool, EpisodeRecorder
from poco_vla.rollout.actor import ActingCopy, Weights
from poco_vla.rollout.interaction import AsynchronousInteraction, Interaction, SynchronousInteraction
from poco_vla.rollout.recorder import can_be_video


def open_recorder(
    config: TrainConfig, folder: Path, fps: int, like: Episode, say: Callable[[str], None], give_up: Callable[[], bool]
) -> EpisodeRecorder:
    """The recorder of a run's online episodes, whose pictures are like those of the demonstration `like`."""
    settings = config.interaction
    video = settings.images == "video"
    if settings.images == "auto" and settings.mode != "synchronous":
        video = all(can_be_video(column) for column in like.obs.values() if column.dtype == np.uint8)
    return EpisodeRecorder(folder, fps, video=video, tell=say, give_up=give_up)


@dataclass(frozen=True)
class Acting:
    """What every interaction is made of.

    Attributes:
        config: of the run.
        actor: with the learner's policy and critic.
        weights: when these may be read.
        recorder: keeps the episodes.
        info: of the demonstrations.
        task: the instruction that robots are told.
        say: tells a person one line.
    """

    config: TrainConfig
    actor: Actor
    weights: Weights
    recorder: EpisodeRecorder
    info: DatasetInfo
    task: str
    say: Callable[[str], None]

    def begin(self, taken: int) -> Interaction:
        """The interaction that the configuration asks for, after `taken` control steps."""
        config = self.config
        first_seed = 1_000_000 * (config.seed + 1)
        if config.interaction.mode == "synchronous":
            return SynchronousInteraction(self._envs(), self.actor, self.weights, self.recorder, first_seed)
        copy = ActingCopy(self.actor, self.weights, config.seed + 1)
        if config.interaction.mode == "asynchronous":
            # Seeds of episodes that were lost in an interruption come again: nobody has seen them.
            first_seed += self.recorder.num_episodes
            return AsynchronousInteraction(self._envs(), copy, self.recorder, first_seed, taken=taken)
        return self._serve(copy, taken)

    def _envs(self) -> EnvPool:
        assert isinstance(self.config.env, EnvSpec)
        return EnvPool(self.config.env, self.config.horizon)

    def _serve(self, copy: ActingCopy, taken: int) -> Interaction:
        from poco_vla.rollout.remote import RemoteInteraction  # needs the extra "serve"
        from poco_vla.rollout.serving.server import observation_spec

        settings, bounds = self.config.interaction, self.info.stats["action"]
        remote = RemoteInteraction(
            copy,
            self.recorder,
            observation_spec(self.info.features, self.actor.policy.input_keys),
            taken=taken,
            adapter=self.config.adapter,
            fps=float(self.info.fps),
            task=self.task,
            action_bounds=(np.asarray(bounds["min"]), np.asarray(bounds["max"])),
            host=settings.host,
            port=settings.port,
            token=os.environ.get("POCO_VLA_TOKEN"),
            certificate=settings.certificate,
            key=settings.key,
            insecure=settings.insecure,
        )
        self.say(f"robots are served: poco-vla robot --url {remote.open()}")
        return remote
