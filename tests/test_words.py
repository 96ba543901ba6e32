"""Docstrings of functions begin with a verb: a list of first words that make sentences without one, refused by name."""

import ast
from pathlib import Path

LIBRARY = Path(__file__).parent.parent / "poco_vla"
REFUSED = {
    *{"What", "Whether", "Of", "Those", "That", "As", "Where", "Anything", "How", "If", "With", "For", "On", "In"},
    "Likewise",
}


def beginnings(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            yield f"{path.relative_to(LIBRARY)}, {node.name}", text.split()[0].strip(",.:;")


def test_docstrings_of_functions_begin_with_a_verb():
    files = sorted(LIBRARY.rglob("*.py"))
    wrong = [f"{where}: {word} ..." for path in files for where, word in beginnings(path) if word in REFUSED]
    assert not wrong, "\n".join(wrong)
