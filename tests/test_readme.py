"""The README's own claims, the metric glossary, and the reading of pages on a text whose answers are known."""

import json
import re
import runpy
import sys
from dataclasses import replace

import numpy as np
import pytest
from pages import GUIDES, ROOT, anchors, blocks, equation_rows, glossary, languages, links, module_of, prose, resolve

TEXT = (ROOT / "README.md").read_text()


def test_it_is_short_enough_for_a_visitor():
    assert len(TEXT.splitlines()) <= 220
    assert len(TEXT.split()) <= 1600


def test_it_links_every_page():
    linked = {path for path, _ in links(TEXT)}
    assert {f"recipes/guides/{page.name}" for page in GUIDES.glob("*.md")} <= linked
    assert {"adapters/README.md", "tests/benchmarks/README.md"} <= linked


def test_the_python_quickstart_has_the_values_of_the_demo():
    """And so the success rates of the table."""
    (code,) = [code for _, code in blocks(TEXT, "python") if "train(config)" in code]
    shown = {"__name__": "__page__"}
    exec(compile(code, "README.md", "exec"), shown)
    demo = runpy.run_path(str(ROOT / "recipes" / "mlp_cube.py"))["config"]()
    assert replace(shown["config"], output_dir=demo.output_dir) == demo


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


def test_it_shows_the_two_verbs_that_a_stranger_runs():
    shown = "\n".join(code for _, code in blocks(TEXT, "bash"))
    verb = "make ([a-z][a-z-]*)"
    named = set(re.findall(rf"\b{verb}\b", shown)) | set(re.findall(rf"`{verb}[^`]*`", prose(TEXT)))
    verbs = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert named - verbs == set()
    assert {"demo", "test"} <= named


def test_every_deviation_that_the_code_marks_is_on_the_algorithms_page():
    listed = {int(n) for n in re.findall(r"^(\d+)\. \*\*", (GUIDES / "algorithms.md").read_text(), flags=re.MULTILINE)}
    files = [path for folder in ("poco_vla", "adapters") for path in (ROOT / folder).rglob("*.py")]
    marked = {int(n) for path in files for n in re.findall(r"# Deviation (\d+):", path.read_text())}
    assert marked
    assert marked <= listed


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
    explained = glossary((GUIDES / "reading_curves.md").read_text())
    assert explained, "the page has no table of metrics"
    assert metrics - explained == set(), "written, not explained"
    assert explained - metrics - labels == set(), "explained, never written"


def test_the_live_view_shows_metrics_by_their_names(emitted):
    from poco_vla.run.logbook import HEADLINE

    assert set(HEADLINE) <= emitted[0]


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
    assert languages(SAMPLE + "\n```\nz\n```\n") == ["python", "python", ""]


def test_names_resolve_or_do_not():
    assert resolve("poco_vla.posterior.posterior_weights") is not None
    assert resolve("poco_vla.critic.ChunkCritic.forward") is not None
    assert resolve("poco_vla.posterior.no_such_name") is None
    assert resolve("poco_vla.no_such_module") is None
