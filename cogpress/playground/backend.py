"""The protocol of whatever runs predictions, and its simplest implementation: a Cog server at an address."""

from __future__ import annotations

import asyncio
import json
import math
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx

from cogpress import source
from cogpress.cog import client
from cogpress.errors import CogpressError
from cogpress.playground import exchange
from cogpress.playground.records import Prediction

CANCEL_SECONDS = 3.0
"""How long a canceled prediction may go on before its connection is dropped."""

CONNECT_SECONDS = 10.0

BUSY_SECONDS = 1800.0
"""How long a server may refuse everything as busy: Replicate's own limit for a prediction."""

_APART_SECONDS = 300.0
"""Refusals further apart are unrelated: Replicate never asks for a wait this long."""


class Busy(Exception):
    """The backend has no free slot or is not ready; the same prediction may run a moment later."""


class Unreachable(CogpressError):
    """Nothing answers, and nothing was begun."""


class Defunct(Unreachable):
    """The server runs, and will take no prediction any more: its worker or its engine ended, or its set-up failed."""


class Rejected(CogpressError):
    """The model does not accept the input."""


class Refusals:
    """How long a server has refused everything; one that is merely busy accepts a prediction now and then."""

    def __init__(self) -> None:
        self._first = self._last = -math.inf

    def add(self) -> bool:
        """Record a refusal; returns whether they have gone on for too long."""
        now = time.monotonic()
        if now - self._last > _APART_SECONDS:
            self._first = now
        self._last = now
        return now - self._first > BUSY_SECONDS

    def end(self) -> None:
        """Record that a prediction was accepted."""
        self._last = -math.inf


class Backend(Protocol):
    """Runs predictions."""

    slots: int | None
    """How many it runs at once; None if only the other end knows."""

    async def run(self, prediction: Prediction) -> None:
        """Run a prediction to its end, and report progress to it.

        Raises:
            Busy: try again.
            Unreachable: nothing was begun.
            Rejected: the model does not accept the input.
            CogpressError: the prediction failed, for this reason.
        """

    async def cancel(self, prediction: Prediction) -> None:
        """Ask a running prediction to end; may be called again until it does."""

    async def schema(self) -> dict[str, Any]:
        """The model's OpenAPI schema.

        Raises:
            CogpressError: it is not available.
        """

    async def close(self) -> None:
        """Release connections and processes."""


Rewrite = Callable[[Any, bool], Awaitable[Any]]
"""Replaces URLs of uploaded files in inputs by ones that a server can fetch without a token; the flag says whether that
server is on this machine."""


class Cog:
    """A Cog server."""

    def __init__(self, url: str, slots: int | None, rewrite: Rewrite) -> None:
        """Connects on the first request.

        Args:
            url: the server's address.
            slots: how many predictions it runs at once, if known.
            rewrite: applied to inputs.
        """
        self.url = url.rstrip("/")
        self.slots = slots
        self._rewrite = rewrite
        parts = urlsplit(self.url)
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._http = httpx.AsyncClient(trust_env=False, timeout=5, verify=self._tls or False)
        self._exchanges: dict[str, exchange.Exchange] = {}
        self._closed = False
        self._refusals = Refusals()

    async def run(self, prediction: Prediction) -> None:
        """See `Backend.run`."""
        inputs = await self._rewrite(prediction.payload, source.is_loopback(self._host))
        if prediction.ended:  # canceled meanwhile
            return
        streams = prediction.version.streams
        request = exchange.request(self.url, f"/predictions/{prediction.id}", {"input": inputs}, streams=streams)
        call = exchange.Exchange(request, prediction)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await asyncio.get_running_loop().create_connection(lambda: call, self._host, self._port, ssl=self._tls)
        except OSError as error:  # includes TimeoutError
            why = error.strerror or str(error) or "timed out"
            raise Unreachable(f"The model server at {self.url} does not answer ({why}). Restart it.") from None
        self._exchanges[prediction.id] = call
        try:
            if not streams:
                prediction.start()
            await call.done
        finally:
            del self._exchanges[prediction.id]
            call.close()
        if not call.broken and call.status in (409, 503):
            if self._closed:  # another prediction saw first that the server is dead
                raise Defunct(f"The model server at {self.url} was stopped.")
            await self._refused()
        self._refusals.end()
        self._conclude(prediction, call)

    async def _refused(self) -> None:
        """Find out why a prediction was refused, which the runtime does not say: no free slot, or a dead server.

        Raises:
            Busy: it may run later.
            Defunct: it will not.
        """
        too_many = self._refusals.add()
        try:
            answer = (await self._http.get(f"{self.url}/health-check")).json()
        except (httpx.HTTPError, ValueError):
            answer = None
        if isinstance(answer, dict) and answer.get("status") in client.DEAD:
            raise Defunct(f"The model server at {self.url} has stopped working ({answer['status']}). Check its log.")
        if too_many:
            raise Defunct(
                f"The model server at {self.url} has taken no prediction for {BUSY_SECONDS / 60:.0f} minutes. Check "
                "its log."
            )
        raise Busy

    def _conclude(self, prediction: Prediction, call: exchange.Exchange) -> None:
        if call.broken:
            if prediction.cancel_requested:
                prediction.end("canceled")
                return
            if not call.status:
                raise Unreachable(f"The model server at {self.url} takes no predictions. Check its log.")
            raise CogpressError(
                f"The model server at {self.url} stopped while this prediction ran. Check its log, then run the "
                "prediction again."
            )
        if call.status == 406:
            # A server that is just starting and has not read its schema yet answers this too.
            raise Unreachable(f"The model server at {self.url} does not stream. Add @cog.streaming to its run().")
        answer = call.completed
        if answer is None:
            answer = _parse_response(call)
        metrics = answer.get("metrics")
        if isinstance(metrics, dict):
            prediction.metrics.update(metrics)
        status = answer.get("status")
        if status == "succeeded":
            prediction.end("succeeded", output=answer.get("output"))
        elif status == "canceled":
            prediction.end("canceled")
        elif client.never_began(error := str(answer.get("error") or "")):
            raise Defunct(f"The model server at {self.url} has stopped working. Check its log.")
        else:
            prediction.fail(client.plain_error(error), fault="server" if client.worker_ended(error) else None)

    async def cancel(self, prediction: Prediction) -> None:
        """See `Backend.cancel`."""
        # The runtime loses a cancellation that arrives before the runner began, so it is repeated until it works.
        for _ in range(int(CANCEL_SECONDS / 0.25)):
            if self._closed:
                break
            try:
                await self._http.post(f"{self.url}/predictions/{prediction.id}/cancel")
            except httpx.HTTPError:
                break
            if await prediction.wait(0.25):
                return
        call = self._exchanges.get(prediction.id)
        if call is not None:
            call.close()

    async def schema(self) -> dict[str, Any]:
        """See `Backend.schema`."""
        return await asyncio.to_thread(client.openapi, self.url)

    async def close(self) -> None:
        """See `Backend.close`."""
        self._closed = True
        for call in list(self._exchanges.values()):
            call.close()
        await self._http.aclose()


def _parse_response(call: exchange.Exchange) -> dict[str, Any]:
    """The response to a request that did not stream, or was refused."""
    try:
        answer = json.loads(call.body)
    except ValueError:
        answer = None
    if call.status == 200 and isinstance(answer, dict) and "status" in answer:
        return answer
    kind = Rejected if call.status < 500 else CogpressError
    raise kind(f"The model server refused the prediction ({call.status}): {client.refusal(call.body)}")
