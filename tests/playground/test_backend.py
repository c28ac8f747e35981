"""A backend whose server another prediction found dead."""

from __future__ import annotations

import asyncio
from unittest.mock import Mock

import pytest

from cogpress.playground.backend import Cog, Defunct


def test_a_refusal_by_a_server_that_was_stopped_meanwhile_is_no_fault_of_the_playground() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 409 Conflict\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async def rewrite(given: object, _: bool) -> object:
        return given

    async def ask() -> None:
        async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
            backend = Cog(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", 1, rewrite)
            await backend.close()
            made = Mock(id="one", payload={}, ended=False, cancel_requested=False)
            with pytest.raises(Defunct):
                await backend.run(made)
            await backend.cancel(made)

    asyncio.run(ask())
