"""Make the interaction, recorder and admission of a run, from its configuration."""

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from poco_vla.config import EnvSpec, TrainConfig
from poco_vla.data import DatasetInfo, Episode
from poco_vla.errors import ConfigError
from poco_vla.policy import FlowPolicy
from poco_vla.prefix_cache.actor_buffer import ActorPrefixBuffer
from poco_vla.recording.admission import Admission
from poco_vla.recording.recorder import EpisodeRecorder, can_be_video
from poco_vla.recording.set_aside import SetAside
from poco_vla.rollout import Actor, EnvPool
from poco_vla.rollout.actor import ActingCopy, WeightsVersion
from poco_vla.rollout.interaction import AsynchronousInteraction, Interaction, SynchronousInteraction
from poco_vla.serving.feature import observation_spec

SET_ASIDE = "set_aside"
"""Folder of a run's episodes that it does not learn from."""
RANK_SEED = 100_003
"""Between the seeds of the noise by which two processes act."""


def picture_shapes(features: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Return (height, width, 3) of each camera in a LeRobot dataset's features."""
    return [f.shape for f in observation_spec(features, features).values() if f.dtype == "uint8"]


def picture_shapes_of(obs: Mapping[str, np.ndarray]) -> list[tuple[int, ...]]:
    """Return (height, width, 3) of each camera in observations [B, ...]."""
    return [column.shape[1:] for column in obs.values() if column.dtype == np.uint8]


def open_recorder(
    config: TrainConfig,
    folder: Path,
    fps: int,
    pictures: Sequence[tuple[int, ...]],
    say: Callable[[str], None],
    give_up: Callable[[], bool],
    admission: Admission | None = None,
) -> EpisodeRecorder:
    """Return the recorder of a run's online episodes, whose cameras give `pictures` of these shapes."""
    settings = config.interaction
    video = settings.images == "video"
    if settings.images == "auto" and settings.mode != "synchronous":
        video = all(can_be_video(shape) for shape in pictures)
    return EpisodeRecorder(folder, fps, video=video, tell=say, give_up=give_up, admission=admission)


def open_admission(
    config: TrainConfig,
    policy: FlowPolicy,
    demos: Sequence[Episode],
    say: Callable[[str], None],
    give_up: Callable[[], bool],
    *,
    is_main: bool,
) -> Admission:
    """Return what decides which online episodes a run learns from; the main process keeps the others."""
    folder = config.output_dir / SET_ASIDE
    return Admission(
        policy,
        demos,
        horizon=config.horizon,
        reward=config.reward,
        outlier_multiple=config.replay.outlier_multiple,
        set_aside=SetAside(folder, tell=say, give_up=give_up) if is_main else None,
        copy_processors=config.interaction.mode != "synchronous",
    )


@dataclass(frozen=True)
class Acting:
    """Hold what every interaction is made of, and make it.

    Raises:
        ConfigError: what the interaction needs is not installed.

    Attributes:
        config: of the run.
        actor: with the learner's algorithm.
        weights: when these may be read.
        recorder: keeps the episodes; None on processes that record none.
        info: of the demonstrations.
        task: the instruction that robots are told.
        say: tells a person one line.
        acted: is told what actors beside the learner encode.
        rank: this process.
        num_ranks: processes that act.
        give_up: the run stops: environments that do not answer are not waited for.
    """

    config: TrainConfig
    actor: Actor
    weights: WeightsVersion
    recorder: EpisodeRecorder | None
    info: DatasetInfo
    task: str
    say: Callable[[str], None]
    acted: ActorPrefixBuffer | None = None
    rank: int = 0
    num_ranks: int = 1
    give_up: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        if self.config.interaction.mode == "ray":
            if find_spec("ray") is None:
                raise ConfigError('interaction.mode is "ray", but Ray is not installed: pip install "poco-vla[ray]"')
            from poco_vla.rollout.cluster_address import check_cluster

            check_cluster(self.config.interaction)
        if self.config.interaction.mode == "remote" and self.recorder is not None:
            from poco_vla.serving.server import check_serving

            settings = self.config.interaction
            check_serving(
                settings.host,
                settings.port,
                os.environ.get("POCO_VLA_TOKEN"),
                insecure=settings.insecure,
                encrypted=settings.certificate is not None,
            )

    def begin(self, taken: int, episodes: int) -> Interaction:
        """Return the interaction that the configuration asks for, after `taken` environment steps and `episodes` of all
        processes that act."""
        config = self.config
        first_seed = 1_000_000 * (config.seed + 1) + 1_000_000 // self.num_ranks * self.rank
        recorder = self.recorder if self.num_ranks == 1 else None  # else those of all are recorded once they have met
        if config.interaction.mode == "synchronous":
            return SynchronousInteraction(self._envs(), self.actor, self.weights, recorder, first_seed)
        # After an interruption seeds go on about where they were: one or another comes again.
        next_seed = first_seed + episodes
        if config.interaction.mode == "ray":
            return self._start_cluster(next_seed, taken)
        copy = ActingCopy(self.actor, self.weights, config.seed + 1 + RANK_SEED * self.rank)
        if self.acted is not None:
            copy.on_encoded = self.acted.add
        if config.interaction.mode == "asynchronous":
            own = taken / self.num_ranks
            return AsynchronousInteraction(self._envs(), copy, recorder, next_seed, taken=own)
        return self._serve(copy, taken)

    def _envs(self) -> EnvPool:
        assert isinstance(self.config.env, EnvSpec)
        return EnvPool(self.config.env, self.config.horizon, say=self.say, give_up=self.give_up)

    def _start_cluster(self, first_seed: int, taken: int) -> Interaction:
        from poco_vla.rollout.cluster import ClusterInteraction  # needs the extra "ray"

        config = self.config
        assert isinstance(config.env, EnvSpec)
        assert self.recorder is not None
        return ClusterInteraction(
            config.env,
            config.horizon,
            self.actor,
            self.weights,
            self.recorder,
            first_seed,
            settings=config.interaction,
            seed=config.seed,
            say=self.say,
            taken=taken,
        )

    def _serve(self, copy: ActingCopy, taken: int) -> Interaction:
        from poco_vla.serving.remote import RemoteInteraction  # needs the extra "serve"

        assert self.recorder is not None
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
        url = remote.open()
        for everywhere in ("0.0.0.0", "[::]"):
            url = url.replace(everywhere, socket.gethostname())
        self.say(f"robots are served: poco-vla robot --url {url}")
        return remote
