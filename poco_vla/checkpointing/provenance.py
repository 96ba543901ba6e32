"""Note in a checkpoint the data that a run has learned from, so that a resume notices other data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from poco_vla.data import Episode
from poco_vla.data.fingerprint import changes, episode_hash, fingerprint
from poco_vla.errors import CheckpointError

ACCEPT = "--accept-changed-data"
"""Option by which a run goes on with data that has changed."""


@dataclass
class Provenance:
    """Digests of the demonstrations and of the online episodes that were learned from.

    Attributes:
        demonstrations: as :func:`poco_vla.data.fingerprint.fingerprint` gives them.
        keys: observations of online episodes that count.
        episodes: digest of each online episode, in their order.
    """

    demonstrations: Mapping[str, Any]
    keys: Sequence[str]
    episodes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, demos: Sequence[Episode], stats: Mapping[str, Any], keys: Sequence[str]) -> "Provenance":
        """Return that of a run which begins."""
        return cls(fingerprint(demos, stats), keys)

    def add(self, episode: Episode) -> None:
        """Note an online episode."""
        self.episodes.append(self._hash(episode))

    def state(self) -> dict[str, Any]:
        """Return values for a checkpoint; `check_demonstrations` and `check_episode` compare with it."""
        return {"demonstrations": dict(self.demonstrations), "episodes": list(self.episodes)}

    def check_demonstrations(
        self, state: Mapping[str, Any], where: str, *, accept: bool, tell: Callable[[str], None]
    ) -> None:
        """Compare the demonstrations with those of a checkpoint (of a version that noted none: nothing).

        Raises:
            CheckpointError: they are others, and that was not accepted.
        """
        other, doubtful = changes(state.get("demonstrations", {}), self.demonstrations)
        if other and not accept:
            raise CheckpointError(
                f"the demonstrations in {where} are not those that the run was trained on: {'; '.join(other)}. Put the "
                "old ones back (dataset.revision or dataset.episodes may name them), start a new run from the policy "
                f"(--policy RUN/policy), or go on with the new ones: {ACCEPT}"
            )
        for one in (*other, *doubtful):
            tell(f"the demonstrations in {where} have changed since the checkpoint: {one}")

    def check_episode(
        self, state: Mapping[str, Any], number: int, episode: Episode, where: Path, *, accept: bool
    ) -> str | None:
        """Note an online episode that was read back, and compare it with the checkpoint's; a phrase where it is another
        and that was accepted.

        Raises:
            CheckpointError: it is another.
        """
        self.add(episode)
        noted = state.get("episodes", [])
        if number >= len(noted) or noted[number] == self.episodes[-1]:
            return None
        if not accept:
            raise CheckpointError(
                f"episode {number} in {where} is not the one that the run learned from (edited, exchanged or in "
                f"another place): put it back, or go on with what is there: {ACCEPT}"
            )
        return f"episode {number}"

    def _hash(self, episode: Episode) -> str:
        return episode_hash(replace(episode, obs={k: _as_read(episode.obs[k]) for k in self.keys if k in episode.obs}))


def _as_read(column: np.ndarray) -> np.ndarray:
    """Return a column as LeRobot's files give it back: numbers as float32 [T, entries]."""
    if column.dtype == np.uint8 and column.ndim == 4:
        return column
    return np.asarray(column, np.float32).reshape(len(column), -1)
