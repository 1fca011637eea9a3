"""API keys: which requests may come in. Knows no routes.

Keys are compared as SHA-256 digests in constant time, each with every known one, so that the time says nothing of them.
A file may hold digests in place of keys.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from pydantic import SecretStr

from mtserve.errors import ConfigError, UnauthorizedError
from mtserve.settings import Settings

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_SHORTEST = 16


class Keys:
    """The keys that a server knows; without any, everybody may come in."""

    def __init__(self, digests: Iterable[bytes] = ()) -> None:
        self._digests = tuple(digests)

    @classmethod
    def of(cls, settings: Settings) -> Keys:
        """Those of MTSERVE_API_KEYS and of MTSERVE_API_KEYS_FILE. Raises ConfigError, which holds no key."""
        found = _digests(settings.api_keys, "MTSERVE_API_KEYS")
        if settings.api_keys_file is not None:
            found += _from_file(settings.api_keys_file)
            if not found:
                raise ConfigError(f"MTSERVE_API_KEYS_FILE: {settings.api_keys_file} holds no key")
        return cls(found)

    @classmethod
    def of_admin(cls, settings: Settings) -> Keys:
        """Those of MTSERVE_ADMIN_KEYS. Raises ConfigError, which holds no key."""
        return cls(_digests(settings.admin_keys, "MTSERVE_ADMIN_KEYS"))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None, api_key: str | None) -> None:
        """Raise UnauthorizedError unless a key is known: of `Authorization: Bearer KEY`, or of `X-API-Key: KEY`."""
        if not self:
            return
        scheme, _, bearer = (authorization or "").partition(" ")
        given = api_key or (bearer.strip() if scheme.lower() == "bearer" else "")
        if not given:
            raise UnauthorizedError("an API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY")
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        known = [hmac.compare_digest(digest, one) for one in self._digests]
        if not any(known):
            raise UnauthorizedError("the API key is not known")


def _digests(keys: Iterable[SecretStr], where: str) -> list[bytes]:
    return [_digest(key.get_secret_value(), where, at) for at, key in enumerate(keys, 1)]


def password(authorization: str | None) -> str | None:
    """The password of HTTP Basic (RFC 7617), whatever the name before it; None where it is none."""
    scheme, _, encoded = (authorization or "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(encoded.strip(), validate=True).decode("utf-8").partition(":")[2] or None
    except ValueError:
        return None


def _from_file(path: Path) -> list[bytes]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"MTSERVE_API_KEYS_FILE: {path} cannot be read: {error}") from error
    keys = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    return [_digest(key, str(path), number) for number, key in keys if key and not key.startswith("#")]


def _digest(key: str, where: str, number: int) -> bytes:
    if match := _DIGEST.fullmatch(key):
        return bytes.fromhex(match[1])
    if len(key) < _SHORTEST:
        raise ConfigError(f"{where}: key {number} has {len(key)} characters; at least {_SHORTEST} are needed")
    return hashlib.sha256(key.encode()).digest()
