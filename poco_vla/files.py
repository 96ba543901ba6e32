"""Files and folders that appear whole or not at all."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from poco_vla.errors import PocoError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name to write to; it takes `path`'s place when the block ends well."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """JSON, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(values, indent=2, default=str) + "\n")


def replace_folder(partial: Path, final: Path) -> None:
    """Put a finished folder in the place of an older one, which stays whole until then."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill; it takes `path`'s place when the block ends well, and goes away when it does not.

    Raises:
        PocoError: at `path` is something that is no policy's folder, which would be lost.
    """
    final = Path(path).resolve()
    if final.exists() and not (final.is_dir() and (not any(final.iterdir()) or (final / "config.json").is_file())):
        raise PocoError(
            f"{final} holds something else than a policy (no config.json) and is not replaced; choose another"
        )
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        replace_folder(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
