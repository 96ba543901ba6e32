"""What may be sent to a robot: finite actions, within bounds, no further than a step from the one before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from poco_vla.errors import ConfigError, PocoError, UnknownNameError

LARGEST = float(np.finfo(np.float32).max)
"""Largest magnitude of a limit: actions are float32."""
MODES = ("clip", "refuse")


class ActionError(PocoError):
    """An action that must not be sent. None of its chunk was."""


class StoppedError(PocoError):
    """The robot was stopped by its emergency key and nobody has released it."""


@dataclass(frozen=True)
class ActionLimits:
    """Bounds of a robot's actions, in the robot's own units.

    Attributes:
        low: smallest value, one for all action features or one per name.
        high: largest value, likewise.
        max_step: largest change from one control step to the next; a name left out of a mapping may jump. None: all
            may. For an action that is itself a change (a velocity, a `delta_x`), it bounds the acceleration.
        mode: "clip" moves an action to the nearest allowed one, "refuse" raises ActionError. Numbers that are not
            finite are refused in both.
    """

    low: float | Mapping[str, float]
    high: float | Mapping[str, float]
    max_step: float | Mapping[str, float] | None = None
    mode: Literal["clip", "refuse"] = "refuse"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UnknownNameError("mode", str(self.mode), MODES)
        for name in _named(self.low) | _named(self.high) or {""}:
            low, high = _value(self.low, name), _value(self.high, name)
            for kind, value in (("low", low), ("high", high)):
                if value is not None and not abs(value) <= LARGEST:
                    where = f' of "{name}"' if name else ""
                    raise ConfigError(f"action limits{where}: {kind} is {value}; a limit is a finite number")
            if low is not None and high is not None and not low < high:
                where = f' of "{name}"' if name else ""
                raise ConfigError(f"action limits{where}: low is {low}, high is {high}; low must be below high")
        for step in self.max_step.values() if isinstance(self.max_step, Mapping) else [self.max_step]:
            if step is not None and not step > 0:
                raise ConfigError(f"max_step is {step}; it must be above 0, or None for no limit")

    def vectors(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return low, high and max_step, each [action_dim], in the order of `names`.

        Raises:
            ConfigError: a limit for a name that the robot does not have, or a bound that is missing.
        """
        for field in (self.low, self.high, self.max_step):
            if unknown := _named(field) - set(names):
                raise ConfigError(f"action limits for {sorted(unknown)}, but the robot's actions are {list(names)}")
        for kind, field in (("low", self.low), ("high", self.high)):
            if isinstance(field, Mapping) and (missing := [name for name in names if name not in field]):
                raise ConfigError(f"no {kind} for {missing}; give one for each of the robot's actions")
        steps = np.inf if self.max_step is None else self.max_step
        return _vector(self.low, names), _vector(self.high, names), _vector(steps, names)

    def apply(
        self, chunk: Float[np.ndarray, "H A"], names: Sequence[str], last: Float[np.ndarray, " A"]
    ) -> Float[np.ndarray, "H A"]:
        """Return the chunk that may be sent after the action `last`: checked or clipped, as `mode` says."""
        return self.clip(chunk, names, last) if self.mode == "clip" else self.check(chunk, names, last)

    def check(
        self, chunk: Float[np.ndarray, "H A"], names: Sequence[str], last: Float[np.ndarray, " A"]
    ) -> Float[np.ndarray, "H A"]:
        """Return the same chunk if all of it may be sent after the action `last`.

        Raises:
            ActionError: it may not; names the joint, the step in the chunk, what was found and what is allowed.
        """
        check_finite(chunk, names)
        low, high, max_step = self.vectors(names)
        for what, excess in (("below", low - chunk), ("above", chunk - high)):
            if (found := _worst(excess)) is not None:
                k, j = found
                raise ActionError(
                    f'"{names[j]}" is {chunk[k, j]:.4g} at step {k} of the chunk, {what} its limits '
                    f"[{low[j]:.4g}, {high[j]:.4g}]: nothing was sent. Correct the policy or the limits, or clip."
                )
        steps = np.diff(np.concatenate([last[None], chunk]), axis=0)
        if (found := _worst(np.abs(steps) - max_step)) is not None:
            k, j = found
            raise ActionError(
                f'"{names[j]}" moves by {steps[k, j]:.4g} at step {k} of the chunk, at most {max_step[j]:.4g} is '
                "allowed per control step: nothing was sent. Correct the policy or the limits, or clip."
            )
        return chunk

    def clip(
        self, chunk: Float[np.ndarray, "H A"], names: Sequence[str], last: Float[np.ndarray, " A"]
    ) -> Float[np.ndarray, "H A"]:
        """Return the nearest chunk that may be sent after the action `last`.

        The step has the last word: from outside the bounds the robot comes back at most `max_step` at a time.
        """
        check_finite(chunk, names)
        low, high, max_step = self.vectors(names)
        allowed = np.empty_like(chunk)
        for k, action in enumerate(np.clip(chunk, low, high)):
            last = allowed[k] = np.clip(action, last - max_step, last + max_step)
        return allowed


def check_finite(chunk: Float[np.ndarray, "H A"], names: Sequence[str]) -> None:
    """Raise ActionError, naming joint and step, for a number that no motor can be sent to."""
    bad = np.argwhere(~np.isfinite(chunk))
    if len(bad):
        k, j = bad[0]
        raise ActionError(f'"{names[j]}" is {chunk[k, j]} at step {k} of the chunk: nothing was sent')


def _worst(excess: np.ndarray) -> tuple[int, int] | None:
    """Return step and joint of the largest excess; None if there is none beyond rounding (float32)."""
    k, j = np.unravel_index(int(excess.argmax()), excess.shape)
    return (int(k), int(j)) if excess[k, j] > 1e-5 else None


def _named(limit: float | Mapping[str, float] | None) -> set[str]:
    return set(limit) if isinstance(limit, Mapping) else set()


def _value(limit: float | Mapping[str, float], name: str) -> float | None:
    return limit.get(name) if isinstance(limit, Mapping) else limit


def _vector(limit: float | Mapping[str, float], names: Sequence[str]) -> np.ndarray:
    values = [limit.get(name, np.inf) if isinstance(limit, Mapping) else limit for name in names]
    return np.array(values, dtype=np.float32)
