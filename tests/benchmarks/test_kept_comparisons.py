"""The comparisons that are kept in results/compare: figures are those of the runs, and the pages say the same."""

import json
import re
from pathlib import Path

import pytest

from poco_vla.report.comparison import compared, read_comparison

HERE = Path(__file__).parent
KEPT = sorted(path.parent for path in (HERE / "results" / "compare").glob("*/comparison.json"))


@pytest.mark.parametrize("root", KEPT, ids=lambda root: root.name)
def test_the_figures_are_those_of_the_runs(root):
    kept = json.loads((root / "comparison.json").read_text())
    found = json.loads(json.dumps(compared(read_comparison(root))))
    assert found["algorithms"] == kept["algorithms"]
    assert found["pairs"] == kept["pairs"]


@pytest.mark.parametrize("root", KEPT, ids=lambda root: root.name)
def test_the_page_of_measurements_has_them(root):
    """A row for each algorithm: title, seeds, start, final."""
    kept = json.loads((root / "comparison.json").read_text())["algorithms"]
    section = (
        (HERE / "README.md").read_text().partition(f"`recipes/{root.name}.py`, each algorithm")[2].partition("\n#")[0]
    )
    rows = [re.split(r" *\| *", line.strip("| ")) for line in section.splitlines() if line.startswith("| ")]
    found = {row[0].rstrip(" *"): row[1:4] for row in rows}
    for one in kept.values():
        start, final = (f"{100 * one[name]:.0f} %" for name in ("start", "final"))
        assert found[one["title"]] == [str(len(one["seeds"])), start, final]
