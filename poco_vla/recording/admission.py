"""Which online episodes enter the replay buffer: those that training can bear. The others are set aside on disk."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poco_vla.config import RewardConfig
from poco_vla.data import Episode, preprocess_obs
from poco_vla.data.episode import LONGEST_TASK
from poco_vla.errors import DataError, PocoError
from poco_vla.policy import FlowPolicy, copy_policy
from poco_vla.recording.set_aside import SetAside

LARGEST = 1e18
"""Largest magnitude of any number: squares of larger ones are not finite in float32, in a loss as in statistics."""
LARGEST_NORMALISED = 1e5
"""Largest magnitude of a normalised state or action, whatever the demonstrations reach."""
FLOOR = 0.1
"""Share of a column's largest magnitude that counts as the magnitude of dimensions that hardly move."""
ROWS = 32
"""Rows of an episode that the policy's pre-processing is shown together."""


class SetAsideError(DataError):
    """Raised for an episode that training cannot use. It is stored in the run's set-aside folder."""


class Admission:
    """Check each online episode before it is recorded, and recorded ones before they enter the replay buffer again.

    An episode is set aside when it has no step, its columns are of other shapes than the demonstrations', a number is
    not finite or would not be so once it is squared, a state, an action or a recorded reward lies beyond
    `outlier_multiple` times the demonstrations' largest magnitude, or the policy's pre-processing refuses it: an empty
    instruction, a prompt that is too long, a number that is not finite after normalisation.

    Args:
        policy: whose pre-processing an episode has to pass.
        demos: the demonstrations in use.
        horizon: H.
        reward: what a step is worth.
        outlier_multiple: see above; None checks only what is finite.
        set_aside: where episodes go that fail; None on processes that write nothing.
        copy_processors: check with a copy of the policy's processors, as another thread than the learner's calls this.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        demos: Sequence[Episode],
        *,
        horizon: int,
        reward: RewardConfig | None = None,
        outlier_multiple: int | float | None = 100.0,
        set_aside: SetAside | None = None,
        copy_processors: bool = False,
    ) -> None:
        self.policy = copy_policy(policy) if copy_processors else policy
        self.horizon, self.reward = horizon, reward or RewardConfig()
        self.multiple, self.set_aside = outlier_multiple, set_aside
        self._shapes = {name: column.shape[1:] for name, column in _numbers(demos[0])}
        self._peaks = _largest_magnitudes(demos)
        self._largest_reward = max((float(np.abs(e.reward).max(initial=0)) for e in demos), default=0.0)

    @property
    def num_set_aside(self) -> int:
        """Episodes of this run that were set aside."""
        return len(self.set_aside) if self.set_aside is not None else 0

    def admits(self, episode: Episode, key: str = "") -> bool:
        """Return True if training can bear the episode; otherwise set it aside and say so."""
        try:
            self.require(episode, key)
        except SetAsideError:
            return False
        return True

    def require(self, episode: Episode, key: str = "") -> None:
        """Raise SetAsideError for an episode that training cannot use, once it is set aside."""
        try:
            self.check(episode)
        except PocoError as error:
            if self.set_aside is not None:
                self.set_aside.keep(episode, str(error), key)
            raise SetAsideError(f"the episode is set aside: {error}") from error

    def check(self, episode: Episode) -> None:
        """Raise PocoError, with the reason, for an episode that training cannot use."""
        _check_form(episode)
        for name, column in _numbers(episode):
            if name in self._shapes and column.shape[1:] != self._shapes[name]:
                found, expected = list(column.shape[1:]), list(self._shapes[name])
                raise DataError(f'"{name}" has shape {found} per step, in the demonstrations {expected}')
            _check_size(name, column, LARGEST, "numbers beyond it are not finite once they are squared")
            if self.multiple is not None and name in self._peaks:
                self._check_outliers(name, column, self._peaks[name])
        self._check_rewards(episode)
        with torch.no_grad():
            self._check_preprocessing(episode)

    def _check_outliers(self, name: str, column: np.ndarray, peaks: np.ndarray) -> None:
        assert self.multiple is not None
        reached = _flat(column)
        excess = reached > self.multiple * peaks
        if excess.any():
            step, i = (int(index) for index in np.argwhere(excess)[0])
            raise DataError(
                f'"{name}" reaches {reached[step, i]:.4g} in dimension {i} at step {step}, and the demonstrations '
                f"{peaks[i]:.4g} at most: more than {self.multiple:g} times that is an outlier "
                "(--replay.outlier-multiple)"
            )

    def _check_rewards(self, episode: Episode) -> None:
        _check_size("next.reward", episode.reward, LARGEST, "numbers beyond it are not finite once they are squared")
        if self.reward.source != "recorded" or self.multiple is None:
            return
        most = self.multiple * max(1.0, self._largest_reward)
        _check_size(
            "next.reward",
            episode.reward,
            most,
            f"the demonstrations' largest is {self._largest_reward:.4g}, and more than {self.multiple:g} times that is "
            "an outlier (--replay.outlier-multiple)",
        )

    def _check_preprocessing(self, episode: Episode) -> None:
        """Let the policy's own pre-processing see the largest and smallest of the episode, and every prompt."""
        rows = _extreme_rows(episode)
        chosen = self._processed(episode, rows)
        for name, column in chosen.items():
            known = name == "action" or name in self._shapes
            if isinstance(column, Tensor) and column.is_floating_point():
                _check_normalised(name, column, LARGEST_NORMALISED if known else np.inf)
        if _prompts_differ(chosen, [episode.task_at(row) for row in rows.tolist()]):
            for begin in range(0, len(episode), ROWS):
                self._processed(episode, np.arange(begin, min(begin + ROWS, len(episode))))

    def _processed(self, episode: Episode, rows: np.ndarray) -> dict[str, Any]:
        """Return what the policy's pre-processing makes of some rows and their chunks. The pictures are those of the
        first row: whole numbers are always finite."""
        missing = [key for key in self.policy.input_keys if key not in episode.obs]
        if missing:
            raise DataError(f"the episode has no {', '.join(missing)}; it has {', '.join(episode.obs)}")
        raw = {}
        for key in self.policy.input_keys:
            column = episode.obs[key]
            picture = column.dtype == np.uint8
            raw[key] = self.policy.resize_images(column[:1]).repeat(len(rows), 0) if picture else column[rows]
        tasks = [episode.task_at(row) for row in rows.tolist()]
        steps = np.minimum(rows[:, None] + np.arange(self.horizon), len(episode) - 1)
        numbers = {key: torch.from_numpy(column) for key, column in raw.items() if column.dtype != np.uint8}
        actions = numbers | {"task": tasks, "action": torch.from_numpy(episode.action[steps])}
        processed = preprocess_obs(self.policy, raw, tasks)
        return processed | {"action": self.policy.preprocess_actions(actions)}


def _numbers(episode: Episode) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the action and the observations that are no pictures, by name."""
    yield "action", episode.action
    yield from ((key, column) for key, column in episode.obs.items() if column.dtype != np.uint8)


def _flat(column: np.ndarray) -> np.ndarray:
    """Return the magnitudes [T, D] of a column [T, ...]."""
    return np.abs(column.reshape(len(column), -1).astype(np.float64))


def _largest_magnitudes(demos: Sequence[Episode]) -> dict[str, np.ndarray]:
    """Return the largest magnitude [D] of each dimension; of those that hardly move, a share of the column's."""
    peaks: dict[str, np.ndarray] = {}
    for episode in demos:
        for name, column in _numbers(episode):
            if len(column) and column.dtype.kind in "fiub":
                reached = _flat(column).max(axis=0)
                peaks[name] = np.maximum(peaks[name], reached) if name in peaks else reached
    return {name: np.maximum(peak, FLOOR * (peak.max(initial=0) or 1 / FLOOR)) for name, peak in peaks.items()}


def _check_form(episode: Episode) -> None:
    if len(episode) == 0:
        raise DataError("it has no step")
    columns: Mapping[str, np.ndarray] = dict(episode.obs) | {
        name: getattr(episode, name) for name in ("action", "reward", "success", "terminal")
    }
    if others := {name: len(column) for name, column in columns.items() if len(column) != len(episode)}:
        raise DataError(f"its columns are not of one length: {len(episode)} actions, {others}")
    if odd := {name: str(column.dtype) for name, column in columns.items() if column.dtype.kind not in "fiub"}:
        raise DataError(f"columns hold no numbers: {odd}")
    if (longest := max(map(len, episode.tasks))) > LONGEST_TASK:
        raise DataError(f"its instruction has {longest} characters; at most {LONGEST_TASK} are taken")
    episode.check("it")


def _check_size(name: str, column: np.ndarray, most: float, why: str) -> None:
    reached = _flat(column)
    if not (reached <= most).all():
        step = int((reached > most).any(axis=1).argmax())
        raise DataError(
            f'"{name}" reaches {reached[step].max():.4g} at step {step}, at most {most:.4g} is taken: {why}'
        )


def _check_normalised(name: str, column: Tensor, most: float) -> None:
    reached = column.float().abs()
    if not torch.isfinite(reached).all():
        raise DataError(f'"{name}" is not finite after normalisation')
    if reached.numel() and float(reached.max()) > most:
        raise DataError(
            f'"{name}" reaches {float(reached.max()):.4g} after normalisation, at most {most:.4g} is taken: it lies '
            "far outside the statistics in use"
        )


def _extreme_rows(episode: Episode) -> np.ndarray:
    """Return the indices of each instruction's first row and of those with the largest and smallest numbers, at most
    ROWS."""
    found = [list(episode.tasks.values())]
    for _, column in _numbers(episode):
        flat = column.reshape(len(column), -1)
        found += [[int(flat[:, i].argmax()), int(flat[:, i].argmin())] for i in range(flat.shape[1])]
    share = max(2, ROWS // len(found))
    first = [row for rows in found for row in rows[:share]]
    return np.array(list(dict.fromkeys(first))[:ROWS])


def _prompts_differ(processed: Mapping[str, Any], tasks: Sequence[str]) -> bool:
    """Return True if rows of one instruction have different tokens: the state is part of the prompt."""
    first = torch.tensor([tasks.index(task) for task in tasks])
    tokens = [
        column.cpu()
        for column in processed.values()
        if isinstance(column, Tensor) and column.ndim == 2 and column.dtype in (torch.int64, torch.int32)
    ]
    return any(bool((column != column[first]).any()) for column in tokens)
