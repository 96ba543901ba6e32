"""What goes to the Hub of a run, gathered in a folder: nothing of it names this machine or holds a secret.

head.safetensors        or adapter_model.safetensors (peft), or model.safetensors (a whole policy)
poco.json               :mod:`poco_vla.heads`, and what was trained how, on what, with which result
config.json, policy_*   LeRobot's configuration and processors
critic.safetensors      if asked for
README.md, curve.png    the model card
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import get_token
from huggingface_hub.constants import HF_HOME
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from poco_vla import checkpoint
from poco_vla.errors import HubError, PocoError
from poco_vla.files import write_json
from poco_vla.heads import (
    ABOUT,
    FORMAT,
    HEAD_WEIGHTS,
    PEFT_WEIGHTS,
    POLICY_WEIGHTS,
    Head,
    read_about,
    read_tensors,
    sha256_of,
)
from poco_vla.hub.peft_form import write_peft
from poco_vla.registry import GROUP, load_adapter

type Form = Literal["head", "peft", "policy"]
type Which = Literal["last", "best"]
type Dtype = Literal["float32", "bfloat16"]

CRITIC = "critic.safetensors"
CARD = "README.md"
PLOT = "curve.png"
MACHINE = (
    *("output_dir", "resume", "num_threads", "trackers", "policy", "dataset.root", "demonstrations.root"),
    *("demonstrations.workers", "interaction.host", "interaction.port", "interaction.certificate", "interaction.key"),
)
"""Fields of a run's configuration that speak of the machine it ran on, or are told elsewhere (the base)."""
SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bAKIA[0-9A-Z]{16}\b|\bsk-[A-Za-z0-9_-]{20,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|Bearer [A-Za-z0-9._-]{16,}"
)
PATHS = re.compile(
    r"(?<![\w.:/~-])/(?:home|Users|root|mnt|media|tmp|var|opt|data|srv|scratch|workspace|work|private)/[\w.-]+"
    r"|\b[A-Z]:\\\\?(?:Users|home)"
)
MOST_NUMBERS = 4096
"""A statistic with more numbers than this is left to the processors' own file."""


@dataclass(frozen=True)
class Artifact:
    """A folder that is ready to be uploaded.

    Attributes:
        folder: where it lies.
        form: what its weights are.
        about: its poco.json.
        base: Hub id of the model that it belongs on or derives from; None for a policy that was trained from nothing.
    """

    folder: Path
    form: Form
    about: dict[str, Any]
    base: str | None

    def files(self) -> dict[str, int]:
        """Names and sizes in bytes."""
        found = sorted(p for p in self.folder.rglob("*") if p.is_file())
        return {p.relative_to(self.folder).as_posix(): p.stat().st_size for p in found}


def stage(
    run: Path,
    folder: Path,
    *,
    form: Form = "head",
    which: Which = "last",
    dtype: Dtype = "float32",
    critic: bool = False,
    base: tuple[str, str] | None = None,
) -> Artifact:
    """Gather everything but the model card.

    Args:
        run: folder of a finished run.
        folder: empty.
        form: "head" (or the LoRA), "peft", or a whole "policy". A policy that has no base is always whole.
        which: the policy of the run's end, or of its best evaluation.
        dtype: of a head's tensors in the file; "bfloat16" halves it and rounds.
        critic: put the critic in, for those who go on training.
        base: Hub id and commit of the base, where the run had it from a local folder.

    Raises:
        HubError: the run has not what is asked for, or a file would give away a secret or a path of this machine.
        DataError: `run` is not the folder of a finished run.
    """
    from poco_vla.report import read_result  # loads pandas

    result, config = read_result(run), json.loads((run / "config.json").read_text())
    source = _source_folder(run, which)
    about = read_about(source)
    head = Head.of(about, source / ABOUT) if "weights" in about else None
    if head is None and form == "head":
        form = "policy"
    if head is None and form == "peft":
        raise HubError(
            f'{source} holds a whole policy without a base: there is no peft form of it; use the form "policy"'
        )
    if form == "policy" and dtype != "float32":
        raise HubError('a whole policy goes as it is: dtype is for the forms "head" and "peft"')
    renames = {}
    if head is not None and base is not None:
        renames = {head.base: base[0]}
        head = replace(head, base=base[0], revision=base[1])
    if head is not None and form == "policy" and (source / HEAD_WEIGHTS).is_file():
        source = _merged(run, source, folder)
    copy_described(source, folder, renames)
    if head is not None and form != "policy":
        head = put_weights(head, source, folder, form, dtype)
        told = head.to_json()
    else:
        file = folder / POLICY_WEIGHTS
        if not file.exists():
            _link(source / POLICY_WEIGHTS, file)
        told = {
            "format": FORMAT,
            "adapter": result["adapter"],
            "base": head.to_json()["base"] if head and head.revision else None,
            "weights": {"file": file.name, "sha256": sha256_of(file), "lora": None},
            "horizon": config["horizon"],
            "options": about.get("options", {}),
        }
    if critic:
        told["critic"] = result["sizes"] | _put_critic(run, config["poco"], folder)
    if (run / PLOT).is_file():
        shutil.copyfile(run / PLOT, folder / PLOT)
    told |= _account(result, config, which, folder)
    write_json(folder / ABOUT, told)
    return Artifact(folder, form, told, told["base"]["id"] if told["base"] else None)


def check_portable(folder: Path) -> None:
    """Raise HubError if a file names a secret or a path of this machine: what is once on the Hub stays known.

    Texts are searched, and the headers of safetensors files.
    """
    words = [str(Path.home()), str(Path.cwd()), HF_HOME]
    words = [word for word in words if len(word) > 1]  # a home that is /
    secrets = [v for n, v in os.environ.items() if re.search(r"TOKEN|SECRET|PASSWORD|API_KEY", n)]
    secrets = [value for value in (*secrets, get_token() or "") if len(value) >= 8]
    for file, text in _texts(folder):
        name = file.relative_to(folder)
        if SECRETS.search(text) or any(value in text for value in secrets):
            raise HubError(f"{name} would publish a secret (a token or a key): take it out of the run's configuration")
        path = PATHS.search(text) or next(
            (re.search(re.escape(w) + r"[\w./-]*", text) for w in words if w in text), None
        )
        if path:
            raise HubError(
                f"{name} would publish the path {path[0]} of this machine, which nobody else can use. Give the run Hub "
                "ids or relative paths there"
            )


def _source_folder(run: Path, which: Which) -> Path:
    folders = [run / "best"] if which == "best" else [run / "head", run / "policy"]
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    raise HubError(
        f"{run} holds no {' or '.join(f.name for f in folders)} policy"
        + ("; was the run evaluated?" if which == "best" else "; has the run ended?")
    )


def _merged(run: Path, source: Path, folder: Path) -> Path:
    """The whole policy of a head: the run's own export, or put together now."""
    if source.name == "head":
        return run / "policy"
    partial = folder.with_name(f"{folder.name}-merged")
    policy = load_adapter(read_about(source)["adapter"]).from_pretrained(source)
    policy.save_pretrained(partial)
    return partial


def copy_described(source: Path, folder: Path, renames: Mapping[str, str], place: str = "") -> None:
    """Everything that lies beside the weights.

    Args:
        source: a policy's or a head's folder.
        folder: where to.
        renames: texts in JSON files, and what takes their place.
        place: before the name of what lies in the folder itself, where a file speaks of it by a path (the folder may
            have been moved since).
    """
    weights = {HEAD_WEIGHTS, PEFT_WEIGHTS, POLICY_WEIGHTS, ABOUT, CARD}

    def renamed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: renamed(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [renamed(inner) for inner in value]
        if isinstance(value, str) and Path(value).is_absolute() and (source / Path(value).name).exists():
            return f"{place}{Path(value).name}"
        return renames.get(value, value) if isinstance(value, str) else value

    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        if not file.is_file() or name.name in weights or any(part.startswith(".") for part in name.parts):
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".json":
            target.write_text(json.dumps(renamed(json.loads(file.read_text())), indent=2) + "\n")
        else:
            shutil.copyfile(file, target)


def put_weights(head: Head, source: Path, folder: Path, form: Form, dtype: Dtype) -> Head:
    """The weights of a head in one of its forms, and what they are then."""
    if form == "head" and dtype == "float32" and head.file == HEAD_WEIGHTS:
        _link(source / head.file, folder / HEAD_WEIGHTS)
        return head
    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in head.read_weights(source).items()}
    if form == "peft":
        file = write_peft(head, weights, folder)
    else:
        file = folder / HEAD_WEIGHTS
        save_file(weights, file, metadata={"format": "pt"})
    return replace(head, file=file.name, sha256=sha256_of(file))


def _put_critic(run: Path, poco: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The critic and its target, out of the newest checkpoint; the arguments that build it."""
    try:
        weights = read_tensors(checkpoint.latest(run / "checkpoints") / "weights.safetensors")
    except PocoError as error:
        raise HubError(f"there is no critic to push: {error}") from error
    tensors = {name: t for name, t in weights.items() if name.split(".")[0] in ("critic", "target_critic")}
    save_file(tensors, folder / CRITIC, metadata={"format": "pt"})
    return {name: poco[f"critic_{name}"] for name in ("hidden", "members", "activation", "layer_norm_eps")}


def _link(file: Path, name: Path) -> None:
    """The same bytes under another name, without a copy where the file system can."""
    try:
        name.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, name)


def _account(result: Mapping[str, Any], config: Mapping[str, Any], which: Which, folder: Path) -> dict[str, Any]:
    """What was trained how, on what, with which result."""
    dataset = config["dataset"]
    demonstrations = result.get("demonstrations") or {}
    return {
        "date": date.today().isoformat(),
        "adapter_distribution": _distribution(result["adapter"]),
        "normalization": _statistics(folder),
        "algorithm": config["poco"] | {"zeta": result.get("zeta", config["poco"]["zeta"])},
        "training": _without(config, MACHINE),
        "datasets": [dataset["repo_id"] or demonstrations.get("repo_id")],
        "dataset_revision": dataset["revision"],
        "versions": result.get("versions"),
        "results": {
            "which": which,
            "env": result["env"],
            "before": result["before"],
            "after": result["after"] if which == "last" else None,
            "best": result.get("best") if which == "best" else None,
            "evaluations": len(result["evaluations"]),
            "env_steps": result["env_steps"],
            "updates": result["updates"],
            "demonstration_steps": demonstrations.get("steps"),
            "seconds": result["seconds"],
            "device": result.get("device"),
            "seed": result["seed"],
        },
    }


def _distribution(adapter: str) -> dict[str, str] | None:
    """What installs an adapter, for those who have not got it."""
    for point in entry_points(group=GROUP):
        if point.name == adapter and point.dist is not None:
            return {"name": point.dist.name, "version": point.dist.version}
    return None


def _statistics(folder: Path) -> dict[str, dict[str, Any]]:
    """Statistics of what the policy observes and does, to be read by people; what counts is in the processors' own
    files."""
    config = json.loads((folder / "config.json").read_text())
    used = {*(config.get("input_features") or {}), *(config.get("output_features") or {})}
    table: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("policy_preprocessor*.safetensors")):
        for name, tensor in load_file(file).items():
            key, _, kind = name.rpartition(".")
            if key in used or not key.startswith(("observation.", "next.", "complementary_info.", "index", "frame")):
                table.setdefault(key, {})[kind] = _numbers(tensor)
    return table


def _numbers(tensor: Tensor) -> Any:
    return tensor.tolist() if tensor.numel() <= MOST_NUMBERS else f"{list(tensor.shape)} numbers"


def _without(config: Mapping[str, Any], names: tuple[str, ...], prefix: str = "") -> dict[str, Any]:
    return {
        key: _without(value, names, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in config.items()
        if f"{prefix}{key}" not in names
    }


def _texts(folder: Path) -> Iterator[tuple[Path, str]]:
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as handle:
                yield file, json.dumps(handle.metadata() or {})
        elif file.suffix not in (".png", ".model"):
            yield file, file.read_text(errors="ignore")
