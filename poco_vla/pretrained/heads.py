"""A trained head without its backbone: a small folder, and the base model that it is put on again.

    head.safetensors        what was trained (the head, or its LoRA), by its names in the adapter's model
    poco.json               adapter, base model and its revision, what tells that model, horizon, hash of the weights
    config.json, policy_*   LeRobot's configuration and processors, which the adapter writes

Adapters write and read it; `poco_vla.hub` shares it. In the place of head.safetensors may stand
adapter_model.safetensors, the same tensors under peft's names (:func:`peft_names`).
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from poco_vla.errors import PolicyError
from poco_vla.files import atomic_folder, write_json
from poco_vla.pretrained.lora import Lora
from poco_vla.pretrained.sources import REVISION, Source, check_file, locate, on_hub, read_object
from poco_vla.pretrained.tensor_files import check_finite, check_tensors, read_shapes, read_tensors

ABOUT = "poco.json"
FORMAT = 1
POLICY_WEIGHTS = "model.safetensors"
HEAD_WEIGHTS, PEFT_WEIGHTS = "head.safetensors", "adapter_model.safetensors"
PEFT_PREFIX, IDLE = "base_model.model.", ".lora_"
DTYPES = ("bfloat16", "float16", "float32")
"""Dtypes that a frozen part may be of."""
MAX_HORIZON = 4096
"""Longest chunk that a head may be of, in control steps."""


@dataclass(frozen=True)
class PeftLayout:
    """How peft can carry a full head, so that LeRobot alone loads it.

    Attributes:
        modules: ends of the names of the modules that make up the head (peft's `modules_to_save`).
        idle: end of the name of one frozen linear layer: peft wants a LoRA somewhere, and there it is zero.
        shape: that layer's output and input width; found when a head is written.
    """

    modules: tuple[str, ...]
    idle: str
    shape: tuple[int, int] = (0, 0)

    def found_in(self, module: nn.Module) -> "PeftLayout":
        """Return the record with the idle layer's whole name and shape."""
        ((name, layer),) = ((n, m) for n, m in module.named_modules() if n.endswith(f".{self.idle}"))
        assert isinstance(layer, nn.Linear)
        return replace(self, idle=name, shape=(layer.out_features, layer.in_features))


@dataclass(frozen=True)
class Head:
    """What a folder says of the head in it.

    Attributes:
        adapter: which adapter reads it.
        base: Hub id or folder of the model that it belongs on.
        revision: that model's Hub commit; None for a folder.
        fingerprint: :func:`fingerprint` of that model.
        content: :func:`poco_vla.pretrained.sources.content_of` its folder; None for a Hub commit.
        horizon: H.
        file: the weights, in the same folder.
        sha256: their hash.
        lora: what was trained in the place of the full head.
        options: what `from_pretrained` must be told to give the same function again.
        peft: see :class:`PeftLayout`; None where there is no such form.
    """

    adapter: str
    base: str
    revision: str | None
    fingerprint: str
    horizon: int
    file: str
    sha256: str
    content: str | None = None
    lora: Lora | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    peft: PeftLayout | None = None

    def to_json(self) -> dict[str, Any]:
        weights = {"file": self.file, "sha256": self.sha256, "lora": self.lora.to_json() if self.lora else None}
        layout = asdict(self.peft) if self.peft else None
        return {
            "format": FORMAT,
            "adapter": self.adapter,
            "base": {
                "id": self.base,
                "revision": self.revision,
                "fingerprint": self.fingerprint,
                "content": self.content,
            },
            "weights": weights | {"peft": layout},
            "horizon": self.horizon,
            "options": dict(self.options),
        }

    @classmethod
    def of(cls, about: Mapping[str, Any], where: Path) -> "Head":
        """From what :func:`read_about` has read.

        Raises:
            PolicyError: it lacks something.
        """
        try:
            base, weights, layout = about["base"], about["weights"], about["weights"].get("peft")
            _check_kinds(about, where)
            return cls(
                adapter=about["adapter"],
                base=base["id"],
                revision=base["revision"],
                fingerprint=base["fingerprint"],
                horizon=about["horizon"],
                file=weights["file"],
                sha256=weights["sha256"],
                content=base["content"],
                lora=Lora.of(weights["lora"], ()),
                options=about["options"],
                peft=PeftLayout(tuple(layout["modules"]), layout["idle"], tuple(layout["shape"])) if layout else None,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise PolicyError(f"{where} is damaged: it lacks {error}") from error

    def put_on(self, module: nn.Module, folder: Path) -> None:
        """Load the weights into a model whose frozen part came from the base.

        Raises:
            PolicyError: the base is another model, the weights are missing, damaged, changed, or of other shapes.
        """
        found = fingerprint(module)
        if found != self.fingerprint:
            raise PolicyError(
                f"the head in {folder} was trained on another base model than {self.base} is now "
                f"(fingerprint {self.fingerprint}, found {found}). Give the one that it was trained on with `base`"
            )
        weights = self.read_weights(folder)
        check_tensors(_shapes(_trained(module)), _shapes(weights), folder / self.file)
        module.load_state_dict(weights, strict=False)

    def check(self, folder: Path) -> None:
        """Raise PolicyError unless the weights are there, and the file that poco.json speaks of."""
        file = folder / self.file
        check_file(file)
        if words := another_file(file, self.sha256):
            raise PolicyError(f"{file} {words}")

    def read_weights(self, folder: Path) -> dict[str, Tensor]:
        """The trained tensors by their names in the adapter's model.

        Raises:
            PolicyError: the file is missing, damaged, or not the one that poco.json speaks of.
        """
        check_file(folder / self.file)
        tensors = read_tensors(folder / self.file)
        self.check(folder)
        check_finite(tensors, folder / self.file)
        if self.file != PEFT_WEIGHTS:
            return tensors
        return {own: tensors[key] for own, key in peft_names(tensors, self.lora is not None).items()}


def read_about(folder: Path) -> dict[str, Any]:
    """poco.json; empty where there is none.

    Raises:
        PolicyError: it is damaged, was written by a later version, or speaks of a file that is none of ours.
    """
    file = folder / ABOUT
    if not file.is_file():
        return {}
    about = read_object(file)
    if about.get("format") != FORMAT:
        raise PolicyError(
            f"{file} is of format {about.get('format')!r}, and this version of poco_vla reads {FORMAT}: update it"
        )
    weights = about.get("weights", {"file": POLICY_WEIGHTS, "sha256": ""})
    kinds = {"adapter": str, "options": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(about.get(name), kind)]
    if not isinstance(weights, dict) or not isinstance(weights.get("sha256"), str):
        wrong.append("weights")
    elif weights.get("file") not in (HEAD_WEIGHTS, PEFT_WEIGHTS, POLICY_WEIGHTS):
        wrong.append("weights.file")
    if wrong:
        raise PolicyError(f"{file} is damaged: {', '.join(wrong)} is missing or of another kind")
    return about


def saved_dtype(folder: Path, option: str = "dtype") -> str | None:
    """Return the dtype of the frozen part, or of that of it which an `option` names, that a folder's poco.json says;
    None where it says none.

    Raises:
        PolicyError: it is not one of :data:`DTYPES`.
    """
    dtype = read_about(folder).get("options", {}).get(option)
    if dtype is not None and dtype not in DTYPES:
        raise PolicyError(f"{folder / ABOUT}: {option} is {dtype!r:.100}, expected one of {', '.join(DTYPES)}")
    return dtype


def read_head(folder: Path, adapter: str) -> Head | None:
    """The head that lies in a folder; None where a whole policy lies there, or nothing of ours.

    Raises:
        PolicyError: poco.json is damaged, or the head is another adapter's.
    """
    about = read_about(folder)
    if about.get("weights", {}).get("file", POLICY_WEIGHTS) == POLICY_WEIGHTS:
        if (folder / HEAD_WEIGHTS).exists():
            raise PolicyError(f"{folder} holds {HEAD_WEIGHTS}, but no {ABOUT} that says what base it belongs on")
        return None
    head = Head.of(about, folder / ABOUT)
    if head.adapter != adapter:
        raise PolicyError(f'{folder} holds a head of the adapter "{head.adapter}", and this is "{adapter}"')
    if head.lora is not None:
        _check_rank(head.lora, folder / head.file)
    return head


@contextmanager
def head_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill, which takes `path`'s place when the block ends well.

    Raises:
        PolicyError: a whole policy is there, which a head is not to replace.
    """
    if (Path(path) / POLICY_WEIGHTS).exists():
        raise PolicyError(f"{path} holds a whole policy, which a head is not to replace; choose another folder")
    with atomic_folder(path) as partial:
        yield partial


def write_head(
    folder: Path,
    module: nn.Module,
    source: Source | None,
    *,
    adapter: str,
    horizon: int,
    lora: Lora | None = None,
    options: Mapping[str, Any] | None = None,
    peft: PeftLayout | None = None,
    names: Mapping[str, Any] | None = None,
) -> None:
    """Weights and poco.json of what trains in `module`.

    Args:
        folder: from :func:`head_folder`.
        module: LeRobot's policy, or what takes its place; its names are the file's.
        source: where its frozen part came from.
        adapter: the adapter's registered name.
        horizon: H.
        lora: what trains in the place of the full head.
        options: what `from_pretrained` must be told to give the same function again.
        peft: how peft can carry it; None offers no such form.
        names: of states and actions (:meth:`poco_vla.adapting.naming.VectorOrder.to_json`).

    Raises:
        PolicyError: there is no base, so that a head alone could not be put on anything.
    """
    if source is None:
        raise PolicyError("this policy was built from no checkpoint, so that a head alone could not be put on anything")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _trained(module).items()}
    save_file(weights, folder / HEAD_WEIGHTS, metadata={"format": "pt"})
    head = Head(
        adapter=adapter,
        base=source.name,
        revision=source.revision,
        fingerprint=fingerprint(module),
        content=source.content,
        horizon=horizon,
        file=HEAD_WEIGHTS,
        sha256=sha256_of(folder / HEAD_WEIGHTS),
        lora=lora,
        options=options or {},
        peft=peft.found_in(module) if peft and lora is None else peft,
    )
    write_json(folder / ABOUT, head.to_json() | ({"names": dict(names)} if names else {}))


def write_about(
    folder: Path, *, adapter: str, options: Mapping[str, Any] | None = None, names: Mapping[str, Any] | None = None
) -> None:
    """poco.json of a whole policy: by which adapter it is loaded, the `options` that make it the same function, and the
    `names` of its states and actions."""
    about = {"format": FORMAT, "adapter": adapter, "options": dict(options or {})}
    write_json(folder / ABOUT, about | ({"names": dict(names)} if names else {}))


def base_of(head: Head, moved: str | Path | None = None) -> Source:
    """Return where the frozen weights are: where a head says, or where its user says they are now.

    Args:
        head: the head.
        moved: Hub id or folder.

    Raises:
        PolicyError: they cannot be had there.
    """
    try:
        if moved is not None:
            return locate(moved)
        return on_hub(head.base, head.revision) if head.revision else locate(head.base)
    except PolicyError as error:
        raise PolicyError(
            f"the base of the head: {error}. If it has moved, say where it is now (`base`, --policy-options.base)"
        ) from error


def chosen_lora(wanted: Lora | None, head: Head | None) -> Lora | None:
    """The LoRA that is asked for, or a saved head's; they must not contradict each other.

    Raises:
        PolicyError: they do.
    """
    if head is None:
        return wanted
    if wanted not in (None, head.lora):
        raise PolicyError(f"the head was trained with lora {head.lora}, asked for {wanted}")
    return head.lora


def fingerprint(module: nn.Module) -> str:
    """A short hash of 16 numbers out of every frozen parameter: tells one base model from another without reading all
    of it. It does not depend on the dtype that they are held in."""
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    samples = []
    for name in sorted(frozen):
        flat = frozen[name].detach().flatten()
        samples.append(flat[:: max(1, flat.numel() // 16)][:16].to(torch.bfloat16))
    return hashlib.sha256(torch.cat(samples).float().cpu().numpy().tobytes()).hexdigest()[:16]


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hex; the Hub knows large files by it."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def another_file(file: Path, expected: str) -> str:
    """Say what is wrong with a file whose SHA-256 is in poco.json; empty where it is the one."""
    found = sha256_of(file)
    if found == expected:
        return ""
    return (
        f"is not the file that {ABOUT} speaks of (SHA-256 {found[:12]}, expected {expected[:12]}): it was changed or "
        "damaged; fetch it again"
    )


def _check_rank(lora: Lora, file: Path) -> None:
    """Raise PolicyError unless a LoRA's matrices in the file are of the rank that takes memory before they are read."""
    check_file(file)
    ranks = {shape[0] for name, shape in read_shapes(file).items() if ".lora_A." in name and len(shape) == 2}
    if ranks != {lora.rank}:
        found = ", ".join(map(str, sorted(ranks))) or "no LoRA"
        raise PolicyError(f"{file} holds {found} where {ABOUT} says a LoRA of rank {lora.rank}: fetch it again")


def _check_kinds(about: Mapping[str, Any], where: Path) -> None:
    """Raise PolicyError unless what poco.json says of a head's base has the kinds and sizes of one."""
    base, horizon = about["base"], about["horizon"]
    wrong = [name for name in ("id", "fingerprint") if not isinstance(base[name], str)]
    wrong += [name for name in ("revision", "content") if not isinstance(base[name], str | None)]
    if base["revision"] is not None and (".." in base["revision"] or not REVISION.fullmatch(base["revision"])):
        wrong.append("revision")
    if isinstance(horizon, bool) or not isinstance(horizon, int) or not 1 <= horizon <= MAX_HORIZON:
        wrong.append("horizon")
    if wrong:
        raise PolicyError(f"{where} is damaged: {', '.join(wrong)} is missing or of another kind or size")


def peft_names(keys: Iterable[str], lora: bool) -> dict[str, str]:
    """Names in the adapter's model -> names in peft's file. Of a full head, the LoRA that peft wants is left out."""
    names = {}
    for key in keys:
        own = key.removeprefix(PEFT_PREFIX)
        if lora:
            own = own.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        elif IDLE in own:
            continue
        names[own] = key
    return names


def _trained(module: nn.Module) -> dict[str, Tensor]:
    """Return what trains, as its module saves it: of a layer that trains in part, the whole."""
    state = module.state_dict()
    return {name: state[name] for name, p in module.named_parameters() if p.requires_grad}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
