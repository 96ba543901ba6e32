"""Command lines: `poco-vla train | eval | serve | robot | data | report | push | export | adapters`, and the entries of
recipes."""

import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NoReturn

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from poco_vla.cli.choices import Choices, choose, described
from poco_vla.cli.open_options import chosen_names
from poco_vla.cli.open_options import with_open_options as _with_open_options
from poco_vla.config import DemonstrationConfig, EnvSpec, TrainConfig, differences, from_json
from poco_vla.errors import ConfigError, PocoError, UnknownNameError
from poco_vla.files import is_out_of_space, read_json
from poco_vla.roles import role_of
from poco_vla.terminal import SafeConsole, first_to_say, format_logs_safely

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
OF_THE_SYSTEM = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.EMFILE),
    *(errno.ENFILE, errno.ENOMEM, errno.ENAMETOOLONG, errno.ELOOP),
}
"""Errors of the operating system that a user can mend: rights, space, limits, a file where a folder belongs."""
NO_ENV = "--no-env"
"""Takes the environment out of a recipe, of which tyro's words can only change one."""


def run_recipe(
    config: TrainConfig | Callable[..., TrainConfig],
    args: Sequence[str] | None = None,
    *,
    tiny: bool = False,
    smoke: bool = False,
    choices: Choices = MappingProxyType({}),
) -> None:
    """Run a recipe: its configuration as defaults, every value overridable on the command line.

    Prints one line and exits with status 1 on an error that the user can mend, 130 on Ctrl-C.

    Args:
        config: the recipe's values; of a recipe that holds several runs, a function that returns those of one.
        args: the command line; the process's own when None.
        tiny: offer `--tiny` (:func:`poco_vla.cli.smoke.tiny_pick_task`); the command line overrides its values, too.
        smoke: offer `--smoke` (:func:`poco_vla.cli.smoke.smoke_run`), likewise.
        choices: parameters of `config` and the values that each takes, offered as options such as `--task square`.
    """

    def run() -> None:
        chosen, words = choose(config, choices, sys.argv[1:] if args is None else args)
        about = described(config, choices)
        given, seeds = _seeds(words)
        # The words are read for every seed before the first run: a bad one is told at once.
        runs = [_parsed(chosen, [*given, "--seed", str(seed)], about, tiny=tiny, smoke=smoke) for seed in seeds]
        for one in runs or [_parsed(chosen, given, about, tiny=tiny, smoke=smoke)]:
            if not (seeds and one.resume):
                _train(one)
            elif (state := _state_of(one)) != "done":
                _train(replace(one, resume=state == "resumable"))

    _guarded(run)


def _state_of(config: TrainConfig) -> Literal["done", "resumable", "new"]:
    """How far the newest run is that `config` stands for."""
    from poco_vla.training import runs_of
    from poco_vla.training.checkpoint import can_resume

    runs = runs_of(config)
    if runs and _is_done(runs[-1]):
        return "done"
    return "resumable" if runs and can_resume(runs[-1]) else "new"


def _is_done(folder: Path) -> bool:
    """True if a run has ended well. One whose result a loss of power has emptied writes it again, by its checkpoint."""
    try:
        return isinstance(read_json(folder / "result.json"), dict)
    except PocoError:
        return False


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

        given, seeds = _seeds(sys.argv[1:] if args is None else args)
        given, only = _taken(given, "--only")
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
            runs += [_parsed(configs[name], words, tiny=False, smoke=smoke) for name in only or configs]
        for one in runs:
            _run_variant(one)
        if os.environ.get("RANK", "0") == "0":
            folders = [one.output_dir for one in runs]
            SafeConsole().print(write_page(folders, folders[0].parent.parent / "report.html"))

    _guarded(run)


def _run_variant(config: TrainConfig) -> None:
    """One run of a sweep, or what is left of it."""
    from poco_vla.training import checkpoint

    folder = config.output_dir
    if (folder / "config.json").is_file():
        changed = differences(from_json(TrainConfig, read_json(folder / "config.json")), config)
        changed = [line for line in changed if role_of(TrainConfig, line.split(":")[0]).resume != "free"]
        if changed:
            raise ConfigError(
                f"{folder} holds a run of another configuration ({'; '.join(changed)}): delete or move it"
            )
    if _is_done(folder):
        return
    if config.policy and Path(config.policy).parts[0] == "runs" and not Path(config.policy).is_dir():
        raise ConfigError(f"{folder} starts from {config.policy}, which is not there: run that variant first")
    resumable = checkpoint.can_resume(folder)
    if not resumable:
        checkpoint.discard_folder(folder)  # ended before its first checkpoint: nothing to go on from
    _train(replace(config, resume=resumable))


def _parsed(config: TrainConfig, given: Sequence[str], about: str = "", *, tiny: bool, smoke: bool) -> TrainConfig:
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
    default, rest = _with_open_options(config, [word for word in given if word not in (*smaller, NO_ENV)])
    parsed = tyro.cli(TrainConfig, description=about, default=default, args=rest, config=(tyro.conf.AvoidSubcommands,))
    parsed = _expanded(_with_options_of(parsed, default))
    return _without_env(parsed) if NO_ENV in given else parsed


def _without_env(config: TrainConfig) -> TrainConfig:
    """For robots, or SFT alone: no environment, hence no demonstrations by its expert."""
    return replace(config, env=None, demonstrations=None)


def _seeds(given: Sequence[str]) -> tuple[list[str], list[int]]:
    rest, words = _taken(given, "--seeds")
    odd = [word for word in words if not word.isdigit()]
    if odd:
        raise ConfigError(f"--seeds takes whole numbers, not {', '.join(odd)}")
    if words and "--seed" in rest:
        raise ConfigError("--seed and --seeds were given: one of them")
    return rest, [int(word) for word in words]


def _taken(given: Sequence[str], flag: str) -> tuple[list[str], list[str]]:
    """A command line without `flag` and its values, and these values."""
    words = [part for word in given for part in (word.split("=", 1) if word.startswith(f"{flag}=") else [word])]
    if flag not in words:
        return words, []
    begin = words.index(flag)
    end = next((i for i in range(begin + 1, len(words)) if words[i].startswith("-")), len(words))
    if end == begin + 1:
        raise ConfigError(f"{flag} needs at least one value")
    return words[:begin] + words[end:], words[begin + 1 : end]


@dataclass
class Train:
    """Supervised fine-tuning, then online POCO. --no-env takes the environment out: for robots
    (--interaction.mode remote), or SFT alone (--online-steps 0)."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: TrainConfig(env=EnvSpec()))


@dataclass
class Eval:
    """Success rate of an exported policy."""

    policy: Annotated[str, tyro.conf.Positional]
    """Folder or Hub id of a policy or a head; a run's folder is its last policy."""
    adapter: str | None = None
    """Adapter that wraps it. Left out: the one that its folder or repository names."""
    base: str | None = None
    """Hub id or folder of a head's base, where it is not where it was."""
    revision: str | None = None
    """Hub commit, tag or branch."""
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
    """Table, learning curves and one HTML page of finished runs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, or folders with runs up to three levels below."""
    output: Path = Path("report.html")
    """What to write: .html is one page with everything in it; .png, .pdf and .svg are a picture of the curves."""
    max_video_bytes: int = 20_000_000
    """Most bytes of videos that the page takes in; it says which were left out."""


@dataclass
class Push:
    """What a run has trained, to the Hugging Face Hub: private, in one commit, with a model card."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished run."""
    repo: Annotated[str, tyro.conf.Positional]
    """Where to: you/name, or name for your own."""
    form: Literal["head", "peft", "policy"] = "head"
    """The head (or its LoRA) for poco_vla; the same for LeRobot alone; or a whole LeRobot policy."""
    which: Literal["last", "best"] = "last"
    """The policy of the run's end, or of its best evaluation."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of a head's file: bfloat16 halves it and rounds."""
    critic: bool = False
    """With the critic, for those who go on training."""
    base: str | None = None
    """Hub id of the base model, for a run that had it from a local folder. The files must be the same."""
    license: str | None = None
    """For a policy that was trained from nothing; any other has its base's."""
    public: bool = False
    """Let everybody see a new repository."""
    update: bool = False
    """Add a commit to a repository that holds such a head already."""
    dry_run: bool = False
    """Upload nothing: list what would go, and show the model card."""


@dataclass
class Export:
    """A trained head as a folder for LeRobot's commands."""

    source: Annotated[str, tyro.conf.Positional]
    """Hub id or folder of a head (RUN/head, RUN/best)."""
    path: Annotated[Path, tyro.conf.Positional]
    """Where to."""
    form: Literal["policy", "peft"] = "policy"
    """Merged with its base, or as a peft adapter that LeRobot puts on the base itself."""
    revision: str | None = None
    """Hub commit, tag or branch."""
    base: str | None = None
    """Hub id or folder of the base, where it is not where it was."""


@dataclass
class Serve:
    """A policy for robots elsewhere, by openpi's websocket protocol."""

    policy: Annotated[str, tyro.conf.Positional]
    """Folder or Hub id of a policy or a head; a run's folder is its last policy."""
    adapter: str | None = None
    """Adapter that wraps it. Left out: the one that its folder or repository names."""
    base: str | None = None
    """Hub id or folder of a head's base, where it is not where it was."""
    revision: str | None = None
    """Hub commit, tag or branch."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is all of this machine's, for which a token is needed."""
    port: int = 8000
    """Port; 0 takes a free one."""
    token: str | None = None
    """Token that clients must send ("Authorization: Api-Key TOKEN"). Default: the environment variable POCO_VLA_TOKEN,
    which others on this machine cannot read; @FILE is the first line of a file."""
    certificate: Path | None = None
    """TLS certificate (PEM)."""
    key: Path | None = None
    """Its private key (PEM)."""
    insecure: bool = False
    """Serve other machines without a token."""
    fps: float | None = None
    """Control steps per second, told to clients. Left out: those of the data that the policy was trained on."""
    device: str = "cpu"
    """Torch device."""
    seed: int = 0
    """Of the policy's noise."""


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


@dataclass
class MakeData:
    """Data of the simulator's own scripted expert."""

    env: EnvSpec = field(default_factory=EnvSpec)
    """The environment."""
    demonstrations: Annotated[DemonstrationConfig, tyro.conf.arg(name="")] = field(default_factory=DemonstrationConfig)


@dataclass
class OGBenchData:
    """An official OGBench set (.npz) with the rewards of one task."""

    task: str
    """Single task, such as cube-double-singletask-task2-v0."""
    root: Path
    """Folder of the LeRobot dataset."""
    path: Path | None = None
    """The .npz, or the folder that it or its parts lie in. Left out: it is downloaded."""
    kind: Literal["play", "noisy"] = "play"
    """Which of the task's sets to download, or to look for in a folder."""
    episodes: int | None = None
    """Trajectories to take, from the first; None is all."""
    downloads: Path = Path("runs/downloads")
    """Where downloaded files are kept."""


@dataclass
class RobomimicData:
    """An official RoboMimic low_dim set (.hdf5)."""

    task: str
    """Lift, Can or Square."""
    root: Path
    """Folder of the LeRobot dataset."""
    path: Path | None = None
    """The .hdf5. Left out: it is downloaded."""
    kind: Literal["ph", "mh", "mg"] = "mh"
    """Which set to download: one proficient human, six of mixed skill, a machine (Lift and Can)."""
    filter_key: str | None = None
    """One of the file's own splits, such as 20_percent."""
    episodes: int | None = None
    """Demonstrations to take, from the first; None is all."""
    downloads: Path = Path("runs/downloads")
    """Where downloaded files are kept."""


@dataclass
class ConsolidateData:
    """A run's online episodes, one file each, as a compact dataset for reading and uploading. The run may go on."""

    source: Annotated[Path, tyro.conf.Positional]
    """The run's folder, or its episodes/."""
    root: Path
    """Folder of the compact dataset; an older one there is replaced."""


@dataclass
class Data:
    """A LeRobot dataset from a simulator's expert, an official file, or a run's online episodes."""

    source: Annotated[
        Annotated[MakeData, tyro.conf.subcommand("make")]
        | Annotated[OGBenchData, tyro.conf.subcommand("ogbench")]
        | Annotated[RobomimicData, tyro.conf.subcommand("robomimic")]
        | Annotated[ConsolidateData, tyro.conf.subcommand("consolidate")],
        tyro.conf.arg(name=""),
    ]


@dataclass
class Adapters:
    """The installed model adapters."""


VERBS = ("train", "eval", "serve", "robot", "data", "report", "push", "export", "adapters")
DATA_VERBS = ("make", "ogbench", "robomimic", "consolidate")


def main(args: Sequence[str] | None = None) -> None:
    """`poco-vla`."""
    given = list(sys.argv[1:] if args is None else args)
    _guarded(lambda: _run(_expanded(_command(given))))


def _command(args: Sequence[str]) -> object:
    """Return the command that a command line stands for."""
    _check_verbs(args)
    if args[:1] == ["train"]:
        return _train_command(args[1:])
    if args[:2] == ["data", "make"]:
        options, rest = _with_open_options(TrainConfig(env=EnvSpec()), args[2:])
        assert options.env is not None
        made = tyro.cli(MakeData, prog="poco-vla data make", default=MakeData(options.env), args=rest)
        return Data(replace(made, env=replace(made.env, options=options.env.options)))
    args, devices = _devices(args) if args[:1] == ["robot"] else (args, ())
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
    options, rest = _with_open_options(TrainConfig(env=EnvSpec()), [word for word in args if word != NO_ENV])
    parsed = tyro.cli(
        TrainConfig,
        prog="poco-vla train",
        description=Train.__doc__,
        default=options,
        args=rest,
        config=(tyro.conf.AvoidSubcommands,),
    )
    parsed = _with_options_of(parsed, options)
    return Train(_without_env(parsed) if NO_ENV in args else parsed)


def _devices(args: Sequence[str]) -> tuple[list[str], list[str]]:
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


def _with_options_of(config: TrainConfig, options: TrainConfig) -> TrainConfig:
    """Return `config` with the open options that were read before the parser saw the command line."""
    env = replace(config.env, options=options.env.options) if config.env and options.env else config.env
    return replace(config, policy_options=options.policy_options, env=env)


def _run(command: object) -> None:
    console = SafeConsole()
    match command:
        case Train():
            _train(command.config)
        case Eval():
            from poco_vla.evaluation import evaluate

            policy = _policy_of(command)
            env = _env_of(command, policy.about)
            result = evaluate(policy.load(), env, episodes=command.episodes, seed=command.seed)
            console.print(f"success {result.success} of {command.episodes} episodes")
        case Serve():
            _serve(command, console)
        case Robot():
            from poco_vla.robots.program import run_robot

            run_robot(**vars(command))
        case Data():
            console.print(_make_data(command.source))
        case Report():
            from poco_vla.report import draw_curves, find_runs, result_table, write_page

            kind = command.output.suffix.lower()
            if kind not in (".html", ".png", ".pdf", ".svg"):
                raise ConfigError(f"--output {command.output} ends in {kind or 'nothing'}; .html, .png, .pdf or .svg")
            runs, problems = find_runs(command.runs)
            for problem in problems:
                _stderr().print(Text.assemble(("left out", "yellow"), f": {problem}"))
            console.print(result_table(runs))
            if kind == ".html":
                console.print(write_page(runs, command.output, max_video_bytes=command.max_video_bytes))
            else:
                console.print(draw_curves(runs, command.output))
        case Push():
            _push(command, console)
        case Export():
            from poco_vla.hub import export_policy

            options = {name: value for name, value in vars(command).items() if name not in ("source", "path")}
            console.print(export_policy(command.source, command.path, **options))
        case Adapters():
            from poco_vla.registry import available_adapters

            for name, where in available_adapters().items():
                console.print(f"{name:<16} {where}")


@dataclass(frozen=True)
class _Policy:
    """A policy that a command line names: its adapter, the folder of its small files, what the folder says of it, and
    what loads it."""

    adapter: str
    folder: Path
    about: dict[str, Any]
    load: Callable[[], Any]


def _policy_of(command: Eval | Serve) -> _Policy:
    """Find a policy, and its adapter where none is told."""
    from poco_vla.adapting.heads import read_about
    from poco_vla.devices import check_device
    from poco_vla.hub import load_head, located
    from poco_vla.registry import load_adapter

    check_device(command.device)
    if command.adapter is not None:
        load_adapter(command.adapter)  # a mistyped name is told before anything is fetched
    options: dict[str, Any] = {"device": command.device} | ({} if command.base is None else {"base": command.base})
    source = located(command.policy, command.revision)
    about = read_about(source.folder)
    if source.revision is not None:
        options["revision"] = source.revision
    if command.adapter is None and about:
        return _Policy(about["adapter"], source.folder, about, lambda: load_head(source.name, **options))
    name = command.adapter or _run_of(command.policy, "by which adapter, with --adapter").get("adapter", "flow_mlp")
    adapter = load_adapter(name)
    return _Policy(name, source.folder, about, lambda: adapter.from_pretrained(source.name, **options))


def _expanded(command: Any) -> Any:
    """Return a command or configuration whose paths may begin with ~, the user's home folder."""
    if isinstance(command, Path):
        return command.expanduser()
    if isinstance(command, tuple):
        return tuple(_expanded(value) for value in command)
    if not is_dataclass(command) or isinstance(command, type):
        return command
    return replace(command, **{f.name: _expanded(getattr(command, f.name)) for f in fields(command)})


def _push(command: Push, console: Console) -> None:
    from poco_vla.hub import push_head

    options = {name: value for name, value in vars(command).items() if name not in ("run", "repo", "public")}
    pushed = push_head(command.run, command.repo, private=not command.public, **options)
    table = Table("file", "bytes", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, size in pushed.files.items():
        table.add_row(name, f"{size:,}")
    table.add_row("in all", f"{sum(pushed.files.values()):,}", style="bold")
    console.print(table)
    where = f"{pushed.repo_id} ({'private' if pushed.private else 'public'})"
    if pushed.url is None:
        console.print(pushed.card, f"\nnothing was uploaded; this would go to {where}")
    else:
        console.print(f"pushed to {where}: {pushed.url}")


def _serve(command: Serve, console: Console) -> None:
    """Answer until Ctrl-C."""
    from poco_vla.hub.rate import rate_of
    from poco_vla.rollout import Actor
    from poco_vla.serving.access import token_of
    from poco_vla.serving.server import PolicyServer, observations_of

    found = _policy_of(command)
    fps = rate_of(command.policy, command.revision) if command.fps is None else command.fps
    policy = found.load()
    server = PolicyServer(
        Actor(policy, command.seed),
        observations_of(str(found.folder), policy.input_keys),
        adapter=found.adapter,
        fps=fps,
        host=command.host,
        port=command.port,
        token=token_of(command.token),
        certificate=command.certificate,
        key=command.key,
        insecure=command.insecure,
    )
    with server:
        console.print(f"serving {found.adapter} at {server.url}; Ctrl-C ends it")
        sys.stdout.flush()
        threading.Event().wait()


def _make_data(source: MakeData | OGBenchData | RobomimicData | ConsolidateData) -> Path:
    """The dataset's folder, made while a bar shows how far it is."""
    from poco_vla.demonstrations import official as published
    from poco_vla.demonstrations.scripted import ensure_demonstrations
    from poco_vla.progress import Display
    from poco_vla.recording.consolidate import consolidate
    from poco_vla.simulators import environment

    if isinstance(source, ConsolidateData):
        inner = source.source / "episodes"
        return consolidate(inner if inner.is_dir() else source.source, source.root)
    display = Display()
    if isinstance(source, MakeData):
        with display.stage("episodes", source.demonstrations.episodes) as bar:
            return ensure_demonstrations(source.env, source.demonstrations, bar.to)
    ogbench = isinstance(source, OGBenchData)
    # Before a download: the task exists, and the folder is free.
    environment(EnvSpec(type="ogbench" if ogbench else "robosuite", task=source.task))
    published.refuse_existing(source.root)
    path = source.path
    if path is None:
        name = published.ogbench_file(source.task, source.kind) if ogbench else f"{source.task.lower()}-{source.kind}"
        with display.stage(f"download {name}", 1) as bar:
            path = published.download("ogbench" if ogbench else "robomimic", name, source.downloads, on_bytes=bar.of)
    with display.stage("episodes", source.episodes or 0) as bar:
        if isinstance(source, OGBenchData):
            return published.import_ogbench(path, source.task, source.root, episodes=source.episodes, on_episode=bar.to)
        return published.import_robomimic(
            path,
            source.task,
            source.root,
            episodes=source.episodes,
            filter_key=source.filter_key,
            on_episode=bar.to,
        )


def _env_of(command: Eval, about: Mapping[str, Any]) -> EnvSpec:
    """Return the environment that is asked for, or that of the policy's own run, as its folder or poco.json has it."""
    if command.env is not None:
        try:
            return _with_instruction(from_json(EnvSpec, json.loads(command.env)), about)
        except (json.JSONDecodeError, AttributeError) as error:
            raise ConfigError(f"--env is no JSON object: {error}") from error
    env = about.get("results", {}).get("env") or _run_of(command.policy, "where it acts with --env")["env"]
    if env is None:
        raise ConfigError(f"the run of {command.policy} had no environment: say where it acts with --env")
    return from_json(EnvSpec, env)


def _with_instruction(env: EnvSpec, about: Mapping[str, Any]) -> EnvSpec:
    """Give an environment the instruction that the policy's own run told in it, unless it has one."""
    trained = about.get("results", {}).get("env") or {}
    if env.instruction is None and (trained.get("type"), trained.get("task")) == (env.type, env.task):
        return replace(env, instruction=trained.get("instruction"))
    return env


def _run_of(policy: str, otherwise: str) -> dict[str, Any]:
    """Return result.json of the run that exported the policy."""
    from poco_vla.hub.places import run_of
    from poco_vla.report import read_result

    run = run_of(policy)
    if run is None:
        raise ConfigError(f"{policy} does not lie in a run's folder: say {otherwise}")
    return read_result(run)


def _train(config: TrainConfig) -> None:
    from poco_vla.training import train

    train(config)


def _guarded(work: object) -> None:
    """Run, and turn what a user can mend into one line on stderr, which one process of a launch writes."""
    format_logs_safely("%(levelname)s %(name)s: %(message)s")
    assert callable(work)
    # A launcher that waits for its children ignores Ctrl-C, and they inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work()
    except PocoError as error:
        _refuse(type(error).__name__, str(error))
    except Exception as error:  # every library wraps a full disk in its own
        if is_out_of_space(error):
            _refuse("the disk is full, or your share of it", f"{error}. Make room, then try again")
        if not (isinstance(error, OSError) and error.errno in OF_THE_SYSTEM):
            raise
        _refuse(type(error).__name__, f"{error.strerror}{f': {error.filename}' if error.filename else ''}")
    except KeyboardInterrupt as stop:
        _stderr().print(str(stop) or "interrupted")
        sys.exit(INTERRUPTED)


def _refuse(kind: str, message: str) -> NoReturn:
    """End with status 1, and the message unless another process of this launch has written it."""
    if first_to_say(message):
        _stderr().print(Text.assemble((kind, "bold red"), f": {message}"))
    sys.exit(1)


def _stderr() -> Console:
    return SafeConsole(stderr=True)
