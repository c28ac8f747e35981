"""Files that were uploaded as inputs, and those that trainings made: kept in a folder, given out safely.

Knows ids, keys and what a browser must be told; leaves routes to `replicate`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cogpress.playground.predictions import new_id

if TYPE_CHECKING:
    from cogpress.playground.store import Store

_ADDRESS = re.compile(r"https?://[^/?#]+/v1/files/(?P<id>[a-z0-9]{26})(?:/download)?(?:\?[^#]*)?")

_PLAIN = re.compile(r"[\w.+-]+/[\w.+-]+")


@dataclass(frozen=True)
class File:
    """What is known of a file."""

    id: str
    created: float
    name: str
    content_type: str
    size: int
    sha256: str
    metadata: dict[str, Any]


class Files:
    """All files."""

    def __init__(self, store: Store, secret: bytes) -> None:
        """Kept in the store's folder."""
        self.folder = store.folder / "files"
        self.folder.mkdir(exist_ok=True)
        self.loopback_url = ""
        """How a server on this machine reaches us; set when it is known."""
        self._store, self._secret = store, secret

    async def add(self, content: BinaryIO, name: str, content_type: str, metadata: dict[str, Any]) -> File:
        """Keep a copy of what is read from `content`."""
        identifier = new_id()
        size, digest = await asyncio.to_thread(_copy, content, self.folder / identifier)
        kind = content_type if _PLAIN.fullmatch(content_type) else "application/octet-stream"
        file = File(identifier, time.time(), name[:255] or "file", kind, size, digest, metadata)
        await self._store.write("INSERT INTO files VALUES (?, ?, ?)", file.id, file.created, json.dumps(asdict(file)))
        return file

    async def find(self, identifier: str) -> File | None:
        """A file by its id."""
        rows = await self._store.read("SELECT data FROM files WHERE id = ?", identifier)
        return File(**json.loads(rows[0]["data"])) if rows else None

    async def all(self) -> list[File]:
        """The newest first."""
        rows = await self._store.read("SELECT data FROM files ORDER BY created DESC LIMIT 1000")
        return [File(**json.loads(row["data"])) for row in rows]

    async def remove(self, file: File) -> None:
        """Forget a file."""
        await self._store.write("DELETE FROM files WHERE id = ?", file.id)
        await asyncio.to_thread((self.folder / file.id).unlink, missing_ok=True)

    def key(self, identifier: str) -> str:
        """What must be known to fetch a file without a token."""
        return hmac.new(self._secret, f"file:{identifier}".encode(), hashlib.sha256).hexdigest()[:40]

    def download(self, base: str, identifier: str) -> str:
        """An address that gives a file's content to whoever has it."""
        return f"{base}/v1/files/{identifier}/download?key={self.key(identifier)}"

    def headers(self, file: File) -> dict[str, str]:
        """So that a browser saves a file and never shows it as a page of ours."""
        name = re.sub(r"[^A-Za-z0-9._-]", "_", file.name)
        return {
            "Content-Type": "application/octet-stream",
            "Content-Disposition": f'attachment; filename="{name}"',
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "default-src 'none'; sandbox",
            "Cache-Control": "private, no-store",
        }

    def place(self, file: File) -> Path:
        """Where its content is."""
        return self.folder / file.id

    async def rewrite(self, value: Any, loopback: bool) -> Any:
        """An input with the addresses of our files made into ones that need no token.

        Args:
            value: any JSON.
            loopback: whether who fetches them is on this machine; elsewhere they are sent along as data URLs.
        """
        if isinstance(value, dict):
            return {name: await self.rewrite(one, loopback) for name, one in value.items()}
        if isinstance(value, list):
            return [await self.rewrite(one, loopback) for one in value]
        match = _ADDRESS.fullmatch(value) if isinstance(value, str) and "/v1/files/" in value else None
        file = await self.find(match["id"]) if match else None
        if file is None:
            return value
        if loopback and self.loopback_url:
            return self.download(self.loopback_url, file.id)
        content = await asyncio.to_thread(self.place(file).read_bytes)
        return f"data:{file.content_type};base64,{base64.b64encode(content).decode()}"


def _copy(source: BinaryIO, target: Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with target.open("xb") as file:
        while block := source.read(1 << 20):
            digest.update(block)
            size += file.write(block)
    return size, digest.hexdigest()
