"""The shared token of a policy server: where it comes from, and when it crosses a network in the clear."""

import ipaddress
import logging
import os
from pathlib import Path
from urllib.parse import urlsplit

from poco_vla.errors import ConfigError

logger = logging.getLogger(__name__)

VARIABLE = "POCO_VLA_TOKEN"
"""Environment variable that holds the token."""
MAX_BYTES = 4096
"""Longest token file."""


def token_of(option: str | None) -> str | None:
    """Return the token: that of the command line where one is given, else the environment's; None where neither is.

    Args:
        option: of ``--token``: the token, or ``@FILE`` for the first line of a file.

    Raises:
        ConfigError: the file cannot be read, or holds no token.
    """
    if option is None:
        return os.environ.get(VARIABLE)
    if not option.startswith("@"):
        logger.warning(
            "--token shows the token to everybody who can list this machine's processes: set the environment "
            "variable %s, or give --token @FILE",
            VARIABLE,
        )
        return option
    path = Path(option[1:]).expanduser()
    if not path.is_file():
        raise ConfigError(f"--token {option}: there is no file {path}")
    try:
        with path.open(encoding="utf-8") as opened:
            lines = opened.read(MAX_BYTES).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token {option}: the file cannot be read: {error}") from error
    if not lines or not lines[0].strip():
        raise ConfigError(f"--token {option}: the first line of the file is empty, and should be the token")
    return lines[0].strip()


def is_exposed(url: str) -> bool:
    """Return True if what is sent to an address leaves this machine unencrypted."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "wss" or host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return True
