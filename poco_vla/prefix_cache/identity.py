"""What a stored prefix depends on, in one digest: where any of it is another, so is the folder."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poco_vla.data.batches import get_preprocessor, preprocess_obs
from poco_vla.data.episode import Episode
from poco_vla.policy import FlowPolicy

FORMAT = 1
"""Of the files; goes up when they change."""
PROBES = 64
"""Observations of the demonstrations whose processed form is part of the digest, beside one of each instruction."""


def identity(policy: FlowPolicy, demos: Sequence[Episode], **settings: Any) -> dict[str, Any]:
    """Return all that a stored prefix of these demonstrations depends on.

    Content counts, not names: every byte of the observations and of the frozen weights, the pre-processor's
    configuration and statistics, and what it makes of some observations, which depends on its code and tokenizer, too.

    Args:
        policy: whose prefixes.
        demos: as they are in the replay buffer; ids count their steps.
        settings: whatever else settles what an entry holds.
    """
    kind = type(policy)
    return {
        "format": FORMAT,
        "policy": f"{kind.__module__}.{kind.__qualname__}",
        "base": policy.base_version,
        "frozen": _hash_frozen(policy),
        "processors": _hash_processors(policy),
        "processed": _hash_processed(policy, demos),
        "demonstrations": _hash_episodes(demos),
        "steps": sum(map(len, demos)),
        "versions": installed_versions(("poco-vla", "torch", "transformers", "lerobot")),
        **settings,
    }


def identity_digest(about: Mapping[str, Any]) -> str:
    """Return the folder name for an identity."""
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]


def cache_folder(root: Path, about: Mapping[str, Any]) -> Path:
    """Return the folder of an identity below `root`, with a readable description of the identity in it."""
    folder = root / identity_digest(about)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "about.json"
    if not file.exists():
        file.write_text(json.dumps(about, indent=2, default=str) + "\n")
    return folder


def _hash_frozen(policy: FlowPolicy) -> str:
    """Return the digest of frozen parameters and of buffers."""
    named = {name: p for name, p in policy.named_parameters() if not p.requires_grad} | dict(policy.named_buffers())
    return _hash(part for name in sorted(named) for part in (name, named[name]))


def _hash_processors(policy: FlowPolicy) -> str:
    """Return the digest of each step's configuration and state, of pipelines that have steps."""
    parts: list[Any] = []
    for step in getattr(get_preprocessor(policy), "steps", ()):
        parts += [type(step).__name__, json.dumps(step.get_config(), sort_keys=True, default=str)]
        state = step.state_dict()
        parts += [part for name in sorted(state) for part in (name, state[name])]
    return _hash(parts)


def _hash_processed(policy: FlowPolicy, demos: Sequence[Episode]) -> str:
    """Return the digest of some processed observations, one of each instruction among them."""
    ends = np.cumsum([len(episode) for episode in demos])
    chosen = {int(step) for step in np.linspace(0, ends[-1] - 1, PROBES)}
    firsts = {
        task: int(end) - len(episode) + step
        for episode, end in zip(demos, ends, strict=True)
        for task, step in episode.tasks.items()
    }
    parts: list[Any] = []
    for step in sorted(chosen | set(firsts.values())):
        number = int(np.searchsorted(ends, step, side="right"))
        episode, row = demos[number], step - int(ends[number]) + len(demos[number])
        obs = {key: column[row : row + 1].copy() for key, column in episode.obs.items()}
        processed = preprocess_obs(policy, obs, [episode.task_at(row)])
        parts += [part for name in sorted(processed) for part in (name, processed[name])]
    return _hash(parts)


def _hash_episodes(demos: Sequence[Episode]) -> str:
    return _hash(
        part
        for episode in demos
        for part in (
            episode.task,
            *(episode.step_tasks or ()),
            *(x for key in sorted(episode.obs) for x in (key, episode.obs[key])),
        )
    )


def _hash(parts: Iterable[Any]) -> str:
    """Return the SHA-256 of texts, arrays and tensors, including types and shapes."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        else:
            text = str(part).encode()
            digest.update(f"{len(text)}:".encode() + text)
    return digest.hexdigest()


def installed_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Return the versions of these distributions, without those that are not installed."""
    found = {}
    for name in distributions:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
