"""The bearer token that both ends share: from the environment or a file, never from a command line, where ps shows it."""

from __future__ import annotations

import os
import secrets
import string
from pathlib import Path

VARIABLE = "OPRD_TEACHER_TOKEN"
SHORTEST = 16
ALPHABET = frozenset(string.ascii_letters + string.digits + "-._~+/=")  # of a bearer token, RFC 6750


def read_token(file: str | os.PathLike | None) -> str | None:
    """The token in ``file``; without a file that of the environment, or None.

    Raises:
        ValueError: a file that cannot be read, or something that is no token; the token itself is never shown.
    """
    if file is None:
        given = os.environ.get(VARIABLE)
        return None if given is None else _checked(given, VARIABLE)
    try:
        given = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ValueError(f"The token file {file} cannot be read: {reason}.") from error
    return _checked(given, f"The token file {file}")


def _checked(given: str, where: str) -> str:
    token = given.strip()
    if len(token) < SHORTEST or not ALPHABET.issuperset(token):
        raise ValueError(
            f"{where} holds no token: {SHORTEST} or more letters, digits and -._~+/= without spaces. This makes one: "
            "openssl rand -hex 32"
        )
    return token


def new_token() -> str:
    """256 random bits."""
    return secrets.token_urlsafe(32)
