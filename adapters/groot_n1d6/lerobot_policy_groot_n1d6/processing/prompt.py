"""Instruction and images -> token ids (section 7.5)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lerobot_policy_groot_n1d6.processing.errors import ProcessingError

QWEN = "Qwen/Qwen3-1.7B"
"""A public repository with the vocabulary that GR00T N1.6 was trained with, but for three tokens."""
BYTES = "bytes"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>", "<img>", "</img>")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
HOW_TO_GET_ONE = (
    f'Its files are public: give `tokenizer` the Hub id "{QWEN}" (needs the network once), or a local folder that '
    f'holds its tokenizer.json, or vocab.json and merges.txt (`hf download {QWEN} --include "*.json" "*.txt"`)'
)


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that are no text; the defaults are the checkpoints'. `image` stands for one image feature."""

    pad: int = 151_643
    turn_start: int = 151_644
    turn_end: int = 151_645
    image: int = 151_669
    image_start: int = 151_670
    image_end: int = 151_671

    @property
    def by_token(self) -> dict[str, int]:
        ids = (self.pad, self.turn_start, self.turn_end, self.image, self.image_start, self.image_end)
        return dict(zip(SPECIAL, ids, strict=True))


BYTE_IDS = SpecialIds(pad=256, turn_start=257, turn_end=258, image=259, image_start=260, image_end=261)
"""What follows the 256 bytes; a model with small random weights needs a vocabulary of 262."""


class Tokenizer(Protocol):
    """What a prompt needs."""

    @property
    def special(self) -> SpecialIds: ...

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class ByteTokenizer:
    """Tokens are the bytes of the text: for tests and models with small random weights."""

    special: SpecialIds = BYTE_IDS

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, SPECIAL))})", text):
            ids += [self.special.by_token[part]] if part in SPECIAL else part.encode()
        return ids


class QwenTokenizer:
    """Qwen3's tokenizer with the three image tokens.

    Args:
        backend: a ``tokenizers.Tokenizer``. The image tokens are added where it lacks them.
        source: where it came from, for messages.

    Raises:
        ProcessingError: its special tokens are not where the checkpoints have them.
    """

    special = SpecialIds()

    def __init__(self, backend: Any, source: str) -> None:
        from tokenizers import AddedToken

        missing = [token for token in SPECIAL[3:] if backend.token_to_id(token) is None]
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
        found = {token: backend.token_to_id(token) for token in SPECIAL}
        if found != self.special.by_token:
            wrong = {token: i for token, i in found.items() if i != self.special.by_token[token]}
            raise ProcessingError(
                f'the tokenizer "{source}" is not Qwen3\'s: it has {wrong}, expected '
                f"{ {token: self.special.by_token[token] for token in wrong} }. {HOW_TO_GET_ONE}"
            )
        self.backend = backend

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def to_tensor(self) -> Tensor:
        """All of it as bytes, so that a saved policy needs no network."""
        return torch.frombuffer(bytearray(self.backend.to_str().encode()), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, content: Tensor) -> "QwenTokenizer":
        from tokenizers import Tokenizer as Backend

        return cls(Backend.from_str(bytes(content.cpu().numpy()).decode()), "saved with the policy")


def load_tokenizer(source: str | Path = QWEN, *, byte_ids: SpecialIds = BYTE_IDS) -> Tokenizer:
    """A tokenizer for the prompts.

    Args:
        source: local folder, Hub id, or "bytes".
        byte_ids: the special tokens' ids where it is "bytes".

    Raises:
        ProcessingError: it cannot be had, or is another model's; the message says what to do.
    """
    name = str(source)
    if name == BYTES:
        return ByteTokenizer(byte_ids)
    path = Path(name).expanduser()
    if path.is_absolute() and not path.is_dir():
        raise ProcessingError(f"the tokenizer's folder {path} is not there. {HOW_TO_GET_ONE}.")
    try:
        backend = _from_folder(path) if path.is_dir() else _from_hub(name)
    except ProcessingError:
        raise
    except Exception as error:  # tokenizers, transformers, the Hub client and the network each raise their own
        first_line = str(error).strip().split("\n")[0]
        raise ProcessingError(
            f'the tokenizer "{name}" cannot be loaded ({type(error).__name__}: {first_line}). {HOW_TO_GET_ONE}.'
        ) from error
    return QwenTokenizer(backend, name)


def formalize_language(text: str) -> str:
    """Lower case, without punctuation."""
    return re.sub(r"[^\w\s]", "", text.lower())


def prompt_text(instruction: str, num_images: int) -> str:
    """The chat, with one ``<IMG_CONTEXT>`` per image; the text comes before the images."""
    images = "".join(f"<image {i + 1}><img><IMG_CONTEXT></img>" for i in range(num_images))
    return f"{SYSTEM}<|im_start|>user\n{instruction}{images}<|im_end|>\n"


def prompt_ids(tokenizer: Tokenizer, instruction: str, tokens_per_image: Sequence[int]) -> list[int]:
    """Token ids of one sample; each image takes as many image tokens as it has features.

    Raises:
        ProcessingError: the instruction itself contains a special token.
    """
    image = tokenizer.special.image
    ids = tokenizer.encode(prompt_text(instruction, len(tokens_per_image)))
    if ids.count(image) != len(tokens_per_image):
        raise ProcessingError(f"the instruction {instruction!r} contains <IMG_CONTEXT>, which stands for an image")
    counts = iter(tokens_per_image)
    return [token for i in ids for token in ([image] * next(counts) if i == image else [i])]


def collate(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows padded on the left to the longest: ids and attention mask, both [B, S] int64."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _from_hub(name: str) -> Any:
    from tokenizers import Tokenizer as Backend

    return Backend.from_pretrained(name)


def _from_folder(folder: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    if (folder / "tokenizer.json").is_file():
        return Backend.from_file(str(folder / "tokenizer.json"))
    if not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise ProcessingError(f"{folder} holds neither tokenizer.json nor vocab.json and merges.txt. {HOW_TO_GET_ONE}.")
    from transformers import Qwen2Tokenizer

    # Qwen3 numbers its own special tokens from 151643 on; the folder says which.
    return Qwen2Tokenizer.from_pretrained(str(folder)).backend_tokenizer
