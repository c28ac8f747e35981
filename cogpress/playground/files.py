"""Store uploaded inputs and trained weights in a folder, and give them out as downloads that no browser renders."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cogpress.files import is_full
from cogpress.playground.keys import Keys
from cogpress.playground.records import new_id
from cogpress.playground.store import Store, UnwritableError

_ADDRESS = re.compile(r"https?://[^/?#]+/v1/files/(?P<id>[a-z0-9]{26})(?:/download)?(?:\?[^#]*)?")

_MEDIA_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+")


@dataclass(frozen=True)
class StoredFile:
    """A file's metadata; `size` is in bytes, `created` in seconds since the epoch."""

    id: str
    created: float
    name: str
    content_type: str
    size: int
    sha256: str
    metadata: dict[str, Any]


class Files:
    """All files."""

    def __init__(self, store: Store, keys: Keys, loopback_url: str) -> None:
        """Files go into the store's folder.

        Args:
            store: where their metadata is kept.
            keys: for downloads without a token.
            loopback_url: how a server on this machine reaches this one.
        """
        self.folder = store.folder / "files"
        self.folder.mkdir(0o700, exist_ok=True)
        for part in self.folder.glob(f"{'[0-9a-z]' * 26}.part"):  # of a run that was killed
            part.unlink()
        self.loopback_url = loopback_url
        self._store, self._keys = store, keys

    async def add(self, content: BinaryIO, name: str, content_type: str, metadata: dict[str, Any]) -> StoredFile:
        """Save a copy of `content`."""
        identifier = new_id()
        size, digest = await asyncio.to_thread(_copy, content, self.folder / identifier)
        kind = content_type if _MEDIA_TYPE.fullmatch(content_type) else "application/octet-stream"
        file = StoredFile(identifier, time.time(), name[:255] or "file", kind, size, digest, metadata)
        await self._store.write("INSERT INTO files VALUES (?, ?, ?)", file.id, file.created, json.dumps(asdict(file)))
        return file

    async def find(self, identifier: str) -> StoredFile | None:
        """A file by its id."""
        rows = await self._store.read("SELECT data FROM files WHERE id = ?", identifier)
        return StoredFile(**json.loads(rows[0]["data"])) if rows else None

    async def all(self) -> list[StoredFile]:
        """The newest 1,000, the newest first."""
        rows = await self._store.read("SELECT data FROM files ORDER BY created DESC LIMIT 1000")
        return [StoredFile(**json.loads(row["data"])) for row in rows]

    async def remove(self, file: StoredFile) -> None:
        """Delete a file."""
        await self._store.write("DELETE FROM files WHERE id = ?", file.id)
        await asyncio.to_thread((self.folder / file.id).unlink, missing_ok=True)

    def download(self, base: str, identifier: str) -> str:
        """A URL that gives a file's content to anyone who has it."""
        return f"{base}/v1/files/{identifier}/download?key={self._keys.make('file', identifier)}"

    def headers(self, file: StoredFile) -> dict[str, str]:
        """Response headers that make a browser save a file and never render it as a page of this site."""
        name = re.sub(r"[^A-Za-z0-9._-]", "_", file.name)
        return {
            "Content-Type": "application/octet-stream",
            "Content-Disposition": f'attachment; filename="{name}"',
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "default-src 'none'; sandbox",
            "Cache-Control": "private, no-store",
        }

    def path(self, file: StoredFile) -> Path:
        """Where its content is."""
        return self.folder / file.id

    async def rewrite(self, value: Any, loopback: bool) -> Any:
        """Inputs with the URLs of stored files replaced by ones that need no token.

        Args:
            value: any JSON.
            loopback: whether the server that fetches them is on this machine; others get data URLs.
        """
        if isinstance(value, dict):
            return {name: await self.rewrite(one, loopback) for name, one in value.items()}
        if isinstance(value, list):
            return [await self.rewrite(one, loopback) for one in value]
        match = _ADDRESS.fullmatch(value) if isinstance(value, str) and "/v1/files/" in value else None
        file = await self.find(match["id"]) if match else None
        if file is None:
            return value
        if loopback:
            return self.download(self.loopback_url, file.id)
        content = await asyncio.to_thread(self.path(file).read_bytes)
        return f"data:{file.content_type};base64,{base64.b64encode(content).decode()}"


def _copy(source: BinaryIO, target: Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    part = target.with_name(f"{target.name}.part")
    try:
        with part.open("xb") as file:
            while block := source.read(1 << 20):
                digest.update(block)
                size += file.write(block)
        part.rename(target)
    except OSError as error:
        if not is_full(error):
            raise
        raise UnwritableError(f"The disk of {target.parent} is full. Free some space and upload it again.") from None
    finally:
        part.unlink(missing_ok=True)
    return size, digest.hexdigest()
