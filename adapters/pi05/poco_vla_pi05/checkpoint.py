"""Reading and writing pi0.5's weights: a complete match, or an error that names what does not.

LeRobot's own `from_pretrained` prints a line and returns a half-random model when a file is missing or keys differ.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from torch import Tensor

from poco_vla import PolicyError
from poco_vla.adapting import weights
from poco_vla.adapting.lerobot_checkpoint import Checkpoint, Described, LoadOptions, fill_policy, read_config
from poco_vla.pretrained import heads, policy_config
from poco_vla_pi05.architecture import Architecture

WEIGHTS = heads.POLICY_WEIGHTS
CORE = "model.paligemma_with_expert."
EMBEDDINGS = f"{CORE}paligemma.model.language_model.embed_tokens.weight"
VLM_HEAD = f"{CORE}paligemma.lm_head.weight"
EXPERT_HEAD = f"{CORE}gemma_expert.lm_head.weight"
"""The two language heads: 790 M parameters that no action depends on. They are not kept in memory."""

VISION_PARTS = ("vision_tower", "multi_modal_projector")
NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm")
"""These two kinds LeRobot keeps in float32 when the rest is bfloat16 (modeling_pi05.py,
to_bfloat16_for_selected_params)."""

OPENPI_SIZES = {"action_dim": 65_536, "action_horizon": 4096}
"""Largest sizes of openpi's config.json that are taken."""

OPENPI_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


def describe(checkpoint: Checkpoint, options: LoadOptions, asset: str | None) -> Described:
    """Return configuration and statistics of a LeRobot or an openpi folder.

    Args:
        checkpoint: where it is.
        options: what was asked for.
        asset: openpi's dataset id, where there are several.

    Raises:
        PolicyError: there is none, or it is of another model.
    """
    folder = checkpoint.source.folder
    file = folder / policy_config.CONFIG
    values = heads.read_object(file) if file.is_file() else {}
    if "type" in values or "action_horizon" not in values:
        config = read_config(checkpoint.source, PI05Config, model="pi0.5")
        config.gradient_checkpointing = False
        return Described(config, checkpoint.stats(config, options))
    policy_config.check_sizes(values, OPENPI_SIZES, file)
    image_size = Architecture.of_folder(folder).image_size
    with policy_config.describing(f"{file} is no configuration of openpi's"):
        config = _openpi_config(values, image_size)
    # A base model has the statistics of many datasets; they matter only where none is given. The configuration states
    # padded widths only. Its cameras are slots: which of the data's they are is for the user to say.
    several = asset is None and len(list((folder / "assets").rglob("norm_stats.json"))) > 1
    unused = options.stats is not None and (
        options.statistics == "dataset" or (options.statistics == "auto" and several)
    )
    stats = {} if unused else openpi_stats(folder, asset)
    return Described(config, stats, padded=(OBS_STATE, ACTION), names_cameras=False)


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
    policy: PI05Policy,
    opened: weights.Weights,
    *,
    backbone: torch.dtype,
    vision: torch.dtype,
    in_head: Callable[[str], bool],
    device: str,
) -> None:
    """Fill an empty policy from LeRobot's or openpi's tensors; its language heads are dropped.

    Args:
        policy: from :func:`poco_vla_pi05.architecture.empty_policy`.
        opened: the tensors.
        backbone: dtype of what is frozen, except SigLIP and norms.
        vision: SigLIP's.
        in_head: True for the name of a parameter that trains: float32.
        device: where they go.

    Raises:
        PolicyError: a file is missing or damaged, or names or shapes differ.
    """

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if in_head(name) else frozen_dtype(name, backbone, vision)

    drop_language_heads(policy)
    fill_policy(policy, opened, names=_lerobot_names, dtype_of=dtype_of, device=device)


def frozen_dtype(name: str, backbone: torch.dtype, vision: torch.dtype) -> torch.dtype:
    """Return the dtype of a frozen parameter: `vision` in SigLIP, float32 in norms, `backbone` elsewhere."""
    if any(part in name for part in VISION_PARTS):
        return vision
    return torch.float32 if any(part in name for part in NORMS) else backbone


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


def full_weights(policy: PI05Policy, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` with both language heads, as LeRobot's strict loader wants them.

    The VLM's is a copy of the embeddings, to which openpi ties it; the expert's, which nothing ever defined, is zero.
    """
    expert: Any = policy.model.paligemma_with_expert.gemma_expert
    embeddings = tensors[EMBEDDINGS]
    zero = torch.zeros(expert.config.vocab_size, expert.config.hidden_size, dtype=embeddings.dtype)
    return {VLM_HEAD: embeddings.clone(), EXPERT_HEAD: zero} | dict(tensors)
