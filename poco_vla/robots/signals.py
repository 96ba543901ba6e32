"""What a person, a script or a detector says about the episode that is running: one small interface."""

import atexit
import os
import re
import select
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from poco_vla.errors import ConfigError


class Signal(Enum):
    """What a signal asks for."""

    SUCCESS = "success"
    FAILURE = "failure"
    DISCARD = "discard"
    STOP = "stop"
    """Emergency: nothing more is sent."""
    TAKEOVER = "takeover"
    """From here on the teleoperator drives."""
    RELEASE = "release"
    """From here on the policy drives again."""


class Signals(ABC):
    """A source of signals. `poll` is called at every control step and, while the robot waits, every few ms."""

    @abstractmethod
    def poll(self) -> Signal | None:
        """Return the oldest signal that has not been returned yet, None if there is none. Never waits."""

    def begin(self) -> None:  # noqa: B027 (most sources have nothing to do)
        """Begin an episode: drop signals about the last one, but never a STOP."""

    def observe(self, obs: Mapping[str, np.ndarray]) -> None:  # noqa: B027
        """Receive the observation of this control step, by LeRobot's names, without a batch axis."""


KEYS = {"s": Signal.SUCCESS, "f": Signal.FAILURE, "d": Signal.DISCARD, " ": Signal.STOP}
"""Key -> signal; "t" takes over and, pressed again, releases. A foot pedal that types one of them does as well."""
_SEQUENCE = re.compile(rb"\x1b[\[O][0-9;]*[A-Za-z~]")
"""What arrow and function keys send; the left arrow's ends in a D."""
_BEGUN = re.compile(rb"\x1b(?:[\[O][0-9;]*)?$")
_PAUSE = 0.02
"""Seconds between two looks at the keys while an answer is waited for."""


class KeySignals(Signals):
    """Keys typed in a terminal, without Enter and without a display server: works over ssh (`ssh -t`).

    A context manager: within it the terminal gives keys at once and shows none; afterwards it is as it was, also after
    an exception, Ctrl-C (which stays the interrupt) or exit(). A terminal that goes away (a dropped connection) is a
    STOP: its emergency key is gone. Upper case counts as lower case.

    LeRobot's own listener (lerobot.utils.keyboard_input) does nothing, silently, where there is no terminal, and takes
    keys in a thread that swallows errors: an emergency key needs better.

    Args:
        terminal: file descriptor of the terminal; None is standard input.
        keys: key -> signal; others mean nothing, but "t".
    """

    def __init__(self, terminal: int | None = None, keys: Mapping[str, Signal] = KEYS) -> None:
        self._fd = terminal
        self.keys = dict(keys)
        self._before: list | None = None
        self._waiting: deque[Signal] = deque()
        self._typed: deque[str] = deque(maxlen=1024)
        self._rest = b""
        self._taken_over = False
        self._gone = False

    def __enter__(self) -> "KeySignals":
        try:
            import termios
            import tty
        except ImportError as error:
            raise ConfigError("keys need a POSIX terminal (Linux, macOS, WSL); use other signals here") from error
        fd = sys.stdin.fileno() if self._fd is None else self._fd
        if not os.isatty(fd):
            raise ConfigError(
                f"keys need a terminal, but file descriptor {fd} is a file or a pipe. Run in a terminal (over ssh: "
                "ssh -t), or use other signals."
            )
        self._fd, self._before = fd, termios.tcgetattr(fd)
        atexit.register(self.close)
        tty.setcbreak(fd)  # no line buffer, no echo; Ctrl-C still interrupts
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Restore the terminal; keys typed meanwhile do not reach the shell."""
        import termios

        atexit.unregister(self.close)
        before, self._before = self._before, None
        if before is not None and self._fd is not None and os.isatty(self._fd):
            termios.tcsetattr(self._fd, termios.TCSAFLUSH, before)

    def begin(self) -> None:
        self._gone = False
        self._read()
        self._waiting = deque(signal for signal in self._waiting if signal is Signal.STOP)
        self._taken_over = False

    def poll(self) -> Signal | None:
        self._read()
        return self._waiting.popleft() if self._waiting else None

    @property
    def gone(self) -> bool:
        """True if the terminal is closed, so that nobody can answer."""
        return self._gone

    def ask(self, answers: Collection[str]) -> str | None:
        """Wait for one of the keys `answers`, pressed from now on; " " is Enter. Other input is dropped.

        None when a STOP was heard, before or instead: it still is to be heard, as a signal. One that is among the
        signals already ends the wait at once, so that nobody is asked while the robot must be looked at.
        """
        self.begin()
        self._typed.clear()
        while Signal.STOP not in self._waiting:
            answer = next((key for key in self._typed if key in answers), None)
            if answer is not None:
                return answer
            self._typed.clear()
            time.sleep(_PAUSE)
            self._read()
        return None

    def _read(self) -> None:
        if self._before is None or self._fd is None:
            raise ConfigError("the terminal is not open: use KeySignals as `with KeySignals() as keys:`")
        while not self._gone and select.select([self._fd], [], [], 0)[0]:
            try:
                typed = os.read(self._fd, 1024)
            except OSError:
                typed = b""
            if typed:
                self._take(typed)
            else:
                self._gone = True
                self._waiting.appendleft(Signal.STOP)

    def _take(self, typed: bytes) -> None:
        """Parse input: escape sequences are skipped, also in two pieces; all other characters are keys, so that no
        space is lost."""
        typed = _SEQUENCE.sub(b"", self._rest + typed)
        begun = _BEGUN.search(typed)
        self._rest = begun.group() if begun else b""
        for key in typed[: len(typed) - len(self._rest)].decode("latin1").lower().replace("\r", "\n"):
            self._typed.append(key)
            if key == "t":
                self._taken_over = not self._taken_over
                self._waiting.append(Signal.TAKEOVER if self._taken_over else Signal.RELEASE)
            elif key in self.keys:
                self._waiting.append(self.keys[key])


@runtime_checkable
class KnowsSuccess(Protocol):
    """A robot, or anything, that can tell whether its task is done."""

    @property
    def success(self) -> bool: ...


class RobotSuccess(Signals):
    """Success as the robot itself knows it: a simulated robot's, or a sensor's in the scene. Given once an episode."""

    def __init__(self, robot: KnowsSuccess) -> None:
        self.robot = robot
        self._given = False

    def begin(self) -> None:
        self._given = False

    def poll(self) -> Signal | None:
        if self._given or not self.robot.success:
            return None
        self._given = True
        return Signal.SUCCESS


@runtime_checkable
class RewardModel(Protocol):
    """What LeRobot's reward models (lerobot.rewards.PreTrainedRewardModel) do."""

    def compute_reward(self, batch: dict[str, Any]) -> torch.Tensor: ...


class RewardModelSuccess(Signals):
    """Success as a LeRobot reward model sees it in what the robot observes. Given once an episode.

    Looks are taken in the control loop: choose `every` so that one fits between two control steps on this machine;
    one that does not shows up as overruns.

    Args:
        model: rewards a batch of observations.
        task: the instruction, for models that read it.
        preprocess: the model's own processor (lerobot.rewards.factory.make_reward_pre_post_processors gives it).
        device: where the model is.
        threshold: a reward above it is a success.
        every: control steps between two looks.
        agree: so many looks, one after the other, must find success.
    """

    def __init__(
        self,
        model: RewardModel,
        task: str = "",
        *,
        preprocess: Callable[[dict[str, Any]], dict[str, Any]] = lambda batch: batch,
        device: str = "cpu",
        threshold: float = 0.5,
        every: int = 5,
        agree: int = 2,
    ) -> None:
        if every < 1 or agree < 1:
            raise ConfigError(f"every is {every}, agree is {agree}; both count from 1 on")
        self.model, self.task, self.preprocess, self.device = model, task, preprocess, torch.device(device)
        self.threshold, self.every, self.agree = threshold, every, agree
        self.begin()

    def begin(self) -> None:
        self._step = self._agreed = 0
        self._given = False

    @torch.no_grad()
    def observe(self, obs: Mapping[str, np.ndarray]) -> None:
        from lerobot.policies.utils import prepare_observation_for_inference  # slow: all of LeRobot's policies

        self._step += 1
        if self._step % self.every == 0:
            batch = prepare_observation_for_inference({**obs}, self.device, self.task)
            reward = float(self.model.compute_reward(self.preprocess(batch)).squeeze())
            self._agreed = self._agreed + 1 if reward > self.threshold else 0

    def poll(self) -> Signal | None:
        if self._given or self._agreed < self.agree:
            return None
        self._given = True
        return Signal.SUCCESS


class AnySignals(Signals):
    """Several sources as one, the first ones heard first: a person's keys, then what the robot says itself."""

    def __init__(self, sources: Iterable[Signals]) -> None:
        self.sources = list(sources)

    def begin(self) -> None:
        for source in self.sources:
            source.begin()

    def observe(self, obs: Mapping[str, np.ndarray]) -> None:
        for source in self.sources:
            source.observe(obs)

    def poll(self) -> Signal | None:
        return next((signal for source in self.sources if (signal := source.poll()) is not None), None)
