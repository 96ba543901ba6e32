"""Test the search for secrets in files before they are published."""

import json
from pathlib import Path

import pytest

from poco_vla.errors import HubError
from poco_vla.hub.artifact import check_portable
from poco_vla.hub.secrets import find_home, find_secret

ABOUT = Path("poco.json")


def with_option(name, value):
    return json.dumps({"training": {"env": {"options": {name: value}}, "prefixes": {"tokens": "fp8"}}})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("password", "hunter2"),
        ("password", 123456),
        ("db_passwd", "x"),
        ("userPassword", "x"),
        ("token", "abc"),
        ("hf_token", "abc"),
        ("accessToken", "abc"),
        ("api_key", "abc"),
        ("apikey", "abc"),
        ("client_secret", "abc"),
        ("url", "https://host/x?token=abcdef"),
        ("url", "https://user:word@host"),
        ("pem", "-----BEGIN OPENSSH PRIVATE KEY-----"),
    ],
)
def test_a_secret_is_found_by_its_name_and_not_repeated(name, value):
    told = find_secret(ABOUT, with_option(name, value), [])
    assert told
    assert str(value) not in told


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer_name", "google/paligemma-3b-pt-224"),
        ("tokenizer_max_length", 200),
        ("image_token", 151669),
        ("mask_token", True),
        ("pad_token", "<pad>"),
        ("token", None),
        ("key", "observation.state"),
        ("task_key", "task"),
    ],
)
def test_words_of_models_are_no_secrets(name, value):
    assert find_secret(ABOUT, with_option(name, value), []) is None


def test_a_home_folder_is_found_whoevers_it_is():
    for path in ("/" + "home/alice/data", "/" + "Users/bob/x", "C:\\Users\\eve\\x"):
        assert find_home(ABOUT, json.dumps({"root": path}))
    assert not find_home(ABOUT, json.dumps({"page": "https://host/" + "home/page"}))


@pytest.mark.parametrize("name", ["curve.png", "tokenizer.model", "notes.txt"])
def test_every_kind_of_file_is_searched(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x89PNG\0 hf_" + b"A1b2" * 8)
    with pytest.raises(HubError, match=f"{name} would publish a secret"):
        check_portable(tmp_path)
