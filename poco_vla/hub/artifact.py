"""What goes to the Hub of a run, gathered in a folder: nothing of it names this machine or holds a secret.

head.safetensors        or adapter_model.safetensors (peft), or model.safetensors (a whole policy)
poco.json               :mod:`poco_vla.pretrained.heads`, and what was trained how, on what, with which result
config.json, policy_*   LeRobot's configuration and processors
critic.safetensors      if asked for
README.md, curve.png    the model card
"""

import json
import re
import shutil
import tempfile
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
from safetensors.torch import save_file
from torch import Tensor

from poco_vla.algorithms import load_algorithm
from poco_vla.checkpointing import checkpoint
from poco_vla.config import PocoConfig, TrainConfig
from poco_vla.errors import HubError, PocoError
from poco_vla.files import recover_folder, write_json
from poco_vla.hub.peft_form import PEFT_CONFIG, write_peft
from poco_vla.hub.secrets import find_home, find_secret, secret_values
from poco_vla.pretrained.heads import (
    ABOUT,
    FORMAT,
    HEAD_WEIGHTS,
    PEFT_WEIGHTS,
    POLICY_WEIGHTS,
    Head,
    read_about,
    sha256_of,
)
from poco_vla.pretrained.sources import read_object
from poco_vla.pretrained.tensor_files import check_finite, check_weights_file, read_tensors
from poco_vla.registry import GROUP, load_adapter
from poco_vla.roles import role_of

type Form = Literal["head", "peft", "policy"]
type Which = Literal["last", "best"]
type Dtype = Literal["float32", "bfloat16"]

CRITIC = "critic.safetensors"
CARD = "README.md"
PLOT = "curve.png"
LOCAL = re.compile(r"(?:~?/|~\w*/|[A-Za-z]:[\\/]).")
"""How a path begins that means something on one machine only."""
LOCAL_PATH = "a local path"
"""Stands for a path of the machine that a run was on."""
PATH_KEYS = ("tokenizer_name", "vlm_model_name", "base_model_path", "pretrained_path")
"""Where LeRobot's configurations and processors name a file or folder."""
OWN_FOLDERS = ("tokenizer", "vlm")
"""Folders beside the weights that LeRobot's own commands look for by a path."""
MOST_NUMBERS = 4096
"""A statistic with more numbers than this is left to the processors' own file."""


@dataclass(frozen=True)
class Artifact:
    """A folder that is ready to be uploaded, but for its model card.

    Attributes:
        folder: where it lies.
        form: what its weights are.
        about: its poco.json.
        derived: whether it was trained on a base.
    """

    folder: Path
    form: Form
    about: dict[str, Any]
    derived: bool

    @property
    def base(self) -> str | None:
        """Hub id of the base, where others can get it."""
        return self.about["base"]["id"] if self.about["base"] else None

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
        HubError: the run has not what is asked for.
        DataError: `run` is not the folder of a finished run.
    """
    from poco_vla.report import read_result  # loads pandas

    result, config = read_result(run), read_object(run / "config.json")
    source = source_folder(run, which)
    head = head_in(source)
    form = _form_of(form, head, dtype, source)
    if critic and which == "best":
        raise HubError(
            "the critic is the one of the run's end, and which=best is an earlier policy: push one or the other"
        )
    renames = {}
    if head is not None and base is not None:
        renames = {head.base: base[0]}
        head = replace(head, base=base[0], revision=base[1], content=None)
    with tempfile.TemporaryDirectory(prefix=".merged-", dir=folder.parent) as scratch:
        if head is not None and form == "policy":
            source = _merged(run, source, Path(scratch) / "policy")
        copy_described(source, folder, renames)
        if head is not None and form != "policy":
            told = put_weights(head, source, folder, form, dtype).to_json()
        else:
            told = _put_policy(source, folder) | {
                "adapter": result["adapter"],
                "base": head.to_json()["base"] if head and head.revision else None,
                "horizon": config["horizon"],
            }
        told |= {name: value for name, value in read_about(source).items() if name in ("names", "title", "acts_with")}
    if critic:
        if (name := config.get("algorithm", "poco")) != "poco":
            raise HubError(f'--critic is for the critic of POCO, and {run} was trained by "{name}": leave it out')
        told["critic"] = _put_critic(run, result, config["poco"], folder)
    if (run / PLOT).is_file():
        check_inside(run / PLOT, run)
        shutil.copyfile(run / PLOT, folder / PLOT)
    told |= _account(result, config, which, folder)
    told["started_from"] = "base" if head is not None else "policy" if config["policy"] else "random weights"
    artifact = Artifact(folder, form, told, derived=head is not None)
    told["files"] = [*artifact.files()]
    write_json(folder / ABOUT, told)
    return artifact


def check_portable(folder: Path, *, token: str | None = None) -> None:
    """Raise HubError if a file names a secret or a path of this machine: what is once on the Hub stays known.

    Texts are searched, and names and metadata in safetensors files.

    Args:
        folder: what would be uploaded.
        token: the Hub's, if it is neither in the environment nor the saved one.
    """
    words = "|".join(re.escape(word) for word in (str(Path.home()), str(Path.cwd()), HF_HOME) if len(word) > 1)
    here = re.compile(rf"(?<![\w.:/~-])(?:{words})(?![\w-])[\w./-]*")
    values = secret_values(token, get_token())
    for file, text in _texts(folder):
        name = file.relative_to(folder)
        if secret := find_secret(file, text, values):
            raise HubError(
                f"{name} would publish a secret ({secret}): take it out of the run's configuration (config.json and "
                "result.json in its folder)"
            )
        found = [match[0] for match in here.finditer(text)] + find_home(file, text)
        if file.name in (ABOUT, "config.json", "adapter_config.json") or file.name.startswith("policy_"):
            found += (
                [value for value in _strings(json.loads(text)) if LOCAL.match(value)] if file.suffix == ".json" else []
            )
        if found:
            raise HubError(
                f"{name} would publish the path {found[0]} of this machine, which nobody else can use: give the run "
                "Hub ids or relative paths there"
            )


def head_in(folder: Path) -> Head | None:
    """The head that lies in a folder; None where it is a whole policy."""
    about = read_about(folder)
    is_head = about.get("weights", {}).get("file", POLICY_WEIGHTS) != POLICY_WEIGHTS
    return Head.of(about, folder / ABOUT) if is_head else None


def source_folder(run: Path, which: Which) -> Path:
    """Return the folder in which a run keeps the policy that is asked for.

    Raises:
        HubError: it has none.
    """
    folders = [run / "best"] if which == "best" else [run / "head", run / "policy"]
    for folder in folders:
        recover_folder(folder)
        if (folder / "config.json").is_file():
            return folder
    raise HubError(
        f"{run} holds no {' or '.join(f.name for f in folders)} policy"
        + ("; was the run evaluated?" if which == "best" else "; has the run ended?")
    )


def _form_of(form: Form, head: Head | None, dtype: Dtype, source: Path) -> Form:
    """The form that is asked for; whole where there is no base."""
    if head is None and form == "peft":
        raise HubError(
            f'{source} holds a whole policy without a base: there is no peft form of it; use the form "policy"'
        )
    form = "policy" if head is None else form
    if form == "policy" and dtype != "float32":
        raise HubError('a whole policy goes as it is: dtype is for the forms "head" and "peft"')
    return form


def _merged(run: Path, source: Path, partial: Path) -> Path:
    """The whole policy of a head: the run's own export, or put together now."""
    if source.name == "head":
        return run / "policy"
    load_adapter(read_about(source)["adapter"]).from_pretrained(source).save_pretrained(partial)
    return partial


def copy_described(source: Path, folder: Path, renames: Mapping[str, str], place: str = "") -> None:
    """Everything that lies beside the weights, byte for byte but for the paths in LeRobot's configuration and
    processors.

    Args:
        source: a policy's or a head's folder.
        folder: where to.
        renames: paths, and what takes their place.
        place: before the name of what lies in the folder itself, where a file speaks of it by a path (the folder may
            have been moved since).
    """
    weights = {HEAD_WEIGHTS, PEFT_WEIGHTS, POLICY_WEIGHTS, ABOUT, CARD, PEFT_CONFIG}

    def renamed(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {inner: renamed(inner, one) for inner, one in value.items()}
        if isinstance(value, list):
            return [renamed(key, one) for one in value]
        if key not in PATH_KEYS or not isinstance(value, str):
            return value
        name = Path(value).name
        return f"{place}{name}" if name in OWN_FOLDERS and (source / name).is_dir() else renames.get(value, value)

    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        if not file.is_file() or name.name in weights or any(part.startswith(".") for part in name.parts):
            continue
        check_inside(file, source)
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.parent == Path() and (name.name == "config.json" or name.match("policy_*.json")):
            target.write_text(json.dumps(renamed("", read_object(file)), indent=2) + "\n")
        else:
            shutil.copyfile(file, target)


def check_inside(file: Path, folder: Path) -> None:
    """Raise HubError for a link that leads out of a folder: what it points to was never a part of it."""
    target, own = file.resolve(), folder.resolve()
    blobs = own.parent.parent / "blobs"  # the Hub's cache links its snapshots to these
    if not (target.is_relative_to(own) or (own.parent.name == "snapshots" and target.is_relative_to(blobs))):
        raise HubError(
            f"{file} is a link out of {folder}, and is not taken along: put a copy in its place, or remove it"
        )


def put_weights(head: Head, source: Path, folder: Path, form: Form, dtype: Dtype) -> Head:
    """The weights of a head in one of its forms, and what they are then."""
    if form == "head" and dtype == "float32" and head.file == HEAD_WEIGHTS:
        head.check(source)
        check_weights_file(source / head.file)
        _link(source / head.file, folder / HEAD_WEIGHTS)
        return head
    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in head.read_weights(source).items()}
    if form == "peft":
        file = write_peft(head, weights, folder)
    else:
        file = folder / HEAD_WEIGHTS
        save_file(weights, file, metadata={"format": "pt"})
    return replace(head, file=file.name, sha256=sha256_of(file))


def _put_policy(source: Path, folder: Path) -> dict[str, Any]:
    """The weights of a whole policy, and what poco.json says of them."""
    file = folder / POLICY_WEIGHTS
    check_weights_file(source / POLICY_WEIGHTS)
    _link(source / POLICY_WEIGHTS, file)
    weights = {"file": file.name, "sha256": sha256_of(file), "lora": None}
    return {"format": FORMAT, "weights": weights, "options": read_about(source).get("options", {})}


def _algorithm(config: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Return name and options of what trained the policy; of POCO, zeta as it was calibrated."""
    name = config.get("algorithm", "poco")
    ours = load_algorithm(name).config_class is PocoConfig
    options = dict(config["poco"] if ours else config.get("algorithm_options", {}))
    return {"name": name} | options | ({"zeta": result["zeta"]} if "zeta" in options and "zeta" in result else {})


def _put_critic(run: Path, result: Mapping[str, Any], poco: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The critic and its target, out of the newest checkpoint; their file, its hash, and what builds them."""
    try:
        weights = read_tensors(checkpoint.latest(run / "checkpoints") / "weights.safetensors")
        sizes = result["sizes"]
    except (PocoError, KeyError) as error:
        raise HubError(f"there is no critic to push: {error}") from error
    tensors = {name: t for name, t in weights.items() if name.split(".")[0] in ("critic", "target_critic")}
    if not tensors:
        raise HubError(f"there is no critic to push: {run} was trained by an algorithm without one")
    check_finite(tensors, folder / CRITIC)
    save_file(tensors, folder / CRITIC, metadata={"format": "pt"})
    options = {name: poco[f"critic_{name}"] for name in ("hidden", "members", "activation", "layer_norm_eps")}
    return {"file": CRITIC, "sha256": sha256_of(folder / CRITIC), "arguments": sizes | options}


def _link(file: Path, name: Path) -> None:
    """The same bytes under another name, without a copy where the file system can."""
    try:
        name.hardlink_to(file.resolve(strict=True))  # what a link points to, not the link
    except OSError:
        shutil.copyfile(file, name)


def _account(result: Mapping[str, Any], config: Mapping[str, Any], which: Which, folder: Path) -> dict[str, Any]:
    """Return what was trained how, on what, with which result."""
    dataset = config["dataset"]
    demonstrations = result.get("demonstrations") or {}
    origin = _origin(config)
    return {
        "date": date.today().isoformat(),
        "fps": result.get("fps"),
        "adapter_distribution": _distribution(result["adapter"]),
        "normalization": _statistics(folder),
        "algorithm": _algorithm(config, result),
        "training": _anywhere(config) | ({} if origin == "script" else {"demonstrations": None}),
        "datasets": [dataset["repo_id"]] if origin == "hub" else [],
        "demonstrations": {"origin": origin, "name": dataset["repo_id"] or None},
        "dataset_revision": dataset["revision"],
        "versions": result.get("versions"),
        "results": {
            "which": which,
            "env": _anywhere(result["env"], "env.") if result["env"] else None,
            "lerobot_arguments": list(result.get("lerobot_arguments", ())),
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


def _origin(config: Mapping[str, Any]) -> Literal["hub", "folder", "script", "unknown"]:
    """Return where the demonstrations came from, as far as the configuration tells: the Hub (or LeRobot's cache of it),
    a local folder, the simulator's script; unknown for anything else."""
    dataset = config["dataset"]
    if dataset["root"] is not None:
        return "folder"
    if dataset["repo_id"]:
        return "hub" if dataset["repo_id"].count("/") == 1 and not dataset["repo_id"].startswith("local/") else "folder"
    return "script" if config.get("demonstrations") else "unknown"


def _distribution(adapter: str) -> dict[str, str] | None:
    """Return the distribution that installs an adapter."""
    for point in entry_points(group=GROUP):
        if point.name == adapter and point.dist is not None:
            return {"name": point.dist.name, "version": point.dist.version}
    return None


def _statistics(folder: Path) -> dict[str, dict[str, Any]]:
    """Statistics of what the policy observes and does, to be read by people; what counts is in the processors' own
    files."""
    config = read_object(folder / "config.json")
    used = {*(config.get("input_features") or {}), *(config.get("output_features") or {})}
    table: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("policy_preprocessor*.safetensors")):
        for name, tensor in read_tensors(file).items():
            key, _, kind = name.rpartition(".")
            if key in used or not key.startswith(("observation.", "next.", "complementary_info.", "index", "frame")):
                table.setdefault(key, {})[kind] = _numbers(tensor)
    return table


def _numbers(tensor: Tensor) -> Any:
    return tensor.tolist() if tensor.numel() <= MOST_NUMBERS else f"{list(tensor.shape)} numbers"


def _anywhere(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the published fields of a run's configuration; open options that name a local path lose it."""
    out = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out[key] = _anywhere(value, f"{name}.")
        elif role_of(TrainConfig, name).published:
            out[key] = LOCAL_PATH if isinstance(value, str) and LOCAL.match(value) else value
    return out


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _strings(inner)


def _texts(folder: Path) -> Iterator[tuple[Path, str]]:
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as handle:
                yield file, json.dumps([handle.metadata() or {}, *handle.keys()])
        else:  # pictures and tokenizers hold texts, too
            yield file, file.read_text(errors="ignore")
