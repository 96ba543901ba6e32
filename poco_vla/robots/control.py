"""Driving a LeRobot robot at a fixed rate: observation, chunk, H actions open loop."""

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from typing import Protocol, runtime_checkable

import numpy as np
from lerobot.lerobot_types import RobotAction, RobotObservation
from lerobot.robots import Robot
from lerobot.teleoperators import Teleoperator
from lerobot.utils.constants import OBS_STR
from lerobot.utils.feature_utils import build_dataset_frame, hw_to_dataset_features

from poco_vla.data import Episode
from poco_vla.errors import ConfigError, DataError, NonFiniteError
from poco_vla.robots.safety import ActionError, ActionLimits, StoppedError, check_finite
from poco_vla.robots.signals import Signal, Signals
from poco_vla.robots.standstill import Standstill, oldest_chunk, time_since_boot

logger = logging.getLogger(__name__)

POLL = 0.01
"""Seconds between two polls of the signals while the robot waits for a deadline or for the policy."""
SPIN = 0.001
"""Seconds before a deadline that are spun instead of slept."""
NOBODY = -1
"""Weights version of a step that no policy chose: a person drove, or the robot held."""


@runtime_checkable
class Answer(Protocol):
    """A chunk and the version of the weights that chose it; what a remote policy replies."""

    @property
    def actions(self) -> np.ndarray: ...

    @property
    def weights_version(self) -> int: ...


PolicyCall = Callable[[Mapping[str, np.ndarray], str], np.ndarray | Answer]
"""(LeRobot key -> [1, ...], task) -> [at least H, action_dim], in the robot's units and its features' order."""
Hold = Callable[[RobotObservation, RobotAction | None], RobotAction]
"""(what the robot sees, the last action sent or None) -> the action that keeps it where it is."""


class Ending(Enum):
    """Why an episode ended."""

    SUCCESS = "success"
    FAILURE = "failure"
    TIME_LIMIT = "time limit"
    DISCARDED = "discarded"
    STOPPED = "emergency stop"
    POLICY_LOST = "policy lost"


_ENDINGS = {
    Signal.SUCCESS: Ending.SUCCESS,
    Signal.FAILURE: Ending.FAILURE,
    Signal.DISCARD: Ending.DISCARDED,
    Signal.STOP: Ending.STOPPED,
}
_KEPT = (Ending.SUCCESS, Ending.FAILURE, Ending.TIME_LIMIT)


@dataclass(frozen=True)
class EpisodeStats:
    """How an episode went. Times in seconds.

    Attributes:
        ending: why it ended; `message` says it in words.
        steps: control steps, `interventions` of which a person drove.
        missed: control steps whose action was not there in time: the robot held.
        overruns: control steps that began a whole period late or more: the robot's cameras or this machine are slow.
        clipped: actions that the limits changed.
        waited: time spent on chunks that were asked for when they were needed (lead 0, first chunks).
        retries: times that the policy could not be reached.
        period_error_p50, period_error_p95, period_error_max: of |time between two control steps - 1/fps|.
        latency_p50, latency_max: of the policy's answers.
    """

    ending: Ending
    message: str
    steps: int
    interventions: int
    missed: int
    overruns: int
    clipped: int
    waited: float
    retries: int
    period_error_p50: float
    period_error_p95: float
    period_error_max: float
    latency_p50: float
    latency_max: float


@dataclass(frozen=True)
class RobotEpisode:
    """An episode with what only robots have.

    Attributes:
        interventions: [T] bool: a person drove this step by the teleoperator.
        weights_version: [T] int64: of the policy that chose the step's action, `NOBODY` where none did; 0 where the
            policy does not say.
    """

    episode: Episode
    interventions: np.ndarray
    stats: EpisodeStats
    weights_version: np.ndarray


@dataclass(frozen=True)
class Sent:
    """A finished control step, for `on_step`.

    Attributes:
        observation: what the robot saw before, by the robot's names.
        action: what was sent, by the robot's names.
        steps: control steps of the episode so far, this one included, `missed` of which held for want of an action.
        weights_version: of the policy's last answer.
        intervention: a person drove this step.
    """

    observation: RobotObservation
    action: RobotAction
    steps: int
    missed: int
    weights_version: int
    intervention: bool


class Pace:
    """Deadlines 1/fps apart on the monotonic clock; `fps` None has none."""

    def __init__(self, fps: int | float | None) -> None:
        self.period = 1 / fps if fps else 0.0
        self.errors: list[float] = []
        self.overruns = 0
        self._begun: float | None = None
        self._deadline = 0.0

    def wait(self, poll: Callable[[], None]) -> None:
        """Wait until the next control step begins, calling `poll` meanwhile."""
        if self._begun is None or not self.period:
            self._begun = time.monotonic()
            self._deadline = self._begun + self.period
            return
        while (left := self._deadline - time.monotonic()) > SPIN:
            time.sleep(min(left - SPIN, POLL))
            poll()
        while (now := time.monotonic()) < self._deadline:
            pass
        self.errors.append(abs(now - self._begun - self.period))
        if now - self._deadline >= self.period:  # what is lost is lost: no burst of actions to catch up
            self.overruns += 1
            self._deadline = now
        self._begun = now
        self._deadline += self.period

    def pause(self) -> None:
        """Restart the clock if an intended wait has exceeded the deadline."""
        if time.monotonic() > self._deadline:
            self._begun = None


@dataclass
class _Request:
    """A chunk on its way: `asked` when, after `k` actions of the plan, `early` while some of those were left."""

    future: Future[tuple[np.ndarray | Answer, float]]
    asked: float
    k: int
    early: bool


@dataclass
class _Run:
    """State of the running episode."""

    pace: Pace
    standstill: Standstill
    observation: RobotObservation | None = None
    obs: dict[str, np.ndarray] = field(default_factory=dict)
    last: np.ndarray | None = None
    plan: np.ndarray | None = None
    k: int = 0
    accepted_at: float = 0.0
    version: int = 0
    request: _Request | None = None
    taken_over: bool = False
    lost_since: float | None = None
    rows: list[dict[str, np.ndarray]] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    interventions: list[bool] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    missed: int = 0
    clipped: int = 0
    retries: int = 0
    waited: float = 0.0

    @property
    def left(self) -> int:
        """Return the number of planned actions that have not been sent."""
        return 0 if self.plan is None else len(self.plan) - self.k

    def drop_plan(self) -> None:
        if self.request is not None:
            self.request.future.cancel()
        self.plan, self.request, self.k = None, None, 0


class _EndedError(Exception):
    def __init__(self, ending: Ending, message: str = "") -> None:
        super().__init__(message or ending.value)
        self.ending = ending


class RobotInteraction:
    """Episodes on a robot. Every action that is sent passes the limits, and is one row of the episode.

    Each control step reads the robot, hears the signals and sends one action. The policy thinks in a thread of its own:
    with `lead` 0 it is asked when the chunk has ended, and the robot waits for it; otherwise `lead` steps before, the
    robot going on meanwhile, and of the answer those actions are left out whose time has passed. An answer that is late
    finds the robot holding, one control step after the other. Holding is the last position for actions called `*.pos`,
    and 0 for velocities and changes (`*.vel`, `delta_*`): while the robot waits at rest nothing needs to be sent.

    A chunk is for the moment it was asked at: after the program (or its machine) has stood still, and when the robot
    takes more than twice as long for a chunk as it should, the rest is dropped and the policy asked anew.

    Emergency stop: no action follows the signal but the one that `on_stop` sends. The default sends the present
    position once, because an arm that is sent nothing still travels to its last goal. The robot stays connected:
    LeRobot's arms let go of their torque when disconnected, and fall. The same happens after an error and Ctrl-C. No
    episode is run from then on until `release` is called.

    Args:
        robot: connected.
        policy_call: asked in a thread of its own, one call at a time.
        horizon: H, control steps per chunk; of longer answers the rest is not used.
        task: the instruction.
        signals: ends episodes; see :mod:`poco_vla.robots.signals`.
        limits: what may be sent. A person's actions are clipped by them, also where a policy's are refused.
        max_steps: time limit, in control steps.
        reset: brings robot and scene back before each episode: a script, or a prompt for a person. Signals are polled
            once it has returned; a STOP meanwhile then lets no episode begin.
        fps: control steps per second; None goes as fast as it can (a simulated robot that is not in real time).
        lead: see above; below `horizon`.
        teleoperator: a person's own arm or pad, connected; drives between TAKEOVER and RELEASE. With a `max_step` in
            the limits the robot goes to where a leader arm is step by step; without, it jumps there.
        hold: how to hold where the actions' names do not say it.
        on_stop: called with the last observation in place of the default above.
        patience: seconds without an answer, or of failing connections, after which the episode is discarded.
        retry_on: what `policy_call` raises when the policy cannot be reached; other errors end the run.
        retry_every: seconds between two tries.
        failure_is_terminal: nothing of value follows a failure that was signalled. With a reward that costs at every
            step, say False: failing soon would be worth more than trying on.
        on_step: called after each action, in the control loop: it must be quick.
    """

    def __init__(
        self,
        robot: Robot,
        policy_call: PolicyCall,
        *,
        horizon: int,
        task: str,
        signals: Signals,
        limits: ActionLimits,
        max_steps: int,
        reset: Callable[[], None],
        fps: int | float | None = 15,
        lead: int = 0,
        teleoperator: Teleoperator | None = None,
        hold: Hold | None = None,
        on_stop: Callable[[RobotObservation], None] | None = None,
        patience: float = 10.0,
        retry_on: tuple[type[Exception], ...] = (ConnectionError, TimeoutError),
        retry_every: float = 0.5,
        failure_is_terminal: bool = True,
        on_step: Callable[[Sent], None] | None = None,
    ) -> None:
        _check_numbers(horizon, lead, max_steps, fps)
        self.robot, self.policy_call, self.teleoperator = robot, policy_call, teleoperator
        self.horizon, self.task, self.signals, self.limits = horizon, task, signals, limits
        self.max_steps, self.reset, self.fps, self.lead = max_steps, reset, fps, lead
        self.patience, self.retry_on, self.retry_every = patience, retry_on, retry_every
        self.failure_is_terminal, self.on_step = failure_is_terminal, on_step
        self.names = _action_names(robot)
        self.hold: Hold = hold or hold_still(self.names, robot.observation_features)
        self.on_stop = on_stop or self._hold_present
        self.stopped = False
        self.stats: EpisodeStats | None = None
        self._features = observation_features(robot)
        self._policy = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")
        limits.vectors(self.names)
        if teleoperator is not None:
            _check_teleoperator(teleoperator, self.names)

    def __enter__(self) -> "RobotInteraction":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop asking the policy. The robot stays as it is."""
        self._policy.shutdown(wait=False, cancel_futures=True)

    def release(self) -> None:
        """Allow episodes again after an emergency stop, once a person has checked the robot."""
        _pending_signals(self.signals)  # the stop key, pressed more than once, was meant for then
        self.stopped = False

    def run_episode(self) -> RobotEpisode | None:
        """Reset, then drive until a signal or the time limit; None when the episode is not worth keeping.

        `stats` says in any case how it went.

        Raises:
            StoppedError: after an emergency stop, until `release`.
            ActionError: the limits refuse an action.
        """
        self._check_stop_between_episodes()
        self.reset()
        self.signals.begin()
        pace = Pace(self.fps)
        run = _Run(pace, Standstill(pace.period))
        try:
            ended = self._drive(run)
        except BaseException:  # Ctrl-C or a camera that breaks must not leave the arm on its way
            self._halt(run)
            raise
        run.drop_plan()
        self.stats = _stats(run, ended)
        logger.info("%s", self.stats.message)
        return self._build_episode(run, ended.ending)

    def _check_stop_between_episodes(self) -> None:
        self.signals.begin()
        self.stopped = self.stopped or Signal.STOP in _pending_signals(self.signals)
        if self.stopped:
            raise StoppedError("the robot was stopped; look at it, then call release() to run episodes again")

    def _drive(self, run: _Run) -> _EndedError:
        try:
            while True:
                self._step(run)
        except _EndedError as ended:
            if ended.ending is Ending.STOPPED:
                self._halt(run)
            else:
                self._rest(run)
            return ended

    def _step(self, run: _Run) -> None:
        """Run one control step: send one action, or none while the robot waits at rest."""
        run.pace.wait(lambda: self._poll_signals(run))
        run.observation = self.robot.get_observation()
        run.obs = self._convert(run.observation)
        self.signals.observe(run.obs)
        self._poll_signals(run)
        if len(run.actions) >= self.max_steps:
            raise _EndedError(Ending.TIME_LIMIT)
        if run.last is None:
            run.last = self._vector(self.hold(run.observation, None), "hold")
        if run.taken_over:
            self._send(run, self._teleoperator_action(run.last, run), intervention=True)
        elif self._planned(run):
            assert run.plan is not None
            action, run.k = run.plan[run.k], run.k + 1
            self._send(run, action, version=run.version)

    def _poll_signals(self, run: _Run) -> None:
        pending = _pending_signals(self.signals)
        if Signal.STOP in pending:
            raise _EndedError(Ending.STOPPED)
        if stood := run.standstill.passed():
            self._forget_plan(run, f"this program stood still for {stood:.1f} s")
        for signal in pending:
            if signal in _ENDINGS:
                raise _EndedError(_ENDINGS[signal])
            if self.teleoperator is None:
                logger.warning("takeover was requested, but there is no teleoperator: the policy continues")
            else:
                run.taken_over = signal is Signal.TAKEOVER
                run.drop_plan()

    def _forget_plan(self, run: _Run, why: str) -> None:
        """Drop a plan that was made for an earlier state; the next control step asks the policy again."""
        if run.plan is not None or run.request is not None:
            logger.warning("%s: the rest of its chunk is dropped, and the policy is asked again", why)
            run.drop_plan()

    def _planned(self, run: _Run) -> bool:
        """Return True if there is a planned action to send now."""
        age = time_since_boot() - run.accepted_at
        if run.left > 0 and age > oldest_chunk(self.horizon, run.pace.period):
            self._forget_plan(run, f"the chunk of {self.horizon} actions is {age:.1f} s old")
        if run.left <= self.lead and run.request is None:
            batch = {key: value[None] for key, value in run.obs.items()}
            future = self._policy.submit(self._ask, batch)
            run.request = _Request(future, time.monotonic(), run.k, early=run.left > 0)
        if run.left > 0:
            return True
        request = run.request
        assert request is not None
        if not request.early:
            self._await(run, request)
        if run.request is not request:  # the program stood still meanwhile
            return False
        if request.future.done():
            return self._accept_answer(run, request)
        self._check_patience(run, request)
        run.missed += 1
        self._send(run, self._rest_action(run))
        return False

    def _ask(self, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray | Answer, float]:
        began = time.monotonic()
        return self.policy_call(batch, self.task), time.monotonic() - began

    def _await(self, run: _Run, request: _Request) -> None:
        """Wait for an answer; if the robot still moves, for one control step at most."""
        began = time.monotonic()
        moves = bool(run.pace.period) and self._moves(run)
        while run.request is request and not request.future.done():
            wait([request.future], timeout=POLL)
            self._poll_signals(run)
            self._check_patience(run, request)
            if moves and time.monotonic() - began > run.pace.period:
                break
        run.waited += time.monotonic() - began
        run.pace.pause()

    def _check_patience(self, run: _Run, request: _Request) -> None:
        now = time.monotonic()
        if now - request.asked > self.patience and not request.future.done():
            raise _EndedError(
                Ending.POLICY_LOST,
                f"the policy has not answered for {now - request.asked:.1f} s (patience {self.patience:g} s): the "
                f"robot holds, and the episode is discarded after {len(run.actions)} steps",
            )

    def _accept_answer(self, run: _Run, request: _Request) -> bool:
        """Make the answer the plan; return False if the policy could not be reached and is asked again."""
        error = request.future.exception()
        if isinstance(error, self.retry_on):
            self._try_again(run, error)
            return False
        answer, latency = request.future.result()
        run.lost_since = None
        run.latencies.append(latency)
        chunk, run.version = (answer, 0) if isinstance(answer, np.ndarray) else (answer.actions, answer.weights_version)
        passed = run.k - request.k
        planned = _check_chunk(chunk, self.horizon, self.names)[passed : passed + self.horizon]
        assert run.last is not None
        run.plan, run.k, run.request = self.limits.apply(planned, self.names, run.last), 0, None
        run.accepted_at = time_since_boot()
        run.clipped += int((run.plan != planned).any(axis=1).sum())
        return True

    def _try_again(self, run: _Run, error: BaseException) -> None:
        """Hold and wait a moment; the next control step asks again, with the observation of that time."""
        run.drop_plan()
        run.retries += 1
        now = time.monotonic()
        run.lost_since = run.lost_since or now
        if now - run.lost_since >= self.patience:
            raise _EndedError(
                Ending.POLICY_LOST,
                f"the policy could not be reached for {now - run.lost_since:.1f} s, {run.retries} tries (last: "
                f"{error}): the robot holds, and the episode is discarded after {len(run.actions)} steps",
            )
        if run.lost_since == now:
            logger.warning("the policy cannot be reached (%s): the robot holds, trying again", error)
        if self._moves(run):
            self._send(run, self._rest_action(run))
        while time.monotonic() - now < self.retry_every:
            time.sleep(POLL)
            self._poll_signals(run)
        run.pace.pause()

    def _teleoperator_action(self, last: np.ndarray, run: _Run) -> np.ndarray:
        assert self.teleoperator is not None
        wanted = self._vector(self.teleoperator.get_action(), "teleoperator")[None]
        allowed = self.limits.clip(wanted, self.names, last)
        run.clipped += int((allowed != wanted).any())
        return allowed[0]

    def _send(self, run: _Run, action: np.ndarray, *, version: int = NOBODY, intervention: bool = False) -> None:
        wanted = dict(zip(self.names, action.tolist(), strict=True))
        sent = self.robot.send_action(wanted)
        run.last = self._vector(wanted | sent, "robot")
        run.rows.append(run.obs)
        run.actions.append(run.last)
        run.versions.append(version)
        run.interventions.append(intervention)
        if self.on_step is not None:
            assert run.observation is not None
            self.on_step(Sent(run.observation, wanted | sent, len(run.actions), run.missed, run.version, intervention))

    def _moves(self, run: _Run) -> bool:
        """True if the last action keeps the robot moving."""
        return run.last is not None and not np.array_equal(self._rest_action(run), run.last)

    def _rest_action(self, run: _Run) -> np.ndarray:
        assert run.observation is not None
        assert run.last is not None
        last = dict(zip(self.names, run.last.tolist(), strict=True))
        return self._vector(self.hold(run.observation, last), "hold")

    def _rest(self, run: _Run) -> None:
        """Send a hold action after the last row if the robot still moves."""
        if self._moves(run):
            self.robot.send_action(dict(zip(self.names, self._rest_action(run).tolist(), strict=True)))

    def _halt(self, run: _Run) -> None:
        self.stopped = True
        run.drop_plan()
        try:
            observation = run.observation if run.observation is not None else self.robot.get_observation()
            self.on_stop(observation)
        except Exception:  # drivers raise anything; what brought us here must still be raised
            logger.exception("the robot could not be told to hold: cut its power")

    def _hold_present(self, observation: RobotObservation) -> None:
        present = self._vector(self.hold(observation, None), "hold")  # a sensor that fails must move nothing
        self.robot.send_action(dict(zip(self.names, present.tolist(), strict=True)))

    def _vector(self, action: Mapping[str, float], origin: str) -> np.ndarray:
        if missing := [name for name in self.names if name not in action]:
            raise ActionError(f"the {origin}'s action has no {missing}; found {sorted(action)}")
        vector = np.array([action[name] for name in self.names], dtype=np.float32)
        check_finite(vector[None], self.names)
        return vector

    def _convert(self, observation: RobotObservation) -> dict[str, np.ndarray]:
        """Return the observation by LeRobot's dataset names: state float32, pictures uint8 [height, width, 3]."""
        if missing := [name for name in self.robot.observation_features if name not in observation]:
            raise DataError(f"{self.robot} gave no {missing}: is a camera or a cable unplugged?")
        frame = build_dataset_frame(self._features, observation, OBS_STR)
        for key, value in frame.items():
            wanted = tuple(self._features[key]["shape"])
            kind = "float32" if self._features[key]["dtype"] == "float32" else "uint8"
            if value.shape != wanted or value.dtype != kind:
                raise DataError(f'"{key}" is {value.dtype} {value.shape}; {self.robot} promises {kind} {wanted}')
            if kind == "float32" and not np.isfinite(value).all():
                raise NonFiniteError(f'{self.robot} gave a "{key}" that is not finite: {value}')
        return {key: value.copy() for key, value in frame.items()}

    def _build_episode(self, run: _Run, ending: Ending) -> RobotEpisode | None:
        if ending not in _KEPT or not run.actions:
            return None
        assert self.stats is not None
        last = np.arange(len(run.actions)) == len(run.actions) - 1
        success = last & (ending is Ending.SUCCESS)
        terminal = success | (last & (ending is Ending.FAILURE and self.failure_is_terminal))
        episode = Episode(
            obs={key: np.stack([row[key] for row in run.rows]) for key in run.rows[0]},
            action=np.stack(run.actions),
            reward=success.astype(np.float32),
            success=success,
            terminal=terminal,
            task=self.task,
        )
        versions = np.array(run.versions, dtype=np.int64)
        return RobotEpisode(episode, np.array(run.interventions), self.stats, versions)


_MOTION = re.compile(r"(^|\.)delta_|\.(vel|delta)$")
"""Names of actions that are a change: 0 holds."""


def hold_still(names: Sequence[str], observed: Mapping[str, object]) -> Hold:
    """Return the hold action that the names of LeRobot's robots imply.

    `*.pos` holds the last goal, or the present position when there is none; velocities and changes hold at 0.

    Raises:
        ConfigError: a name that says neither, or a position that is not observed.
    """
    for name in names:
        if not (_MOTION.search(name) or (name.endswith(".pos") and name in observed)):
            raise ConfigError(
                f'how to hold "{name}" cannot be told: expected an observed "*.pos", a "*.vel" or a "delta_*". Give a '
                "`hold` of your own."
            )

    def hold(observation: RobotObservation, last: RobotAction | None) -> RobotAction:
        goals = observation if last is None else last
        return {name: 0.0 if _MOTION.search(name) else float(goals[name]) for name in names}

    return hold


def _pending_signals(signals: Signals) -> list[Signal]:
    """Return all pending signals, at most 100 of a source that never ends."""
    return list(islice(iter(signals.poll, None), 100))


def _check_numbers(horizon: int, lead: int, max_steps: int, fps: int | float | None) -> None:
    if horizon < 1 or max_steps < 1:
        raise ConfigError(f"horizon is {horizon}, max_steps is {max_steps}; both count control steps, from 1 on")
    if not 0 <= lead < horizon:
        raise ConfigError(f"lead is {lead}; a chunk of {horizon} can be asked for 0 to {horizon - 1} steps early")
    if fps is not None and not fps > 0:
        raise ConfigError(f"fps is {fps}; expected control steps per second, or None for no fixed rate")


def _action_names(robot: Robot) -> list[str]:
    features = robot.action_features
    if others := {name: kind for name, kind in features.items() if kind is not float}:
        raise ConfigError(f"{robot} takes actions that are no numbers: {others}; only float features can be driven")
    return list(features)


def observation_features(robot: Robot) -> dict[str, dict]:
    """Return the robot's observations as the features of a LeRobot dataset.

    Raises:
        ConfigError: something that is neither a number nor a colour picture.
    """
    for name, shape in robot.observation_features.items():
        if isinstance(shape, tuple) and (len(shape) != 3 or shape[2] != 3):
            raise ConfigError(f'"{name}" of {robot} is {shape}; pictures are (height, width, 3). Turn depth off.')
    return hw_to_dataset_features(robot.observation_features, OBS_STR, use_video=False)


def _check_teleoperator(teleoperator: Teleoperator, names: Sequence[str]) -> None:
    # LeRobot's arms list their features by name; its pads and keyboards as {"dtype", "shape", "names": {...}}.
    features = teleoperator.action_features
    features = features.get("names", features)
    if missing := [name for name in names if name not in features]:
        raise ConfigError(f"{teleoperator} gives {list(features)}, but the robot also needs {missing}")


def _check_chunk(chunk: np.ndarray, horizon: int, names: Sequence[str]) -> np.ndarray:
    if chunk.ndim != 2 or len(chunk) < horizon or chunk.shape[1] != len(names):
        raise ActionError(
            f"the policy gave a chunk {chunk.shape}; expected at least {horizon} steps of {len(names)} actions "
            f"({', '.join(names)}): nothing was sent"
        )
    return chunk.astype(np.float32)


def _stats(run: _Run, ended: _EndedError) -> EpisodeStats:
    errors, latencies = run.pace.errors or [0.0], run.latencies or [0.0]
    p50, p95 = np.percentile(errors, [50, 95])
    return EpisodeStats(
        ending=ended.ending,
        message=str(ended),
        steps=len(run.actions),
        interventions=sum(run.interventions),
        missed=run.missed,
        overruns=run.pace.overruns,
        clipped=run.clipped,
        waited=run.waited,
        retries=run.retries,
        period_error_p50=float(p50),
        period_error_p95=float(p95),
        period_error_max=max(errors),
        latency_p50=float(np.median(latencies)),
        latency_max=max(latencies),
    )
