"""Check the adapters' pages: links, names of files and functions, Python blocks, commands."""

import re
import shlex
import tomllib
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import get_type_hints

import pytest
from lerobot.configs.eval import EvalPipelineConfig
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.train import TrainPipelineConfig
from test_readme import ROOT, anchors, blocks, links, prose, resolve

from poco_vla import TrainConfig, load_adapter

PAGES = sorted((ROOT / "adapters").glob("README.md")) + sorted((ROOT / "adapters").glob("*/README.md"))


def named(paths):
    return [pytest.param(path, id=path.parent.name) for path in paths]


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_somewhere(page):
    text = page.read_text()
    assert not [path for path, _ in links(text) if path and not (page.parent / path).exists()]
    assert not [anchor for path, anchor in links(text) if anchor and not path and anchor not in anchors(text)]


@pytest.mark.parametrize("page", named(PAGES))
def test_what_a_page_names_exists(page):
    text = page.read_text()
    dotted = set(re.findall(r"\bpoco_vla(?:\.\w+)+", text)) - {"poco_vla.adapters"}
    assert not sorted(name for name in dotted if resolve(name) is None)
    paths = re.findall(r"`((?:poco_vla|adapters|recipes|tests)/[\w./-]+)`", prose(text))
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize(
    ("page", "code"),
    [
        pytest.param(page, code, id=f"{page.parent.name}:{line}")
        for page in PAGES
        for line, code in blocks(page.read_text(), "python")
    ],
)
def test_python_runs(page, code, tmp_path, monkeypatch):
    """Run each block by itself, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{page}", "exec"), {"__name__": "__page__"})


def test_the_table_of_modules_is_whole():
    """Every module of poco_vla.adapting is in the table of adapters/README.md."""
    modules = {path.stem for path in (ROOT / "poco_vla" / "adapting").glob("*.py")} - {"__init__"}
    rows = re.findall(r"^\| (`[^|]+) \|", PAGES[0].read_text().split("## Load and save")[1], flags=re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == modules


# -- commands ----------------------------------------------------------------------------------------------------------


def field_of(record, path):
    """Return True if a dotted name is a field of a record, or leads into a table or a choice of types."""
    name, _, rest = path.partition(".")
    if name not in {field.name for field in fields(record)}:
        return False
    inner = get_type_hints(record)[name]
    records = [kind for kind in (inner, *getattr(inner, "__args__", ())) if is_dataclass(kind)]
    return not rest or not records or any(field_of(kind, rest) for kind in records) or name in ("env", "policy")


def check_install(words):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = [target for flag, target in pairwise(words) if flag == "-e"]
    assert targets
    for target in targets:
        path, _, chosen = target.partition("[")
        assert (ROOT / path / "pyproject.toml").is_file(), target
        assert set(filter(None, chosen.rstrip("]").split(","))) <= extras.keys(), target


def check_recipe(words):
    text = (ROOT / words[0]).read_text()
    adapter = load_adapter(re.search(r'adapter="(\w+)"', text)[1])
    for option in (word.removeprefix("--").replace("-", "_") for word in words[1:] if word.startswith("--")):
        group, _, name = option.partition(".")
        if group == "policy_options":
            assert name in (adapter.option_names(pretrained=True) or ()), option
        else:
            assert option == "tiny" or field_of(TrainConfig, option), option


def check_script(words):
    text = (ROOT / words[0]).read_text()
    for word in words[1:]:
        if word.startswith("--"):
            assert f'"{word}"' in text, word
        elif not words[words.index(word) - 1].startswith("--"):
            assert (ROOT / word).is_file(), word


def check_lerobot(record):
    def check(words):
        for option, _, value in (word.removeprefix("--").partition("=") for word in words):
            assert value, option
            assert field_of(record, option), option
            if option == "policy.type":
                load_adapter(value)  # registers the configuration
                config = PreTrainedConfig.get_choice_class(value)
                names = [word.removeprefix("--policy.").partition("=")[0] for word in words if "--policy." in word]
                assert all(name == "type" or field_of(config, name) for name in names), names

    return check


CHECKS = {
    "uv pip install": check_install,
    "accelerate launch": check_recipe,
    "python": check_script,
    "pytest": lambda words: [(ROOT / word).stat() for word in words],
    "lerobot-train": check_lerobot(TrainPipelineConfig),
    "lerobot-eval": check_lerobot(EvalPipelineConfig),
}


@pytest.mark.parametrize(
    ("page", "line"),
    [
        pytest.param(page, line, id=f"{page.parent.name}:{line}")
        for page in PAGES
        for _, code in blocks(page.read_text(), "bash")
        for line in code.splitlines()
    ],
)
def test_commands_name_files_and_options_that_exist(page, line):
    begin = next(begin for begin in CHECKS if line.startswith(f"{begin} "))
    CHECKS[begin](shlex.split(line.removeprefix(begin)))
