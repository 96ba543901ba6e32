"""Command lines: `poco-vla train | eval | report | adapters`, and the entry of recipes."""

import json
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape

from poco_vla.config import EnvSpec, TrainConfig, from_json
from poco_vla.errors import ConfigError, PocoError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def run_recipe(
    config: TrainConfig,
    args: Sequence[str] | None = None,
    *,
    tiny: bool = False,
) -> None:
    """Run a recipe: its configuration as defaults, every value overridable on the command line.

    Prints one line and exits with status 1 on an error that the user can mend, 130 on Ctrl-C.

    Args:
        config: the recipe's values.
        args: the command line; the process's own when None.
        tiny: offer `--tiny` (:func:`poco_vla.tiny.tiny_pick_task`); the command line overrides its values, too.
    """
    given = list(sys.argv[1:] if args is None else args)
    use_tiny = tiny and "--tiny" in given
    about = (
        "Every value of this recipe, with its default. Options of adapter and environment that are not listed can be "
    )
    about += "added: --policy-options.NAME VALUE, --env.options.NAME VALUE (JSON, or a plain word)."
    if tiny:
        about += " --tiny runs all of it on a CPU within minutes: small random weights, a simulated task."

    def run() -> None:
        from poco_vla.tiny import tiny_pick_task

        default = tiny_pick_task(config) if use_tiny else config
        default, rest = _with_open_options(default, [arg for arg in given if not (use_tiny and arg == "--tiny")])
        _train(
            tyro.cli(TrainConfig, description=about, default=default, args=rest, config=(tyro.conf.AvoidSubcommands,))
        )

    _guarded(run)


def _with_open_options(config: TrainConfig, args: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """Take `--policy-options.NAME VALUE` and `--env.options.NAME VALUE` into `config` where its defaults have no such
    name: what an adapter or environment offers is not known here. Another adapter or environment than the default's
    begins without the default's options. Gives the rest of the command line back."""
    words = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--") and "=" in arg else [arg])]
    chosen = {flag: value for flag, value in pairwise(words) if flag in ("--adapter", "--env.type")}
    policy_options, env = dict(config.policy_options), config.env
    if chosen.get("--adapter", config.adapter) != config.adapter:
        policy_options = {}
    env_options = dict(env.options) if env else {}
    if env is not None and chosen.get("--env.type", env.type) != env.type:
        env_options = {}
    rest: list[str] = []
    waiting = iter(words)
    for word in waiting:
        for prefix, options in (("--policy-options.", policy_options), ("--env.options.", env_options)):
            name = word[len(prefix) :].replace("-", "_")
            if word.replace("_", "-").startswith(prefix) and name not in options:
                value = next(waiting, None)
                if value is None:
                    raise ConfigError(f"{word} needs a value")
                options[name] = _json_or_word(value)
                break
        else:
            rest.append(word)
    env = replace(env, options=env_options) if env is not None else None
    return replace(config, policy_options=policy_options, env=env), rest


def _json_or_word(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


@dataclass
class Train:
    """Supervised fine-tuning, then online POCO."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: TrainConfig(env=EnvSpec()))


@dataclass
class Eval:
    """Success rate of an exported policy."""

    policy: Annotated[str, tyro.conf.Positional]
    """LeRobot policy folder or Hub id."""
    adapter: str | None = None
    """Adapter that wraps it. Left out: that of the run that exported the policy."""
    env: str | None = None
    """Where it acts, as JSON: '{"type": "ogbench", "task": "...", "options": {"episode_length": 120}}'. Left out: the
    environment of the run that exported the policy (result.json beside its folder)."""
    device: str = "cpu"
    """Torch device."""
    episodes: int = 50
    """Episodes."""
    seed: int = 100_000
    """Seed of the first episode."""


@dataclass
class Report:
    """Table and learning curves of finished runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    output: Path = Path("curves.png")
    """Picture to write."""


@dataclass
class Adapters:
    """The installed model adapters."""


def main(args: Sequence[str] | None = None) -> None:
    """`poco-vla`."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"train": Train, "eval": Eval, "report": Report, "adapters": Adapters},
        prog="poco-vla",
        description="POCO for vision-language-action policies: imitate first, then succeed.",
        args=args,
        config=(tyro.conf.AvoidSubcommands,),
    )
    _guarded(lambda: _run(command))


def _run(command: object) -> None:
    console = Console(highlight=False)
    match command:
        case Train():
            _train(command.config)
        case Eval():
            from poco_vla.evaluate import evaluate
            from poco_vla.registry import load_adapter

            adapter = load_adapter(
                command.adapter or _run_of(command, "by which adapter, with --adapter").get("adapter", "flow_mlp")
            )
            env = _env_of(command)
            policy = adapter.from_pretrained(command.policy, device=command.device)
            result = evaluate(policy, env, episodes=command.episodes, seed=command.seed)
            console.print(f"success {result.success} of {command.episodes} episodes")
        case Report():
            from poco_vla.report import draw_curves, result_table

            console.print(result_table(command.runs))
            console.print(draw_curves(command.runs, command.output))
        case Adapters():
            from poco_vla.registry import available_adapters

            for name, where in available_adapters().items():
                console.print(f"{name:<16} {where}")


def _env_of(command: Eval) -> EnvSpec:
    """The environment that is asked for, or that of the policy's own run."""
    if command.env is not None:
        try:
            return from_json(EnvSpec, json.loads(command.env))
        except (json.JSONDecodeError, AttributeError) as error:
            raise ConfigError(f"--env is no JSON object: {error}") from error
    env = _run_of(command, "where it acts with --env")["env"]
    if env is None:
        raise ConfigError(f"the run of {command.policy} had no environment: say where it acts with --env")
    return from_json(EnvSpec, env)


def _run_of(command: Eval, otherwise: str) -> dict[str, Any]:
    """result.json of the run that exported the policy."""
    from poco_vla.report import read_result

    run = Path(command.policy).parent
    if not (run / "result.json").is_file():
        raise ConfigError(f"{command.policy} does not lie in a run's folder: say {otherwise}")
    return read_result(run)


def _train(config: TrainConfig) -> None:
    from poco_vla.train import train

    train(config)


def _guarded(work: object) -> None:
    """Run, and turn what a user can mend into one line on stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    assert callable(work)
    # A launcher that waits for its children ignores Ctrl-C, and they inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work()
    except PocoError as error:
        _stderr().print(f"[bold red]{type(error).__name__}[/bold red]: {escape(str(error))}")
        sys.exit(1)
    except KeyboardInterrupt as stop:
        _stderr().print(escape(str(stop)) or "interrupted")
        sys.exit(INTERRUPTED)


def _stderr() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)
