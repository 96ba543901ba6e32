"""Where a pretrained model lies: a local folder, or a Hub repository at one commit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from poco_vla.errors import PolicyError

SMALL_FILES = ("*.json", "*.txt", "*.model", "policy_*.safetensors", "tokenizer*/*", "assets/*")
HEADS = ("head.safetensors", "adapter_model.safetensors")
"""Weights that are fetched with the small files: they are a head's, which is of no use without them."""


@dataclass(frozen=True)
class Source:
    """Where a checkpoint comes from.

    Attributes:
        name: Hub id, or absolute path of a folder.
        revision: Hub commit; None for a folder.
        folder: where its small files lie on this machine.
    """

    name: str
    revision: str | None
    folder: Path

    def file(self, name: str) -> Path:
        """One of its files, fetched now when it is a Hub repository.

        Raises:
            PolicyError: the Hub does not give it. That of a local folder may be missing.
        """
        if self.revision is None:
            return self.folder / name
        with hub_errors(self.name, self.revision):
            return Path(hf_hub_download(self.name, name, revision=self.revision))


def locate(repo_or_path: str | Path, revision: str | None = None) -> Source:
    """A local folder as it is, or a Hub repository's snapshot without its large weights: what is wrong is told before
    they are fetched.

    Raises:
        PolicyError: neither can be had.
    """
    folder = Path(repo_or_path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise PolicyError(
                f'{folder} is a local folder and has no revisions, but revision "{revision}" was asked for'
            )
        return Source(str(folder.resolve()), None, folder.resolve())
    name = str(repo_or_path)
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise PolicyError(f"no policy in {name}: the folder does not exist")
    with hub_errors(name, revision):
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=[*SMALL_FILES, *HEADS]))
    return Source(name, snapshot.name, snapshot)


@contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """What goes wrong at the Hub within this block, as a PolicyError that says what to do."""
    try:
        yield
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
