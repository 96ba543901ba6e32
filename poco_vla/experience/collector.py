"""Collection of episodes: when the policy acts, what comes of it, and how acting goes on at a resume."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from poco_vla.data import Episode, Replay
from poco_vla.errors import CheckpointError
from poco_vla.experience.interactions import Acting
from poco_vla.learner.broadcast import Sharing
from poco_vla.recording.admission import Admission
from poco_vla.recording.recorder import EpisodeRecorder
from poco_vla.rollout.actor import UNTRAINED
from poco_vla.rollout.interaction import Interaction, Received
from poco_vla.run.context import RunContext


class Collector:
    """Let the policy act, and give its episodes to every process.

    Args:
        context: of the run.
        acting: makes the interaction.
        sharing: between the processes.
        recorder: keeps the episodes; None on processes that record none.
        admission: decides which episodes are learned from.
        replay: the replay buffer: acting waits for learning once it holds an online episode.

    Attributes:
        acts: this process acts.
        interaction: None until `begin`, and on processes that do not act.
    """

    def __init__(
        self,
        context: RunContext,
        acting: Acting,
        sharing: Sharing,
        recorder: EpisodeRecorder | None,
        admission: Admission,
        replay: Replay,
    ) -> None:
        self.config, self.progress = context.config, context.progress
        self.logbook, self.interruption = context.logbook, context.interruption
        self.acting, self.sharing, self.recorder, self.admission = acting, sharing, recorder, admission
        self.replay = replay
        self.acts = sharing.accelerator.process_index in sharing.sources
        self.interaction: Interaction | None = None

    def begin(self) -> None:
        """Begin to act, unless that was begun, or nothing is to be learned online."""
        if self.interaction is None and self.acts and self.config.online_steps:
            self.interaction = self.acting.begin(self.progress.env_steps, self.progress.episodes)

    def act(self) -> None:
        """Let acting go on, as far as learning follows."""
        config, now = self.config, self.progress
        if self.interaction is None:
            return
        best_of_n = config.best_of_n if now.stage_update > config.warmup_steps else UNTRAINED
        until = float(config.online_steps)
        if self.replay.num_online_steps:  # learning begins with the first episode
            until = min(until, now.env_steps + config.interaction.ahead - now.owed_updates / config.updates_per_step)
        with self.interruption.simulators():
            self.interaction.act(best_of_n=best_of_n, until=until / self.acting.num_ranks)
        self._tell(self.interaction)

    def receive(self, *, wait: bool) -> tuple[list[Episode], int]:
        """Return episodes that ended, as the replay buffer keeps them, and environment steps taken: on every process
        those of all. `wait` for something where there is nothing else to do."""
        received = Received()
        if self.interaction is not None and self.interruption.failure is None:
            with self.interruption.simulators():
                received = self.interaction.receive(wait=wait)
        self.logbook.acted(received.versions)
        if self.acting.num_ranks == 1:
            return self.sharing.episodes([self._shrunk(episode) for episode in received.episodes], received.steps)
        episodes, steps = self.sharing.episodes(received.episodes, received.steps)
        episodes = [episode for episode in episodes if self.admission.admits(episode)]
        if self.recorder is not None:
            for episode in episodes:
                self.recorder.add(episode)
        return [self._shrunk(episode) for episode in episodes], steps

    def pause(self) -> None:
        """Begin no more episodes."""
        if self.interaction is not None:
            self.interaction.pause()

    def finish(self) -> None:
        """Tell whoever acts that training is over."""
        if self.interaction is not None:
            self._tell(self.interaction)
            self.interaction.finish()

    def close(self) -> None:
        """Stop acting."""
        if self.interaction is not None:
            self.interaction.close()

    def state(self) -> dict[str, Any]:
        """Return the running episodes and the noise of all processes that act. All processes call this together."""
        acting = dict(self.interaction.state()) if self.interaction is not None else {}
        chunks = {f"chunks.{i}": one for i, one in enumerate(acting.pop("chunks", []))}
        given = self.sharing.values(acting, [chunks | {"actor": self.acting.actor.generator.get_state().numpy()}])
        tensors = {
            _prefix(rank) + name: torch.from_numpy(one)
            for rank, (_, (arrays,)) in enumerate(given)
            for name, one in arrays.items()
        }
        (values, _), *others = given
        return values | ({"others": [one for one, _ in others]} if others else {}) | tensors

    def load(self, state: Mapping[str, Any]) -> None:
        """Begin to act where a checkpoint was taken, if that was in the online stage.

        Raises:
            CheckpointError: another number of processes acts now, and acts in step with learning.
        """
        if self.progress.stage != "online" or not self.config.online_steps:
            return
        if self.recorder is not None and self.config.interaction.mode == "synchronous":
            self.recorder.rewind(self.progress.episodes)
        self.begin()
        if self.interaction is None:
            return
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        values = {name: value for name, value in state.items() if name not in tensors}
        all_of_them = [values, *values.pop("others", [])]
        rank, num_ranks = self.acting.rank, self.acting.num_ranks
        if len(all_of_them) != num_ranks:
            if values and self.config.interaction.mode == "synchronous":
                raise CheckpointError(
                    f"the checkpoint holds running episodes of {len(all_of_them)} processes, and {num_ranks} act now: "
                    f"launch {len(all_of_them)}, as before"
                )
            return
        mine, prefix = all_of_them[rank], _prefix(rank)
        self.acting.actor.generator.set_state(tensors[f"{prefix}actor"])
        count = sum(name.startswith(f"{prefix}chunks.") for name in tensors)
        chunks = [tensors[f"{prefix}chunks.{i}"].numpy() for i in range(count)]
        self.interaction.restore(mine | {"chunks": chunks} if chunks else mine)

    def _tell(self, interaction: Interaction) -> None:
        told = {"online_steps": self.config.online_steps, "set_aside": self.admission.num_set_aside}
        interaction.report_progress(self.logbook.told() | told)

    def _shrunk(self, episode: Episode) -> Episode:
        return episode.with_images(self.acting.actor.policy.resize_images)


def _prefix(rank: int) -> str:
    """Return what the names of a process's tensors begin with."""
    return f"rank{rank}." if rank else ""
