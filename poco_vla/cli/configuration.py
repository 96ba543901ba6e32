"""Read a run's configuration from a command line."""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from poco_vla.cli.option_values import flag_of, read_options
from poco_vla.cli.options import Option, options_of_adapter, options_of_algorithm, options_of_env
from poco_vla.cli.parser import Listed, Parser, parse
from poco_vla.config import ALGORITHM_SECTIONS, DemonstrationConfig, EnvSpec, TrainConfig
from poco_vla.errors import ConfigError, UnknownAdapterError

SHOWN_FIRST = (
    *("dataset.repo_id", "dataset.root", "policy", "adapter", "env.type", "env.task", "algorithm", "horizon"),
    *("sft_steps", "online_steps", "seed", "output_dir", "resume", "memory"),
)
"""Fields that `--help` lists; `--help-all` lists every one."""
ABOUT = (
    "--help-all lists every option, with those of the adapter (--policy-options.NAME VALUE, in JSON or plain words), "
    "of the algorithm (--ALGORITHM.NAME VALUE) and of the environment (--env.options.NAME VALUE). --no-env takes the "
    "environment out: SFT alone or, with --interaction.mode remote, robots."
)
SWITCHES = ("--help", "--help-all", "--no-env", "--seeds")


def parse_config(
    config: TrainConfig,
    args: Sequence[str],
    about: str = "",
    *,
    tiny: bool = False,
    smoke: bool = False,
    prog: str | None = None,
    authors: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> TrainConfig:
    """Return a configuration with the words of a command line in it. `--help` and `--help-all` end the program.

    Another adapter than the configuration's begins without the configuration's options, and so does a pretrained policy
    where the configuration builds a new one; another environment type begins without its options, and with its own
    default task. `--env.` and `--demonstrations.` options begin from defaults where the configuration has none of them.
    `--no-env` leaves SFT alone, unless robots act or online steps are asked for.

    Args:
        config: the values that hold where the command line gives none.
        args: words of a command line.
        about: what `--help` says first.
        tiny: offer `--tiny` (:func:`poco_vla.cli.smoke.tiny_pick_task`).
        smoke: offer `--smoke` (:func:`poco_vla.cli.smoke.smoke_run`).
        prog: name of the program; that of the script when None.
        authors: values of an algorithm's authors for the recipe's task, by the algorithm's name.

    Raises:
        ConfigError: an option does not exist, or a value cannot work.
    """
    from poco_vla.cli.smoke import smoke_run, tiny_pick_task

    about += ABOUT
    smaller: dict[str, Callable[[TrainConfig], TrainConfig]] = {}
    if tiny:
        smaller["tiny"] = tiny_pick_task
        about += " --tiny runs all of it on a CPU within minutes: small random weights, a simulated task."
    if smoke:
        smaller["smoke"] = smoke_run
        about += " --smoke runs every stage within a minute, on little data and with small networks."
    chosen, rest = _choices(*smaller).parse_known_args(list(args))
    if chosen.adapter not in (None, config.adapter):  # before --tiny, which makes a base of it
        config = replace(config, adapter=chosen.adapter, policy_options={})
    if chosen.algorithm not in (None, config.algorithm):
        from poco_vla.algorithms import with_algorithm  # loads torch, as the options of an algorithm do

        config = with_algorithm(config, chosen.algorithm, authors.get(chosen.algorithm, {}))
    for name, shrink in smaller.items():
        config = shrink(config) if getattr(chosen, name) else config
    config, rest = _with_choices(config, chosen, rest)
    others = [name for name in ALGORITHM_SECTIONS if name != config.algorithm]
    for word in rest:
        if (name := word.removeprefix("--").partition(".")[0]) in others and word.startswith("--"):
            raise ConfigError(f'{word} is an option of algorithm "{name}", but this run is of "{config.algorithm}"')
    first = [*SHOWN_FIRST, *([config.algorithm] if chosen.algorithm in ALGORITHM_SECTIONS else [])]
    parsed = parse(
        TrainConfig,
        rest,
        default=config,
        about=about,
        prog=prog,
        shown=first if chosen.help and not chosen.help_all else None,
        hidden=others,
        listed=_listed(config, chosen),
        others=(*SWITCHES, *(f"--{name}" for name in smaller)),
    )
    if not chosen.no_env:
        return parsed
    acts = parsed.interaction.mode == "remote" or "--online-steps" in map(flag_of, rest)
    return replace(parsed, env=None, demonstrations=None, online_steps=parsed.online_steps if acts else 0)


def parse_env(record: Any, args: Sequence[str], prog: str) -> Any:
    """Return a record that holds an environment in its field `env`, with the words of a command line in it."""
    chosen, rest = _choices().parse_known_args(list(args))
    config, rest = _with_choices(TrainConfig(env=record.env), chosen, rest)
    listed = {name: found for name, found in _listed(config, chosen).items() if name == "env.options"}
    return parse(type(record), rest, default=replace(record, env=config.env), prog=prog, listed=listed)


def _choices(*switches: str) -> Parser:
    """Return a parser of the options on which the others depend."""
    parser = Parser()
    for name in ("adapter", "algorithm", "policy", "env.type", "env.task"):
        parser.add_argument(f"--{name}", dest=name.replace(".", "_"))
    for name in ("no-env", "help-all", *switches):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    return parser


def _with_choices(config: TrainConfig, chosen: Namespace, words: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """Return a configuration with the chosen policy, environment and their options, and the words that are left."""
    env, demonstrations = config.env, config.demonstrations
    policy, policy_options = config.policy, config.policy_options
    if chosen.policy is not None:
        given = None if chosen.policy in ("None", "null") else chosen.policy
        policy, policy_options = given, {} if policy is None and given is not None else policy_options
    if env is None and (chosen.env_type or chosen.env_task or any(word.startswith("--env.") for word in words)):
        env = EnvSpec()
    if demonstrations is None and any(word.startswith("--demonstrations.") for word in words):
        demonstrations = DemonstrationConfig()
    if env is not None and chosen.env_type not in (None, env.type):
        env = replace(env, type=chosen.env_type, task=chosen.env_task or _default_task(chosen.env_type), options={})
    elif env is not None and chosen.env_task is not None:
        env = replace(env, task=chosen.env_task)
    policy_options, rest = read_options(
        words,
        "policy-options",
        policy_options,
        lambda: options_of_adapter(config.adapter, pretrained=policy is not None),
    )
    algorithm_options = config.algorithm_options
    if config.algorithm not in ALGORITHM_SECTIONS:
        for prefix in ("algorithm-options", config.algorithm.replace("_", "-")):
            algorithm_options, rest = read_options(
                rest, prefix, algorithm_options, lambda: options_of_algorithm(config.algorithm)
            )
    if env is not None:
        kind = env.type
        options, rest = read_options(rest, "env.options", env.options, lambda: options_of_env(kind))
        env = replace(env, options=options)
    config = replace(
        config,
        policy=policy,
        policy_options=policy_options,
        algorithm_options=algorithm_options,
        env=env,
        demonstrations=demonstrations,
    )
    return config, [*rest, *(["--help"] if chosen.help or chosen.help_all else [])]


def _default_task(kind: str) -> str:
    from poco_vla.simulators import default_task  # loads LeRobot, for which no --help waits

    return default_task(kind)


def _listed(config: TrainConfig, chosen: Namespace) -> Listed:
    """Return the options that `--help` lists: of the adapter and environment that the command line chooses, or of the
    configuration's with `--help-all`. They are imported for it."""
    out: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Option]]] = {}
    if chosen.help_all or (chosen.help and chosen.adapter):
        try:
            options = options_of_adapter(config.adapter, pretrained=config.policy is not None)
        except UnknownAdapterError:
            if chosen.adapter:
                raise
            options = None  # a recipe's, not installed yet
        out["policy_options"] = "policy_options", config.policy_options, _shown(options, config.policy_options)
    if chosen.help_all or (chosen.help and chosen.algorithm):
        name, values = config.algorithm, config.algorithm_options
        options = {} if name in ALGORITHM_SECTIONS else options_of_algorithm(name)
        out["algorithm_options"] = name, values, _shown(options, values)
    if config.env is not None and (chosen.help_all or (chosen.help and chosen.env_type)):
        values = config.env.options
        out["env.options"] = "options", values, _shown(options_of_env(config.env.type), values)
    return {name: found for name, found in out.items() if found[2]}


def _shown(options: Mapping[str, Option] | None, values: Mapping[str, Any]) -> dict[str, Option]:
    """Return the options that are listed, and those that have a value."""
    declared = dict(options or {})
    names = {name for name, option in declared.items() if option.listed} | values.keys()
    return {name: declared.get(name, Option()) for name in sorted(names)}
