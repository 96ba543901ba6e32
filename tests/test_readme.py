"""What README.md says is so: its links lead somewhere, its tables name what exists, its code runs."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text() if README.exists() else ""


def blocks(text, language):
    """Fenced code blocks of a language, with the line each begins in."""
    found = re.finditer(rf"^( *)```{language}\b[^\n]*\n(.*?)^ *```\s*$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: m.start()].count("\n") + 1, re.sub(rf"^{m[1]}", "", m[2], flags=re.MULTILINE)) for m in found]


def prose(text):
    """The text without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```\s*$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(text):
    """Targets of links and pictures that lie in this repository: (path, anchor)."""
    targets = re.findall(r"\]\(([^)\s]+)", prose(text)) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose(text))
    targets += re.findall(r"^\[[^\]]+\]:\s*(\S+)", prose(text), flags=re.MULTILINE)
    here = [target for target in targets if not re.match(r"[a-z+]+:", target)]
    return [(path, anchor) for path, _, anchor in (target.partition("#") for target in here)]


def anchors(text):
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+\s+(.*)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", h).strip().lower()).replace(" ", "-") for h in headings}


def tables(text):
    """(heading above, header cells, rows of cells) of every table."""
    found, heading, lines = [], "", prose(text).splitlines()
    for i, line in enumerate(lines):
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if re.match(r"^[\s|:-]*-[\s|:-]*$", line) and "|" in line and i and "|" in lines[i - 1]:
            rows = []
            for row in lines[i + 1 :]:
                if "|" not in row:
                    break
                rows.append(_cells(row))
            found.append((heading, _cells(lines[i - 1]), rows))
    return found


def _cells(row):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]


def equation_rows(text):
    """(file, name) pairs of the equation-to-file table; a cell may hold several names in backticks."""
    pairs = []
    for _, header, rows in tables(text):
        if [h.lower() for h in header[:3]] == ["equation", "file", "name"]:
            for row in rows:
                (file, *_), names = re.findall(r"`([^`]+)`", row[1]), re.findall(r"`([^`]+)`", row[2])
                pairs += [(file, name) for name in names]
    return pairs


def glossary(text):
    """Metrics in the first column of the tables that say so there, or in the heading above."""
    found = [rows for heading, header, rows in tables(text) if "metric" in f"{heading} {header[0]}".lower()]
    return {name for rows in found for row in rows for name in re.findall(r"`([^`]+)`", row[0])}


def resolve(dotted):
    """The object that a dotted name of poco_vla means, or None."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part) and part not in getattr(found, "__annotations__", {}):
                return None
            found = getattr(found, part, True)
        return found
    return None


def module_of(file):
    return ".".join(Path(file).with_suffix("").parts)


def test_the_readme_is_there():
    assert README.is_file()
    assert TEXT.startswith("#") or TEXT.startswith("<")


def test_its_links_into_the_repository_lead_somewhere():
    lost = [path for path, _ in links(TEXT) if path and not (ROOT / path).exists()]
    assert not lost
    astray = [anchor for path, anchor in links(TEXT) if anchor and not path and anchor not in anchors(TEXT)]
    assert not astray


def test_every_file_that_it_names_exists():
    """Names in backticks that look like a path of ours: a known top folder, or a file at the top."""
    tops = r"(?:poco_vla|adapters|recipes|tests|\.ci)/[\w./-]+|Makefile|LICENSE|pyproject\.toml"
    named = set(re.findall(rf"`({tops})(?::\w+)?`", prose(TEXT)))
    lost = sorted(path for path in named if not (ROOT / path.rstrip("/")).exists())
    assert not lost


def test_every_function_of_a_file_that_it_names_exists():
    """Written `poco_vla/file.py:function`."""
    for file, name in re.findall(r"`([\w./-]+\.py):(\w+)`", prose(TEXT)):
        assert re.search(rf"^\s*(?:def|class) {name}\b", (ROOT / file).read_text(), flags=re.MULTILINE), (
            f"{file}:{name}"
        )


def test_every_dotted_name_of_the_library_that_it_names_exists():
    named = set(re.findall(r"\bpoco_vla(?:\.\w+)+", TEXT)) - set(re.findall(r"\bpoco_vla\.adapters\b", TEXT))
    lost = sorted(name for name in named if resolve(name.removesuffix(".py")) is None)
    assert not lost


def test_the_equation_table_points_at_names_that_exist():
    rows = equation_rows(TEXT)
    assert len(rows) >= 5, "README has no table Equation | File | Name"
    for file, name in rows:
        assert (ROOT / file).is_file(), file
        assert resolve(f"{module_of(file)}.{name.removesuffix('()')}") is not None, f"{file}: {name}"


def test_the_mathematics_is_all_in_the_equation_table():
    """A reader who comes from the paper finds every equation's function."""
    named = {name.removesuffix("()") for _, name in equation_rows(TEXT)}
    assert named >= {"flow_errors", "td_target", "posterior_weights", "clipped_distillation"}


@pytest.fixture
def pushed_head(tmp_path_factory):
    """A Hub with the head on it that the text loads."""
    sys.path.append(str(ROOT / "tests" / "hub"))
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


@pytest.mark.parametrize(("line", "code"), [pytest.param(n, code, id=f"line{n}") for n, code in blocks(TEXT, "python")])
def test_its_python_runs(line, code, tmp_path, monkeypatch, request):
    """Each block by itself, in an empty folder."""
    if "load_head(" in code:
        request.getfixturevalue("pushed_head")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"README.md, block at line {line}", "exec"), {"__name__": "__readme__"})


def test_every_make_verb_that_it_names_exists():
    verbs = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    shown = "\n".join(code for language in ("bash", "sh", "console", "shell", "") for _, code in blocks(TEXT, language))
    named = set(re.findall(r"\bmake ([a-z]+)\b", shown)) | set(re.findall(r"`make ([a-z]+)[^`]*`", prose(TEXT)))
    assert named - verbs == set()
    assert {"demo", "test"} <= named


def test_every_poco_vla_command_that_it_names_exists():
    from poco_vla.cli import main as cli

    verbs = {
        name.lower()
        for name, found in vars(cli).items()
        if isinstance(found, type) and found.__module__ == cli.__name__
    }
    assert set(re.findall(r"^\s*(?:\$ )?poco-vla ([a-z]+)\b", TEXT, flags=re.MULTILINE)) <= verbs


@pytest.fixture(scope="module")
def emitted(tmp_path_factory):
    """Every scalar that a short but real run of all stages writes, and what its lines are labelled with."""
    sys.path.insert(0, str(ROOT / "tests" / "rollout"))
    import tiny_gym  # noqa: F401 (registers the environments)
    from tiny_env import point_spec

    from poco_vla.config import DemonstrationConfig, EvalConfig, OptimConfig, PocoConfig, TrainConfig
    from poco_vla.training import train

    root = tmp_path_factory.mktemp("readme")
    config = TrainConfig(
        policy_options={"hidden_dims": [8], "num_inference_steps": 2},
        env=point_spec(2, kind="ExpertPoint"),
        demonstrations=DemonstrationConfig(episodes=2, root=root / "data"),
        horizon=2,
        poco=PocoConfig(num_candidates=3, critic_hidden=(8,)),
        optim=OptimConfig(batch_size=4),
        eval=EvalConfig(episodes=2, videos=False),
        sft_steps=2,
        warmup_steps=3,
        online_steps=60,
        updates_per_step=0.5,
        log_every=1,
        output_dir=root / "run",
    )
    result = train(config)
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"sft", "warmup", "online"}
    assert all(np.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    names = {name for line in lines for name in line}
    labels = {"stage", "update", "env_steps", "seconds"}
    assert labels <= names
    return names - labels, labels


def test_the_metric_glossary_lists_what_training_writes_and_nothing_else(emitted):
    metrics, labels = emitted
    assert {"bc_loss", "critic_loss", "effective_sample_size", "train_success"} <= metrics
    explained = glossary(TEXT)
    assert explained, "README has no table of metrics"
    assert metrics - explained == set(), "written, not explained"
    assert explained - metrics - labels == set(), "explained, never written"


# -- the reading of the text itself, on a text whose answers are known ---------------------------------------------

SAMPLE = """# Title

[a](poco_vla/flow.py) and [b](https://x.y) and [c](#metric-glossary) ![p](docs/x.png "t") <img src="y.svg">

| Equation | File | Name |
|---|---|---|
| 17 | `poco_vla/posterior.py` | `posterior_weights`, `effective_sample_size()` |

## Metric glossary

| metric | meaning |
|:--|--:|
| `bc_loss` | a \\| b |
| `q`, `target` | |

```python
x = 1
```

  ```python
  y = [
      2]
  ```
"""


def test_reading_finds_links_tables_and_blocks():
    assert links(SAMPLE) == [("poco_vla/flow.py", ""), ("", "metric-glossary"), ("docs/x.png", ""), ("y.svg", "")]
    assert "metric-glossary" in anchors(SAMPLE)
    assert equation_rows(SAMPLE) == [
        ("poco_vla/posterior.py", "posterior_weights"),
        ("poco_vla/posterior.py", "effective_sample_size()"),
    ]
    assert glossary(SAMPLE) == {"bc_loss", "q", "target"}
    assert [code for _, code in blocks(SAMPLE, "python")] == ["x = 1\n", "y = [\n    2]\n"]
    assert blocks(SAMPLE, "python")[0][0] == 16


def test_names_resolve_or_do_not():
    assert resolve("poco_vla.posterior.posterior_weights") is not None
    assert resolve("poco_vla.algorithm.Poco.update") is not None
    assert resolve("poco_vla.posterior.no_such_name") is None
    assert resolve("poco_vla.no_such_module") is None
