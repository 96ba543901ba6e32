"""A trained head from the Hub or a folder, on its base again: checked, and ready to act or to go on training."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from poco_vla.critic import ChunkCritic
from poco_vla.errors import HubError, UnknownAdapterError
from poco_vla.hub.artifact import CRITIC
from poco_vla.hub.places import policy_folder
from poco_vla.policy import FlowPolicy
from poco_vla.pretrained.heads import (
    ABOUT,
    HEAD_WEIGHTS,
    POLICY_WEIGHTS,
    another_file,
    read_about,
)
from poco_vla.pretrained.policy_config import describing
from poco_vla.pretrained.sources import Source, check_file, check_sizes, locate
from poco_vla.pretrained.tensor_files import check_finite, check_tensors, read_shapes, read_tensors
from poco_vla.registry import available_adapters, load_adapter

CRITIC_SIZES = {"feature_dim": 1_000_000, "horizon": 4096, "action_dim": 65_536, "hidden": 65_536, "members": 1000}
"""Largest sizes of a critic that are taken from a file."""
_DISTRIBUTION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def load_head(
    repo_or_path: str | Path,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    base: str | Path | None = None,
    device: str = "cpu",
    **options: Any,
) -> FlowPolicy:
    """A ready policy of what `push_head` has pushed, or a run has written: head and base, put together.

    The base is fetched at the commit that the head was trained on. Hash and shapes of the head are checked, and that
    the base is the same model.

    Args:
        repo_or_path: Hub id, a run's folder (its last policy) or a folder in it (`best`), or a fetched repository.
        revision: Hub commit, tag or branch of the head.
        adapter: the one that is expected; None takes what it says.
        base: Hub id or folder of the base, where it is not where it was.
        device: torch device.
        options: further ones of the adapter's `from_pretrained`.

    Raises:
        HubError: nothing of ours is there, it is another adapter's, or its adapter is not installed.
        PolicyError: head or base cannot be had, or do not fit.
    """
    source = located(repo_or_path, revision)
    about = _about(source)
    name = about["adapter"]
    if adapter not in (None, name):
        raise HubError(f'{source.name} holds a head of the adapter "{name}", and "{adapter}" was asked for')
    loaded = _adapter(source, about)
    _check_policy_file(source, about)
    if base is not None:
        options["base"] = base
    if source.revision is not None:
        options["revision"] = source.revision
    return loaded.from_pretrained(source.name, device=device, **options)


def load_critic(repo_or_path: str | Path, *, revision: str | None = None, target: bool = False) -> ChunkCritic:
    """The critic that was pushed with a head (`push_head(..., critic=True)`).

    Args:
        repo_or_path: Hub id or folder.
        revision: Hub commit, tag or branch.
        target: the target critic, which the E-step asks.

    Raises:
        HubError: there is none.
        PolicyError: it cannot be had, or is damaged.
    """
    source = located(repo_or_path, revision)
    told = _about(source).get("critic")
    if told is None:
        raise HubError(f"{source.name} came without its critic: push it again with critic=True (--critic)")
    if (
        not isinstance(told, dict)
        or not isinstance(told.get("sha256"), str)
        or not isinstance(told.get("arguments"), dict)
    ):
        raise HubError(f"{source.folder / ABOUT} is damaged: critic is of another kind")
    file = source.file(CRITIC)
    check_file(file)
    _check_hash(file, told["sha256"], source)
    check_sizes(told["arguments"], CRITIC_SIZES, source.folder / ABOUT)
    with describing(f"{source.folder / ABOUT} describes no critic"), torch.device("meta"):
        critic = ChunkCritic(**told["arguments"])  # takes no memory yet
    prefix = "target_critic." if target else "critic."
    names = {name: name.removeprefix(prefix) for name in read_shapes(file) if name.startswith(prefix)}
    wanted = {name: tuple(tensor.shape) for name, tensor in critic.state_dict().items()}
    check_tensors(wanted, {names[n]: shape for n, shape in read_shapes(file).items() if n in names}, file)
    tensors = read_tensors(file)
    check_finite(tensors, file)
    critic.load_state_dict({own: tensors[name] for name, own in names.items()}, assign=True)
    return critic


def located(repo_or_path: str | Path, revision: str | None = None) -> Source:
    """Return the source as :func:`poco_vla.pretrained.sources.locate` does; of a run, that of its last policy."""
    return locate(policy_folder(repo_or_path), revision)


def _check_policy_file(source: Source, about: Mapping[str, Any]) -> None:
    """The weights of a whole policy, if their hash is known; a head's are checked where they are put on its base."""
    weights = about.get("weights")
    if weights is not None and weights["file"] == POLICY_WEIGHTS:
        file = source.file(POLICY_WEIGHTS)
        check_file(file)
        _check_hash(file, weights["sha256"], source)


def _check_hash(file: Path, expected: str, source: Source) -> None:
    if words := another_file(file, expected):
        raise HubError(f"{file.name} in {source.name} {words}")


def _about(source: Source) -> dict[str, Any]:
    about = read_about(source.folder)
    if not about:
        if not (source.folder / "config.json").is_file():
            check_file(source.folder / HEAD_WEIGHTS)  # says so if pickles lie there instead
        raise HubError(
            f"{source.name} holds no {ABOUT}: poco_vla did not write it. A LeRobot policy is loaded with "
            "load_adapter(NAME).from_pretrained(...)"
        )
    return about


def _adapter(source: Source, about: dict[str, Any]) -> type[FlowPolicy]:
    name = about["adapter"]
    try:
        return load_adapter(name)
    except UnknownAdapterError as error:
        told = about.get("adapter_distribution")
        distribution = told.get("name") if isinstance(told, dict) else None
        install = "install the distribution that offers it"
        if isinstance(distribution, str) and _DISTRIBUTION.fullmatch(distribution):
            install = f"install {distribution}, which its {ABOUT} names, if you trust who wrote that"
        raise HubError(
            f'{source.name} needs the adapter "{name}", which is not installed (installed: '
            f"{', '.join(available_adapters()) or 'none'}): {install}"
        ) from error
