"""Every page of the project: its links lead somewhere, what it names exists, its blocks run or are understood.

:mod:`pages` says what a block may be. The guides of :data:`pages.RUN_WHOLE` are also run, by test_guides.py.
"""

import ast
import json
import re
import runpy
import shlex
import sys
import tomllib
from dataclasses import fields, is_dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import get_args, get_type_hints

import pytest
import yaml
from pages import (
    COMMANDS,
    DATA,
    GUIDES,
    LANGUAGES,
    PAGES,
    ROOT,
    RUN_WHOLE,
    anchors,
    blocks,
    languages,
    links,
    prose,
    resolve,
    tables,
)
from pages import commands as commands_of

NAMES = [str(path) for path in PAGES]
IN_SMALL = {
    '{"episode_length": 120}': '{"episode_length": 120}, num_envs=1, in_process=True',
    "DemonstrationConfig(episodes=20)": "DemonstrationConfig(episodes=1, workers=1)",
    "episodes=100, every=2_500": "episodes=1, videos=False",
    "episodes=100, seed=7": "episodes=1, seed=7",
    "sft_steps=3_000": "sft_steps=4",
    "warmup_steps=3_000": "warmup_steps=2",
    "online_steps=10_000": "online_steps=150, updates_per_step=0.05",
}
"""What takes the place of sizes in a Python block that trains."""
SHELL = {"cd", "export", "unset", "source", "git", "hf", "ray", "cat", "nvidia-smi"}
"""Programs of which only the name is known here."""


def text_of(name):
    return (ROOT / name).read_text()


def every(*kinds):
    """Return the blocks of all pages in these languages, as parameters."""
    return [
        pytest.param(name, line, code, id=f"{name}:{line}", marks=[pytest.mark.slow] if "train(config)" in code else [])
        for name in NAMES
        for kind in kinds
        for line, code in blocks(text_of(name), kind)
    ]


# -- prose ------------------------------------------------------------------------------------------------------------


def test_the_pages_are_there():
    expected = {"README.md", "adapters/pi05/README.md", "recipes/guides/reading_curves.md", "tests/golden/README.md"}
    assert expected <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    for path, anchor in links(text_of(name)):
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.read_text()), f"{path}#{anchor}"


@pytest.mark.parametrize("name", NAMES)
def test_what_a_page_names_exists(name):
    """Files of this repository, functions of a file (`file.py:name`), dotted names of the library."""
    text = prose(text_of(name))
    tops = r"(?:poco_vla|adapters|recipes|tests|\.ci)/[\w./-]+|Makefile|LICENSE|pyproject\.toml"
    lost = [path for path in re.findall(rf"`({tops})(?::\w+)?`", text) if not (ROOT / path.rstrip("/")).exists()]
    dotted = set(re.findall(r"\bpoco_vla(?:\.\w+)+", text)) - {"poco_vla.adapters", "poco_vla.algorithms"}
    lost += sorted(one for one in dotted if resolve(one.removesuffix(".py")) is None)
    for file, function in re.findall(r"`([\w./-]+\.py):(\w+)`", text):
        if not re.search(rf"^\s*(?:def|class) {function}\b", (ROOT / file).read_text(), flags=re.MULTILINE):
            lost.append(f"{file}:{function}")
    assert not lost


@pytest.mark.parametrize("name", NAMES)
def test_a_page_needs_no_document_that_users_do_not_have(name):
    assert not re.findall(r"\bshared/|\bspec [A-Z]\d|section \d+, trap|design\.md|style\.md", text_of(name))


@pytest.fixture(scope="module")
def known_options():
    """Options of every `poco-vla` command, by the fields of what they are parsed into."""
    import poco_vla.cli
    from poco_vla import available_algorithms, load_algorithm
    from poco_vla.config import TrainConfig

    modules = [import_module(f"poco_vla.cli.{found.name}") for found in iter_modules(poco_vla.cli.__path__)]
    records = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    algorithms = [
        _options(load_algorithm(name).config_class, f"--{name.replace('_', '-')}.") for name in available_algorithms()
    ]
    return set().union(*algorithms, *(_options(cls) for cls in (TrainConfig, *records) if is_dataclass(cls)))


def _options(cls, prefix="--"):
    """Return the options of a configuration record, its inner records' too."""
    found = set()
    for name, hint in get_type_hints(cls).items():
        if name not in {f.name for f in fields(cls)}:
            continue
        option = f"{prefix}{name.replace('_', '-')}"
        found |= {option, option.replace(f"{prefix}", f"{prefix}no-", 1)}
        for inner in (hint, *get_args(hint)):
            if is_dataclass(inner):
                # Below a field without a name of its own (`arg(name="")`), options stand by themselves.
                found |= _options(inner, f"{option}.") | _options(inner, prefix)
                found |= {re.sub(r"\.([\w-]+)$", r".no-\1", one) for one in _options(inner, f"{option}.")}
    return found


OPEN_ENDED = ("--robot.", "--teleop.", "--policy-options", "--env.options")
OF_OURS = {
    *("--help", "--help-all", "--tiny", "--smoke", "--seeds", "--only", "--no-env", "--task", "--setting"),
}
"""Options that recipes and commands read before the parser of configurations does."""
OF_OTHERS = {
    *("--config_file", "--machine_rank", "--num_processes", "--num_machines", "--multi_gpu", "--cpu"),
    *("--mixed_precision", "--dynamo_backend", "--dynamo_mode", "--gradient_accumulation_steps", "--main_process_ip"),
    *("--measure", "--compiled", "--save"),
}
"""Options of Accelerate's launcher, of benchmarks, and of LeRobot's viewer."""


@pytest.mark.parametrize("name", NAMES)
def test_options_in_the_text_are_those_of_a_command(name, known_options):
    """An option in backticks is one of training or of another `poco-vla` command, unless it is said to be LeRobot's.

    LeRobot's own options have underscores, `.type` or `.path`: a page shows those in blocks, which are parsed.
    """
    # A span that begins with another program's name belongs to that program.
    spans = re.findall(r"`([^`\n]+)`", prose(text_of(name)))
    ours = [span for span in spans if not re.match(r"(lerobot-|accelerate|python|pytest|uv|pip|ray|make|hf)\b", span)]
    shown = {flag for span in ours for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", span)}
    shown = {flag for flag in shown if not flag.startswith(OPEN_ENDED) and "_" not in flag}
    lerobots = {
        flag for flag in shown if re.match(r"--(policy|dataset|plugin|env|strategy|inference|algorithm)\.", flag)
    }
    unknown = shown - known_options - OF_OURS - OF_OTHERS
    assert unknown <= {flag for flag in lerobots if flag.endswith((".type", ".path", ".dtype"))} | {"--fps"}, unknown


# -- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_block_says_what_it_is(name):
    assert [kind for kind in languages(text_of(name)) if kind not in LANGUAGES] == []


@pytest.mark.parametrize(("name", "line", "code"), every(*DATA))
def test_data_is_read(name, line, code):
    for kind, read in {"json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load}.items():
        if (line, code) in blocks(text_of(name), kind):
            assert read(code)


@pytest.fixture
def pushed_head(tmp_path_factory):
    """A Hub with the head on it that the text loads."""
    from hub_server import HubServer, connected
    from run_folders import based_run

    from poco_vla import push_head

    root = tmp_path_factory.mktemp("hub")
    base, run = based_run(root)
    with HubServer() as hub, connected(hub):
        hub.add_repo("lerobot/pi05_base", base)
        push_head(run, "pen", base="lerobot/pi05_base")
        hub.add_repo("you/pi05-pick-pen-poco")
        hub.commit("you/pi05-pick-pen-poco", hub.files("someone/pen"))
        yield


@pytest.fixture
def served_policy():
    """A tiny policy behind the address that the text connects to."""
    from poco_vla import load_adapter
    from poco_vla.rollout import Actor
    from poco_vla.serving.feature import Feature
    from poco_vla.serving.server import PolicyServer

    policy = load_adapter("pi05").tiny()
    obs = policy.example_obs(1)
    observed = {
        key: Feature((224, 224, 3), "uint8") if "images" in key else Feature(tuple(obs[key].shape[1:]), "float32")
        for key in policy.input_keys
    }
    with PolicyServer(Actor(policy, 0), observed, adapter="pi05", fps=30.0, port=0) as server:
        yield server


def run_python(name, line, code):
    exec(compile(code, f"{name}, block at line {line}", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("name", "line", "code"), every("python"))
def test_python_runs(name, line, code, tmp_path, monkeypatch, request):
    """Each block by itself, in an empty folder."""
    if Path(name).stem in RUN_WHOLE and name.startswith("recipes/guides"):
        pytest.skip("test_guides.py runs the page")
    if named := re.match(r"# (\w+\.py)\n", code):  # a file, whose own test uses it
        compile(code, named[1], "exec")
        return
    if "load_head(" in code:
        request.getfixturevalue("pushed_head")
    if "PolicyClient(" in code:
        code = code.replace("ws://127.0.0.1:8000", request.getfixturevalue("served_policy").url)
    if "train(" in code:
        for old, small in IN_SMALL.items():
            assert old in code
            code = code.replace(old, small)
    monkeypatch.chdir(tmp_path)
    run_python(name, line, code)


@pytest.fixture
def trained(monkeypatch):
    """Take what training is given, and train nothing."""
    import poco_vla.report
    import poco_vla.training

    given = []
    monkeypatch.setattr(poco_vla.training, "train", given.append)
    monkeypatch.setattr(poco_vla.report, "write_page", lambda runs, path: path)
    monkeypatch.setattr("poco_vla.cli.smoke.tiny_pick_task", lambda config: config)
    return given


@pytest.mark.parametrize(("name", "line", "code"), every(*COMMANDS))
def test_commands_are_understood(name, line, code, trained, monkeypatch, tmp_path):
    """By the parser of the program that each is for."""
    for command in commands_of(code):
        words = shlex.split(command.split("<<")[0], comments=True)
        understood(words, trained, monkeypatch)


def understood(words, trained, monkeypatch):
    """Raise AssertionError or SystemExit unless a command's program takes its words."""
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert rest[0] == "launch", rest
        parsed = launch_command_parser().parse_args(rest[1:])
        assert parsed.config_file is None or (ROOT / parsed.config_file).is_file(), parsed.config_file
        script_is_understood(parsed.training_script, parsed.training_script_args, trained, monkeypatch)
    elif program == "python" and rest[0] == "-m":
        assert rest[1] in ("pytest", "venv"), rest
    elif program == "python":
        script_is_understood(rest[0], rest[1:], trained, monkeypatch)
    elif program == "poco-vla":
        from poco_vla.cli.compare import Compare, Plan
        from poco_vla.cli.program import _command

        command = _command(rest)
        if isinstance(command, Compare) and not str(command.recipe).startswith("runs/"):
            Plan(replace(command, recipe=ROOT / command.recipe), Path("runs/compare"))
    elif program == "make":
        verbs = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
        assert {word for word in rest if "=" not in word} <= verbs
    elif program in ("uv", "pip"):
        assert rest[: 1 + (program == "uv")][-1] in ("install", "pip"), words
        for word in rest:
            packages_exist(word)
    elif program == "pytest":
        assert all((ROOT / word.split("::")[0]).exists() for word in rest if not word.startswith("-")), words
    elif program.startswith("lerobot-"):
        options_exist(program, rest)
    else:
        assert program in SHELL, f"no parser is known for {program}"


def script_is_understood(script, words, trained, monkeypatch):
    """A recipe is run up to its training; of another script the options stand in its text."""
    path = ROOT / script
    if not path.exists():
        assert "/" not in script, f"there is no {script}"
        return  # a file that the page itself shows
    text = path.read_text()
    if path.parent != ROOT / "recipes":
        missing = [
            word for word in words if word.startswith("--") and word.split("=")[0][2:] not in text.replace("_", "-")
        ]
        assert not missing, f"{script} has no {missing}"
        return
    if "run_sweep(" in text and "--only" not in words:
        words = [*words, "--only", "sft"]
    if "--resume" in words:  # there is no run to resume here
        words = [word for word in words if word != "--resume"]
    begun = len(trained)
    words = ["{}" if re.fullmatch(r"\$\(cat \S+\.json\)", word) else word for word in words]
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    runpy.run_path(str(path), run_name="__main__")
    assert len(trained) > begun, f"{script} {shlex.join(words)} trains nothing"


def packages_exist(word):
    """Raise AssertionError for an extra or a folder of ours that does not exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if found := re.fullmatch(r"(\.|poco-vla)\[([\w,-]+)\]", word):
        assert set(found[2].split(",")) <= set(extras), word
    if word.startswith("adapters/"):
        assert (ROOT / word / "pyproject.toml").is_file(), word


@cache
def lerobot_config(program):
    """Return the configuration record of one of LeRobot's commands."""
    module = {
        "lerobot-train": ("lerobot.configs.train", "TrainPipelineConfig"),
        "lerobot-eval": ("lerobot.configs.eval", "EvalPipelineConfig"),
        "lerobot-record": ("lerobot.scripts.lerobot_record", "RecordConfig"),
        "lerobot-rollout": ("lerobot.rollout.configs", "RolloutConfig"),
    }
    where, name = module[program]
    return getattr(import_module(where), name)


def options_exist(program, words):
    """Raise AssertionError for an option that one of LeRobot's commands does not have."""
    if program in ("lerobot-dataset-viz", "lerobot-edit-dataset"):
        source = find_spec(f"lerobot.scripts.{program.replace('-', '_')}").origin
        text = Path(source).read_text()
        assert all(f'"{word.split("=")[0]}"' in text for word in words if word.startswith("--")), words
        return
    from poco_vla.robots import devices

    devices._with_plugins([])
    import_module("lerobot.policies")
    import_module("poco_vla.simulators.ogbench")
    given = {}
    for word in words:
        if word.startswith("--"):
            option, _, value = word[2:].partition("=")
            given[option] = value
    for option in given:
        has_option(lerobot_config(program), option.split("."), given, ())


def has_option(cls, path, given, above):
    """Follow an option's path through LeRobot's configuration records; `type` chooses among registered ones."""
    name, *rest = path
    if name in ("path", "type", "discover_packages_path", "pretrained_path"):
        return
    hints = get_type_hints(cls)
    whole = ".".join((*above, *path))
    if name == "plugin":
        return
    assert name in hints, f"{cls.__name__} has no {whole}"
    if not rest:
        return
    inner = next((one for one in (hints[name], *get_args(hints[name])) if is_dataclass(one)), None)
    assert inner is not None, f"{whole}: {name} holds no options"
    kind = given.get(".".join((*above, name, "type")))
    if kind and hasattr(inner, "get_known_choices"):
        choices = inner.get_known_choices()
        if kind not in choices:
            return  # a plug-in's, which `discover_packages_path` names
        inner = choices[kind]
    elif hasattr(inner, "get_known_choices"):
        return
    has_option(inner, rest, given, (*above, name))


# -- what single pages claim ------------------------------------------------------------------------------------------


@cache
def sentences():
    """Return every text literal of the library and its adapters, with "…" for what is filled in."""
    found = set()
    for folder in ("poco_vla", "adapters"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.add("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return "\n".join(found)


def test_every_error_on_the_troubleshooting_page_is_one_that_the_library_writes():
    """Each part between the gaps ("…") stands in one text of the library."""
    page = GUIDES / "troubleshooting.md"
    shown = [
        row[0].strip("`") for _, header, rows in tables(page.read_text()) if header[0] == "Message" for row in rows
    ]
    assert len(shown) >= 15
    lost = [
        part for message in shown for part in re.split("…", message) if part.strip(" .") and part not in sentences()
    ]
    assert not lost


def test_the_environment_that_the_simulators_page_writes_can_be_trained_in(tmp_path, monkeypatch):
    from poco_vla.cli.smoke import smoke_run
    from poco_vla.config import EnvSpec, TrainConfig
    from poco_vla.rollout import EnvPool

    page = (GUIDES / "simulators.md").read_text()
    (code,) = [code for _, code in blocks(page, "python") if code.startswith("# lerobot_env_reach.py\n")]
    (tmp_path / "lerobot_env_reach.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    import_module("lerobot_env_reach")
    with EnvPool(EnvSpec("reach", in_process=True, num_envs=1), 2) as pool:
        pool.reset(0, 1)
        assert pool.tasks == ["reach the origin"]
        ended = []
        while not ended:
            towards = -10 * pool.obs["observation.state"][:, None].repeat(2, axis=1)
            ended, _ = pool.step(towards.clip(-1, 1).astype("float32"))
    assert ended[0].succeeded
    (episode, *_) = read_demonstrations(EnvSpec("reach", in_process=True), tmp_path)
    assert episode.succeeded
    assert smoke_run(TrainConfig(env=EnvSpec("reach"))).env.max_episode_steps == 250


def read_demonstrations(spec, folder):
    from poco_vla.config import DatasetConfig, DemonstrationConfig
    from poco_vla.data import open_dataset, read_episodes
    from poco_vla.demonstrations.scripted import ensure_demonstrations

    root = ensure_demonstrations(spec, DemonstrationConfig(episodes=2, workers=1, root=folder / "data"))
    config = DatasetConfig(repo_id="local/data", root=root)
    return read_episodes(open_dataset(config), config, ["observation.state"])


def test_the_adapters_page_lists_every_module_that_adapters_may_import():
    files = [path for room in ("adapting", "pretrained") for path in (ROOT / "poco_vla" / room).glob("*.py")]
    modules = {f"{path.parent.name}.{path.stem}" for path in files if path.stem != "__init__"}
    (rows,) = [rows for _, header, rows in tables(text_of("adapters/README.md")) if header[0] == "Module"]
    assert {name for row in rows for name in re.findall(r"`([\w.]+)`", row[0])} == modules


def test_the_adapters_page_lists_what_an_adapter_may_leave_out():
    from poco_vla import FlowPolicy
    from poco_vla.conformance.interface import OPTIONAL

    (rows,) = [rows for _, header, rows in tables(text_of("adapters/README.md")) if header[0] == "A `FlowPolicy`"]
    needed, optional = (set(re.findall(r"`(\w+)`", row[1])) for row in rows)
    assert optional >= OPTIONAL.keys()
    assert not needed & OPTIONAL.keys()
    known = {*dir(FlowPolicy), *FlowPolicy.__annotations__, "preprocess", "postprocess"}
    assert needed | optional <= known


def test_guides_are_short_and_their_pictures_small():
    assert all(len((GUIDES / path.name).read_text().splitlines()) <= 125 for path in GUIDES.glob("*.md"))
    assert all(path.stat().st_size < 100_000 for path in GUIDES.glob("*.png"))


# -- the reading itself -----------------------------------------------------------------------------------------------


def test_commands_that_are_not_understood_are_found(trained, monkeypatch, capsys):
    for command in (
        "poco-vla evaluate runs/x",
        "poco-vla eval runs/x --no-such-option 1",
        "python recipes/mlp_cube.py --poco.zetta 0.3",
        "python recipes/no_such.py",
        "accelerate launch --no-such recipes/mlp_cube.py",
        "make coffee",
        "uv pip install -e .[no-such]",
        "lerobot-train --policy.type=flow_mlp --dataset.no_such=1",
        "frobnicate",
    ):
        with pytest.raises((AssertionError, SystemExit, ValueError)):
            understood(shlex.split(command), trained, monkeypatch)


def test_gaps_in_a_message_are_read():
    assert "there is no env to act in" in sentences()
    assert "no message of ours says this" not in sentences()
