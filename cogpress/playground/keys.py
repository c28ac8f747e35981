"""Unguessable keys for the addresses that work without a token: streams, downloads and training callbacks."""

from __future__ import annotations

import hashlib
import hmac


class Keys:
    """Derives a key for each address from one secret."""

    def __init__(self, secret: bytes) -> None:
        """The secret must outlive the process, so that addresses stay valid."""
        self._secret = secret

    def make(self, kind: str, identifier: str) -> str:
        """The key of the `kind` (stream, file or training) with this id."""
        return hmac.new(self._secret, f"{kind}:{identifier}".encode(), hashlib.sha256).hexdigest()[:40]

    def match(self, kind: str, identifier: str, key: str) -> bool:
        """Whether `key` is the right one."""
        return hmac.compare_digest(key.encode(), self.make(kind, identifier).encode())
