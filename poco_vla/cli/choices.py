"""Options by which a recipe of several runs chooses one of them, such as `--task square`."""

from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import signature

from poco_vla.config import TrainConfig
from poco_vla.errors import ConfigError, UnknownNameError

type Choices = Mapping[str, Collection[str]]
"""Parameter of a recipe's `config` -> the values that it takes."""


def choose(
    config: TrainConfig | Callable[..., TrainConfig], choices: Choices, args: Sequence[str]
) -> tuple[TrainConfig, list[str]]:
    """Read a recipe's own options from a command line.

    Args:
        config: a configuration, or a function that returns the one of the chosen values.
        choices: parameters of that function and the values that each takes.
        args: words of a command line.

    Returns:
        The chosen configuration, and the words that are left.

    Raises:
        UnknownNameError: a value is none of those that the option takes.
        ConfigError: an option has no value.
    """
    if isinstance(config, TrainConfig):
        return config, list(args)
    words = [part for arg in args for part in (arg.split("=", 1) if arg.split("=")[0][2:] in choices else [arg])]
    chosen: dict[str, str] = {}
    for name, values in choices.items():
        while f"--{name}" in words:
            at = words.index(f"--{name}")
            value = words[at + 1] if at + 1 < len(words) else "-"
            if value.startswith("-"):
                raise ConfigError(f"--{name} needs a value: one of {', '.join(values)}")
            if value not in values:
                raise UnknownNameError(name, value, values)
            chosen[name] = value
            del words[at : at + 2]
    return config(**chosen), words


def described(config: TrainConfig | Callable[..., TrainConfig], choices: Choices) -> str:
    """Return what `--help` says about a recipe's own options; empty if it has none."""
    if isinstance(config, TrainConfig):
        return ""
    parameters = signature(config).parameters
    options = (
        f"--{name} is one of {', '.join(values)} (default: {parameters[name].default})"
        for name, values in choices.items()
    )
    return f"This recipe holds several runs: {'; '.join(options)}. "
