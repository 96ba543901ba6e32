"""Download of official data sets, continued where a connection broke off."""

from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from poco_vla.demonstrations.ogbench import OGBENCH_URL
from poco_vla.demonstrations.robomimic import ROBOMIMIC_FILES, ROBOMIMIC_REPO
from poco_vla.errors import DataError, UnknownNameError

ATTEMPTS = 5
"""Connections that a download may use up; each goes on where the one before broke off."""
DOWNLOAD_BLOCK = 2**20
"""Bytes read at once."""


def _no_report(done: int, total: int | None) -> None:
    """Do nothing after a block of bytes."""


def download(
    kind: str,
    name: str,
    folder: Path,
    *,
    host: str | None = None,
    on_bytes: Callable[[int, int | None], None] = _no_report,
) -> Path:
    """An official file on this machine, fetched when it is not there yet. Told twice, a broken download goes on.

    Args:
        kind: whose, "ogbench" or "robomimic".
        name: OGBench: the data set (:func:`ogbench_file`); RoboMimic: a key of `ROBOMIMIC_FILES`.
        folder: where it is put.
        host: another address than the official one: of the folder of OGBench's files, or of the Hub.
        on_bytes: told how many bytes are there, and of how many where that is known.

    Raises:
        DataError: it cannot be fetched.
    """
    if kind == "ogbench":
        path = folder / f"{name}.npz"
        return path if path.is_file() else _fetch(f"{host or OGBENCH_URL}/{path.name}", path, on_bytes)
    if kind == "robomimic":
        return _fetch_from_hub(name, folder, host, on_bytes)
    raise UnknownNameError("kind of official data set", kind, ("ogbench", "robomimic"))


def _fetch(url: str, path: Path, on_bytes: Callable[[int, int | None], None]) -> Path:
    """The file at `url`, under a temporary name until it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    reason = ""
    for _ in range(ATTEMPTS):
        try:
            total = _append(url, partial, on_bytes)
        except (OSError, HTTPException) as error:
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, HTTPError) and error.code == 416:  # what is here is no beginning of what is there
                partial.unlink(missing_ok=True)
            elif isinstance(error, HTTPError) and error.code < 500:
                break
        else:
            size = partial.stat().st_size
            if total in (None, size):
                return partial.rename(path)
            reason = f"the connection broke off after {size} of {total} bytes"
    raise _unreachable(url, reason)


def _append(url: str, partial: Path, on_bytes: Callable[[int, int | None], None]) -> int | None:
    """Add to `partial` what it lacks, as far as the connection lasts; the whole file's size where it is known."""
    done = partial.stat().st_size if partial.is_file() else 0
    headers = {"Range": f"bytes={done}-"} if done else {}
    with urlopen(Request(url, headers=headers), timeout=30) as response:
        if response.status != 206:  # the server sends the whole file, asked or not
            done = 0
        length = response.headers["Content-Length"]
        total = done + int(length) if length else None
        with partial.open("ab" if done else "wb") as file:
            while block := response.read(DOWNLOAD_BLOCK):
                file.write(block)
                done += len(block)
                on_bytes(done, total)
    return total


def _fetch_from_hub(name: str, folder: Path, host: str | None, on_bytes: Callable[[int, int | None], None]) -> Path:
    from huggingface_hub import hf_hub_download

    if name not in ROBOMIMIC_FILES:
        raise UnknownNameError("RoboMimic data set", name, ROBOMIMIC_FILES)
    path = ROBOMIMIC_FILES[name]
    if (folder / path).is_file():
        return folder / path
    options: dict[str, Any] = {"local_dir": folder, "endpoint": host, "tqdm_class": _hub_bar(on_bytes)}
    try:
        return Path(hf_hub_download(ROBOMIMIC_REPO, path, repo_type="dataset", **options))
    except Exception as error:  # the Hub's client, its HTTP library and the network each raise their own
        url = f"{host or 'https://huggingface.co'}/datasets/{ROBOMIMIC_REPO}/resolve/main/{path}"
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise _unreachable(url, f"{type(error).__name__}: {reason}") from error


def _hub_bar(on_bytes: Callable[[int, int | None], None]) -> type:
    """A progress bar for the Hub's client that shows nothing and tells `on_bytes`."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))
            self.done, self.size = int(options.get("initial") or 0), options.get("total")

        def update(self, n: int | float | None = 1) -> None:
            self.done += int(n or 0)
            on_bytes(self.done, self.size)

    return Bar


def _unreachable(url: str, reason: str) -> DataError:
    return DataError(f"{url} cannot be fetched ({reason}). Try again, or download it elsewhere and give --path.")
