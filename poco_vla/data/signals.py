"""Success, ends and rewards of a dataset's steps, by one convention for all of its episodes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from poco_vla.config import DatasetConfig, RewardConfig
from poco_vla.data.episode import NO_REWARD
from poco_vla.errors import DataError

REWARD, SUCCESS, DONE, TRUNCATED = "next.reward", "next.success", "next.done", "next.truncated"


@dataclass(frozen=True)
class StepSignals:
    """Signals of all steps of a dataset, one behind the other.

    Attributes:
        success: [S] bool.
        terminal: [S] bool.
        reward: [S] float32.
        has_reward: a reward was recorded; otherwise `reward` repeats `success`.
        rule: how success is recognised, as text.
    """

    success: np.ndarray
    terminal: np.ndarray
    reward: np.ndarray
    has_reward: bool
    rule: str


def check_reward(features: Mapping[str, Any], reward: RewardConfig) -> None:
    """Raise DataError where the recorded reward is asked for and a dataset records none."""
    if reward.source == "recorded" and REWARD not in features:
        raise DataError(NO_REWARD)


def read_signals(
    columns: Mapping[str, np.ndarray],
    last: np.ndarray,
    config: DatasetConfig,
    name: str,
    whole_reward: Callable[[], np.ndarray] | None = None,
) -> StepSignals:
    """Return success, end and reward of each step.

    Args:
        columns: [S, ...] each, of the episodes in use; those of the signals among them.
        last: [S] bool: the last step of an episode.
        config: options of the convention.
        name: of the dataset, for messages.
        whole_reward: gives next.reward of all episodes of the dataset, in use or not, which show the convention; None
            takes those in use.

    Raises:
        DataError: the convention is not recognised, or an option refers to a column that is not there; the message says
            which option decides.
    """
    steps = len(last)
    reward = _flat(columns[REWARD], steps, REWARD, name).astype(np.float32) if REWARD in columns else None
    success, rule = _success(columns, reward, last, config, name, whole_reward)
    if DONE in columns:
        truncated = (
            _flags(columns[TRUNCATED], steps, TRUNCATED, name) if TRUNCATED in columns else np.zeros(steps, bool)
        )
        terminal = _flags(columns[DONE], steps, DONE, name) & ~truncated | success
    else:
        terminal = success
    earned = success.astype(np.float32) if reward is None else reward
    return StepSignals(success, terminal, earned, reward is not None, rule)


def _success(
    columns: Mapping[str, np.ndarray],
    reward: np.ndarray | None,
    last: np.ndarray,
    config: DatasetConfig,
    name: str,
    whole_reward: Callable[[], np.ndarray] | None,
) -> tuple[np.ndarray, str]:
    if SUCCESS in columns:
        unused = "" if config.success_reward is None else "; dataset.success_reward is not used, as success is recorded"
        success, rule = _recorded_success(_flat(columns[SUCCESS], len(last), SUCCESS, name), config, name)
        return success, rule + unused
    if config.success_threshold is not None:
        raise DataError(
            f"dataset.success_threshold is {config.success_threshold:g}, but {name} has no column {SUCCESS}: leave it "
            f"out, or give dataset.success_reward, which is about {REWARD}"
        )
    if reward is not None:
        return _rewarded_success(reward, config, name, whole_reward)
    if config.success_reward is not None:
        raise DataError(
            f"dataset.success_reward is {config.success_reward:g}, but {name} has no column {REWARD}: leave it out "
            "(demonstrations then succeed at their last step), or record the reward"
        )
    if config.success_at_end:
        return last.copy(), "neither success nor reward is recorded: each episode succeeds at its last step"
    return np.zeros(len(last), bool), "neither success nor reward is recorded, and dataset.success_at_end is off"


def _recorded_success(column: np.ndarray, config: DatasetConfig, name: str) -> tuple[np.ndarray, str]:
    if config.success_threshold is not None:
        with np.errstate(invalid="ignore"):  # NaN is no success
            return column >= config.success_threshold, f"{SUCCESS} of at least {config.success_threshold:g}"
    values = _values(column)
    if column.dtype != bool and not values <= {0.0, 1.0}:
        raise DataError(
            f"{SUCCESS} of {name} is {column.dtype} between {min(values):g} and {max(values):g}, neither true/false "
            "nor 0/1. Give dataset.success_threshold: the value from which a step counts as success."
        )
    return column == 1, f"{SUCCESS} as it is recorded"


def _rewarded_success(
    reward: np.ndarray, config: DatasetConfig, name: str, whole_reward: Callable[[], np.ndarray] | None
) -> tuple[np.ndarray, str]:
    if config.success_reward is not None:
        return reward >= config.success_reward, f"{REWARD} of at least {config.success_reward:g}"
    values = _values(reward if whole_reward is None else whole_reward()) | _values(reward)
    if values <= {0.0}:
        return reward == 1, (
            f"{REWARD} is 0 at every step, taken as 0/1 without a success (if 0 means success, give "
            "dataset.success_reward 0)"
        )
    if values <= {0.0, 1.0}:
        return reward == 1, f"{REWARD} of 0/1, 1 is success"
    if values <= {-1.0, 0.0}:
        return reward == 0, f"{REWARD} of -1/0, 0 is success"
    raise DataError(
        f"success is not recorded in {name}, and cannot be derived from a reward between {min(values):g} and "
        f"{max(values):g} that is neither 0/1 nor -1/0. Give dataset.success_reward: the reward from which a step "
        "counts as success."
    )


def _values(column: np.ndarray) -> set[float]:
    """Return the distinct numbers; NaN is none, and is reported with its frame when episodes are checked."""
    found = np.unique(column.astype(np.float64))
    return set(found[~np.isnan(found)].tolist())


def _flags(column: np.ndarray, steps: int, key: str, name: str) -> np.ndarray:
    column = _flat(column, steps, key, name)
    values = _values(column)
    if column.dtype != bool and not values <= {0.0, 1.0}:
        raise DataError(
            f"{key} of {name} is {column.dtype} between {min(values):g} and {max(values):g}; expected true/false or "
            "0/1 at each step"
        )
    return column == 1


def _flat(column: np.ndarray, steps: int, key: str, name: str) -> np.ndarray:
    if column.size != steps:
        raise DataError(f"{key} of {name} has shape {column.shape[1:]} per step; expected one number")
    return column.reshape(steps)
