"""The shared token: where it comes from, and when it crosses a network in the clear."""

import pytest

from poco_vla.errors import ConfigError
from poco_vla.serving.access import is_exposed, read_token
from poco_vla.serving.client import ConnectionLostError, PolicyClient, Retry


def test_the_environment_gives_the_token_without_a_word(monkeypatch, caplog):
    monkeypatch.setenv("POCO_VLA_TOKEN", "secret")
    assert read_token(None) == "secret"
    assert not caplog.text


def test_a_token_on_the_command_line_is_taken_with_a_warning(caplog):
    assert read_token("secret") == "secret"
    assert "POCO_VLA_TOKEN" in caplog.text
    assert "secret" not in caplog.text


def test_a_token_may_be_the_first_line_of_a_file(tmp_path, caplog):
    (tmp_path / "token").write_text("secret\n")
    assert read_token(f"@{tmp_path / 'token'}") == "secret"
    assert not caplog.text


@pytest.mark.parametrize("content", [None, "", "\n\n", b"\xff\xfe"])
def test_a_file_without_a_token_is_told(tmp_path, content):
    if content is not None:
        (tmp_path / "token").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match="--token @"):
        read_token(f"@{tmp_path / 'token'}")


@pytest.mark.parametrize(
    ("url", "exposed"),
    [
        ("ws://127.0.0.1:8000", False),
        ("ws://localhost:8000", False),
        ("ws://[::1]:8000", False),
        ("wss://learner:8000", False),
        ("ws://192.168.1.7:8000", True),
        ("ws://learner:8000", True),
    ],
)
def test_a_token_is_exposed_where_it_leaves_the_machine_unencrypted(url, exposed):
    assert is_exposed(url) is exposed


@pytest.mark.parametrize(("token", "warns"), [("secret", True), (None, False)])
def test_a_client_warns_before_it_sends_a_token_in_the_clear(caplog, token, warns):
    with pytest.raises(ConnectionLostError):
        PolicyClient("ws://0.0.0.0:9", token, timeout=0.2, retry=Retry(budget=0.0))
    assert ("in the clear" in caplog.text) is warns
    assert "secret" not in caplog.text
