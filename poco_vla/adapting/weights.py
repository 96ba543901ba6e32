"""A checkpoint's tensors, in whatever form they lie: one file, shards, or a LoRA of peft on its base.

Checkpoints from before LeRobot's processors hold their statistics among the weights; they are read from there. For
adapters of LeRobot's policies. Only safetensors are ever opened.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poco_vla.adapting.normalization import NEEDED
from poco_vla.errors import PolicyError
from poco_vla.pretrained.heads import PEFT_PREFIX, PEFT_WEIGHTS, POLICY_WEIGHTS
from poco_vla.pretrained.sources import Source, check_file, locate, on_hub, read_object
from poco_vla.pretrained.tensor_files import check_finite, open_tensors, read_tensors

INDEX = f"{POLICY_WEIGHTS}.index.json"
PEFT_CONFIG = "adapter_config.json"
OLD_NORMALISERS = re.compile(
    r"(model\.)?(normalize_inputs|unnormalize_outputs|normalize_targets|normalize|unnormalize|input_normalizer|"
    r"output_normalizer)\.(buffer_)?(?P<column>[\w.-]+)\.(?P<kind>mean|std|min|max|q01|q99|q10|q90)"
)
"""Names of statistics among the weights, as LeRobot wrote them before 0.4."""
MIGRATE = "python -m lerobot.processor.migrate_policy_normalization --pretrained-path"
_MERGE = (
    "merge it into its base with peft (PeftModel.from_pretrained(policy, folder).merge_and_unload()), save that policy "
    "with its processors, and give the folder of it"
)
MAX_LORAS = 4
"""Longest chain of LoRAs that stand on each other."""


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA of peft, as lerobot-train writes it.

    Attributes:
        folder: it lies in.
        base: what it belongs on.
        config: its adapter_config.json.
    """

    folder: Path
    base: Source
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Weights:
    """Tensors of a checkpoint by name; open within a ``with`` block.

    Attributes:
        where: the file or folder, for messages.
        files: tensor -> the file that holds it.
        added: tensor -> what a LoRA adds to it.
        replaced: tensor -> what a LoRA has in its place.
    """

    where: Path
    files: Mapping[str, Path]
    added: Mapping[str, tuple[Tensor, Tensor, float]] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)
    _stack: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)

    def __enter__(self) -> "Weights":
        for file in sorted(set(self.files.values())):
            self._handles[file] = self._stack.enter_context(open_tensors(file))
        return self

    def __exit__(self, *_: object) -> None:
        self._handles.clear()
        self._stack.close()

    def keys(self) -> Iterator[str]:
        """Yield the names of the model's tensors; old normalisers are none."""
        return (name for name in self.files if not OLD_NORMALISERS.fullmatch(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        if name in self.replaced:
            return tuple(self.replaced[name].shape)
        return tuple(self._handles[self.files[name]].get_slice(name).get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each of the model's tensors; opens the files by itself."""
        with self:
            return {name: self.shape(name) for name in self.keys()}

    def tensors(self) -> dict[str, Tensor]:
        """Return all of the model's tensors; opens the files by itself."""
        with self:
            return {name: self.tensor(name) for name in self.keys()}

    def tensor(self, name: str, *, as_stored: bool = False) -> Tensor:
        """Return a tensor; where a LoRA adds to it, in float32, or with `as_stored` in the base's dtype.

        Raises:
            PolicyError: it holds numbers that are not finite.
        """
        tensor = self.replaced[name] if name in self.replaced else self._handles[self.files[name]].get_tensor(name)
        if name in self.added:
            down, up, scale = self.added[name]
            merged = tensor.float() + scale * (up.float() @ down.float())
            tensor = merged.to(tensor.dtype) if as_stored else merged
        check_finite({name: tensor}, self.where)
        return tensor

    def old_stats(self, columns: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
        """Return the statistics among the weights, by column and kind; empty where there are none.

        Args:
            columns: names of the policy's features: the weights spell them with underscores.
        """
        spelled = {key.replace(".", "_"): key for key in columns} | {key: key for key in columns}
        stats: dict[str, dict[str, Tensor]] = {}
        for name, file in self.files.items():
            found = OLD_NORMALISERS.fullmatch(name)
            if found and (key := spelled.get(found["column"])):
                value = self._handles[file].get_tensor(name)
                if not bool(torch.isfinite(value).all()):
                    raise PolicyError(
                        f"{self.where} holds its statistics among the weights, and {name} is not finite: it was never "
                        'set. Give a dataset and statistics "dataset"'
                    )
                stats.setdefault(key, {})[found["kind"]] = value.float()
        return stats


def weights_of(source: Source, base: str | Path | None = None, *, above: int = 0) -> Weights:
    """Return a checkpoint's tensors, fetched now where it lies on the Hub.

    Args:
        source: the checkpoint.
        base: where the base of a LoRA is, if not where the LoRA says.
        above: LoRAs that this one is the base of.

    Raises:
        PolicyError: there are none, in no form that is read; the message says what is there and what to do.
    """
    adapter = peft_adapter(source, base)
    if adapter is not None:
        _check_chain(source, above)
        return _with_adapter(weights_of(adapter.base, above=above + 1), adapter)
    if (source.folder / INDEX).is_file():
        return _sharded(source)
    file = source.file(POLICY_WEIGHTS)
    check_file(file)
    return of_file(file)


def of_file(file: Path) -> Weights:
    """Return the tensors of one file."""
    with open_tensors(file) as handle:
        return Weights(file, dict.fromkeys(handle.keys(), file))


def peft_adapter(source: Source, base: str | Path | None = None) -> PeftAdapter | None:
    """Return the LoRA of peft that lies in the place of whole weights; None where there is none.

    Raises:
        PolicyError: it is of a kind that is not put on its base here, or its base cannot be had.
    """
    folder = source.folder
    whole = (folder / POLICY_WEIGHTS).is_file() or (folder / INDEX).is_file()
    if whole or not (folder / PEFT_CONFIG).is_file():
        return None
    config = read_object(folder / PEFT_CONFIG)
    if (kind := config.get("peft_type")) != "LORA" or config.get("use_dora") or config.get("fan_in_fan_out"):
        raise PolicyError(f"{source.name} is a {kind} adapter of peft, not a plain LoRA: {_MERGE}")
    if not (folder / PEFT_WEIGHTS).is_file():
        raise PolicyError(f"{source.name} is a LoRA of peft, and its {PEFT_WEIGHTS} is missing")
    named = base or config.get("base_model_name_or_path")
    if not isinstance(named, str | Path) or not str(named):
        raise PolicyError(
            f"{source.name} is a LoRA of peft that does not say what base it belongs on: give policy_options "
            f'{{"base": "FOLDER OR HUB ID"}}, or {_MERGE}'
        )
    revision = None if base is not None else config.get("revision")
    try:
        found = locate(named) if not revision or Path(named).is_dir() else on_hub(str(named), revision)
    except PolicyError as error:
        raise PolicyError(
            f"{source.name} is a LoRA of peft on a base that cannot be had: {error}. Say where it is "
            '(policy_options {"base": "FOLDER OR HUB ID"})'
        ) from error
    if found.folder == folder:
        raise PolicyError(f"{source.name} is a LoRA of peft that names itself as its base; give policy_options base")
    return PeftAdapter(folder, found, config)


def whole_source(source: Source, base: str | Path | None = None, *, above: int = 0) -> Source:
    """Return where whole weights lie: the checkpoint itself, or the base of a LoRA."""
    adapter = peft_adapter(source, base)
    if adapter is None:
        return source
    _check_chain(source, above)
    return whole_source(adapter.base, above=above + 1)


def _check_chain(source: Source, above: int) -> None:
    """Raise PolicyError for a chain of LoRAs that name each other as their base without end."""
    if above >= MAX_LORAS:
        raise PolicyError(f"{source.name} is a LoRA of peft on more than {MAX_LORAS} others: give policy_options base")


def old_stats(source: Source, config: Any, base: str | Path | None = None) -> dict[str, dict[str, Tensor]]:
    """Return the statistics of a checkpoint from before LeRobot's processors; empty where there are none.

    Args:
        source: the checkpoint, without saved processors.
        config: LeRobot's configuration of the policy.
        base: where the base of a LoRA is, if not where the LoRA says.

    Raises:
        PolicyError: they are of another kind than the configuration normalises by.
    """
    columns = {**(config.input_features or {}), **(config.output_features or {})}
    with weights_of(source, base) as weights:
        stats = weights.old_stats(columns)
    for key, kinds in stats.items():
        mode = getattr(config.normalization_mapping.get(columns[key].type.value), "value", None)
        if mode in NEEDED and not set(NEEDED[mode]) <= kinds.keys():
            raise PolicyError(
                f"{source.name} is a checkpoint from before LeRobot's processors: its weights hold "
                f'{", ".join(sorted(kinds))} of "{key}", and its config.json says {mode}. Convert it with '
                f"`{MIGRATE} {source.name}` and give the new folder"
            )
    return stats


def _sharded(source: Source) -> Weights:
    table = read_object(source.folder / INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise PolicyError(f'{source.folder / INDEX} is damaged: it has no "weight_map"')
    if wrong := [file for file in table.values() if not isinstance(file, str) or Path(file).name != file]:
        raise PolicyError(f"{source.folder / INDEX} names {wrong[0]!r}, which is no file beside it")
    files = {shard: source.file(shard) for shard in sorted(set(table.values()))}
    if missing := [shard for shard, file in files.items() if not file.is_file()]:
        raise PolicyError(f"{source.name} is not whole: of {len(files)} shards {', '.join(missing)} is missing")
    held: dict[str, Path] = {}
    for file in files.values():
        with open_tensors(file) as handle:
            held |= dict.fromkeys(handle.keys(), file)
    if lost := sorted(table.keys() - held.keys()):
        raise PolicyError(f"{source.name} is not whole: {INDEX} names {lost[0]}, which no shard holds")
    return Weights(source.folder, held)


def _with_adapter(base: Weights, adapter: PeftAdapter) -> Weights:
    """Return a base's tensors with a LoRA on them: W + B A alpha / r."""
    tensors = read_tensors(adapter.folder / PEFT_WEIGHTS)
    own = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
    added: dict[str, tuple[Tensor, Tensor, float]] = {}
    replaced: dict[str, Tensor] = {}
    for name, tensor in own.items():
        module, _, rest = name.partition(".lora_A.")
        if rest == "weight":
            up = own.get(f"{module}.lora_B.weight")
            if up is None or tensor.ndim != 2 or up.ndim != 2 or up.shape[1] != tensor.shape[0]:
                raise PolicyError(f"{adapter.folder} is a LoRA of peft whose {module} cannot be read here: {_MERGE}")
            added[_name_in(base, f"{module}.weight", adapter)] = (
                tensor,
                up,
                _scale(adapter.config, module, len(tensor)),
            )
        elif ".lora_B.weight" not in name:
            if ".lora_" in name:
                raise PolicyError(f"{adapter.folder} is a LoRA of peft with {name}, which is not read here: {_MERGE}")
            replaced[_name_in(base, name, adapter)] = tensor
    if not added and not replaced:
        raise PolicyError(f"{adapter.folder} is a LoRA of peft without a tensor")
    return Weights(adapter.folder, base.files, added, replaced)


def _name_in(base: Weights, name: str, adapter: PeftAdapter) -> str:
    """Return a tensor's name in the base: openpi's leave out the first "model."."""
    for known in (name, name.removeprefix("model.")):
        if known in base.files:
            return known
    raise PolicyError(
        f"the LoRA in {adapter.folder} changes {name}, which its base {adapter.base.name} does not have: give the base "
        'that it was trained on (policy_options {"base": "FOLDER OR HUB ID"})'
    )


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return what a LoRA's product is multiplied by, as peft does."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if module == pattern or module.endswith(f".{pattern}"):
            alpha = value
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
