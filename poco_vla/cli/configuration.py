"""Read a run's configuration from a command line."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from poco_vla.cli.errors import shown_once
from poco_vla.cli.open_options import chosen_names, with_open_options
from poco_vla.config import TrainConfig
from poco_vla.errors import ConfigError

NO_ENV = "--no-env"
"""Takes the environment out of a recipe, of which tyro's words can only change one."""


def parse_config(config: TrainConfig, given: Sequence[str], about: str = "", *, tiny: bool, smoke: bool) -> TrainConfig:
    """The recipe's configuration with the words of a command line in it."""
    from poco_vla.cli.smoke import smoke_run, tiny_pick_task

    about += (
        "Every value of this recipe, with its default. Options of adapter and environment, listed or not, are given as "
        "--policy-options.NAME VALUE and --env.options.NAME VALUE (JSON, or plain words), or several in one as "
        "--policy-options '{\"NAME\": VALUE}'. --seeds 0 1 2 runs once "
        f"for each. {NO_ENV} takes the environment out: for robots (--interaction.mode remote), or SFT alone "
        "(--online-steps 0)."
    )
    smaller = {}
    if tiny:
        smaller["--tiny"] = tiny_pick_task
        about += " --tiny runs all of it on a CPU within minutes: small random weights, a simulated task."
    if smoke:
        smaller["--smoke"] = smoke_run
        about += " --smoke runs every stage within a minute, on little data and with small networks."
    adapter = chosen_names(given).get("--adapter", config.adapter)
    if adapter != config.adapter:  # before --tiny, which makes a base of it
        config = replace(config, adapter=adapter, policy_options={})
    for flag, shrink in smaller.items():
        config = shrink(config) if flag in given else config
    default, rest = with_open_options(config, [word for word in given if word not in (*smaller, NO_ENV)])
    options = (tyro.conf.AvoidSubcommands,)
    with shown_once():
        parsed = tyro.cli(TrainConfig, description=about, default=default, args=rest, config=options)
    parsed = expanded(with_options_of(parsed, default))
    return without_env(parsed) if NO_ENV in given else parsed


def without_env(config: TrainConfig) -> TrainConfig:
    """For robots, or SFT alone: no environment, hence no demonstrations by its expert."""
    return replace(config, env=None, demonstrations=None)


def split_seeds(given: Sequence[str]) -> tuple[list[str], list[int]]:
    rest, words = split_flag(given, "--seeds")
    odd = [word for word in words if not word.isdigit()]
    if odd:
        raise ConfigError(f"--seeds takes whole numbers, not {', '.join(odd)}")
    if words and "--seed" in rest:
        raise ConfigError("--seed and --seeds were given: one of them")
    return rest, [int(word) for word in words]


def split_flag(given: Sequence[str], flag: str) -> tuple[list[str], list[str]]:
    """A command line without `flag` and its values, and these values."""
    words = [part for word in given for part in (word.split("=", 1) if word.startswith(f"{flag}=") else [word])]
    if flag not in words:
        return words, []
    begin = words.index(flag)
    end = next((i for i in range(begin + 1, len(words)) if words[i].startswith("-")), len(words))
    if end == begin + 1:
        raise ConfigError(f"{flag} needs at least one value")
    return words[:begin] + words[end:], words[begin + 1 : end]


def with_options_of(config: TrainConfig, options: TrainConfig) -> TrainConfig:
    """Return `config` with the open options that were read before the parser saw the command line."""
    env = replace(config.env, options=options.env.options) if config.env and options.env else config.env
    return replace(config, policy_options=options.policy_options, env=env)


def expanded(command: Any) -> Any:
    """Return a command or configuration whose paths may begin with ~, the user's home folder."""
    if isinstance(command, Path):
        return command.expanduser()
    if isinstance(command, tuple):
        return tuple(expanded(value) for value in command)
    if not is_dataclass(command) or isinstance(command, type):
        return command
    return replace(command, **{f.name: expanded(getattr(command, f.name)) for f in fields(command)})
