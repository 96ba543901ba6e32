"""A trained policy in a form that LeRobot loads: whole, or as a peft adapter on its base."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from poco_vla.errors import HubError
from poco_vla.files import write_json
from poco_vla.heads import ABOUT, Head, base_of, head_folder, read_about
from poco_vla.hub.artifact import copy_described, put_weights
from poco_vla.hub.fetch import load_head
from poco_vla.sources import locate


def export_policy(
    source: str | Path, path: str | Path, *, form: Literal["policy", "peft"] = "policy", base: str | Path | None = None
) -> Path:
    """Write a folder that LeRobot's commands take as `--policy.path`; whole or not at all.

    Args:
        source: Hub id or folder of a head (a run's `head` or `best`).
        path: where to.
        form: "policy" merges head and base; "peft" is the head alone, which LeRobot puts on the base itself.
        base: Hub id or folder of the base, where it is not where it was.

    Returns:
        The folder.

    Raises:
        HubError: there is no such form of it.
        PolicyError: head or base cannot be had, or do not fit.
    """
    path = Path(path)
    if form == "policy" or base is not None:
        policy = load_head(source, base=base)  # with another base, this says whether it is the same model
        if form == "policy":
            policy.save_pretrained(path)
            return path
    found = locate(source)
    about = read_about(found.folder)
    if "weights" not in about:
        raise HubError(f"{found.name} holds no head that belongs on a base: there is no peft form of it")
    head = Head.of(about, found.folder / ABOUT)
    if base is not None:
        there = base_of(head, base)
        head = replace(head, base=there.name, revision=there.revision)
    with head_folder(path) as partial:
        copy_described(found.folder, partial, {}, f"{path.resolve()}/")
        head = put_weights(head, found.folder, partial, "peft", "float32")
        write_json(partial / ABOUT, about | head.to_json())
    return path
