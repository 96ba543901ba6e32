"""Secrets and paths of a person's machine in what is about to be published: what is once on the Hub stays known."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

LOOKS = re.compile(
    r"\bhf_(?:oauth_)?[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9_-]{20,}|\bxox[abp]-[A-Za-z0-9-]{10,}|\bAIza[\w-]{30,}"
    r"|://[^/\s:@\"]+:[^/\s@\"]+@|-----BEGIN [A-Z ]*PRIVATE KEY|Bearer [A-Za-z0-9._-]{16,}"
    r"|\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\."
)
"""Tokens and keys by their looks; those of this process's environment are searched as they are."""
GIVEN = re.compile(r"(?i)\b(?:password|passwd|secret|token|api[_-]?key)[=:][^\s&\"'<>]{4,}")
"""A secret behind its name, as in an address or a command."""
NAMES = re.compile(
    r"(?i)pass(?:word|wd|phrase)$|(?:^|[._-])(?:pwd|secrets?|credentials?|bearer)$|(?:^|\.)(?:auth|token)$"
    r"|(?:api|access|auth|bearer|hf|hub|private|refresh|secret|session)[_-]?(?:key|token)$"
)
"""Names of options whose values are secrets."""
VARIABLES = re.compile(r"(?i)TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL")
"""Names of environment variables likewise."""
HOME = re.compile(r"(?<![\w.:/~-])(?:/(?:home|Users)/\w[\w./-]*|[A-Za-z]:\\{1,2}Users\\{1,2}\w[\w.\\-]*)")
"""A path in somebody's home folder."""
DESCRIPTIONS = ("poco.json", "config.json", "adapter_config.json", "README.md")
"""Files that are written from a run's configuration: names of options are looked at in these."""
SHORTEST = 8
"""Characters of a value of the environment that is searched for: shorter ones are words."""


def secret_values(*tokens: str | None) -> list[str]:
    """Return the secrets that this process knows: `tokens`, and values of environment variables named like one."""
    known = [value for name, value in os.environ.items() if VARIABLES.search(name)]
    return [value for value in (*known, *(token or "" for token in tokens)) if len(value) >= SHORTEST]


def find_secret(file: Path, text: str, values: Sequence[str]) -> str | None:
    """Return in words what secret a file's text holds, without repeating it; None where it holds none.

    Args:
        file: its name says whether options by their names are looked for.
        text: its content.
        values: secrets that are known.
    """
    if LOOKS.search(text):
        return "a token or a key"
    if any(value in text for value in values):
        return "a token or a key of this machine's environment"
    if not is_description(file):
        return None
    if GIVEN.search(text):
        return "a value behind the name of a secret"
    if file.suffix == ".json":
        for name, value in _options(json.loads(text)):
            if NAMES.search(name) and not isinstance(value, bool) and value not in (None, "", "***"):
                return f"the value of {name}"
    return None


def find_home(file: Path, text: str) -> list[str]:
    """Return paths of home folders in a file that is written from a run's configuration, whoever's they are."""
    return [match[0] for match in HOME.finditer(text)] if is_description(file) else []


def is_description(file: Path) -> bool:
    """Return True for a file that is written from a run's configuration."""
    return file.name in DESCRIPTIONS or file.name.startswith("policy_")


def _options(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every plain value with its whole name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _options(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _options(inner, name)
    else:
        yield name, value
