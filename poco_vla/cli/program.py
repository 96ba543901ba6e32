"""The program `poco-vla`: its verbs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from poco_vla.cli.configuration import NO_ENV, expanded, with_options_of, without_env
from poco_vla.cli.data import Data, MakeData
from poco_vla.cli.errors import guarded, shown_once
from poco_vla.cli.hub import Export, Push
from poco_vla.cli.open_options import with_open_options
from poco_vla.cli.policies import Eval, Serve
from poco_vla.cli.report import Report
from poco_vla.cli.robot import Robot, split_devices
from poco_vla.config import EnvSpec, TrainConfig
from poco_vla.errors import UnknownNameError
from poco_vla.terminal import SafeConsole

type Command = Train | Eval | Serve | Robot | Data | Report | Push | Export | Adapters

VERBS = ("train", "eval", "serve", "robot", "data", "report", "push", "export", "adapters")
DATA_VERBS = ("make", "ogbench", "robomimic", "consolidate")


@dataclass
class Train:
    """Supervised fine-tuning, then online POCO. --no-env takes the environment out: for robots
    (--interaction.mode remote), or SFT alone (--online-steps 0)."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: TrainConfig(env=EnvSpec()))

    def execute(self) -> None:
        """Train."""
        from poco_vla.training import train

        train(self.config)


@dataclass
class Adapters:
    """The installed model adapters."""

    def execute(self) -> None:
        """List them."""
        from poco_vla.registry import available_adapters

        for name, where in available_adapters().items():
            SafeConsole().print(f"{name:<16} {where}")


def main(args: Sequence[str] | None = None) -> None:
    """`poco-vla`."""
    given = list(sys.argv[1:] if args is None else args)
    guarded(lambda: expanded(_command(given)).execute())


def _command(args: Sequence[str]) -> Command:
    """Return the command that a command line stands for."""
    _check_verbs(args)
    if args[:1] == ["train"]:
        return _train_command(args[1:])
    if args[:2] == ["data", "make"]:
        options, rest = with_open_options(TrainConfig(env=EnvSpec()), args[2:])
        assert options.env is not None
        made = tyro.cli(MakeData, prog="poco-vla data make", default=MakeData(options.env), args=rest)
        return Data(replace(made, env=replace(made.env, options=options.env.options)))
    args, devices = split_devices(args) if args[:1] == ["robot"] else (args, ())
    command = tyro.extras.subcommand_cli_from_dict(
        {
            **{"train": Train, "eval": Eval, "serve": Serve, "robot": Robot, "data": Data, "report": Report},
            **{"push": Push, "export": Export, "adapters": Adapters},
        },
        prog="poco-vla",
        description="POCO for vision-language-action policies: imitate first, then succeed.",
        args=args,
        config=(tyro.conf.AvoidSubcommands,),
    )
    if isinstance(command, Robot):
        command.devices = tuple(devices)
    return command


def _check_verbs(args: Sequence[str]) -> None:
    """Raise UnknownNameError if a command line begins with a command that does not exist."""
    verbs = {"": VERBS, "data": DATA_VERBS}
    for place, known in verbs.items():
        word = (args[1:] if place else args)[:1]
        if (not place or args[:1] == [place]) and word and not word[0].startswith("-") and word[0] not in known:
            raise UnknownNameError(f"command {place}".strip(), word[0], known)


def _train_command(args: Sequence[str]) -> Train:
    options, rest = with_open_options(TrainConfig(env=EnvSpec()), [word for word in args if word != NO_ENV])
    with shown_once():
        parsed = tyro.cli(
            TrainConfig,
            prog="poco-vla train",
            description=Train.__doc__,
            default=options,
            args=rest,
            config=(tyro.conf.AvoidSubcommands,),
        )
    parsed = with_options_of(parsed, options)
    return Train(without_env(parsed) if NO_ENV in args else parsed)
