"""PaliGemma's tokenizer, from wherever it can be had."""

from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer
from transformers.models.gemma.tokenization_gemma import GemmaTokenizer

from poco_vla import PolicyError
from poco_vla.adapting.processors import PREPROCESSOR
from poco_vla.pretrained import policy_config
from poco_vla.pretrained.sources import read_object

DEFAULT = "google/paligemma-3b-pt-224"
"""What LeRobot's pi0.5 processors ask for: a gated repository."""

HOW_TO_GET_ONE = (
    f'Accept the licence of "{DEFAULT}" on the Hub and run `hf auth login`; or give policy_options a "tokenizer", '
    "either a local folder that holds a copy of it, or openpi's own file, which is not gated: "
    "gs://big_vision/paligemma_tokenizer.model"
)


def load_tokenizer(source: str | Path | None) -> Any:
    """A tokenizer for the prompts.

    Args:
        source: Hub id, local folder, or a sentencepiece ``.model`` file; None is LeRobot's default.

    Raises:
        PolicyError: it cannot be had; the message says what to do.
    """
    name = str(source or DEFAULT)
    path = Path(name).expanduser()
    if path.suffix == ".model":
        return _from_sentencepiece(path)
    if path.is_absolute() and not path.is_dir():
        raise PolicyError(f"the tokenizer's folder {path} is not there. {HOW_TO_GET_ONE}")
    if path.is_dir():
        policy_config.check_regular(path)
    try:
        # Never None: transformers would ask at the terminal whether to run a repository's own code.
        return AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name, trust_remote_code=False)
    except Exception as error:  # transformers, the Hub client and the network each raise their own
        first_line = str(error).strip().split("\n")[0]
        raise PolicyError(
            f'the tokenizer "{name}" cannot be loaded ({type(error).__name__}: {first_line}). {HOW_TO_GET_ONE}'
        ) from error


def saved_tokenizer(folder: Path) -> str | None:
    """Return the tokenizer that a saved pre-processor names; None where it names none."""
    file = folder / PREPROCESSOR
    for step in read_object(file).get("steps", []) if file.is_file() else ():
        told = step.get("config") if isinstance(step, dict) else None
        name = told.get("tokenizer_name") if isinstance(told, dict) else None
        if isinstance(name, str):
            return name
    return None


def _from_sentencepiece(path: Path) -> Any:
    if not path.is_file():
        raise PolicyError(f"the tokenizer's file {path} is not there. {HOW_TO_GET_ONE}")
    try:
        model = SentencePieceProcessor(model_file=str(path))
        special = {name: model.id_to_piece(getattr(model, f"{name}_id")()) for name in ("bos", "eos", "pad", "unk")}
        tokenizer: Any = GemmaTokenizer.from_pretrained(
            str(path.parent), vocab_file=str(path), **{f"{name}_token": piece for name, piece in special.items()}
        )
    except Exception as error:  # sentencepiece and tokenizers raise RuntimeError, ValueError, OSError ...
        raise PolicyError(f"{path} is no sentencepiece model: {type(error).__name__}: {error}") from None
    tokenizer.add_bos_token = True  # as openpi encodes its prompts
    return tokenizer


def byte_tokenizer() -> Any:
    """A tokenizer of PaliGemma's class whose tokens are bytes: for models with small random weights."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    vocabulary = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[])
