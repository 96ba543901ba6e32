"""Docstrings of functions begin with a verb: a list of first words that make sentences without one, refused by name."""

import ast
from pathlib import Path

LIBRARY = Path(__file__).parent.parent / "poco_vla"
REFUSED = {
    *{"What", "Whether", "Of", "Those", "That", "As", "Where", "Anything", "How", "If", "With", "For", "On", "In"},
    "Likewise",
}
NOT_YET = {"adapting", "cli", "conformance", "demonstrations", "hub", "lerobot_rl.py", "recording", "simulators"} | {
    "training",
    *{"algorithm.py", "algorithms", "dense.py", "distill.py", "policy.py"},
}
"""Folders and files of the library whose docstrings have not been rewritten."""


def beginnings(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            yield f"{path.relative_to(LIBRARY)}, {node.name}", text.split()[0].strip(",.:;")


def test_docstrings_of_functions_begin_with_a_verb():
    files = [path for path in sorted(LIBRARY.rglob("*.py")) if path.relative_to(LIBRARY).parts[0] not in NOT_YET]
    wrong = [f"{where}: {word} ..." for path in files for where, word in beginnings(path) if word in REFUSED]
    assert not wrong, "\n".join(wrong)
