"""`poco-vla robot`: a robot, a person at its terminal and a learner elsewhere, put together."""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from lerobot.robots import Robot
from lerobot.teleoperators import Teleoperator
from lerobot.utils.visualization_utils import init_visualization, log_visualization_data, shutdown_visualization

from poco_vla.errors import ConfigError, PocoError
from poco_vla.robots.control import RobotInteraction
from poco_vla.robots.devices import make_devices
from poco_vla.robots.episode import Sent
from poco_vla.robots.joint_order import ByName, joint_order
from poco_vla.robots.matching import action_limits, check_match
from poco_vla.robots.session import Learner, RobotSession, call_with_retries
from poco_vla.robots.signals import KEYS, AnySignals, KeySignals, KnowsSuccess, RobotSuccess, Signal, Signals
from poco_vla.robots.spool import Spool
from poco_vla.robots.view import View, log_lines
from poco_vla.serving import client as client_module
from poco_vla.serving.access import read_token
from poco_vla.serving.client import ConnectionLostError, PolicyClient, Retry
from poco_vla.terminal import SafeConsole

PATIENCE = 10.0
"""Seconds that a robot holds within an episode while the learner is away; then the episode is discarded."""
RETRY = Retry(budget=2.0)
"""Of one question: much shorter than the patience."""
TIMEOUT = 8.0
"""Seconds for an answer, below the patience too."""
_KEY_WORDS = {
    Signal.SUCCESS: "success",
    Signal.FAILURE: "failure",
    Signal.DISCARD: "discard",
    Signal.STOP: "EMERGENCY STOP",
}


@runtime_checkable
class Resets(Protocol):
    """A robot that puts its scene back itself."""

    def reset(self) -> None: ...


def run_robot(
    *,
    devices: Sequence[str],
    url: str,
    token: str | None,
    certificate: Path | None,
    task: str | None,
    rewards: Literal["keys", "robot", "keys+robot"],
    episode_seconds: float,
    max_steps: int | None,
    fps: float | None,
    horizon: int | None,
    lead: int,
    low: tuple[float, ...] | None,
    high: tuple[float, ...] | None,
    max_step: tuple[float, ...] | None,
    episodes: int | None,
    spool: Path,
    reset: Literal["auto", "prompt"],
    show: bool,
    joints: ByName = "by-name",
) -> None:
    """Run episodes for a learner until training is over; `poco-vla robot --help` says what each argument is.

    Raises:
        PocoError: it cannot be run like that.
    """
    robot, teleoperator = make_devices(devices)
    view = View(SafeConsole(soft_wrap=not sys.stdout.isatty()))
    with ExitStack() as stack:
        stack.enter_context(_interrupted_by_signals())
        stack.enter_context(log_lines(view, silent=client_module.__name__))
        look = _step_callback(view, show, stack)
        with view:
            client = _learner_at(url, read_token(token), certificate, view)
            stack.callback(client.close)
        metadata = client.metadata
        for key in check_match(robot, metadata, joints=joints):
            view.say(f"{key} is not read by the policy, and not sent", "dim")
        order = joint_order(robot, metadata, joints)
        names = list(robot.action_features)
        limits = action_limits(metadata, names, low=low, high=high, max_step=max_step, joints=joints)
        rate = metadata["fps"] if fps is None else fps
        chunk = metadata["horizon"] if horizon is None else horizon
        if chunk > metadata["horizon"]:
            raise ConfigError(f"--horizon is {chunk}, but the policy's chunks have {metadata['horizon']} steps")
        stored = stack.enter_context(Spool(spool, view.say))
        _connect(robot, teleoperator, stack)
        signals, keys = _success_signals(rewards, robot, stack)
        learner = Learner(client, metadata["observation"], view, order)
        drive = RobotInteraction(
            robot,
            learner.chunk,
            horizon=chunk,
            task=metadata["task"] if task is None else task,
            signals=signals,
            limits=limits,
            max_steps=round(episode_seconds * (rate or metadata["fps"])) if max_steps is None else max_steps,
            reset=partial(_put_back, robot, reset == "prompt", view, keys),
            fps=rate or None,
            lead=lead,
            teleoperator=teleoperator,
            patience=PATIENCE,
            retry_on=(ConnectionLostError,),
            on_step=look,
        )
        stack.callback(drive.close)
        view.header(_header(drive, url, low is None or high is None, keys))
        with view:
            _run(RobotSession(drive, learner, stored, view, keys=keys, episodes=episodes))


def _run(session: RobotSession) -> None:
    try:
        session.run()
    except OSError as error:  # as drivers raise for a cable, a port, a camera
        raise PocoError(
            f"{session.drive.robot.name} or its teleoperator failed, the robot holds its position: {error}"
        ) from error


def _learner_at(url: str, token: str | None, certificate: Path | None, view: View) -> PolicyClient:
    """Return a client that is connected to a server which takes episodes, however long connecting takes."""
    view.note(f"connecting to {url}")
    client = call_with_retries(lambda: PolicyClient(url, token, certificate, timeout=TIMEOUT, retry=RETRY), view)
    if not client.metadata.get("takes_episodes"):
        client.close()
        raise ConfigError(
            f"the server at {url} takes no episodes, it only serves a policy: start training that does, with "
            "--interaction.mode remote"
        )
    return client


def _connect(robot: Robot, teleoperator: Teleoperator | None, stack: ExitStack) -> None:
    """Connect as LeRobot's own programs do, calibration included; disconnect when `stack` is closed."""
    for device in filter(None, (robot, teleoperator)):
        try:
            device.connect()
        except OSError as error:
            raise ConfigError(
                f"cannot connect {device.name}: {error}. Is it plugged in, switched on, the port right?"
            ) from error
        stack.callback(device.disconnect)


def _success_signals(rewards: str, robot: Robot, stack: ExitStack) -> tuple[Signals, KeySignals | None]:
    """Return the sources of success and failure. The emergency key of a terminal always works."""
    sources: list[Signals] = []
    keys = None
    if "keys" in rewards or sys.stdin.isatty():
        judged = (Signal.SUCCESS, Signal.FAILURE)
        known = {key: meant for key, meant in KEYS.items() if "keys" in rewards or meant not in judged}
        keys = stack.enter_context(KeySignals(keys=known))
        sources.append(keys)
    if "robot" in rewards:
        if not isinstance(robot, KnowsSuccess):
            raise ConfigError(f"{robot.name} cannot tell success by itself: judge it by --rewards keys")
        sources.append(RobotSuccess(robot))
    return AnySignals(sources), keys


def _put_back(robot: Robot, prompt: bool, view: View, keys: KeySignals | None) -> None:
    """Prepare robot and scene for the next episode: the robot does it if it can, a person if it cannot."""
    if prompt or not isinstance(robot, Resets):
        if keys is None:
            raise ConfigError("a person has to reset the scene, but there is no terminal to ask in")
        view.note("put the scene back, then press Enter", "bold")
        if keys.ask("\n") is None:
            return  # the emergency stop was pressed: nothing moves, and no episode begins
    if isinstance(robot, Resets):
        robot.reset()


def _step_callback(view: View, show: bool, stack: ExitStack) -> Callable[[Sent], None]:
    """Return the function that is called after each control step."""
    if not show:
        return view.step
    try:
        init_visualization("rerun", session_name="poco-vla robot")
    except (ImportError, RuntimeError) as error:  # not installed, or its program is not on the PATH
        first_line = str(error).strip().split("\n")[0]
        raise ConfigError(f"--show needs LeRobot's viewer (lerobot[viz]): {first_line}") from error
    stack.callback(shutdown_visualization, "rerun")

    def step(sent: Sent) -> None:
        view.step(sent)
        log_visualization_data("rerun", observation=sent.observation, action=sent.action)

    return step


def _header(drive: RobotInteraction, url: str, by_demonstrations: bool, keys: KeySignals | None) -> dict[str, str]:
    pace = f"{drive.fps:g} Hz" if drive.fps else "as fast as it goes"
    lead = f", asked {drive.lead} ahead" if drive.lead else ""
    rows = {
        "robot": f"{drive.robot.name}, {pace}, chunks of {drive.horizon}{lead}, at most {drive.max_steps} steps",
        "learner": url,
        "task": drive.task or "(none)",
        "limits": "the demonstrations' range and 5 % beyond" if by_demonstrations else "as given",
    }
    if keys is not None:
        words = [f"{'space' if key == ' ' else key} {_KEY_WORDS[meant]}" for key, meant in keys.keys.items()]
        rows["keys"] = "   ".join([*words, *(["t takeover"] if drive.teleoperator else []), "Ctrl-C end"])
    return rows


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Treat SIGHUP and SIGTERM as Ctrl-C within this context: the robot holds before the process ends."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
