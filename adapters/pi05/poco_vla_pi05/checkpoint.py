"""Reading and writing pi0.5's weights: a complete match, or an error that names what does not.

LeRobot's own `from_pretrained` prints a line and returns a half-random model when a file is missing or keys differ.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from safetensors.torch import save_file
from torch import Tensor

from poco_vla import PolicyError
from poco_vla.adapting import heads, policy_config, weights
from poco_vla_pi05.architecture import Architecture

WEIGHTS = "model.safetensors"
CORE = "model.paligemma_with_expert."
EMBEDDINGS = f"{CORE}paligemma.model.language_model.embed_tokens.weight"
VLM_HEAD = f"{CORE}paligemma.lm_head.weight"
EXPERT_HEAD = f"{CORE}gemma_expert.lm_head.weight"
"""The two language heads: 790 M parameters that no action depends on. They are not kept in memory."""

FLOAT32_PARTS = ("vision_tower", "multi_modal_projector", "input_layernorm", "post_attention_layernorm", "model.norm")
"""What LeRobot keeps in float32 when the rest is bfloat16 (modeling_pi05.py, to_bfloat16_for_selected_params)."""

OPENPI_SIZES = {"action_dim": 65_536, "action_horizon": 4096}
"""Largest sizes of openpi's config.json that are taken."""

OPENPI_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


def read_config(source: heads.Source) -> tuple[PI05Config, bool]:
    """The configuration of a LeRobot or an openpi folder, and whether it is openpi's.

    Raises:
        PolicyError: there is none, or it is of another model.
    """
    file = source.folder / policy_config.CONFIG
    values = heads.read_object(file) if file.is_file() else {}
    if "type" not in values and "action_horizon" in values:
        policy_config.check_sizes(values, OPENPI_SIZES, file)
        image_size = Architecture.of_folder(source.folder).image_size
        with policy_config.describing(f"{file} is no configuration of openpi's"):
            return _openpi_config(values, image_size), True
    config = policy_config.load_policy_config(
        source.folder,
        "pi05",
        PI05Config.from_pretrained,
        fields=[field.name for field in fields(PI05Config)],
        name=source.name,
    )
    with policy_config.describing(f"{file} describes no pi0.5"):
        config.validate_features()
    return config, False


def cameras(config: PI05Config) -> list[str]:
    """Return a policy's cameras in the order of its slots, without LeRobot's empty ones."""
    return [key for key in config.image_features if not key.startswith(f"{OBS_IMAGES}.empty_camera")]


def sizes(config: PI05Config) -> dict[str, int]:
    """Return how many numbers a policy's state and action have."""
    features = {OBS_STATE: config.robot_state_feature, ACTION: config.action_feature}
    return {key: feature.shape[0] for key, feature in features.items() if feature is not None}


def _openpi_config(values: Mapping[str, Any], image_size: int) -> PI05Config:
    """openpi's config.json: action_dim, action_horizon, variants, precision (convert_jax_model_to_pytorch.py)."""
    size = values.get("action_dim", 32)
    images = {f"{OBS_IMAGES}.{name}": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)) for name in OPENPI_CAMERAS}
    return PI05Config(
        input_features=images | {OBS_STATE: PolicyFeature(FeatureType.STATE, (size,))},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (size,))},
        chunk_size=values["action_horizon"],
        n_action_steps=values["action_horizon"],
        max_state_dim=size,
        max_action_dim=size,
        dtype="bfloat16" if values.get("precision") == "bfloat16" else "float32",
        image_resolution=(image_size, image_size),
        device="cpu",
    )


def num_assets(folder: Path) -> int:
    """Datasets whose statistics an openpi checkpoint brings."""
    return len(list((folder / "assets").rglob("norm_stats.json")))


def openpi_stats(folder: Path, asset: str | None) -> dict[str, dict[str, Tensor]]:
    """``assets/<id>/norm_stats.json`` under LeRobot's names; empty where there is none.

    Args:
        folder: the checkpoint.
        asset: which id, where there are several (ids may hold a slash).
    """
    files = {str(p.parent.relative_to(folder / "assets")): p for p in (folder / "assets").rglob("norm_stats.json")}
    if not files:
        return {}
    if asset is None and len(files) > 1:
        raise PolicyError(f'{folder} has statistics of several datasets: give policy_options "asset": {sorted(files)}')
    if asset is not None and asset not in files:
        raise PolicyError(f'{folder} has no statistics for the asset "{asset}". Known: {", ".join(sorted(files))}.')
    file = files[asset or next(iter(files))]
    stats = heads.read_object(file).get("norm_stats")
    if not isinstance(stats, dict):
        raise PolicyError(f'{file} is damaged: it has no table "norm_stats"')
    names = {"state": OBS_STATE, "actions": ACTION}
    with policy_config.describing(f"{file} is damaged"):
        return {
            names[key]: {
                kind: torch.tensor(value, dtype=torch.float32) for kind, value in table.items() if value is not None
            }
            for key, table in stats.items()
            if key in names
        }


def load_weights(
    policy: PI05Policy, file: Path | weights.Weights, *, backbone: torch.dtype, head: Iterable[str], device: str
) -> None:
    """Fill an empty policy from safetensors; its language heads are dropped.

    Args:
        policy: from :func:`poco_vla_pi05.architecture.empty_policy`.
        file: LeRobot's or openpi's ``model.safetensors``, or what else holds the weights.
        backbone: dtype of what is frozen, but for the parts that LeRobot keeps in float32.
        head: names of the parameters that train: float32.
        device: where they go.

    Raises:
        PolicyError: the file is missing or damaged, or names or shapes differ.
    """
    drop_language_heads(policy)
    wanted = {name: tuple(parameter.shape) for name, parameter in policy.named_parameters()}
    head = set(head)
    with weights.of_file(file) if isinstance(file, Path) else file as handle:
        found = _lerobot_names(handle.keys())
        heads.check_tensors(wanted, {name: handle.shape(key) for name, key in found.items()}, handle.where)
        tensors = {}
        for name in wanted:
            exact = name in head or any(part in name for part in FLOAT32_PARTS)
            tensors[name] = handle.tensor(found[name]).to(device, torch.float32 if exact else backbone)
    policy.load_state_dict(tensors, strict=False, assign=True)
    policy.to(device)  # buffers


def _lerobot_names(keys: Iterable[str]) -> dict[str, str]:
    """LeRobot's name of each tensor in a file -> its name there. openpi leaves out ``model.`` and tied embeddings."""
    found = {key if key.startswith("model.") else f"model.{key}": key for key in keys}
    if EMBEDDINGS not in found and VLM_HEAD in found:
        found[EMBEDDINGS] = found[VLM_HEAD]
    return {name: key for name, key in found.items() if name not in (VLM_HEAD, EXPERT_HEAD)}


def drop_language_heads(policy: PI05Policy) -> None:
    """Free the 790 M parameters of the language heads, which no action depends on."""
    core: Any = policy.model.paligemma_with_expert
    core.paligemma.lm_head = core.gemma_expert.lm_head = None


def full_weights(policy: PI05Policy, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` with both language heads, as LeRobot's strict loader wants them.

    The VLM's is a copy of the embeddings, to which openpi ties it; the expert's, which nothing ever defined, is zero.
    """
    expert: Any = policy.model.paligemma_with_expert.gemma_expert
    out = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    if VLM_HEAD not in out:
        out[VLM_HEAD] = out[EMBEDDINGS].clone()
    if EXPERT_HEAD not in out:
        out[EXPERT_HEAD] = torch.zeros(expert.config.vocab_size, expert.config.hidden_size, dtype=out[EMBEDDINGS].dtype)
    return out


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """One safetensors file, as LeRobot writes it."""
    save_file(dict(tensors), file, metadata={"format": "pt"})
