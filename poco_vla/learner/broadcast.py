"""Broadcast of values and arrays between the processes: as JSON and plain numbers, never as pickled objects."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from poco_vla.data import Episode


def shared(tensor: Tensor, source: int = 0) -> Tensor:
    """Return the tensor of one process (the main one's) on every process."""
    got = broadcast(tensor, from_process=source)
    assert isinstance(got, Tensor)
    return got


class Sharing:
    """Give what processes have to all of them, in the order of the processes.

    Args:
        accelerator: its processes; all of them call a method together.
        each: every process has something to give; otherwise the main one, and what others pass is not looked at.
    """

    def __init__(self, accelerator: Accelerator, *, each: bool) -> None:
        self.accelerator = accelerator
        self.sources = range(accelerator.num_processes if each else 1)

    def episodes(self, episodes: Sequence[Episode], steps: int) -> tuple[list[Episode], int]:
        """Return the episodes of all processes, and the sum of their environment steps."""
        facts = [{"task": e.task, "seed": e.seed, "step_tasks": e.step_tasks} for e in episodes]
        given = self.values({"episodes": facts, "steps": steps}, [_columns_of(e) for e in episodes])
        found = [_episode(*one) for values, columns in given for one in zip(columns, values["episodes"], strict=True)]
        return found, sum(values["steps"] for values, _ in given)

    def values(
        self, values: Any, arrays: Sequence[Mapping[str, np.ndarray]]
    ) -> list[tuple[Any, list[dict[str, np.ndarray]]]]:
        """Return JSON values and named arrays of each process that gives."""
        if self.accelerator.num_processes == 1:
            return [(values, [dict(one) for one in arrays])]
        shapes = [{name: (one.dtype.str, one.shape) for name, one in some.items()} for some in arrays]
        text = json.dumps({"values": values, "arrays": shapes}).encode()
        data = b"".join(one.tobytes() for some in arrays for one in some.values())
        return [self._from(source, text, data) for source in self.sources]

    def _from(self, source: int, text: bytes, data: bytes) -> tuple[Any, list[dict[str, np.ndarray]]]:
        sizes = shared(torch.tensor([len(text), len(data)], device=self.accelerator.device), source)
        num_text, num_data = (int(size) for size in sizes)
        mine = self.accelerator.process_index == source
        read = json.loads(self._bytes(text if mine else bytes(num_text), source))
        data = self._bytes(data if mine else bytes(num_data), source) if num_data else b""
        arrays, begin = [], 0
        for some in read["arrays"]:
            arrays.append({})
            for name, (dtype, shape) in some.items():
                count = int(np.prod(shape))
                # A copy: arrays that are kept must not be read-only, nor hold all that came with them.
                arrays[-1][name] = np.frombuffer(data, dtype, count, begin).reshape(shape).copy()
                begin += count * np.dtype(dtype).itemsize
        return read["values"], arrays

    def _bytes(self, data: bytes, source: int) -> bytes:
        buffer = torch.from_numpy(np.frombuffer(data, np.uint8).copy()).to(self.accelerator.device)
        return shared(buffer, source).cpu().numpy().tobytes()


def _columns_of(episode: Episode) -> dict[str, np.ndarray]:
    names = ("action", "reward", "success", "terminal", "policy_version", "interventions")
    signals = {name: getattr(episode, name) for name in names}
    return dict(episode.obs) | {name: column for name, column in signals.items() if column is not None}


def _episode(columns: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> Episode:
    obs = {key: column for key, column in columns.items() if key.startswith("observation.")}
    signals: dict[str, Any] = {key: column for key, column in columns.items() if key not in obs}
    tasks = facts["step_tasks"]  # a list where it came as JSON
    known: dict[str, Any] = {**facts, "step_tasks": tasks and tuple(tasks)}
    return Episode(obs, **signals, **known)
