"""Episodes that a run learns from: taken into the replay buffer, noted, and read back from disk at a resume."""

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from poco_vla import report
from poco_vla.checkpointing.provenance import Provenance
from poco_vla.config import DatasetConfig
from poco_vla.data import Episode, Replay, open_dataset, read_episodes
from poco_vla.data.folder import read_info
from poco_vla.errors import CheckpointError, DataError
from poco_vla.experience.dataset import RunData
from poco_vla.policy import FlowPolicy
from poco_vla.prefix_cache.source import PrefixSource
from poco_vla.recording.admission import Admission
from poco_vla.run.context import RunContext

EPISODES_AT_ONCE = 50
"""Episodes with pictures that are read together."""


class Experience:
    """Take online episodes in.

    Args:
        context: of the run.
        data: the demonstrations.
        policy: what the episodes are for.
        replay: the replay buffer, which holds the demonstrations already.
        prefixes: gets what acting has encoded.
        admission: decides which episodes are learned from.
        provenance: digests of the data.
        watch: is told of every episode whether it succeeded, and its instruction.
    """

    def __init__(
        self,
        context: RunContext,
        data: RunData,
        policy: FlowPolicy,
        replay: Replay,
        *,
        prefixes: PrefixSource | None,
        admission: Admission,
        provenance: Provenance,
        watch: Callable[[bool, str], None],
    ) -> None:
        self.config, self.accelerator, self.progress = context.config, context.accelerator, context.progress
        self.folder, self.display, self.logbook = context.folder, context.display, context.logbook
        self.data, self.policy, self.replay = data, policy, replay
        self.prefixes, self.admission, self.provenance, self.watch = prefixes, admission, provenance, watch

    def count(self, steps: int) -> None:
        """Count environment steps, and the updates that they allow."""
        self.progress.env_steps += steps
        self.progress.owed_updates += steps * self.config.updates_per_step

    def take(self, episodes: list[Episode], *, recorded: bool = False) -> None:
        """Take episodes in, which an earlier process has `recorded` or this one."""
        now = self.progress
        for episode in episodes:
            self._store(episode, recorded=recorded)
            self.provenance.add(episode)
            now.episodes += 1
            now.recent = [*now.recent, episode.succeeded][-report.WINDOW :]
            self.logbook.episode(len(episode), episode.succeeded)
            self.watch(episode.succeeded, episode.task)

    def state(self) -> dict[str, Any]:
        """Return digests of all that was learned from; the episodes themselves are on disk already."""
        return self.provenance.state()

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Compare demonstrations and episodes with a checkpoint's, and read the episodes back. In step with learning,
        those that a checkpoint does not cover are run again, and come out the same; otherwise they count as if they had
        just come.

        Args:
            state: digests; nothing in a checkpoint of an older version.

        Raises:
            CheckpointError: the data has changed, and that was not accepted.
        """
        noted = state or {}
        accept = self.config.accept_changed_data
        done = self.progress.stage == "done"  # learns from none any more
        where = str(self.data.config.root or self.data.config.repo_id)
        self.provenance.check_demonstrations(noted, where, accept=accept or done, tell=self.display.say)
        if self.progress.stage == "online":
            self._read_back(noted, accept=accept)

    def _read_back(self, noted: Mapping[str, Any], *, accept: bool) -> None:
        taken, steps, total = self.progress.episodes, 0, self._num_recorded()
        folder = self.folder.episodes
        if total < taken:
            raise CheckpointError(
                f"{folder} holds {total} episodes, the checkpoint has seen {taken}: put back what was taken away"
            )
        changed = []
        for number, episode in enumerate(self._recorded(0, taken)):
            changed.append(self.provenance.check_episode(noted, number, episode, folder, accept=accept))
            self._store(episode, recorded=True)
            steps += len(episode)
        if any(changed):
            self.display.say(f"not what the run learned from before: {', '.join(filter(None, changed))}")
        if self.config.interaction.mode != "synchronous":
            self.count(steps - self.progress.env_steps)  # running episodes are gone
            for episode in self._recorded(taken, total):
                self.count(len(episode))
                self.take([episode], recorded=True)
        self.accelerator.wait_for_everyone()  # all have read before more episodes come

    def _store(self, episode: Episode, *, recorded: bool) -> None:
        """Put an episode into the replay buffer; one that does not fit there stays on disk alone. One that was
        `recorded` by an earlier process may be one that training cannot use."""
        if recorded and not self.admission.admits(episode):
            return
        try:
            add = partial(self.replay.add, episode, is_demo=False)
            first = self.folder.write("an episode of the pool", add)
        except DataError as error:
            self.display.say(f"an episode stays out of the pool: {error}")
            return
        if self.prefixes is not None:
            self.prefixes.add_from_actor(episode, first)

    def _num_recorded(self) -> int:
        """Return the number of online episodes on disk."""
        self.accelerator.wait_for_everyone()  # the main process has put the folder in order
        folder = self.folder.episodes
        return int(read_info(folder).total_episodes) if (folder / "meta" / "info.json").is_file() else 0

    def _recorded(self, first: int, end: int) -> Iterator[Episode]:
        """Yield these online episodes, as the replay buffer keeps them; of those with pictures a few are in memory at
        once."""
        features = self.data.info.features
        pictures = any(features[key]["dtype"] in ("image", "video") for key in self.policy.input_keys)
        size = EPISODES_AT_ONCE if pictures else max(1, end - first)
        for begin in range(first, end, size):
            numbers = tuple(range(begin, min(begin + size, end)))
            config = DatasetConfig(
                "local/episodes", self.folder.episodes, episodes=numbers, max_image_bytes=sys.maxsize
            )
            yield from read_episodes(
                open_dataset(config), config, self.policy.input_keys, resize_images=self.policy.resize_images
            )
