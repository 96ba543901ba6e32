"""Obey or refuse the settings of `accelerate launch`: its options, its file, its environment variables."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from accelerate.utils import PrecisionType

from poco_vla.config import TrainConfig
from poco_vla.errors import ConfigError

PRECISIONS = ("no", "bf16")
"""Mixed precisions of :attr:`TrainConfig.mixed_precision`."""
FALSE = ("", "0", "no", "none", "false", "off")
"""Spellings by which launchers and shells switch something off."""
REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM (use_megatron_lm)",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration (use_parallelism_config)",
    "ACCELERATE_DOWNCAST_BF16": "downcast_bf16, which is for TPUs",
    "XLA_USE_BF16": "bfloat16 on a TPU",
    "XLA_DOWNCAST_BF16": "downcast_bf16, which is for TPUs",
}
"""Environment variables of Accelerate that this library cannot obey, and what they ask for."""
FILE_SETTINGS = ("num_processes", "mixed_precision", "downcast_bf16")
"""Settings of `accelerate launch` that are looked at, and that its file may hold."""
SETTINGS = ("num_processes", "mixed_precision", "gradient_accumulation_steps", "gradient_clipping")
"""Options of `accelerate launch` that are looked at, None where they are not given."""
DEEPSPEED_BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu")
"""Batch sizes of a DeepSpeed configuration, which the learner sets for the time of a run."""
ANCESTORS = 6
"""Processes above this one among which its launcher is looked for."""


@dataclass(frozen=True)
class Launcher:
    """The process that started this one, when it is `accelerate launch`.

    Attributes:
        pid: its number.
        options: its command line and configuration file by Accelerate's names; only what was said.
    """

    pid: int
    options: Mapping[str, Any]


def launched_precision(config: TrainConfig) -> Literal["no", "bf16"]:
    """Return the mixed precision of a run: the launcher's where it asks for one, else the configuration's.

    Raises:
        ConfigError: the launcher asks for another than no and bf16.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").strip().lower() or "no"
    if asked not in PRECISIONS:
        known = ", ".join(str(name) for name in PrecisionType.list())
        raise ConfigError(
            f'mixed_precision "{asked}" was asked for by `accelerate launch` (its option, its file or '
            f"ACCELERATE_MIXED_PRECISION; it knows {known}), and this library trains in no (float32) or bf16: launch "
            "with one of these"
        )
    return config.mixed_precision if asked == "no" else "bf16"


def precision_told(config: TrainConfig, precision: str) -> str | None:
    """Say whose mixed precision holds, where launcher and configuration differ; return None where they agree."""
    if precision != config.mixed_precision:
        return (
            f"mixed_precision is {precision}, as the launcher was told; the configuration says {config.mixed_precision}"
        )
    said = str(_launcher_options().get("mixed_precision", precision))
    if said.lower() != precision and not (precision == "no" and said.lower() in FALSE):
        return f"mixed_precision is {precision}, as the configuration says; the launcher says {said}"
    return None


def refuse_unheeded() -> None:
    """Refuse what a launcher was told that would have no effect here.

    Raises:
        ConfigError: names the setting, and what has its effect.
    """
    for name, asked in REFUSED.items():
        if os.environ.get(name, "").lower() not in FALSE:
            raise ConfigError(f"{name} asks for {asked}, which this library does not have: launch without it")
    options = _launcher_options()
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true", "yes", "on")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", options.get("gradient_accumulation_steps", 1))
    if str(steps).strip().lower() not in ("", "1", "auto", "none"):
        raise ConfigError(
            f"the launcher was told gradient_accumulation_steps {steps} (gradient accumulation by its option, its file "
            "or ACCELERATE_GRADIENT_ACCUMULATION_STEPS), expected 1: optim.batch_size is what one update learns from, "
            "and optim.micro_batch computes it in parts"
        )
    clip = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", options.get("gradient_clipping"))
    if not zero and clip is not None and not _is_zero(clip):
        raise ConfigError(
            f"the launcher was told gradient_clipping {clip}, which is DeepSpeed's and has no effect here: "
            "optim.max_grad_norm clips"
        )
    if str(options.get("downcast_bf16", "no")).lower() not in FALSE:
        raise ConfigError("the launcher was told downcast_bf16, which is for TPUs: launch without it")
    launched, asked = int(os.environ.get("WORLD_SIZE", "1")), options.get("num_processes")
    if asked is not None and int(asked) > launched:
        raise ConfigError(
            f"`accelerate launch` was told num_processes {asked}, and started {launched}: it starts several only with "
            "--multi_gpu, --use_fsdp or --use_deepspeed, or by a file that says so (recipes/accelerate; on CPUs "
            "recipes/accelerate/ddp_cpu.yaml)"
        )


def refuse_unfit_deepspeed(settings: Mapping[str, Any]) -> list[str]:
    """Return what a DeepSpeed configuration sets that the learner sets itself, one text each."""
    unfit = []
    for name in ("bf16", "fp16", "amp"):
        section = settings.get(name)
        if isinstance(section, Mapping) and str(section.get("enabled", False)).lower() not in (*FALSE, "auto"):
            unfit.append(f"{name} is enabled, expected float32 (no mixed precision: the critic's values need it)")
    for name in ("an optimizer", "a scheduler"):
        if name.split()[1] in settings:
            unfit.append(f"it sets {name}, expected none (optim.actor_lr and optim.critic_lr are Adam's)")
    for name in DEEPSPEED_BATCH_SIZES:
        if settings.get(name, "auto") != "auto":
            unfit.append(f"{name} is {settings[name]}, expected auto (optim.batch_size does that)")
    return unfit


def find_launcher() -> Launcher | None:
    """Find the `accelerate launch` above this process, where the system shows command lines; else return None."""
    for pid, words in _ancestors():
        told = _launch_words(words)
        if told is not None:
            return Launcher(pid, _said(told))
    return None


def _launcher_options() -> Mapping[str, Any]:
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # no launcher of Accelerate started this process
        return {}
    found = find_launcher()
    return found.options if found is not None else {}


def _is_zero(clip: Any) -> bool:
    try:
        return float(clip) == 0
    except ValueError:
        return str(clip).lower() in (*FALSE, "auto")


def _ancestors() -> Iterator[tuple[int, list[str]]]:
    """Yield number and command line of each process above this one, nearest first (Linux)."""
    pid = os.getppid()
    for _ in range(ANCESTORS):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            status = Path(f"/proc/{pid}/status").read_text(errors="replace")
        except OSError:
            return
        yield pid, words
        pid = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:")), 0)
        if pid <= 1:
            return


def _launch_words(words: list[str]) -> list[str] | None:
    """Return what follows `accelerate launch` on a command line in any of its spellings; None for another program's."""
    for i, word in enumerate(words[:6]):
        name = Path(word).name
        if name == "accelerate" and words[i + 1 : i + 2] == ["launch"]:
            return words[i + 2 :]
        if name in ("accelerate-launch", "accelerate.commands.launch") or word.endswith(
            "accelerate/commands/launch.py"
        ):
            return words[i + 1 :]
    return None


def _said(words: list[str]) -> dict[str, Any]:
    """Return options on the launcher's command line, and those of the file that it read."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        args = launch_command_parser().parse_args(words)
    except SystemExit:  # the launcher itself has understood them: another version's
        return {}
    said = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    file = args.config_file or (default_config_file if Path(default_config_file).is_file() and not args.cpu else None)
    try:
        values = cast(Any, load_config_from_file(file)).to_dict() if file is not None else {}
    except (OSError, ValueError, TypeError):  # likewise
        return said
    in_file = {name: values[name] for name in FILE_SETTINGS if values.get(name) is not None}
    return in_file | said | {"downcast_bf16": args.downcast_bf16 or in_file.get("downcast_bf16", False)}
