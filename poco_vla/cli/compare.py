"""`poco-vla compare`: several algorithms on one recipe."""

import runpy
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from poco_vla.cli.choices import Choices, choose
from poco_vla.cli.configuration import parse_config
from poco_vla.cli.option_values import flag_of, groups_of
from poco_vla.config import TrainConfig, differences, from_json
from poco_vla.errors import ConfigError, PocoError, UnknownNameError
from poco_vla.files import read_json
from poco_vla.roles import role_of
from poco_vla.terminal import SafeConsole

if TYPE_CHECKING:
    from poco_vla.report.comparison_page import WrittenComparison
    from poco_vla.report.comparisons_page import WrittenComparisons

SFT = "sft"
"""Folder of the SFT runs of a comparison, beside those of its algorithms."""
REFUSED = {
    "--seed": "--seeds 0 1 2 names the seeds",
    "--algorithm": "--algorithms qc poco names the algorithms",
    "--output-dir": "--output names the folder of the comparison",
    "--resume": "a comparison goes on by itself",
    "--no-env": "success is compared in an environment",
}
"""Options of a recipe that a comparison gives to its runs itself, and what to do."""


@dataclass
class Compare:
    """Several algorithms on one recipe: same demonstrations, same SFT policy, same budget, same evaluations.

    Runs what is missing, goes on with what was stopped, and writes one report. Further options are the recipe's, and
    hold for every run; those below an algorithm's name (--qc.num-candidates 4) hold for that one's runs.
    """

    recipe: Annotated[Path, tyro.conf.Positional]
    """Recipe, a Python file with a function `config`; or the folder of a comparison, whose report is written again."""
    algorithms: tuple[str, ...] = ()
    """Algorithms by name (`poco-vla algorithms` lists them)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds, a run of each algorithm for each."""
    jobs: int = 1
    """Runs side by side; a run of a small recipe keeps one core busy, and its simulators another one in part."""
    output: Path | None = None
    """Folder of the comparison; runs/compare/NAME of the recipe when left out."""
    report_only: bool = False
    """Write the report of what is there, and run nothing."""
    page: bool = False
    """Given a folder of comparisons (runs/compare): one page of all of them, with aggregates over tasks."""
    options: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Words for the runs."""

    def execute(self) -> None:
        """Run what is missing, and write the report."""
        if self.page:
            return _page(self.recipe)
        if self.recipe.is_dir():
            return _report(self.recipe)
        root = self.output or Path("runs/compare") / self.recipe.stem
        plan = Plan(self, root)
        if not self.report_only:
            failed = _run(plan)
            if failed:
                _report(root)
                told = f"Their logs are in {root / 'logs'}; the same command goes on"
                raise PocoError(f"runs failed: {', '.join(failed)}. {told}")
        return _report(root)


def split_compare(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words of `poco-vla compare` that are its own, and those for its runs.

    Raises:
        ConfigError: the recipe does not come first.
    """
    if any(word in ("-h", "--help") for word in args) or not args:
        return list(args) or ["--help"], []
    if args[0].startswith("-"):
        raise ConfigError(f"the recipe comes first: poco-vla compare recipes/mlp_cube.py {args[0]} ...")
    own, rest = [args[0]], []
    words = [part for arg in args[1:] for part in (arg.split("=", 1) if arg.split("=")[0] in OWN else [arg])]
    groups = groups_of(words)
    for i, group in enumerate(groups):
        if i == 0 and not group[0].startswith("-"):
            raise ConfigError(f'"{group[0]}" belongs to no option; the algorithms follow --algorithms')
        (own if group[0] in OWN else rest).extend(group)
    return own, rest


OWN = ("--algorithms", "--seeds", "--jobs", "--output", "--report-only", "--no-report-only", "--page", "--no-page")
"""Options that are not the recipe's."""


@dataclass(frozen=True)
class Recipe:
    """Hold what a comparison needs of a recipe.

    Attributes:
        config: its configuration, or a function that returns the one of the chosen values.
        choices: parameters of that function and the values that each takes.
        authors: values of algorithms' authors for its task.
    """

    config: Any
    choices: Choices
    authors: Mapping[str, Mapping[str, Any]]


def read_recipe(path: Path) -> Recipe:
    """Import a recipe: its function `config`, and where it has them the parameters of that (`CHOICES`) and values of
    algorithms' authors for its task (`AUTHORS`).

    Raises:
        ConfigError: it is no Python file, or has no function `config`.
    """
    if not path.is_file() or path.suffix != ".py":
        found = "there is no such file" if not path.exists() else "that is no Python file"
        raise ConfigError(f"{path}: {found}; give a recipe, such as recipes/mlp_cube.py, or a comparison's folder")
    sys.path.insert(0, str(path.parent.resolve()))  # as when it is run
    try:
        found = runpy.run_path(str(path), run_name="poco_vla_recipe")
    finally:
        sys.path.pop(0)
    config = found.get("config")
    if not callable(config):
        raise ConfigError(f"{path} has no function config() that returns a TrainConfig, as recipes/mlp_cube.py has")
    choices = found.get("CHOICES", {})
    return Recipe(config if choices else config(), choices, found.get("AUTHORS", {}))


class Plan:
    """The runs of a comparison, checked before any work.

    Args:
        command: the command line.
        root: folder of the comparison.

    Attributes:
        members: the runs, each after the one that it starts from.

    Raises:
        PocoError: an algorithm cannot run on the recipe, an option does not exist, or runs of other settings are there.
    """

    def __init__(self, command: Compare, root: Path) -> None:
        _check_command(command)
        self.command, self.root, self.recipe = command, root, read_recipe(command.recipe)
        self.common, self.own = _split_options(command.options, command.algorithms)
        if not any(word.replace("no-", "").startswith("--eval.videos") for word in self.common):
            self.common.append("--eval.no-videos")  # the report shows none
        self.configs = self._configs(command.algorithms)
        self._refuse_other_settings()
        self.members = self._members()

    def _configs(self, algorithms: Iterable[str]) -> dict[str, TrainConfig]:
        """Return the configuration of each algorithm's runs, as it is trained without a shared SFT policy."""
        out, wrong = {}, {}
        for name in algorithms:
            try:
                out[name] = self._parsed([*self._words(name), "--algorithm", name])
                _check(out[name])
            except ConfigError as error:
                wrong.setdefault(str(error), []).append(name)
        if wrong:
            raise ConfigError("; ".join(f"{', '.join(names)}: {said}" for said, names in wrong.items()))
        return out

    def _parsed(self, words: Sequence[str]) -> TrainConfig:
        chosen, rest = choose(self.recipe.config, self.recipe.choices, words)
        return parse_config(chosen, rest, tiny=True, smoke=True, authors=self.recipe.authors)

    def _words(self, name: str) -> list[str]:
        """Return the options of an algorithm's runs."""
        from poco_vla.algorithms import load_algorithm

        horizon = load_algorithm(name).horizon
        words = [*self.common, *self.own.get(name, [])]
        return words if horizon is None else [*_without(words, "--horizon"), "--horizon", str(horizon)]

    def _sft_folder(self, name: str, seed: int) -> Path | None:
        """Return the folder of the SFT run that an algorithm's run starts from; None if it starts from none."""
        from poco_vla.algorithms import load_algorithm

        kind, config = load_algorithm(name), self.configs[name]
        if not (kind.has_sft and kind.sft_trains_policy and config.sft_steps):
            return None
        return self.root / SFT / f"h{config.horizon}-seed{seed}"

    def _members(self) -> list[Any]:
        from poco_vla.comparison.member import Member

        members: dict[Path, Member] = {}
        for seed in self.command.seeds:
            for name, config in self.configs.items():
                start = self._sft_folder(name, seed)
                words = [*self._words(name), "--algorithm", name]
                if start is not None:
                    if start not in members:
                        sft = [*_without(words, "--algorithm", *(f"--{name}",), "--online-steps"), "--algorithm", "bc"]
                        sft = self._command([*sft, "--online-steps", "0"], seed, start)
                        members[start] = Member(SFT, seed, start, self._log(start), sft, None, config.sft_steps)
                    words = [*_without(words, "--policy", "--statistics", "--sft-steps"), *_from(start)]
                folder = self.root / name / f"seed{seed}"
                line = self._command(words, seed, folder)
                members[folder] = Member(name, seed, folder, self._log(folder), line, start, config.online_steps)
        return list(members.values())

    def _command(self, words: Sequence[str], seed: int, folder: Path) -> tuple[str, ...]:
        line = [sys.executable, str(self.command.recipe), *words, "--seed", str(seed), "--output-dir", str(folder)]
        return tuple(line)

    def _log(self, folder: Path) -> Path:
        return self.root / "logs" / f"{'-'.join(folder.relative_to(self.root).parts)}.log"

    def _refuse_other_settings(self) -> None:
        """Raise ConfigError if a run in the folder is of other settings than the plan's."""
        from poco_vla.algorithms import available_algorithms, load_algorithm

        wrong: dict[str, None] = {}
        for path in sorted(self.root.glob("*/*/config.json")):
            name = path.parts[-3]
            if name not in available_algorithms():
                continue
            found = from_json(TrainConfig, read_json(path))
            listed = name in self.configs
            config = self.configs[name] if listed else self._configs([name])[name]
            start = _started_from(found, self.root)
            if start is not None:
                config = replace(config, policy=found.policy, policy_options={}, statistics="checkpoint", sft_steps=0)
            expected = load_algorithm(name).fit(config)
            changed = [line for line in differences(found, expected) if _counts(line.split(":")[0], listed=listed)]
            if changed:
                wrong[f"{path.parent.relative_to(self.root)} ({'; '.join(changed)})"] = None
        if wrong:
            raise ConfigError(
                f"{self.root} holds runs of other settings, which no curve may mix: {', '.join(wrong)}. Give the same "
                "options, or another --output"
            )


def _check(config: TrainConfig) -> None:
    """Raise ConfigError if an algorithm cannot run as configured, or there is nothing to compare."""
    from poco_vla.algorithms import load_algorithm, options_of

    fitted = load_algorithm(config.algorithm).fit(config)
    options_of(fitted)
    if fitted.env is None or not fitted.online_steps:
        raise ConfigError("a comparison needs an environment (env) and environment steps (--online-steps)")


def _from(start: Path) -> list[str]:
    """Return the options with which a run starts from an SFT run's policy."""
    return ["--policy", str(start / "policy"), "--statistics", "checkpoint", "--sft-steps", "0"]


def _started_from(config: TrainConfig, root: Path) -> Path | None:
    """Return the SFT policy of the comparison that a run has started from; None if it has not."""
    if config.policy is None:
        return None
    path = Path(config.policy)
    return path if path.resolve().is_relative_to((root / SFT).resolve()) else None


def _counts(name: str, *, listed: bool) -> bool:
    """Return True for a field that makes another setting; of algorithms that are not asked for now, their own options
    and what they change in a run do not."""
    role = role_of(TrainConfig, name)
    if not role.setting:
        return False
    own = ("algorithm_options", "poco.", "optim.", "warmup_steps", "sft_steps", "updates_per_step", "replay.")
    return listed or not name.startswith(own)


def _check_command(command: Compare) -> None:
    """Raise PocoError if a command line cannot be meant."""
    from poco_vla.algorithms import available_algorithms

    known = available_algorithms()
    if not command.algorithms:
        raise ConfigError(f"no algorithm is given: --algorithms poco qc ...; there are {', '.join(known)}")
    for name in command.algorithms:
        if name not in known:
            raise UnknownNameError("algorithm", name, known)
    for what, values in (("algorithm", command.algorithms), ("seed", command.seeds)):
        if twice := [str(value) for value in dict.fromkeys(values) if values.count(value) > 1]:
            raise ConfigError(f"{what} {', '.join(twice)} is given more than once")
    if not command.seeds:
        raise ConfigError("--seeds needs at least one seed")
    if command.jobs < 1:
        raise ConfigError(f"--jobs is {command.jobs}; at least 1 run at a time")


def _split_options(words: Sequence[str], algorithms: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the options of all runs, and those below an algorithm's name by that name.

    Raises:
        ConfigError: one is below the name of an algorithm that is not compared, or is the comparison's own matter.
    """
    from poco_vla.algorithms import available_algorithms

    known = {name.replace("_", "-"): name for name in available_algorithms()}
    common: list[str] = []
    own: dict[str, list[str]] = {}
    for group in groups_of(words):
        flag = flag_of(group[0])
        if flag in REFUSED:
            raise ConfigError(f"{flag} is not for the runs of a comparison: {REFUSED[flag]}")
        head, dot, _ = flag.removeprefix("--").partition(".")
        if not dot or head not in known:
            common += group
        elif known[head] in algorithms:
            own.setdefault(known[head], []).extend(group)
        else:
            raise ConfigError(f'{flag} is an option of algorithm "{known[head]}", which is not compared')
    return common, own


def _without(words: Sequence[str], *flags: str) -> list[str]:
    """Return words without some options and their values, those below a flag's name too."""
    plain = [flag.replace("_", "-") for flag in flags]

    def is_one(group: Sequence[str]) -> bool:
        flag = flag_of(group[0])
        return any(flag == one or flag.startswith(f"{one}.") for one in plain)

    return [word for group in groups_of(words) if not is_one(group) for word in group]


def _run(plan: Plan) -> list[str]:
    """Run what is missing of a plan; return the names of the runs that failed."""
    from poco_vla.comparison.schedule import Schedule
    from poco_vla.comparison.table import ProgressTable, clocked
    from poco_vla.locks import FolderLock, HeldError

    console, root = SafeConsole(), plan.root
    root.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(root)
    try:
        lock.acquire()
    except HeldError as error:
        raise ConfigError(f"another comparison is at work in {root}: wait for it, or give another --output") from error
    try:
        schedule = Schedule(root, plan.members, plan.command.jobs, clocked(console.print))
        table = ProgressTable(console)
        with table.shown():
            schedule.run(lambda: table.show(schedule))
        return [member.label for member in schedule.failed]
    except KeyboardInterrupt:
        console.print(f"the runs are saved in {root}; the same command goes on")
        raise
    finally:
        lock.release()


def _report(root: Path) -> None:
    """Write the report of a comparison, and print its table."""
    from poco_vla.report import write_comparison

    _show(write_comparison(root))


def _page(root: Path) -> None:
    """Write the page of all comparisons in a folder, and print its table.

    Raises:
        ConfigError: it is no folder.
    """
    from poco_vla.report import write_comparisons

    if not root.is_dir():
        raise ConfigError(f"--page takes a folder of comparisons, such as runs/compare; {root} is none")
    _show(write_comparisons(root))


def _show(written: "WrittenComparison | WrittenComparisons") -> None:
    console = SafeConsole()
    console.print(written.table)
    for path in written.paths:
        console.print(path)
