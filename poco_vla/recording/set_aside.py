"""A folder of episodes that were kept out of training, with the reason of each beside its data."""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from poco_vla.data import Episode
from poco_vla.files import atomic_file, sync, wait_for_space
from poco_vla.recording.episode_file import encoded

logger = logging.getLogger(__name__)

INDEX = "episodes.jsonl"
"""One line for each episode: its name, its reason, steps and instruction."""
MOST_KEPT = 200
"""Episodes whose data are kept; of later ones only the line is kept, so that a sender cannot fill the disk."""


class SetAside:
    """Keep episodes that training cannot use, each once: ``<name>.safetensors`` with its data, ``<name>.txt`` with the
    reason, and a line in ``episodes.jsonl``.

    Args:
        folder: made with the first episode.
        tell: gets a message about each, of many about ever fewer.
        give_up: True ends the waiting for room on a full disk.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tell: Callable[[str], None] = logger.warning,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self.folder, self._tell, self._give_up = folder, tell, give_up
        self._lock = Lock()
        self._names = _names_in(folder / INDEX)

    def __len__(self) -> int:
        return len(self._names)

    def keep(self, episode: Episode, reason: str, key: str = "") -> None:
        """Write an episode and the reason why it is here; one that is here already is not written again."""
        data = encoded(episode)
        name = hashlib.sha256(data).hexdigest()[:16]
        with self._lock:
            if name in self._names:
                return
            wait_for_space(
                lambda: self._write(name, episode, data, reason, key),
                what=f"an episode that is set aside ({len(episode)} steps)",
                where=self.folder,
                tell=self._tell,
                give_up=self._give_up,
            )
            self._names.add(name)
            count = len(self._names)
        if count <= 10 or count & (count - 1) == 0:  # then 16, 32, 64, ...
            so_many = f" ({count} so far)" if count > 1 else ""
            self._tell(
                f"an episode of {len(episode)} steps is set aside and not learned from{so_many}: {reason}. It is kept "
                f"as {self.folder / name}.safetensors"
            )

    def _write(self, name: str, episode: Episode, data: bytes, reason: str, key: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "name": name,
            "reason": reason,
            "steps": len(episode),
            "task": episode.task[:200],
            "key": key,
            "at": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        if len(self._names) < MOST_KEPT:
            with atomic_file(self.folder / f"{name}.safetensors") as partial:
                partial.write_bytes(data)
                sync(partial)
            with atomic_file(self.folder / f"{name}.txt") as partial:
                partial.write_text("".join(f"{what}: {_plain(value)}\n" for what, value in facts.items()))
        with (self.folder / INDEX).open("a") as file:
            file.write(json.dumps(facts) + "\n")


def _plain(value: object) -> str:
    """Return a value as printable ASCII: instructions and keys come from others."""
    return str(value).encode("unicode_escape").decode("ascii")


def _names_in(index: Path) -> set[str]:
    """Return the names in an index, of which a kill may have torn the last line."""
    if not index.is_file():
        return set()
    names = set()
    for line in index.read_text(errors="replace").splitlines():
        try:
            names.add(str(json.loads(line)["name"]))
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return names
