"""Read the project's pages: their blocks, links, headings, tables and commands.

A fenced block is one of four kinds, named by its language: `python` is run; `bash` and `console` hold commands, each
understood by its own program's parser (the guides in test_guides.py also run their `bash` commands); `json`, `toml` and
`yaml` are read; `text` and `bibtex` are output or citation, which nothing runs. No other block may stand on a page.
"""

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "recipes" / "guides"
PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "adapters/*.md", "adapters/*/README.md", "recipes/**/*.md", "tests/**/README.md")
    for path in ROOT.glob(pattern)
)
COMMANDS, DATA, OUTPUT = ("bash", "console"), ("json", "toml", "yaml"), ("text", "bibtex")
RUN_WHOLE = ("growth", "groot_embodiment", "hil_serl", "pi05_so101", "reading_curves")
"""Guides of a whole task, whose commands and Python blocks test_guides.py runs in their order."""
LANGUAGES = ("python", *COMMANDS, *DATA, *OUTPUT)


def blocks(text, language):
    """Return the fenced code blocks of a language, each with the line that it begins in."""
    found = re.finditer(rf"^( *)```{language}\b[^\n]*\n(.*?)^ *```\s*$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: m.start()].count("\n") + 1, re.sub(rf"^{m[1]}", "", m[2], flags=re.MULTILINE)) for m in found]


def languages(text):
    """Return the language of every fenced block, "" where none is given."""
    return [m[1] for m in re.finditer(r"^ *```(\w*)[^\n]*\n.*?^ *```\s*$", text, flags=re.MULTILINE | re.DOTALL)]


def prose(text):
    """Return the text without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```\s*$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(text):
    """Return the targets of links and pictures that lie in this repository: (path, anchor)."""
    targets = re.findall(r"\]\(([^)\s]+)", prose(text)) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose(text))
    targets += re.findall(r"^\[[^\]]+\]:\s*(\S+)", prose(text), flags=re.MULTILINE)
    here = [target for target in targets if not re.match(r"[a-z+]+:", target)]
    return [(path, anchor) for path, _, anchor in (target.partition("#") for target in here)]


def anchors(text):
    """Return GitHub's anchors of the headings."""
    headings = re.findall(r"^#+\s+(.*)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", h).strip().lower()).replace(" ", "-") for h in headings}


def tables(text):
    """Return (heading above, header cells, rows of cells) of every table."""
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
    """Return (file, name) pairs of the equation-to-file table; a cell may hold several names in backticks."""
    pairs = []
    for _, header, rows in tables(text):
        if [h.lower() for h in header[:3]] == ["equation", "file", "name"]:
            for row in rows:
                (file, *_), names = re.findall(r"`([^`]+)`", row[1]), re.findall(r"`([^`]+)`", row[2])
                pairs += [(file, name) for name in names]
    return pairs


def glossary(text):
    """Return the metrics in the first column of the tables whose header there is "Metric"."""
    found = [rows for _, header, rows in tables(text) if header[0].lower() == "metric"]
    return {name for rows in found for row in rows for name in re.findall(r"`([^`]+)`", row[0])}


def resolve(dotted):
    """Return the object that a dotted name of poco_vla means, or None."""
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
    """Return the module's name of a file of the library."""
    return ".".join(Path(file).with_suffix("").parts)


def commands(code):
    """Return the commands of a block, each with its continuation lines or its here-document; comments are left out."""
    found, lines = [], iter(code.splitlines())
    for line in lines:
        command = line
        while command.endswith("\\"):
            command = command[:-1] + next(lines).strip()
        if here := re.search(r"<<-?\s*['\"]?(\w+)", command):
            for inner in lines:
                command += f"\n{inner}"
                if inner == here[1]:
                    break
        if command.strip() and not command.lstrip().startswith("#"):
            found.append(command)
    return found
