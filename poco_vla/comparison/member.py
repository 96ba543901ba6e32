"""A run of a comparison: its folder, its command, and how far it is."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poco_vla.errors import PocoError
from poco_vla.files import read_json

TAIL = 16_384
"""Bytes at the end of a log that are read to see how far a run is."""


@dataclass(frozen=True)
class Member:
    """A run of a comparison.

    Attributes:
        name: of its algorithm, or "sft".
        seed: of the run.
        folder: its own.
        log: file of what it prints.
        command: program and words that start it.
        needs: folder of the SFT run that it starts from; None if it starts from none.
        steps: updates of SFT if that is all that it does, else environment steps.
    """

    name: str
    seed: int
    folder: Path
    log: Path
    command: tuple[str, ...]
    needs: Path | None
    steps: int

    @property
    def label(self) -> str:
        """Return algorithm and seed, as lines and logs name them."""
        return f"{self.name} seed {self.seed}"

    @property
    def is_done(self) -> bool:
        """Return True if the run has ended well."""
        return is_done(self.folder)

    def progress(self) -> tuple[str, int, float | None]:
        """Return the run's stage, its steps of that stage, and the success rate of its last evaluation."""
        line = _last(self.folder / "metrics.jsonl")
        evaluated = _last(self.folder / "evaluations.jsonl").get("success_rate")
        stage = str(line.get("stage", "begins"))
        done = line.get("update" if self.name == "sft" else "env_steps", 0)
        return stage, int(done), evaluated


def is_done(folder: Path) -> bool:
    """Return True if a run has ended well. One whose result a loss of power has emptied writes it again, by its
    checkpoint."""
    try:
        return isinstance(read_json(folder / "result.json"), dict)
    except PocoError:
        return False


def last_lines(log: Path, count: int = 6) -> list[str]:
    """Return the last lines of a log that are not empty."""
    lines = _end(log).splitlines()
    return [line.rstrip() for line in lines if line.strip()][-count:]


def _last(path: Path) -> dict[str, Any]:
    """Return the last whole object of a .jsonl file; none of an empty one."""
    for text in reversed(_end(path).splitlines()):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            return line
    return {}


def _end(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
