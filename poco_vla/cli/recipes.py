"""Entries of recipes: one run, a run per seed, or a sweep over variants."""

import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from poco_vla.cli.choices import Choices, choose, described
from poco_vla.cli.configuration import parse_config
from poco_vla.cli.errors import guarded
from poco_vla.cli.parser import Parser
from poco_vla.comparison.member import is_done
from poco_vla.config import TrainConfig, differences, from_json
from poco_vla.errors import ConfigError, UnknownNameError
from poco_vla.files import read_json
from poco_vla.roles import role_of
from poco_vla.terminal import SafeConsole


def run_recipe(
    config: TrainConfig | Callable[..., TrainConfig],
    args: Sequence[str] | None = None,
    *,
    tiny: bool = False,
    smoke: bool = False,
    choices: Choices = MappingProxyType({}),
    authors: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> None:
    """Run a recipe: its configuration as defaults, every value overridable on the command line.

    Prints one line and exits with status 1 on an error that the user can mend, 130 on Ctrl-C.

    Args:
        config: the recipe's values; of a recipe that holds several runs, a function that returns those of one.
        args: the command line; the process's own when None.
        tiny: offer `--tiny` (:func:`poco_vla.cli.smoke.tiny_pick_task`); the command line overrides its values, too.
        smoke: offer `--smoke` (:func:`poco_vla.cli.smoke.smoke_run`), likewise.
        choices: parameters of `config` and the values that each takes, offered as options such as `--task square`.
        authors: values of an algorithm's authors for the recipe's task, by the algorithm's name.
    """

    def run() -> None:
        chosen, words = choose(config, choices, sys.argv[1:] if args is None else args)
        about = f"{described(config, choices)}--seeds 0 1 2 runs once for each. "
        given, seeds, _ = _split_runs(words)
        # The words are read for every seed before the first run: a bad one is told at once.
        read = partial(parse_config, chosen, about=about, tiny=tiny, smoke=smoke, authors=authors)
        runs = [read([*given, "--seed", str(seed)]) for seed in seeds]
        for one in runs or [read(given)]:
            if not (seeds and one.resume):
                _train(one)
            elif (state := _state_of(one)) != "done":
                _train(replace(one, resume=state == "resumable"))

    guarded(run)


def _split_runs(args: Sequence[str], *several: str) -> tuple[list[str], list[int], list[str]]:
    """Return a command line without the options that choose runs, the seeds, and the chosen names."""
    parser = Parser()
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", nargs="+", type=_whole_number, default=[])
    seeds.add_argument("--seed", type=_whole_number)
    for flag in several:
        parser.add_argument(flag, dest="names", nargs="+")
    lists = ("--seeds", *several)  # argparse takes one value alone after "--seeds="
    words = [part for word in args for part in (word.split("=", 1) if word.split("=")[0] in lists else [word])]
    found, rest = parser.parse_known_args(words)
    if found.seed is not None:
        rest += ["--seed", str(found.seed)]
    return rest, found.seeds, getattr(found, "names", None) or []


def _whole_number(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise ArgumentTypeError(f"takes whole numbers, not {word}") from None


def _state_of(config: TrainConfig) -> Literal["done", "resumable", "new"]:
    """Return how far the newest run of `config` is."""
    from poco_vla.checkpointing.checkpoint import can_resume
    from poco_vla.training import runs_of

    runs = runs_of(config)
    if runs and is_done(runs[-1]):
        return "done"
    return "resumable" if runs and can_resume(runs[-1]) else "new"


def run_sweep(
    variants: Callable[[int], Mapping[str, TrainConfig]], args: Sequence[str] | None = None, *, smoke: bool = False
) -> None:
    """Run a recipe's variants one after another, for each of `--seeds`, and write one report of all.

    A variant whose result is there already is not run again, so that a sweep goes on where it was stopped; `--only
    NAME ...` leaves the others out. Further words of the command line hold for every variant.

    Args:
        variants: configurations by name for a seed, each with a folder of its own, later ones free to start from what
            earlier ones wrote.
        args: the command line; the process's own when None.
        smoke: offer `--smoke`.
    """

    def run() -> None:
        from poco_vla.report import write_page

        given, seeds, only = _split_runs(sys.argv[1:] if args is None else args, "--only")
        for word in given:
            if word.split("=")[0].replace("_", "-") in ("--seed", "--output-dir", "--resume"):
                raise ConfigError(
                    f"a sweep has its own folders and goes on by itself: leave {word} out, or use --seeds"
                )
        runs: list[TrainConfig] = []
        for seed in seeds or [0]:
            configs = variants(seed)
            for name in only:
                if name not in configs:
                    raise UnknownNameError("variant", name, configs)
            words = [*given, "--seed", str(seed)]
            runs += [parse_config(configs[name], words, smoke=smoke) for name in only or configs]
        for one in runs:
            _run_variant(one)
        if os.environ.get("RANK", "0") == "0":
            folders = [one.output_dir for one in runs]
            SafeConsole().print(write_page(folders, folders[0].parent.parent / "report.html"))

    guarded(run)


def _run_variant(config: TrainConfig) -> None:
    """One run of a sweep, or what is left of it."""
    from poco_vla.checkpointing import checkpoint

    folder = config.output_dir
    if (folder / "config.json").is_file():
        changed = differences(from_json(TrainConfig, read_json(folder / "config.json")), config)
        changed = [line for line in changed if role_of(TrainConfig, line.split(":")[0]).resume != "free"]
        if changed:
            raise ConfigError(
                f"{folder} holds a run of another configuration ({'; '.join(changed)}): delete or move it"
            )
    if is_done(folder):
        return
    if config.policy and Path(config.policy).parts[0] == "runs" and not Path(config.policy).is_dir():
        raise ConfigError(f"{folder} starts from {config.policy}, which is not there: run that variant first")
    resumable = checkpoint.can_resume(folder)
    if not resumable:
        checkpoint.discard_folder(folder)  # ended before its first checkpoint: nothing to go on from
    _train(replace(config, resume=resumable))


def _train(config: TrainConfig) -> None:
    from poco_vla.training import train

    train(config)
