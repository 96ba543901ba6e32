"""A trained policy in a form that LeRobot loads: whole, or as a peft adapter on its base."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from poco_vla.errors import HubError
from poco_vla.files import write_json
from poco_vla.hub.artifact import copy_described, head_in, put_weights
from poco_vla.hub.fetch import load_head, located
from poco_vla.hub.rate import note_run, noted_in
from poco_vla.pretrained.heads import ABOUT, base_of, head_folder, read_about


def export_policy(
    source: str | Path,
    path: str | Path,
    *,
    form: Literal["policy", "peft"] = "policy",
    revision: str | None = None,
    base: str | Path | None = None,
) -> Path:
    """Write a folder that LeRobot's commands take as `--policy.path`; whole or not at all.

    Args:
        source: Hub id or folder of a head (a run, or its `best`).
        path: where to.
        form: "policy" merges head and base; "peft" is the head alone, which LeRobot puts on the base itself.
        revision: Hub commit, tag or branch of the head.
        base: Hub id or folder of the base, where it is not where it was.

    Returns:
        The folder.

    Raises:
        HubError: there is no such form of it.
        PolicyError: head or base cannot be had, or do not fit.
    """
    path, found = Path(path), located(source, revision)
    if path.resolve() == found.folder:
        raise HubError(f"{path} is what is to be exported: choose another folder")
    if form == "policy" or base is not None:
        policy = load_head(
            source, revision=revision, base=base
        )  # with another base, this says whether it is the same model
        if form == "policy":
            policy.save_pretrained(path)
            note_run(path, noted_in(read_about(found.folder)))
            return path
    about, head = read_about(found.folder), head_in(found.folder)
    if head is None:
        raise HubError(f"{found.name} holds no head that belongs on a base: there is no peft form of it")
    if base is not None:
        there = base_of(head, base)
        head = replace(head, base=there.name, revision=there.revision, content=there.content)
    with head_folder(path) as partial:
        copy_described(found.folder, partial, {}, f"{path.resolve()}/")
        head = put_weights(head, found.folder, partial, "peft", "float32")
        write_json(partial / ABOUT, about | head.to_json())
    return path
