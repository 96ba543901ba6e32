"""Small pi05 checkpoints on disk, in LeRobot's form and in openpi's."""

import json

import torch
from poco_vla_pi05 import checkpoint
from poco_vla_pi05.architecture import ARCHITECTURE_FILE, TINY
from poco_vla_pi05.tokenizer import byte_tokenizer
from safetensors.torch import load_file, save_file

from poco_vla.pretrained import heads

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
STATE, ACTION = "observation.state", "action"

OPENPI_STATS = {
    "state": {"mean": [0.0] * 6, "std": [1.0] * 6, "q01": [-1.0, -2, -3, -4, -5, -6], "q99": [1.0, 2, 3, 4, 5, 6]},
    "actions": {"mean": [0.5] * 4, "std": [1.0] * 4, "q01": [-1.0] * 4, "q99": [1.0, 2, 3, 4]},
}


def dataset(state=6, action=4, cameras=(FRONT, WRIST), spread=4.0):
    """LeRobot features and statistics of a dataset; all quantiles are -spread and spread."""
    camera = {"dtype": "video", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
    sizes = {STATE: state, ACTION: action}
    features: dict = dict.fromkeys(cameras, camera)
    features |= {key: {"dtype": "float32", "shape": (n,), "names": None} for key, n in sizes.items()}
    numbers = {"q01": -spread, "q99": spread, "min": -2 * spread, "max": 2 * spread, "mean": 0.0, "std": spread}
    stats = {key: {name: torch.full((n,), value) for name, value in numbers.items()} for key, n in sizes.items()}
    return {"features": features, "stats": stats}


def raw_batch(size=2, seed=0, cameras=(FRONT, WRIST), steps=50):
    """What a dataset gives, in the robot's units."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.rand(size, 3, 64, 64, generator=generator) for key in cameras} | {
        STATE: torch.rand(size, 6, generator=generator) * 2 - 1,
        ACTION: torch.rand(size, steps, 4, generator=generator) * 2 - 1,
        "task": ["pick up the pen", "hang the keychain on the hook"][:size],
    }


def change_json(file, drop=(), **values):
    """Set and drop fields of a JSON file."""
    held = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in held.items() if name not in drop}))


def move_base(folder, base):
    """Say in a head's poco.json that its base lies elsewhere."""
    held = json.loads((folder / heads.ABOUT).read_text())
    change_json(folder / heads.ABOUT, base=held["base"] | {"id": str(base)})


def change_weights(folder, change):
    """Let `change` work on the table of tensors in a folder."""
    file = folder / checkpoint.WEIGHTS
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def openpi_folder(path, policy, stats=None):
    """`policy` as openpi's PyTorch converter writes it, tied embeddings under the language head's name only.

    Args:
        path: new folder.
        policy: a tiny Pi05.
        stats: asset id -> norm_stats.
    """
    path.mkdir()
    weights = {name.removeprefix("model."): tensor.clone() for name, tensor in policy.policy.state_dict().items()}
    strip = checkpoint.EMBEDDINGS.removeprefix("model.")
    weights[checkpoint.VLM_HEAD.removeprefix("model.")] = weights.pop(strip)
    weights[checkpoint.EXPERT_HEAD.removeprefix("model.")] = torch.randn(TINY.vocab, TINY.expert.width)
    save_file(weights, path / checkpoint.WEIGHTS)
    config = {
        "action_dim": 32,
        "action_horizon": 50,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "precision": "float32",
    }
    (path / "config.json").write_text(json.dumps(config))
    for asset, table in ({"droid": OPENPI_STATS} if stats is None else stats).items():
        (path / "assets" / asset).mkdir(parents=True)
        (path / "assets" / asset / "norm_stats.json").write_text(json.dumps({"norm_stats": table}))
    (path / ARCHITECTURE_FILE).write_text(TINY.to_json())
    return path


def tokenizer_folder(path):
    byte_tokenizer().save_pretrained(path)
    return str(path)
