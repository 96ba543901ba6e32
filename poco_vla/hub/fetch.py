"""A trained head from the Hub or a folder, on its base again: checked, and ready to act or to go on training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from poco_vla.critic import ChunkCritic
from poco_vla.errors import HubError, UnknownAdapterError
from poco_vla.heads import ABOUT, HEAD_WEIGHTS, POLICY_WEIGHTS, check_file, read_about, read_tensors, sha256_of
from poco_vla.hub.artifact import CRITIC
from poco_vla.policy import FlowPolicy
from poco_vla.registry import available_adapters, load_adapter
from poco_vla.sources import Source, hub_errors, locate

PICKLES = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt"]
"""Never fetched: reading one runs its code."""


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
        repo_or_path: Hub id, or a folder (a run's `head`, `best` or `policy`, or a fetched repository).
        revision: Hub commit, tag or branch of the head.
        adapter: the one that is expected; None takes what it says.
        base: Hub id or folder of the base, where it is not where it was.
        device: torch device.
        options: further ones of the adapter's `from_pretrained`.

    Raises:
        HubError: nothing of ours is there, it is another adapter's, or its adapter is not installed.
        PolicyError: head or base cannot be had, or do not fit.
    """
    source = locate(repo_or_path, revision)
    about = _about(source)
    name = about["adapter"]
    if adapter not in (None, name):
        raise HubError(f'{source.name} holds a head of the adapter "{name}", and "{adapter}" was asked for')
    if base is not None:
        options["base"] = base
    return _adapter(source, about).from_pretrained(_whole(source, about), device=device, **options)


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
    source = locate(repo_or_path, revision)
    shape = _about(source).get("critic")
    if shape is None:
        raise HubError(f"{source.name} came without its critic: push it again with critic=True (--critic)")
    prefix = "target_critic." if target else "critic."
    weights = read_tensors(source.file(CRITIC))
    critic = ChunkCritic(**shape)
    try:
        critic.load_state_dict({n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)})
    except RuntimeError as error:
        raise HubError(f"{CRITIC} in {source.name} does not fit what {ABOUT} says of it: {error}") from error
    return critic


def _whole(source: Source, about: Mapping[str, Any]) -> Path:
    """The folder with everything that the adapter reads: a head lies there already, a whole policy is fetched now."""
    weights = about.get("weights") or {"file": POLICY_WEIGHTS, "sha256": None}
    if source.revision is None or weights["file"] != POLICY_WEIGHTS:
        return source.folder
    with hub_errors(source.name, source.revision):
        folder = Path(snapshot_download(source.name, revision=source.revision, ignore_patterns=PICKLES))
    check_file(folder / POLICY_WEIGHTS)
    found = sha256_of(folder / POLICY_WEIGHTS)
    if found != weights["sha256"]:
        raise HubError(
            f"{POLICY_WEIGHTS} in {source.name} is not the file that {ABOUT} speaks of (SHA-256 {found[:12]}, expected "
            f"{weights['sha256'][:12]}): it was changed or damaged; fetch it again"
        )
    return folder


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
        distribution = (about.get("adapter_distribution") or {}).get("name")
        install = f"install {distribution}" if distribution else "install the distribution that offers it"
        raise HubError(
            f'{source.name} needs the adapter "{name}", which is not installed (installed: '
            f"{', '.join(available_adapters()) or 'none'}): {install}"
        ) from error
