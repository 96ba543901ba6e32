"""`poco-vla push` and `poco-vla export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.table import Table

from poco_vla.terminal import SafeConsole


@dataclass
class Push:
    """What a run has trained, to the Hugging Face Hub: private, in one commit, with a model card."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished run."""
    repo: Annotated[str, tyro.conf.Positional]
    """Where to: you/name, or name for your own."""
    form: Literal["head", "peft", "policy"] = "head"
    """The head (or its LoRA) for poco_vla; the same for LeRobot alone; or a whole LeRobot policy."""
    which: Literal["last", "best"] = "last"
    """The policy of the run's end, or of its best evaluation."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of a head's file: bfloat16 halves it and rounds."""
    critic: bool = False
    """With the critic, for those who go on training."""
    base: str | None = None
    """Hub id of the base model, for a run that had it from a local folder. The files must be the same."""
    license: str | None = None
    """For a policy that was trained from nothing; any other has its base's."""
    public: bool = False
    """Let everybody see a new repository."""
    update: bool = False
    """Add a commit to a repository that holds such a head already."""
    dry_run: bool = False
    """Upload nothing: list what would go, and show the model card."""

    def execute(self) -> None:
        """Upload, and list what was uploaded."""
        from poco_vla.hub import push_head

        options = {name: value for name, value in vars(self).items() if name not in ("run", "repo", "public")}
        pushed = push_head(self.run, self.repo, private=not self.public, **options)
        console = SafeConsole()
        table = Table("file", "bytes", box=None, pad_edge=False)
        table.columns[1].justify = "right"
        for name, size in pushed.files.items():
            table.add_row(name, f"{size:,}")
        table.add_row("in all", f"{sum(pushed.files.values()):,}", style="bold")
        console.print(table)
        if pushed.note is not None:
            console.print(pushed.note)
        where = f"{pushed.repo_id} ({'private' if pushed.private else 'public'})"
        if pushed.url is None:
            console.print(pushed.card, f"\nnothing was uploaded; this would go to {where}")
        else:
            console.print(f"pushed to {where}: {pushed.url}")


@dataclass
class Export:
    """A trained head as a folder for LeRobot's commands."""

    source: Annotated[str, tyro.conf.Positional]
    """Hub id or folder of a head (RUN/head, RUN/best)."""
    path: Annotated[Path, tyro.conf.Positional]
    """Where to."""
    form: Literal["policy", "peft"] = "policy"
    """Merged with its base, or as a peft adapter that LeRobot puts on the base itself."""
    revision: str | None = None
    """Hub commit, tag or branch."""
    base: str | None = None
    """Hub id or folder of the base, where it is not where it was."""

    def execute(self) -> None:
        """Write the folder, and print where it is."""
        from poco_vla.hub import export_policy

        options = {name: value for name, value in vars(self).items() if name not in ("source", "path")}
        SafeConsole().print(export_policy(self.source, self.path, **options))
