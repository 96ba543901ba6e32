"""The program `poco-vla`: its verbs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import tyro

from poco_vla.cli.compare import Compare, split_compare
from poco_vla.cli.configuration import parse_config, parse_env
from poco_vla.cli.data import ConsolidateData, Data, MakeData, OGBenchData, RobomimicData
from poco_vla.cli.errors import guarded
from poco_vla.cli.hub import Export, Push
from poco_vla.cli.parser import parse
from poco_vla.cli.policies import Eval, Serve
from poco_vla.cli.report import Report
from poco_vla.cli.robot import Robot, split_devices
from poco_vla.config import EnvSpec, TrainConfig
from poco_vla.errors import UnknownNameError
from poco_vla.terminal import SafeConsole

type Command = Train | Compare | Eval | Serve | Robot | Data | Report | Push | Export | Adapters | Algorithms


@dataclass
class Train:
    """Supervised fine-tuning, then online RL."""

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


@dataclass
class Algorithms:
    """The installed algorithms."""

    def execute(self) -> None:
        """List them, each with the first line of its class."""
        from poco_vla.algorithms import available_algorithms, load_algorithm

        for name in available_algorithms():
            about = (load_algorithm(name).__doc__ or "").strip().partition("\n")[0]
            SafeConsole().print(f"{name:<16} {about}")


VERBS: dict[str, Any] = {
    **{"train": Train, "compare": Compare, "eval": Eval, "serve": Serve, "robot": Robot, "data": Data},
    **{"report": Report, "push": Push, "export": Export, "adapters": Adapters, "algorithms": Algorithms},
}
DATA_VERBS: dict[str, Any] = {
    **{"make": MakeData, "ogbench": OGBenchData, "robomimic": RobomimicData, "consolidate": ConsolidateData}
}


def main(args: Sequence[str] | None = None) -> None:
    """`poco-vla`."""
    given = list(sys.argv[1:] if args is None else args)
    guarded(lambda: _command(given).execute())


def _command(args: Sequence[str]) -> Command:
    """Return the command that a command line stands for."""
    _check_verbs(args)
    verb, data_verb = " ".join(args[:1]), " ".join(args[1:2])
    prog = f"poco-vla {verb}"
    if verb == "train":
        config = TrainConfig(env=EnvSpec())
        return Train(parse_config(config, args[1:], f"{Train.__doc__} ", prog=prog))
    if verb == "data" and data_verb == "make":
        return Data(parse_env(MakeData(), args[2:], f"{prog} make"))
    if verb == "data" and data_verb in DATA_VERBS:
        return Data(parse(DATA_VERBS[data_verb], args[2:], prog=f"{prog} {data_verb}"))
    if verb == "compare":
        own, words = split_compare(args[1:])
        return replace(parse(Compare, own, prog=prog), options=tuple(words))
    if verb == "robot":
        rest, devices = split_devices(args[1:])
        return replace(parse(Robot, rest, prog=prog), devices=tuple(devices))
    if verb in VERBS and verb != "data":
        return parse(VERBS[verb], args[1:], prog=prog)
    return tyro.extras.subcommand_cli_from_dict(
        VERBS, prog="poco-vla", description="Train vision-language-action policies with POCO.", args=list(args)
    )


def _check_verbs(args: Sequence[str]) -> None:
    """Raise UnknownNameError if a command line begins with a command that does not exist."""
    verbs = {"": VERBS, "data": DATA_VERBS}
    for place, known in verbs.items():
        word = (args[1:] if place else args)[:1]
        if (not place or args[:1] == [place]) and word and not word[0].startswith("-") and word[0] not in known:
            raise UnknownNameError(f"command {place}".strip(), word[0], known)
