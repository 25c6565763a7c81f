"""API keys: read from a file or the environment, kept as digests only, compared in constant time."""

import hashlib
import hmac
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from plumbline.config.serving import LOCAL_HOSTS
from plumbline.errors import ConfigError
from serve.errors import ApiError

VARIABLE = "PLUMBLINE_API_KEYS"
SHORTEST = 16
"""Characters of a key: shorter ones can be guessed."""


@dataclass(frozen=True)
class Keys:
    """Who may ask. Without keys anybody may, which `check_bind` allows on localhost only."""

    digests: tuple[bytes, ...] = field(default=(), repr=False)

    def check(self, authorization: str | None) -> str:
        """Let a request pass by its `Authorization` header.

        Returns:
            What tells the key's owner from others; "" where there are no keys.

        Raises:
            ApiError: 401.
        """
        if not self.digests:
            return ""
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise ApiError(401, "You didn't provide an API key: send it as `Authorization: Bearer KEY`.")
        digest = _digest(given.strip())
        found = False
        for known in self.digests:  # all of them, so that the time tells nothing
            found |= hmac.compare_digest(digest, known)
        if not found:
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
        return digest.hex()[:16]


def read_keys(path: str | None, environment: Mapping[str, str] = os.environ) -> Keys:
    """Keys of a file, one a line, or of the environment.

    Raises:
        ConfigError: the file cannot be read, is empty, or a key is too short to be one, or no client could send it. No
            key is in the message.
    """
    if path is None:
        return _keys(environment.get(VARIABLE, "").split(","), VARIABLE)
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"serve.api_keys: {path} cannot be read ({reason}); write one key a line") from None
    keys = _keys((line for line in lines if not line.startswith("#")), path)
    if not keys.digests:
        raise ConfigError(f"serve.api_keys: {path} holds no key; write one a line")
    return keys


def check_bind(host: str, keys: Keys) -> None:
    """Raises ConfigError for an endpoint that others could reach without a key."""
    if host not in LOCAL_HOSTS and not keys.digests:
        raise ConfigError(
            f"serve.host: {host} can be reached by others, which needs API keys: `serve.api_keys: FILE`, or {VARIABLE}"
        )


def _keys(texts: Iterable[str], origin: str) -> Keys:
    keys = [text.strip() for text in texts if text.strip()]
    if odd := sum(not (key.isascii() and key.isprintable()) or " " in key for key in keys):
        raise ConfigError(
            f"{origin}: {odd} of {len(keys)} keys cannot be sent in a header; use letters, digits and signs of ASCII"
        )
    if short := sum(len(key) < SHORTEST for key in keys):
        raise ConfigError(
            f"{origin}: {short} of {len(keys)} keys have less than {SHORTEST} characters; use longer ones"
        )
    return Keys(tuple(_digest(key) for key in keys))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
