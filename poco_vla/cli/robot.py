"""`poco-vla robot`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass
class Robot:
    """Episodes on a robot for a training run elsewhere (interaction.mode "remote").

    --robot.type=TYPE and its options, cameras included, and --teleop.type=TYPE for a person who takes over, are given
    as LeRobot's own commands take them (`lerobot-record --robot.type=TYPE --help` lists them); simulated_arm is a robot
    without hardware.
    """

    devices: tyro.conf.Suppress[tuple[str, ...]] = ()
    url: str = "ws://127.0.0.1:8000"
    """Where training serves its policy: ws://HOST:PORT, or wss:// with TLS."""
    token: str | None = None
    """Token that the server asks for. Default: the environment variable POCO_VLA_TOKEN, which others on this
    machine cannot read; @FILE is the first line of a file."""
    certificate: Path | None = None
    """TLS certificate to trust (PEM), where no authority has signed it."""
    task: str | None = None
    """The instruction. Left out: the server's."""
    rewards: Literal["keys", "robot", "keys+robot"] = "keys"
    """Who judges an episode: a person by keys, the robot itself (the simulated arm can), or both. Space (emergency
    stop) and d (discard) are heard in any case."""
    episode_seconds: float = 30.0
    """Time limit of an episode."""
    max_steps: int | None = None
    """Time limit in control steps, in place of seconds."""
    fps: float | None = None
    """Control steps per second. Left out: the server's. 0 is as fast as it goes, for simulated robots."""
    horizon: int | None = None
    """Actions of a chunk that are executed. Left out: all."""
    lead: int = 0
    """Asynchronous inference: ask for the next chunk so many steps before this one ends; 0 waits for it."""
    low: tuple[float, ...] | None = None
    """Smallest actions that are sent, in the robot's units, one for all or one each. Left out: 5 % below the
    demonstrations' range."""
    high: tuple[float, ...] | None = None
    """Largest actions, likewise."""
    max_step: tuple[float, ...] | None = None
    """Largest change of an action from one control step to the next, likewise. Left out: no limit."""
    joints: Literal["by-name", "positional"] = "by-name"
    """Bring states and actions into the policy's order by name, or take them in their order where the names merely
    differ."""
    episodes: int | None = None
    """End after so many episodes that were kept. Left out: when training ends."""
    spool: Path = Path("runs/spool")
    """Folder where episodes are kept until training has them on its disk."""
    reset: Literal["auto", "prompt"] = "auto"
    """Before an episode: "auto" lets a robot reset itself if it can, and asks a person if not; "prompt" always asks."""
    show: bool = False
    """Show cameras, states and actions in Rerun, LeRobot's viewer."""

    def execute(self) -> None:
        """Run episodes on the robot, and send them to training."""
        from poco_vla.robots.program import run_robot

        run_robot(**vars(self))


def split_devices(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line without the words for robot and teleoperator, and these: LeRobot's own parser reads them."""
    rest: list[str] = []
    devices: list[str] = []
    into = rest
    for word in args:
        if word.startswith("--"):
            into = devices if word.startswith(("--robot.", "--teleop.")) else rest
        into.append(word)
        into = rest if "=" in word else into
    return rest, devices
