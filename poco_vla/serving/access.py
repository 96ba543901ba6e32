"""Access to a policy server: its token and certificate, and when the token crosses a network in the clear."""

import ipaddress
import logging
import os
import ssl
from pathlib import Path
from urllib.parse import urlsplit

from poco_vla.errors import ConfigError

logger = logging.getLogger(__name__)
VARIABLE = "POCO_VLA_TOKEN"
"""Environment variable that holds the token."""
MAX_BYTES = 4096
"""Longest token file."""


def read_token(option: str | None) -> str | None:
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
    return parts.scheme != "wss" and not _is_loopback(parts.hostname or "")


def check_access(host: str, token: str | None, *, insecure: bool, encrypted: bool) -> None:
    """Raise ConfigError unless a server may listen at an address with this token."""
    if token is not None and (not token or not token.isascii() or not token.isprintable() or token != token.strip()):
        raise ConfigError(
            "the token is empty, or holds what a header cannot: use printable ASCII without spaces around"
        )
    if _is_loopback(host):
        return
    if token is None and not insecure:
        raise ConfigError(
            f"{host} can be reached from other machines, and there is no token: set the environment variable "
            "POCO_VLA_TOKEN, listen on 127.0.0.1 (--host), or give --insecure (in training --interaction.insecure) "
            "where everybody on the network may drive the policy"
        )
    if token is not None and not encrypted:
        logger.warning("the token and the pictures cross the network in the clear: give a certificate and a key")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may resolve to anything
        return False


def server_tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """Return the TLS settings of a server with a certificate; None without one.

    Raises:
        ConfigError: a key without its certificate, or files that cannot be read.
    """
    if certificate is None and key is not None:
        raise ConfigError(f"a key ({key}) without a certificate: give both")
    if certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"cannot read the certificate {certificate} with the key {key or certificate}: {error}"
        ) from error
    return context
