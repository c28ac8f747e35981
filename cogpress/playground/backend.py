"""What runs predictions: a Cog server by its address, or a model on Replicate.

Knows how each is asked, followed and canceled, and what its answers mean; leaves the order of predictions to `lane`,
servers of this machine to `servers`, and bytes of a stream to `exchange`.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import httpx

from cogpress import source
from cogpress.cog import client
from cogpress.errors import CogpressError
from cogpress.playground import exchange

if TYPE_CHECKING:
    from cogpress.playground.predictions import Prediction

CANCEL_SECONDS = 3.0
"""How long a canceled prediction may go on before its connection is dropped."""


CONNECT_SECONDS = 10.0


class Busy(Exception):
    """It takes no more now, or is not ready yet; the same prediction may run a moment later."""


class Unreachable(CogpressError):
    """Nothing answers there; nothing was begun."""


class Backend(Protocol):
    """What a lane of predictions needs of what runs them."""

    slots: int | None
    """How many it runs at once; None where only it knows."""

    async def run(self, prediction: Prediction) -> None:
        """Run a prediction to its end, of which it is told.

        Raises:
            Busy: try again.
            Unreachable: nothing was begun.
            CogpressError: it fails, for this reason.
        """

    async def cancel(self, prediction: Prediction) -> None:
        """Ask for the end of a running prediction; may be called again until it comes."""

    async def schema(self) -> dict[str, Any]:
        """The model's OpenAPI document.

        Raises:
            CogpressError: it can not be had.
        """

    async def close(self) -> None:
        """Let go of what it holds."""


Rewrite = Callable[[Any, bool], Awaitable[Any]]
"""Makes addresses of files that were uploaded here into ones that a server can fetch without a token."""


async def as_they_are(inputs: Any, _loopback: bool) -> Any:
    """No file is ours."""
    return inputs


class Cog:
    """A Cog server."""

    def __init__(self, url: str, slots: int | None = None, rewrite: Rewrite = as_they_are) -> None:
        """Describe it; nothing is asked yet.

        Args:
            url: where it answers.
            slots: how many predictions it runs at once, where known.
            rewrite: for files among the inputs.
        """
        self.url = url.rstrip("/")
        self.slots = slots
        self.streams = True
        self._rewrite = rewrite
        parts = urlsplit(self.url)
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._http = httpx.AsyncClient(trust_env=False, timeout=5, verify=self._tls or False)
        self._exchanges: dict[str, exchange.Exchange] = {}

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
        except OSError as error:  # also for TimeoutError
            why = error.strerror or str(error) or "no connection in time"
            raise Unreachable(f"The model server at {self.url} does not answer ({why}). Start it again.") from None
        self._exchanges[prediction.id] = call
        try:
            if not streams:
                prediction.start()
            await call.done
        finally:
            del self._exchanges[prediction.id]
            call.close()
        self._conclude(prediction, call)

    def _conclude(self, prediction: Prediction, call: exchange.Exchange) -> None:
        if call.broken:
            if prediction.cancel_asked:
                prediction.end("canceled")
                return
            if not call.status:
                raise Unreachable(f"The model server at {self.url} takes no predictions. Its log tells why.")
            raise CogpressError(
                f"The model server at {self.url} ended or broke off while this prediction ran. Its log tells why; "
                "run the prediction again."
            )
        if call.status in (409, 503):
            raise Busy
        if call.status == 406:
            # Also the answer of a server that is just starting and has not read its schema yet.
            raise Unreachable(f"The model server at {self.url} does not stream. Add @cog.streaming to its run().")
        answer = call.completed
        if answer is None:
            answer = _read(call)
        metrics = answer.get("metrics")
        if isinstance(metrics, dict):
            prediction.metrics.update(metrics)
        status = answer.get("status")
        if status == "succeeded":
            prediction.end("succeeded", output=answer.get("output"))
        elif status == "canceled":
            prediction.end("canceled")
        else:
            prediction.end("failed", error=client.plain_error(str(answer.get("error") or "")))

    async def cancel(self, prediction: Prediction) -> None:
        """See `Backend.cancel`."""
        # The runtime loses a cancellation that comes before the runner began, so it is said until it is heard.
        for _ in range(int(CANCEL_SECONDS / 0.25)):
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
        """Drop what still runs."""
        for call in list(self._exchanges.values()):
            call.close()
        await self._http.aclose()


def _read(call: exchange.Exchange) -> dict[str, Any]:
    """The answer to a request that was not streamed, or was refused."""
    try:
        answer = json.loads(call.body)
    except ValueError:
        answer = None
    if call.status == 200 and isinstance(answer, dict) and "status" in answer:
        return answer
    detail: Any = call.body[:300].decode(errors="replace")
    if isinstance(answer, dict):
        detail = answer.get("detail") or answer.get("error") or answer
    if isinstance(detail, list) and all(isinstance(item, dict) for item in detail):
        detail = "; ".join(f"{'.'.join(map(str, item.get('loc', ())[2:]))}: {item.get('msg')}" for item in detail)
    raise CogpressError(f"The model server refuses the prediction ({call.status}): {detail}")
