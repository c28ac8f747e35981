"""A model on Replicate as a backend: asked, followed and canceled through its HTTP API.

Knows Replicate's side as a client; leaves everything of ours to the other parts. The token is sent and never shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import httpx

from cogpress.cog import client
from cogpress.errors import CogpressError
from cogpress.playground.backend import Busy, Unreachable

if TYPE_CHECKING:
    from cogpress.playground.predictions import Prediction

POLL_SECONDS = 0.5

PATIENCE_SECONDS = 60.0
"""How long Replicate may be out of reach while a prediction of ours runs there."""

SILENT_SECONDS = 120.0
"""How long a stream may say nothing before the prediction itself is looked at instead."""

_LONGEST_WAIT = 60.0
_BY_VERSION = "/v1/predictions"


class _Missing(CogpressError):
    """There is nothing of this name."""


class _Away(Unreachable):
    """Nothing that lasts: the same question may be answered a moment later."""


class Remote:
    """A model or deployment `owner/name`, or one version of a model `owner/name:version`."""

    slots: int | None = None

    def __init__(self, name: str, token: str | None = None, base: str | None = None) -> None:
        """Describe it; nothing is asked yet.

        Args:
            name: of the model, with a version or without, or of a deployment.
            token: the one in REPLICATE_API_TOKEN where not given.
            base: Replicate's address where it is not the usual one (also REPLICATE_BASE_URL).

        Raises:
            CogpressError: there is no token.
        """
        token = token or os.environ.get("REPLICATE_API_TOKEN")
        if not token:
            raise CogpressError("Set REPLICATE_API_TOKEN to your token of Replicate, to ask a model there.")
        self._name, _, self._version = name.partition(":")
        self._route = ""
        """Where predictions are created, when it is known."""
        base = (base or os.environ.get("REPLICATE_BASE_URL") or "https://api.replicate.com").rstrip("/")
        self._http = httpx.AsyncClient(
            base_url=base,
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(20, read=SILENT_SECONDS),
            trust_env=not client.is_loopback(httpx.URL(base).host),
            limits=httpx.Limits(max_connections=None),
        )
        self._remote: dict[str, dict[str, Any]] = {}

    async def run(self, prediction: Prediction) -> None:
        """See `Backend.run`."""
        made = await self._create({"input": prediction.payload, "stream": True})
        self._remote[prediction.id] = made
        try:
            if prediction.cancel_asked:
                await self.cancel(prediction)
            await self._follow(prediction, made)
        finally:
            del self._remote[prediction.id]

    async def _create(self, body: dict[str, Any]) -> dict[str, Any]:
        if not self._route:
            await self.schema()
        if self._route != _BY_VERSION:
            try:
                return await self._ask("POST", self._route, body)
            except _Missing:
                # Replicate runs only models of its own choice by name, all others by version.
                if not self._version:
                    raise
                self._route = _BY_VERSION
        return await self._ask("POST", _BY_VERSION, {**body, "version": self._version})

    async def _follow(self, prediction: Prediction, made: dict[str, Any]) -> None:
        address = made["urls"].get("stream")
        if address:
            # Where the stream breaks off, what is missing comes with the prediction itself.
            with contextlib.suppress(httpx.HTTPError):
                await self._stream(prediction, address)
        while made.get("status") not in ("succeeded", "failed", "canceled", "aborted"):
            made = await self._state(made["id"])
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

    async def _state(self, identifier: str) -> dict[str, Any]:
        """A prediction that was created. What is in the way for a while must not lose it, nor have it made again."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return await self._ask("GET", f"/v1/predictions/{identifier}")
            except Busy:
                continue  # it waited for as long as it was told
            except _Away as error:
                if time.monotonic() > deadline:
                    # No Unreachable, upon which it would be run anew.
                    raise CogpressError(f"The prediction was lost from sight: {error}") from None
                await asyncio.sleep(POLL_SECONDS)

    async def _ask(self, method: str, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = await self._http.request(method, route, json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _Away(f"Replicate can not be reached ({error}). Check the network.") from None
        except httpx.HTTPError as error:
            what = f"Replicate's answer broke off ({str(error) or type(error).__name__})."
            raise (_Away if method == "GET" else CogpressError)(what) from None
        if response.status_code == 429:
            wait = response.headers.get("retry-after", "")
            await asyncio.sleep(min(float(wait), _LONGEST_WAIT) if wait.isdecimal() else 1.0)
            raise Busy
        if response.status_code >= 500 and method == "GET":
            raise _Away(f"Replicate answers {response.status_code}. Try again later.")
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if response.status_code >= 400 or not isinstance(answer, dict):
            detail = answer.get("detail") if isinstance(answer, dict) else response.text[:200]
            kind = _Missing if response.status_code == 404 else CogpressError
            raise kind(f"Replicate refuses {route} ({response.status_code}): {detail}")
        return answer

    async def cancel(self, prediction: Prediction) -> None:
        """See `Backend.cancel`."""
        made = self._remote.get(prediction.id)
        if made is None:
            return
        for _ in range(3):
            with contextlib.suppress(Busy):
                await self._ask("POST", f"/v1/predictions/{made['id']}/cancel")
                return

    async def schema(self) -> dict[str, Any]:
        """See `Backend.schema`."""
        try:
            found = await self._find()
        except Busy:
            raise CogpressError("Replicate takes no more requests now. Try again in a minute.") from None
        schema = found.get("openapi_schema")
        if not isinstance(schema, dict):
            raise CogpressError(f"The model {self._name} on Replicate has no version that tells its inputs.")
        return schema

    async def _find(self) -> dict[str, Any]:
        """The version that is asked, by which route, learnt of the name."""
        if self._version:
            found = await self._ask("GET", f"/v1/models/{self._name}/versions/{self._version}")
            self._route = self._route or _BY_VERSION
            return found
        try:
            found = (await self._ask("GET", f"/v1/models/{self._name}")).get("latest_version") or {}
            self._version, self._route = str(found.get("id") or ""), f"/v1/models/{self._name}/predictions"
            return found
        except _Missing as missing:
            try:
                release = (await self._ask("GET", f"/v1/deployments/{self._name}"))["current_release"]
            except (_Missing, KeyError):
                raise missing from None
        self._route = f"/v1/deployments/{self._name}/predictions"
        return await self._ask("GET", f"/v1/models/{release['model']}/versions/{release['version']}")

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
