"""Small GR00T N1.6 checkpoints and datasets on disk, as NVIDIA and a user of LeRobot write them."""

import json
from dataclasses import asdict, replace

import numpy as np
import torch
from lerobot_policy_groot_n1d6.model import GrootN1d6, GrootSizes
from safetensors.torch import load_file, save_file

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
STATE, ACTION = "observation.state", "action"
SHARDS = tuple(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
INDEX = "model.safetensors.index.json"

_TINY = GrootSizes.tiny()
SIZES = replace(
    _TINY,
    language=replace(_TINY.language, vocab=264, image_token=259),
    head=replace(_TINY.head, state_dim=32, horizon=16, max_steps=64),
)
OPTIONS = {"sizes": asdict(SIZES), "tokenizer": "bytes", "dtype": "float32", "compute": "float32"}
"""What a tiny checkpoint's own config.json cannot say."""

BOUNDS = {"min": -2.0, "max": 2.0, "mean": 0.0, "std": 1.0, "q01": -2.0, "q99": 2.0}


def stats_of(**dims):
    """Statistics by column, all alike."""
    return {key: {name: torch.full((n,), value) for name, value in BOUNDS.items()} for key, n in dims.items()}


def dataset(state=6, action=4, cameras=(FRONT, WRIST), spread=1.0):
    """LeRobot features and statistics of a dataset; its range is -2 to 2 times `spread`."""
    camera = {"dtype": "video", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
    sizes = {STATE: state, ACTION: action}
    features = dict.fromkeys(cameras, camera)
    features |= {key: {"dtype": "float32", "shape": (n,), "names": None} for key, n in sizes.items()}
    stats = {key: {name: value * spread for name, value in table.items()} for key, table in stats_of(**sizes).items()}
    return {"features": features, "stats": stats}


def raw_batch(size=2, seed=0, cameras=(FRONT, WRIST), state=6, action=4, steps=16):
    """What a dataset gives, in the robot's units."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.rand(size, 3, 64, 64, generator=generator) for key in cameras} | {
        STATE: torch.rand(size, state, generator=generator) * 2 - 1,
        ACTION: torch.rand(size, steps, action, generator=generator) * 2 - 1,
        "task": ["Pick up the pen!", "hang the keychain on the hook"][:size],
    }


def nvidia_network(*, mask_token=False, state_dropout=0.0, seed=0):
    """Random weights; the backbone's frozen part in bfloat16 as the original's fine-tuning leaves it."""
    head = replace(SIZES.head, mask_token=mask_token, state_dropout=state_dropout)
    return GrootN1d6.random(replace(SIZES, head=head), seed)


def nvidia_folder(path, *, mask_token=False, state_dropout=0.0, seed=0, horizon=16):
    """A folder as NVIDIA's fine-tuning writes it: two shards of mixed dtype, an index, and four JSON files.

    The embodiment gr1, of a state of 6 numbers and an action of 4, is described in it.
    """
    path.mkdir()
    network = nvidia_network(mask_token=mask_token, state_dropout=state_dropout, seed=seed)
    weights = {name: tensor.to(_stored_dtype(name)).contiguous() for name, tensor in network.state_dict().items()}
    names = sorted(weights)
    shards = {SHARDS[0]: names[: len(names) // 2], SHARDS[1]: names[len(names) // 2 :]}
    for file, held in shards.items():
        save_file({name: weights[name] for name in held}, path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    write_json(path / INDEX, index)
    write_json(path / "config.json", nvidia_config(network.sizes, horizon))
    write_processing(path, horizon)
    return path


def _stored_dtype(name):
    """Trained tensors are float32: the head's and the last language layer's."""
    return torch.float32 if name.startswith("action_head.") or ".layers.1.self_attn.q_" in name else torch.bfloat16


def nvidia_config(sizes, horizon=16):
    """config.json: flat, and silent about the vision-language model's sizes (section 2 of the specification)."""
    head = sizes.head
    return {
        "architectures": ["Gr00tN1d6"],
        "model_type": "Gr00tN1d6",
        "model_name": "nvidia/Eagle-Block2A-2B-v2",
        "select_layer": sizes.language.depth,
        "backbone_embedding_dim": sizes.language.width,
        "tune_top_llm_layers": 4,
        "max_state_dim": head.state_dim,
        "max_action_dim": head.action_dim,
        "action_horizon": horizon,
        "hidden_size": head.hidden,
        "input_embedding_dim": head.width,
        "max_seq_len": head.max_steps,
        "max_num_embodiments": head.num_embodiments,
        "use_alternate_vl_dit": True,
        "use_vlln": True,
        "add_pos_embed": True,
        "attend_text_every_n_blocks": head.text_every,
        "state_dropout_prob": head.state_dropout,
        "num_inference_timesteps": head.flow_steps,
        "num_timestep_buckets": head.time_buckets,
        "noise_beta_alpha": head.time_alpha,
        "noise_beta_beta": 1.0,
        "noise_s": head.time_scale,
        "diffusion_model_cfg": {
            "num_layers": head.depth,
            "num_attention_heads": head.num_heads,
            "attention_head_dim": head.head_dim,
            "norm_type": "ada_norm",
            "dropout": head.dropout,
            "final_dropout": True,
            "output_dim": head.hidden,
            "interleave_self_attention": True,
            "positional_embeddings": None,
        },
    }


def write_processing(path, horizon=16):
    """gr1: an absolute hand and an arm relative to the state's, both of two numbers between 0 and 1; two cameras."""
    mode = {"delta_indices": [0], "sin_cos_embedding_keys": None, "mean_std_embedding_keys": None}
    joints = {"rep": "RELATIVE", "type": "NON_EEF", "format": "DEFAULT", "state_key": None}
    gr1 = {
        "video": mode | {"modality_keys": ["front", "wrist"]},
        "state": mode | {"modality_keys": ["arm", "hand", "waist"]},
        "action": mode
        | {
            "delta_indices": list(range(horizon)),
            "modality_keys": ["hand", "arm"],
            "action_configs": [joints | {"rep": "ABSOLUTE"}, joints],
        },
        "language": mode | {"modality_keys": ["task"]},
    }
    flat = {name: [1.0, 1.0] if name in ("max", "q99", "std") else [0.0, 0.0] for name in BOUNDS}
    relative = {"arm": {name: [values] * horizon for name, values in flat.items()}}
    table = {"state": dict.fromkeys(("arm", "hand", "waist"), flat), "action": {"arm": flat, "hand": flat}}
    write_json(path / "statistics.json", {"gr1": table | {"relative_action": relative}})
    write_json(path / "embodiment_id.json", {"gr1": 20, "new_embodiment": 10})
    kwargs = {
        "modality_configs": {"gr1": gr1},
        "image_crop_size": None,
        "image_target_size": None,
        "shortest_image_edge": 256,
        "crop_fraction": 0.95,
        "model_type": "eagle",
        "formalize_language": True,
        "max_state_dim": SIZES.head.state_dim,
        "max_action_dim": SIZES.head.action_dim,
        "max_action_horizon": horizon,
        "use_percentiles": False,
        "clip_outliers": True,
        "apply_sincos_state_encoding": True,
        "use_relative_action": True,
    }
    write_json(path / "processor_config.json", {"processor_class": "Gr00tN1d6Processor", "processor_kwargs": kwargs})


def write_json(file, value):
    file.write_text(json.dumps(value))


def change_json(file, drop=(), **values):
    """Set and drop fields of a JSON file."""
    held = json.loads(file.read_text()) | values
    write_json(file, {name: value for name, value in held.items() if name not in drop})


def all_weights(folder):
    """Every tensor of a folder, whatever the number of its files."""
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def change_weights(folder, change):
    """Let `change` work on the tensors of an NVIDIA folder's second shard; the index follows."""
    weights = load_file(folder / SHARDS[1])
    change(weights)
    save_file(weights, folder / SHARDS[1], metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    first = {name: file for name, file in index["weight_map"].items() if file == SHARDS[0]}
    write_json(folder / INDEX, index | {"weight_map": first | dict.fromkeys(weights, SHARDS[1])})


def camera_features(state, action, size=64, cameras=(FRONT, WRIST)):
    """LeRobot's feature table of a dataset whose pictures are files of their own."""
    camera = {"dtype": "image", "shape": (size, size, 3), "names": ["height", "width", "channels"]}
    features = dict.fromkeys(cameras, camera)
    return features | {
        key: {"dtype": "float32", "shape": (n,), "names": None} for key, n in ((STATE, state), (ACTION, action))
    }


def camera_episodes(features, lengths=(12, 12), seed=0):
    """Columns of random episodes for `lerobot_on_disk.write`."""
    rng = np.random.default_rng(seed)
    return [
        {
            key: rng.integers(0, 256, (n, *f["shape"])).astype(np.uint8)
            if f["dtype"] == "image"
            else rng.normal(size=(n, *f["shape"])).astype(np.float32)
            for key, f in features.items()
        }
        for n in lengths
    ]


def change_weights_of(change):
    """A fault of a LeRobot folder: `change` works on its table of tensors."""

    def spoil(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil
