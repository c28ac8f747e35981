"""A model on Replicate as a backend: asked, followed and canceled through its HTTP API.

Knows Replicate's side as a client; leaves everything of ours to the other parts. The token is sent and never shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import httpx

from cogpress import client
from cogpress.errors import CogpressError
from cogpress.local.backend import Busy, Unreachable

if TYPE_CHECKING:
    from cogpress.local.predictions import Prediction

POLL_SECONDS = 0.5


class Remote:
    """A model `owner/name`, or one version of it `owner/name:version`."""

    slots: int | None = None

    def __init__(self, name: str, token: str | None = None, base: str | None = None) -> None:
        """Describe it; nothing is asked yet.

        Args:
            name: of the model, with a version or without.
            token: the one in REPLICATE_API_TOKEN where not given.
            base: Replicate's address where it is not the usual one (also REPLICATE_BASE_URL).

        Raises:
            CogpressError: there is no token.
        """
        token = token or os.environ.get("REPLICATE_API_TOKEN")
        if not token:
            raise CogpressError("Set REPLICATE_API_TOKEN to your token of Replicate, to ask a model there.")
        self._model, _, self._version = name.partition(":")
        base = (base or os.environ.get("REPLICATE_BASE_URL") or "https://api.replicate.com").rstrip("/")
        self._http = httpx.AsyncClient(
            base_url=base,
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(20, read=None),
            trust_env=not client.is_loopback(httpx.URL(base).host),
            limits=httpx.Limits(max_connections=None),
        )
        self._remote: dict[str, dict[str, Any]] = {}

    async def run(self, prediction: Prediction) -> None:
        """See `Backend.run`."""
        body: dict[str, Any] = {"input": prediction.payload, "stream": True}
        route = f"/v1/models/{self._model}/predictions"
        if self._version:
            route, body = "/v1/predictions", {**body, "version": self._version}
        made = await self._ask("POST", route, body)
        self._remote[prediction.id] = made
        try:
            await self._follow(prediction, made)
        finally:
            del self._remote[prediction.id]

    async def _follow(self, prediction: Prediction, made: dict[str, Any]) -> None:
        address = made["urls"].get("stream")
        if address:
            # Where the stream breaks off, what is missing comes with the prediction itself.
            with contextlib.suppress(httpx.HTTPError):
                await self._stream(prediction, address)
        while made.get("status") not in ("succeeded", "failed", "canceled", "aborted"):
            made = await self._ask("GET", f"/v1/predictions/{made['id']}")
            if made.get("status") == "processing" and prediction.status == "starting":
                prediction.start()
            if made.get("status") in ("starting", "processing"):
                await asyncio.sleep(POLL_SECONDS)
        prediction.metrics.update(made.get("metrics") or {})
        output, error = made.get("output"), made.get("error")
        if isinstance(output, list) and isinstance(prediction.output, list):
            had = "".join(map(str, prediction.output))
            whole = "".join(map(str, output))
            if whole.startswith(had) and len(whole) > len(had):
                prediction.add_output(whole[len(had) :])
        status = "canceled" if made["status"] == "aborted" else made["status"]
        prediction.end(status, error=str(error) if status == "failed" else None, output=output)

    async def _stream(self, prediction: Prediction, address: str) -> None:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        async with self._http.stream("GET", address, headers=headers) as response:
            if response.status_code != 200:
                return
            async for event, data in _events(response.aiter_bytes()):
                if prediction.status == "starting":
                    prediction.start()
                if event == "output":
                    prediction.add_output(data)
                elif event == "logs":
                    prediction.add_log(f"{data}\n")
                elif event in ("done", "error"):
                    return

    async def _ask(self, method: str, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = await self._http.request(method, route, json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unreachable(f"Replicate can not be reached ({error}). Check the network.") from None
        except httpx.HTTPError as error:
            raise CogpressError(f"Replicate's answer broke off ({error or type(error).__name__}).") from None
        if response.status_code == 429:
            wait = response.headers.get("retry-after", "")
            await asyncio.sleep(min(float(wait), 60) if wait.isdecimal() else 1.0)
            raise Busy
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if response.status_code >= 400 or not isinstance(answer, dict):
            detail = answer.get("detail") if isinstance(answer, dict) else response.text[:200]
            raise CogpressError(f"Replicate refuses ({response.status_code}): {detail}")
        return answer

    async def cancel(self, prediction: Prediction) -> None:
        """See `Backend.cancel`."""
        made = self._remote.get(prediction.id)
        if made is not None:
            await self._ask("POST", f"/v1/predictions/{made['id']}/cancel")

    async def schema(self) -> dict[str, Any]:
        """See `Backend.schema`."""
        if self._version:
            found = await self._ask("GET", f"/v1/models/{self._model}/versions/{self._version}")
        else:
            found = (await self._ask("GET", f"/v1/models/{self._model}")).get("latest_version") or {}
        schema = found.get("openapi_schema")
        if not isinstance(schema, dict):
            raise CogpressError(f"The model {self._model} on Replicate has no version that tells its inputs.")
        return schema

    async def close(self) -> None:
        """See `Backend.close`."""
        await self._http.aclose()


async def _events(blocks: AsyncIterator[bytes]) -> AsyncIterator[tuple[str, str]]:
    rest = b""
    async for block in blocks:
        *events, rest = (rest + block.replace(b"\r\n", b"\n")).split(b"\n\n")
        for event in events:
            name, data = "message", []
            for line in event.decode(errors="replace").split("\n"):
                field, _, value = line.partition(":")
                if field == "event":
                    name = value.strip()
                elif field == "data":
                    data.append(value.removeprefix(" "))
            if data:
                yield name, "\n".join(data)
