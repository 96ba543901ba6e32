"""Digests of what episodes hold, by which a resumed run knows its demonstrations and its own episodes again.

Numbers are hashed as the float32, int64 or bool that LeRobot's files give back, so that an episode has one digest in
memory and after it was written and read. Decoded pictures depend on the decoder: they have a digest of their own.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from poco_vla.data.episode import Episode

PICTURES = 256
"""Most pictures of each camera that are hashed, evenly spaced over all steps (ours)."""
DIGITS = 5
"""Significant digits of statistics that count: what is computed from the same rows may differ in the last ones."""


def episode_hash(episode: Episode) -> str:
    """Return the digest of an episode's instructions, observations without pictures, actions and signals."""
    digest = hashlib.blake2b(digest_size=16)
    for task in episode.step_tasks or (episode.task,):
        digest.update(f"{len(task)}:{task}".encode())
    columns = {key: column for key, column in episode.obs.items() if not _is_picture(column)}
    columns |= {"action": episode.action, "reward": episode.reward, "success": episode.success}
    columns["ended"] = (episode.terminal | episode.success)[-1:]
    for name in sorted(columns):
        column = columns[name]
        column = np.ascontiguousarray(column, bool if column.dtype == bool else np.float32)
        digest.update(f"{name}{column.dtype}{column.shape}".encode())
        digest.update(column.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def content_hash(episodes: Iterable[Episode]) -> str:
    """Return one digest of episodes in their order; pictures are left out (see :func:`fingerprint`).

    The same whether the episodes are in memory or were read back from a dataset, on every machine.
    """
    digest = hashlib.blake2b(digest_size=16)
    for episode in episodes:
        digest.update(episode_hash(episode).encode())
    return digest.hexdigest()


def fingerprint(episodes: Sequence[Episode], stats: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a fingerprint of demonstrations, as plain JSON values for a checkpoint.

    Args:
        episodes: the demonstrations in use, as :func:`poco_vla.data.read_episodes` gives them.
        stats: their statistics (``DatasetInfo.stats``); None leaves them out.

    Returns:
        Numbers of episodes and steps, and digests of the rows, of some pictures and of the statistics. Compare two of
        them with :func:`changes`.
    """
    found: dict[str, Any] = {
        "episodes": len(episodes),
        "steps": sum(map(len, episodes)),
        "rows": content_hash(episodes),
        "pictures": _picture_hash(episodes),
    }
    return found if stats is None else found | {"statistics": _stats_hash(stats)}


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compare two fingerprints of a run's demonstrations.

    Returns:
        What makes them other demonstrations, and what may have another cause and is only to be told, one phrase each.
        Both are empty for the same data. What only one of the two knows is not compared.
    """
    other = [
        f"{then[name]} {name} then, {now[name]} now"
        for name in ("episodes", "steps")
        if name in then and name in now and then[name] != now[name]
    ]
    differ = {name for name in then.keys() & now.keys() if then[name] != now[name]}
    if "rows" in differ and not other:
        other.append("as many episodes and steps, but other states, actions, rewards or instructions")
    doubtful = []
    if not other and "pictures" in differ:
        doubtful.append("the pictures are not those of before (edited videos, or another version of the decoder)")
    if not other and "statistics" in differ:
        doubtful.append("the dataset's statistics (meta/stats.json) are not those of before; the run keeps its own")
    return other, doubtful


def _is_picture(column: np.ndarray) -> bool:
    return column.dtype == np.uint8 and column.ndim == 4


def _picture_hash(episodes: Sequence[Episode]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    ends = np.cumsum([len(episode) for episode in episodes])
    total = int(ends[-1]) if len(ends) else 0
    for step in np.unique(np.linspace(0, max(0, total - 1), min(PICTURES, total)).astype(int)).tolist():
        number = int(np.searchsorted(ends, step, side="right"))
        episode = episodes[number]
        row = step - int(ends[number]) + len(episode)
        for key in sorted(key for key, column in episode.obs.items() if _is_picture(column)):
            digest.update(f"{key}{episode.obs[key].shape[1:]}".encode())
            digest.update(np.ascontiguousarray(episode.obs[key][row]).reshape(-1).data)
    return digest.hexdigest()


def _stats_hash(stats: Mapping[str, Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(stats):
        for name in sorted(stats[key]):
            values = np.asarray(stats[key][name])
            if values.dtype.kind in "fiub":
                shown = [f"{value:.{DIGITS}g}" for value in values.astype(np.float64).reshape(-1).tolist()]
                digest.update(f"{key}/{name}:{shown}".encode())
    return digest.hexdigest()
