"""Test which files of an untrusted folder a library may read."""

import os

import pytest

from poco_vla import PolicyError
from poco_vla.pretrained.policy_config import check_regular


def put(folder, name, size):
    with (folder / name).open("wb") as file:
        file.truncate(size)  # takes no space


def test_weights_beside_a_tokenizer_may_be_large(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin", "model.gguf"):
        put(tmp_path, name, 2 * 1024**3)
    put(tmp_path, "tokenizer.json", 1024)
    check_regular(tmp_path)


def test_a_file_that_would_be_read_whole_is_bounded(tmp_path):
    put(tmp_path, "tokenizer.json", 2 * 1024**3)
    with pytest.raises(PolicyError, match=r"tokenizer\.json is no regular file of at most 256 MB"):
        check_regular(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "pytorch_model.bin"])
def test_a_pipe_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(PolicyError, match="no regular file"):
        check_regular(tmp_path)
