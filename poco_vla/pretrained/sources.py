"""Where a pretrained model lies: a local folder, or a Hub repository at one commit."""

import hashlib
import json
import logging
import math
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from poco_vla.errors import PolicyError

logger = logging.getLogger(__name__)

SMALL_FILES = ("*.json", "*.txt", "*.model", "policy_*.safetensors", "tokenizer*/*", "assets/*")
HEADS = ("head.safetensors", "adapter_model.safetensors")
"""Weights that are fetched with the small files: they are a head's, which is of no use without them."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
"""Files that are never opened: reading a pickle runs its code."""
STEPS_OF = ("lerobot.processor.", "lerobot.policies.", "lerobot_policy_", "poco_vla")
"""Where a processor's steps may come from when they are named by their class."""

REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")
"""How a commit, tag or branch is spelled."""
MAX_JSON_BYTES = 8 * 1024**2
"""Longest JSON file of a policy that is read: configurations and processors are some kilobytes."""
MAX_JSON_DEPTH = 32
"""Deepest nesting of one; theirs are below ten deep."""


@dataclass(frozen=True)
class Source:
    """Where a checkpoint comes from.

    Attributes:
        name: Hub id, or absolute path of a folder.
        revision: Hub commit; None for a folder.
        folder: where its small files lie on this machine.
        content: of a folder, what tells its weights from others (:func:`content_of`).
    """

    name: str
    revision: str | None
    folder: Path
    content: str | None = None

    def file(self, name: str) -> Path:
        """One of its files, fetched now when it is a Hub repository.

        Raises:
            PolicyError: the Hub does not give it. That of a local folder may be missing.
        """
        if self.revision is None:
            return self.folder / name
        with hub_errors(self.name, self.revision):
            try:
                return Path(hf_hub_download(self.name, name, revision=self.revision))
            except EntryNotFoundError as error:
                held = list_repo_files(self.name, revision=self.revision)
                raise PolicyError(
                    f"{self.name} holds no {name}{_pickles_among(held)}; it holds {_some(held)}"
                ) from error


def locate(repo_or_path: str | Path, revision: str | None = None) -> Source:
    """A local folder as it is, or a Hub repository's snapshot without its large weights: what is wrong is told before
    they are fetched.

    Raises:
        PolicyError: neither can be had, or its processors would run something that is no processing step.
    """
    folder = Path(repo_or_path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise PolicyError(
                f'{folder} is a local folder and has no revisions, but revision "{revision}" was asked for'
            )
        folder = folder.resolve()
        check_processors(folder)
        return Source(str(folder), None, folder, content_of(folder))
    name = str(repo_or_path)
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise PolicyError(f"no policy in {name}: the folder does not exist")
    return on_hub(name, revision)


def on_hub(name: str, revision: str | None = None) -> Source:
    """Locate a repository like :func:`locate`, without a look at a local folder of that name."""
    if revision is not None and (".." in revision or not REVISION.fullmatch(revision)):
        raise PolicyError(f'"{revision}" is no commit, tag or branch of "{name}"')  # the Hub's cache makes a path of it
    with hub_errors(name, revision):
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=[*SMALL_FILES, *HEADS]))
    check_processors(snapshot)
    logger.info("%s is taken at commit %s", name, snapshot.name)
    return Source(name, snapshot.name, snapshot)


def check_processors(folder: Path) -> None:
    """Raise PolicyError if a processor's file names anything but a registered step or a class of LeRobot's or ours.

    LeRobot imports what it finds there and calls it with what else it finds there, before it looks what it is: a file
    that somebody else wrote could run any command. An adapter checks further, by its own list of steps
    (:mod:`poco_vla.adapting.processors`).
    """
    for file in folder.glob("*processor*.json"):
        steps = read_object(file).get("steps", [])
        if not isinstance(steps, list):
            raise PolicyError(f"{file} is damaged: its steps are a {type(steps).__name__}, expected a list")
        for step in steps:
            name = step.get("class", "") if isinstance(step, dict) else step
            if isinstance(step, dict) and "registry_name" in step:
                continue
            if not (isinstance(name, str) and name.startswith(STEPS_OF) and name.endswith("Step")):
                raise PolicyError(
                    f"{file} names {name!r} as a processing step: only registered steps, and classes of "
                    f"{', '.join(STEPS_OF)}, are run"
                )


def weights_in(folder: Path) -> list[Path]:
    """A model's weights, whole or in shards; processors keep their statistics in files of the same kind."""
    files = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith("policy_")]
    return [file for file in files if file.is_file()]  # a named pipe would be waited for


def content_of(folder: Path) -> str:
    """A hash of the sizes of a folder's weights and of 64 pieces of each: notices that they were replaced, in
    milliseconds."""
    digest = hashlib.sha256()
    for file in weights_in(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size};".encode())
        with file.open("rb") as opened:
            for i in range(64):
                opened.seek(size * i // 64)
                digest.update(opened.read(4096))
    return digest.hexdigest()[:16]


def read_object(file: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read the object in a JSON file that somebody else may have written.

    Args:
        file: a regular file; devices and named pipes are refused.
        max_bytes: longest file that is read.

    Raises:
        PolicyError: the file holds none, or one that is too large, too deep, or of numbers that are not finite.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise PolicyError(f"{file} is damaged: it is no regular file, and is not read")
        with file.open("rb") as opened:
            data = opened.read(max_bytes + 1)
    except OSError as error:
        raise PolicyError(f"{file} cannot be read: {error.strerror or error}") from error
    if len(data) > max_bytes:
        raise PolicyError(f"{file} is damaged: it is larger than {max_bytes / 1024**2:g} MB, which none of its kind is")
    try:
        values = json.loads(data, parse_constant=_refused_constant, parse_float=_finite, parse_int=_small)
        depth = _depth(values)
    except RecursionError as error:
        raise PolicyError(f"{file} is damaged: it is nested too deep") from error
    except ValueError as error:
        raise PolicyError(f"{file} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise PolicyError(f"{file} is damaged: expected a JSON object, found {type(values).__name__}")
    if depth > MAX_JSON_DEPTH:
        raise PolicyError(f"{file} is damaged: it is nested more than {MAX_JSON_DEPTH} deep")
    return values


def _refused_constant(name: str) -> float:
    raise ValueError(f"{name} is no number that a configuration holds")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _small(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"the number {text[:40]} is too large")
    return int(text)


def _depth(values: Any) -> int:
    """Return how many objects and lists are inside each other."""
    depth, level = 0, [values]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def check_sizes(values: Mapping[str, Any], limits: Mapping[str, int], file: Path) -> None:
    """Raise PolicyError for a whole number in a configuration that is beyond what any real model has.

    A number takes memory and time before anything else is known to be wrong: it is looked at first.

    Args:
        values: from :func:`read_object`; lists, and objects within it, are searched too.
        limits: name of a field -> its largest value. A field that is not named is not bounded.
        file: that it comes from, for the message.
    """
    waiting: list[tuple[str, Any]] = list(values.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            if name in limits and len(value) > 4096:
                raise PolicyError(f"{file}: {name} has {len(value)} entries, expected at most 4096")
            waiting += [(name, one) for one in value]
        elif isinstance(value, int | float) and name in limits and not -1 <= value <= limits[name]:
            raise PolicyError(f"{file}: {name} is {value}, expected a size of at most {limits[name]}")


def check_file(file: Path) -> None:
    """Raise PolicyError unless the file is there. Nothing but safetensors is ever read."""
    if not file.is_file():
        held = sorted(p.name for p in file.parent.glob("*"))
        raise PolicyError(f"no weights in {file.parent}: {file.name} is missing{_pickles_among(held)}")


@contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Raise what goes wrong at the Hub within this block as a PolicyError that says what to do."""
    try:
        yield
    except PolicyError:
        raise
    except GatedRepoError as error:
        raise PolicyError(
            f'"{name}" is gated: accept its terms on its page at the Hub, then run `hf auth login` with that account'
        ) from error
    except RevisionNotFoundError as error:
        raise PolicyError(f'"{name}" has no revision "{revision}" at the Hub (any more)') from error
    except RepositoryNotFoundError as error:
        raise PolicyError(
            f'"{name}" is no local folder, and the Hub has no such repository, or a private one that this machine may '
            "not see: check the name, and `hf auth whoami`"
        ) from error
    except Exception as error:  # the Hub client and the network each raise their own
        first_line = str(error).strip().split("\n")[0]
        at = f' at revision "{revision}"' if revision else ""
        raise PolicyError(
            f'the policy "{name}"{at} is no local folder and cannot be had from the Hub '
            f"({type(error).__name__}: {first_line})"
        ) from error


def _pickles_among(names: list[str]) -> str:
    found = [name for name in names if name.endswith(PICKLES)]
    return f"; {', '.join(found)} may be a pickle, which would run code and is not read" if found else ""


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(sorted(names)[:most]) + (", ..." if len(names) > most else "")
