"""Run predictions on Replicate: create, follow and cancel them through its API."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import Any, Literal

import httpx

from cogpress.cog import client
from cogpress.errors import CogpressError
from cogpress.http import UnavailableError
from cogpress.playground import backend
from cogpress.playground.backend import Busy, Refusals, Rejected, Unreachable
from cogpress.playground.records import Prediction
from cogpress.replicate import routes
from cogpress.replicate.api import ENDED, AsyncReplicate, NoStreamError, RefusedError, credentials
from cogpress.replicate.routes import Call

POLL_SECONDS = 0.5

PATIENCE_SECONDS = 60.0
"""How long Replicate may be unreachable while a prediction runs there."""

SILENT_SECONDS = 120.0
"""The longest silence of a stream; after that the prediction itself is polled."""

CALLERS = frozenset({401, 402, 403})
"""Refusals of a token, or of what its account may do."""

TRIES = 2
"""Attempts at a request. The queue repeats what still fails, and cancels what waits."""

LONGEST_WAIT = 60.0
"""Seconds between attempts."""


def _limited() -> CogpressError:
    minutes = backend.BUSY_SECONDS / 60
    return CogpressError(f"Replicate has refused every request for {minutes:.0f} minutes as too many. Try again later.")


class Missing(CogpressError):
    """There is no such model, version or deployment."""


class ReplicateBackend:
    """A model or deployment `owner/name`, or one version of a model `owner/name:version`."""

    slots: int | None = None

    def __init__(self, name: str, token: str | None = None, base: str | None = None) -> None:
        """Sends nothing yet.

        Args:
            name: of the model, with or without a version, or of a deployment.
            token: the caller's; default: REPLICATE_API_TOKEN.
            base: address of the API; default: REPLICATE_BASE_URL, or else Replicate's own.

        Raises:
            CogpressError: there is no token.
        """
        environ = {**os.environ}
        environ |= {"REPLICATE_API_TOKEN": token} if token else {}
        environ |= {"REPLICATE_BASE_URL": base} if base else {}
        self._name, _, self._version = name.partition(":")
        self._kind: Literal["models", "deployments", ""] = ""
        """What `name` names; empty if predictions are created by version."""
        self._found = False
        self._callers = token is not None
        """Whether the token is the caller's, and not this server's own."""
        timeout = httpx.Timeout(20, read=SILENT_SECONDS)
        self._replicate = AsyncReplicate(*credentials(environ), tries=TRIES, longest=LONGEST_WAIT, timeout=timeout)
        self._remote: dict[str, dict[str, Any]] = {}
        self._refusals = Refusals()

    async def run(self, prediction: Prediction) -> None:
        """See `Backend.run`."""
        try:
            made = await self._create(prediction.payload)
        except Busy:
            if self._refusals.add():
                raise _limited() from None
            raise
        except RefusedError as error:
            if self._callers and error.status in CALLERS:
                prediction.refused = error.status
            raise
        self._refusals.end()
        self._remote[prediction.id] = made
        try:
            if prediction.cancel_requested:
                await self.cancel(prediction)
            await self._follow(prediction, made)
        finally:
            del self._remote[prediction.id]

    async def _create(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if not self._found:
            await self.schema()
        if self._kind:
            try:
                return await self._ask(routes.predict_by_name(self._kind, self._name, inputs))
            except Missing:
                # Replicate runs only official models by name, all others by version.
                if not self._version:
                    raise
                self._kind = ""
        return await self._ask(routes.predict(self._version, inputs))

    async def _follow(self, prediction: Prediction, made: dict[str, Any]) -> None:
        # If there is no stream or it breaks off, the rest comes with the prediction itself.
        with contextlib.suppress(httpx.HTTPError, NoStreamError):
            await self._stream(prediction, made)
        while made.get("status") not in ENDED:
            made = await self._state(made["id"])
            if made.get("status") == "processing" and prediction.status == "starting":
                prediction.start()
            if made.get("status") in ("starting", "processing"):
                await asyncio.sleep(POLL_SECONDS)
        if made.get("started_at") and prediction.status == "starting":
            prediction.start()  # it ended between two polls; without a start, no model saw it
        prediction.metrics.update(made.get("metrics") or {})
        output, error = made.get("output"), made.get("error")
        if isinstance(output, list) and isinstance(prediction.output, list):
            had = "".join(map(str, prediction.output))
            whole = "".join(map(str, output))
            if whole.startswith(had) and len(whole) > len(had):
                prediction.add_output(whole[len(had) :])
        status = made["status"]
        # As from a Cog server: versions that were pushed before say more than the runner did.
        told = client.plain_error(str(error or "")) if status == "failed" else None
        prediction.end(status, error=told, output=output)

    async def _stream(self, prediction: Prediction, made: dict[str, Any]) -> None:
        async with contextlib.aclosing(self._replicate.stream(made)) as events:
            async for event, data in events:
                if prediction.status == "starting":
                    prediction.start()
                if event == "output":
                    prediction.add_output(data)
                elif event == "logs":
                    prediction.add_log(f"{data}\n")
                elif event == "error":
                    return

    async def _state(self, identifier: str) -> dict[str, Any]:
        """The state of a created prediction. A temporary failure must neither lose it nor create it again."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        refusals = Refusals()
        while True:
            try:
                return await self._ask(routes.prediction(identifier))
            except Busy:
                # The client has waited as long as Replicate asked.
                if refusals.add():
                    raise _limited() from None
            except Unreachable as error:
                if time.monotonic() > deadline:
                    # Not Unreachable, after which the queue would create it again.
                    raise CogpressError(f"Lost track of the prediction on Replicate: {error}") from None
                await asyncio.sleep(POLL_SECONDS)

    async def _ask(self, call: Call) -> dict[str, Any]:
        try:
            return dict(await self._replicate.ask(call))
        except RefusedError as error:
            if error.status == 404:
                raise Missing(str(error)) from None
            if error.status == 422:
                raise Rejected(str(error)) from None
            raise
        except UnavailableError as error:
            if error.status == 429:
                raise Busy from None
            if call.method == "GET" or not error.begun:
                raise Unreachable(str(error)) from None
            raise

    async def cancel(self, prediction: Prediction) -> None:
        """See `Backend.cancel`."""
        made = self._remote.get(prediction.id)
        if made is None:
            return
        for _ in range(3):
            with contextlib.suppress(Busy):
                await self._ask(routes.cancel(made["id"]))
                return

    async def schema(self) -> dict[str, Any]:
        """See `Backend.schema`."""
        try:
            found = await self._find()
        except Busy:
            raise CogpressError("Replicate is limiting requests. Try again in a minute.") from None
        schema = found.get("openapi_schema")
        if not isinstance(schema, dict):
            raise CogpressError(f"The model {self._name} on Replicate has no version with a schema.")
        return schema

    async def _find(self) -> dict[str, Any]:
        """Find the version, and whether predictions are created by name."""
        if self._version:
            found = await self._ask(routes.version(self._name, self._version))
            self._found = True
            return found
        try:
            found = (await self._ask(routes.model(self._name))).get("latest_version") or {}
            self._version, self._kind, self._found = str(found.get("id") or ""), "models", True
            return found
        except Missing as missing:
            try:
                release = (await self._ask(routes.deployment(self._name)))["current_release"]
            except (Missing, KeyError):
                raise missing from None
        self._kind, self._found = "deployments", True
        return await self._ask(routes.version(release["model"], release["version"]))

    async def close(self) -> None:
        """See `Backend.close`."""
        await self._replicate.close()
