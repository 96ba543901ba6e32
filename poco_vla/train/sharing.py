"""What the main process alone knows, on every process."""

import json
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from poco_vla.data import Episode


def shared(tensor: Tensor) -> Tensor:
    """The main process's tensor, on every process."""
    got = broadcast(tensor)
    assert isinstance(got, Tensor)
    return got


class EpisodeSharing:
    """Gives the main process's episodes to every process, as plain tensors.

    Args:
        accelerator: its processes.
        like: an episode whose columns all others have.
    """

    def __init__(self, accelerator: Accelerator, like: Episode) -> None:
        self.accelerator = accelerator
        self._columns = {name: column[:1].copy() for name, column in _columns_of(like).items()}

    def share(self, episodes: list[Episode], steps: int) -> tuple[list[Episode], int]:
        """The main process's episodes, and its number of control steps; what others pass is not looked at."""
        if self.accelerator.num_processes == 1:
            return episodes, steps
        device = self.accelerator.device
        text = list(json.dumps([episode.task for episode in episodes]).encode()) if episodes else []
        head = shared(torch.tensor([steps, len(episodes), len(text)], device=device))
        steps, count, letters = (int(x) for x in head)
        if count == 0:
            return [], steps
        text = shared(torch.tensor(text or [0] * letters, dtype=torch.uint8, device=device))
        lengths = torch.tensor([len(e) for e in episodes] or [0] * count, device=device)
        lengths = [int(x) for x in shared(lengths)]
        columns = {}
        for name, like in self._columns.items():
            shape = (sum(lengths), *like.shape[1:])
            mine = np.concatenate([_columns_of(e)[name] for e in episodes]) if episodes else np.zeros(shape, like.dtype)
            columns[name] = shared(torch.from_numpy(mine).to(device)).cpu().numpy()
        tasks = json.loads(bytes(text.tolist()))
        bounds = np.cumsum([0, *lengths])
        rows = [{name: column[a:b] for name, column in columns.items()} for a, b in pairwise(bounds)]
        return [_from_columns(columns, task) for columns, task in zip(rows, tasks, strict=True)], steps


def _columns_of(episode: Episode) -> dict[str, np.ndarray]:
    signals = {name: getattr(episode, name) for name in ("action", "reward", "success", "terminal")}
    return dict(episode.obs) | signals


def _from_columns(columns: Mapping[str, np.ndarray], task: str) -> Episode:
    obs = {key: column for key, column in columns.items() if key.startswith("observation.")}
    return Episode(obs, columns["action"], columns["reward"], columns["success"], columns["terminal"], task)
