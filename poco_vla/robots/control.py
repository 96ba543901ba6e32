"""Driving a LeRobot robot at a fixed rate: observation, chunk, H actions open loop."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import islice

import numpy as np
from lerobot.lerobot_types import RobotObservation
from lerobot.robots import Robot
from lerobot.teleoperators import Teleoperator
from lerobot.utils.constants import OBS_STR
from lerobot.utils.feature_utils import build_dataset_frame

from poco_vla.errors import ConfigError, DataError, NonFiniteError
from poco_vla.robots.episode import (
    ENDINGS,
    NOBODY,
    Answer,
    ChunkRequest,
    Ending,
    EpisodeState,
    EpisodeStats,
    RobotEpisode,
    Sent,
)
from poco_vla.robots.features import Hold, action_names, check_teleoperator, hold_still, observation_features
from poco_vla.robots.pace import POLL, Pace
from poco_vla.robots.safety import ActionError, ActionLimits, StoppedError, check_finite
from poco_vla.robots.signals import Signal, Signals
from poco_vla.robots.standstill import Standstill, oldest_chunk, time_since_boot

logger = logging.getLogger(__name__)
PolicyCall = Callable[[Mapping[str, np.ndarray], str], np.ndarray | Answer]
"""(LeRobot key -> [1, ...], task) -> [at least H, action_dim], in the robot's units and its features' order."""


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
        self.names = action_names(robot)
        self.hold: Hold = hold or hold_still(self.names, robot.observation_features)
        self.on_stop = on_stop or self._hold_present
        self.stopped = False
        self.stats: EpisodeStats | None = None
        self._features = observation_features(robot)
        self._policy = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")
        limits.vectors(self.names)
        if teleoperator is not None:
            check_teleoperator(teleoperator, self.names)

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
        run = EpisodeState(pace, Standstill(pace.period))
        try:
            ended = self._drive(run)
        except BaseException:  # Ctrl-C or a camera that breaks must not leave the arm on its way
            self._halt(run)
            raise
        run.drop_plan()
        self.stats = run.stats(ended.ending, str(ended))
        logger.info("%s", self.stats.message)
        return run.build(self.stats, self.task, failure_is_terminal=self.failure_is_terminal)

    def _check_stop_between_episodes(self) -> None:
        self.signals.begin()
        self.stopped = self.stopped or Signal.STOP in _pending_signals(self.signals)
        if self.stopped:
            raise StoppedError("the robot was stopped; look at it, then call release() to run episodes again")

    def _drive(self, run: EpisodeState) -> _EndedError:
        try:
            while True:
                self._step(run)
        except _EndedError as ended:
            if ended.ending is Ending.STOPPED:
                self._halt(run)
            else:
                self._rest(run)
            return ended

    def _step(self, run: EpisodeState) -> None:
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

    def _poll_signals(self, run: EpisodeState) -> None:
        pending = _pending_signals(self.signals)
        if Signal.STOP in pending:
            raise _EndedError(Ending.STOPPED)
        if stood := run.standstill.passed():
            self._forget_plan(run, f"this program stood still for {stood:.1f} s")
        for signal in pending:
            if signal in ENDINGS:
                raise _EndedError(ENDINGS[signal])
            if self.teleoperator is None:
                logger.warning("takeover was requested, but there is no teleoperator: the policy continues")
            else:
                run.taken_over = signal is Signal.TAKEOVER
                run.drop_plan()

    def _forget_plan(self, run: EpisodeState, why: str) -> None:
        """Drop a plan that was made for an earlier state; the next control step asks the policy again."""
        if run.plan is not None or run.request is not None:
            logger.warning("%s: the rest of its chunk is dropped, and the policy is asked again", why)
            run.drop_plan()

    def _planned(self, run: EpisodeState) -> bool:
        """Return True if there is a planned action to send now."""
        age = time_since_boot() - run.accepted_at
        if run.left > 0 and age > oldest_chunk(self.horizon, run.pace.period):
            self._forget_plan(run, f"the chunk of {self.horizon} actions is {age:.1f} s old")
        if run.left <= self.lead and run.request is None:
            batch = {key: value[None] for key, value in run.obs.items()}
            future = self._policy.submit(self._ask, batch)
            run.request = ChunkRequest(future, time.monotonic(), run.k, early=run.left > 0)
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

    def _await(self, run: EpisodeState, request: ChunkRequest) -> None:
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

    def _check_patience(self, run: EpisodeState, request: ChunkRequest) -> None:
        now = time.monotonic()
        if now - request.asked > self.patience and not request.future.done():
            raise _EndedError(
                Ending.POLICY_LOST,
                f"the policy has not answered for {now - request.asked:.1f} s (patience {self.patience:g} s): the "
                f"robot holds, and the episode is discarded after {len(run.actions)} steps",
            )

    def _accept_answer(self, run: EpisodeState, request: ChunkRequest) -> bool:
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

    def _try_again(self, run: EpisodeState, error: BaseException) -> None:
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

    def _teleoperator_action(self, last: np.ndarray, run: EpisodeState) -> np.ndarray:
        assert self.teleoperator is not None
        wanted = self._vector(self.teleoperator.get_action(), "teleoperator")[None]
        allowed = self.limits.clip(wanted, self.names, last)
        run.clipped += int((allowed != wanted).any())
        return allowed[0]

    def _send(
        self, run: EpisodeState, action: np.ndarray, *, version: int = NOBODY, intervention: bool = False
    ) -> None:
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

    def _moves(self, run: EpisodeState) -> bool:
        """True if the last action keeps the robot moving."""
        return run.last is not None and not np.array_equal(self._rest_action(run), run.last)

    def _rest_action(self, run: EpisodeState) -> np.ndarray:
        assert run.observation is not None
        assert run.last is not None
        last = dict(zip(self.names, run.last.tolist(), strict=True))
        return self._vector(self.hold(run.observation, last), "hold")

    def _rest(self, run: EpisodeState) -> None:
        """Send a hold action after the last row if the robot still moves."""
        if self._moves(run):
            self.robot.send_action(dict(zip(self.names, self._rest_action(run).tolist(), strict=True)))

    def _halt(self, run: EpisodeState) -> None:
        self.stopped = True
        run.drop_plan()
        try:
            observation = run.observation if run.observation is not None else self.robot.get_observation()
            self.on_stop(observation)
        except Exception:  # drivers raise anything; what brought us here must still be raised
            logger.exception("the robot did not take the hold action: cut its power")

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


def _check_chunk(chunk: np.ndarray, horizon: int, names: Sequence[str]) -> np.ndarray:
    if chunk.ndim != 2 or len(chunk) < horizon or chunk.shape[1] != len(names):
        raise ActionError(
            f"the policy gave a chunk {chunk.shape}; expected at least {horizon} steps of {len(names)} actions "
            f"({', '.join(names)}): nothing was sent"
        )
    return chunk.astype(np.float32)
