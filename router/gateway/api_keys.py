"""Who calls: API keys, of which only hashes are kept, and the owner that each one stands for.

A file of lines `OWNER SHA256_OF_THE_KEY [WEIGHT]` (hex); several keys may have one owner, `#` begins a comment. The
weight is the owner's share of a full tier (`fair_queue.py`), 1 where none is given. Keys are random and long, so a
plain hash is enough: there is no password to guess. What an owner makes (sessions, requests, journals, cached prefixes)
is looked up under its name, so another owner's is simply not found.

    printf %s "$KEY" | sha256sum"""

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...errors import ConfigError, Unauthenticated
from .validation import NAME_FORM

HEADER = "authorization"
_SCHEME = "Bearer "
_OWNER, _HASH = re.compile(r"[A-Za-z0-9_-]{1,64}"), re.compile(r"[0-9a-f]{64}")
_WEIGHT = re.compile(r"[1-9]\d{0,2}(\.\d+)?|0\.\d?[1-9]")  # 0.01 to 999


class ApiKeys:
    """Empty = nobody is asked for a key, and everything has the owner ""."""

    def __init__(self, owners: Mapping[str, str] | None = None, weights: Mapping[str, float] | None = None) -> None:
        """`owners`: hash of a key -> owner; `weights`: owner -> share."""
        self._owners, self.weights = dict(owners or {}), dict(weights or {})

    @classmethod
    def from_file(cls, path: str) -> "ApiKeys":
        """No path: no keys."""
        if not path:
            return cls()
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("network.api_keys_file", path, f"a readable file: {error}") from None
        owners, weights = dict[str, str](), dict[str, float]()
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            form = (_OWNER, _HASH, _WEIGHT)[: max(2, len(words))]
            if len(words) != len(form) or not all(f.fullmatch(w) for f, w in zip(form, words)):
                expected = f"an owner ({NAME_FORM}), the SHA-256 of a key in hex, and if need be a weight (0.01..999)"
                raise ConfigError(f"network.api_keys_file, line {number}", path, expected)
            owners[words[1]] = words[0]
            if len(words) == 3:
                weights[words[0]] = float(words[2])
        if not owners:
            raise ConfigError("network.api_keys_file", path, "a file with at least one key")
        return cls(owners, weights)

    def owner(self, metadata: Iterable[tuple[str, str | bytes]]) -> str:
        """The caller's name. Unauthenticated: no key, or one that is not known."""
        if not self._owners:
            return ""
        value = next((str(v) for k, v in metadata if k == HEADER), "")
        if not value.startswith(_SCHEME):
            raise Unauthenticated(f"an API key is needed: send `{HEADER}: {_SCHEME}KEY` with the call")
        owner = self._owners.get(hash_of(value[len(_SCHEME) :].strip()))
        if owner is None:
            raise Unauthenticated("the API key is not known here")
        return owner


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    """A key to give away; keep its hash."""
    return f"em-{secrets.token_urlsafe(32)}"


def prefix_salt(owner: str) -> bytes:
    """Cached prefixes are shared within an owner only: a hit would tell what others ask."""
    return hashlib.sha256(owner.encode()).digest()[:16] if owner else b""
