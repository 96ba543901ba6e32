"""LeRobot's configuration of a policy, read from a folder that somebody else may have written.

LeRobot's own reader takes any size on trust, and answers a fault with the errors of its parser.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from poco_vla.errors import PocoError, PolicyError
from poco_vla.pretrained.sources import check_sizes, read_object

CONFIG = "config.json"
SIZES: Mapping[str, int] = {
    "shape": 65_536,
    "chunk_size": 4096,
    "n_action_steps": 4096,
    "n_obs_steps": 1024,
    "num_inference_steps": 1000,
    "num_steps": 1000,
    "max_state_dim": 65_536,
    "max_action_dim": 65_536,
    "tokenizer_max_length": 65_536,
    "image_resolution": 8192,
    "resize_imgs_with_padding": 8192,
    "empty_cameras": 64,
}
"""Largest values of the fields that cost memory or time, far beyond those of any real policy."""
NETWORK_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("width", "mlp_dim", "hidden", "context", "state_dim", "action_dim"), 262_144),
    **dict.fromkeys(("head_dim", "patch", "grid", "num_heads", "num_kv_heads"), 8192),
    **dict.fromkeys(("depth", "text_every"), 1000),
    **dict.fromkeys(("horizon", "image_size"), 8192),
    **dict.fromkeys(("max_steps", "time_buckets", "num_embodiments"), 1_000_000),
    "vocab": 16_000_000,
    "flow_steps": 1000,
}
"""Largest sizes of a network's parts, where a folder states them."""
TRANSFORMERS_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "hidden_sizes", "embedding_size", "projection_dim"), 262_144),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depths", "depth"), 1000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "patch_size", "scale_factor"), 8192),
    **dict.fromkeys(("image_size", "num_channels"), 8192),
    "max_position_embeddings": 100_000_000,
    "vocab_size": 16_000_000,
}
"""Likewise in the configuration of a model of transformers."""


def load_policy_config[T](
    folder: Path,
    kind: str,
    load: Callable[[str], T],
    *,
    fields: Collection[str],
    name: str | None = None,
    limits: Mapping[str, int] | None = None,
) -> T:
    """Read the config.json of a LeRobot policy.

    Args:
        folder: of the policy.
        kind: the type that is expected.
        load: LeRobot's own reader of a folder, called when nothing else is wrong.
        fields: names that LeRobot's class of this type has.
        name: what the folder is called in messages.
        limits: of fields beside :data:`SIZES`.

    Raises:
        PolicyError: there is none, it is damaged, of another type, or of sizes that no policy has.
    """
    file, name = folder / CONFIG, name or str(folder)
    if not file.exists():
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:20]) or "nothing"
        raise PolicyError(f"no policy in {name}: {CONFIG} is missing (the folder holds {held})")
    values = read_object(file)
    if values.get("type") != kind:
        found = f'of type "{values["type"]}"' if isinstance(values.get("type"), str) else 'without a "type"'
        raise PolicyError(f'{name} holds a policy {found}, expected "{kind}"')
    if unknown := sorted(values.keys() - {"type", *fields}):
        raise PolicyError(
            f"{file} is not understood by LeRobot: its {kind} has no field {', '.join(unknown[:8])}. The policy is of "
            "another version of LeRobot, or damaged"
        )
    check_sizes(values, {**SIZES, **(limits or {})}, file)
    with describing(f"{file} is not understood by LeRobot"):
        config = load(str(folder))
    _check_shapes(config, file)
    return config


def _check_shapes(config: Any, file: Path) -> None:
    """Raise PolicyError for an input or an output without dimensions."""
    for table in (config.input_features, config.output_features):
        for key, feature in (table or {}).items():
            if not feature.shape or not all(isinstance(size, int) and size >= 1 for size in feature.shape):
                raise PolicyError(f'{file}: "{key}" has the shape {list(feature.shape)}, expected sizes from 1 on')


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz")
"""Ends of files of weights, which may be of any size."""


def check_regular(folder: Path, *, max_bytes: int = 256 * 1024**2) -> None:
    """Raise PolicyError if a folder that a library is to read holds anything but regular files of a bearable size.

    Args:
        folder: of a tokenizer or of a model's description; folders within it are not looked at.
        max_bytes: of one file. Tokenizers are up to some 40 MB; weights, which may lie beside them, are not read.
    """
    for file in sorted(folder.iterdir()):
        if file.is_dir() or (file.suffix in WEIGHTS and file.is_file()):
            continue
        if not file.is_file() or file.stat().st_size > max_bytes:
            raise PolicyError(f"{file} is no regular file of at most {max_bytes / 1024**2:g} MB, and is not read")


def check_transformers_config(config: Any, where: str | Path) -> None:
    """Raise PolicyError for the configuration of a model of transformers that asks for code or for sizes of no model.

    Args:
        config: a `PretrainedConfig`, read without a repository's own code.
        where: it comes from, for the message.
    """
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    for part in parts:
        if "/" in str(getattr(part, "_attn_implementation", None)):
            raise PolicyError(f"{where} asks for an attention kernel from the Hub, whose code is not run")
    check_sizes(config.to_dict(), TRANSFORMERS_SIZES, Path(where))


@contextmanager
def describing(what: str) -> Iterator[None]:
    """Turn any error within the block into one PolicyError that begins with `what`.

    Libraries that are given a stranger's numbers fail in ways of their own: a division by zero, a key, a shape.
    """
    try:
        yield
    except PocoError:
        raise
    except Exception as error:  # parsers and constructors raise anything
        raise PolicyError(f"{what}: {_reason(error)}") from error


def _reason(error: BaseException, most: int = 300) -> str:
    """Return an error's words and its cause's in one line."""
    words = " ".join(str(error).split()) or type(error).__name__
    cause = error.__cause__
    if cause is not None and str(cause) not in words:
        words = f"{words} {_reason(cause, most)}"
    return words if len(words) <= most else f"{words[:most]} ..."
