"""A model on Replicate as a backend."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import Any, Literal

import httpx

from cogpress.errors import CogpressError
from cogpress.http import UnavailableError
from cogpress.playground.backend import Busy, Rejected, Unreachable
from cogpress.playground.records import Prediction
from cogpress.replicate import routes
from cogpress.replicate.api import ENDED, AsyncReplicate, NoStreamError, RefusedError, credentials
from cogpress.replicate.routes import Call

POLL_SECONDS = 0.5

PATIENCE_SECONDS = 60.0
"""How long Replicate may be out of reach while a prediction of ours runs there."""

SILENT_SECONDS = 120.0
"""How long a stream may say nothing before the prediction itself is looked at instead."""

TRIES = 2
"""Of a request. The queue repeats what still fails, and cancels what waits."""

LONGEST_WAIT = 60.0
"""Seconds between them."""


class _Missing(CogpressError):
    """There is nothing of this name."""


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
        environ = {**os.environ}
        environ |= {"REPLICATE_API_TOKEN": token} if token else {}
        environ |= {"REPLICATE_BASE_URL": base} if base else {}
        self._name, _, self._version = name.partition(":")
        self._kind: Literal["models", "deployments", ""] = ""
        """Of what predictions are created by name; empty where they are created by version."""
        self._found = False
        timeout = httpx.Timeout(20, read=SILENT_SECONDS)
        self._replicate = AsyncReplicate(*credentials(environ), tries=TRIES, longest_wait=LONGEST_WAIT, timeout=timeout)
        self._remote: dict[str, dict[str, Any]] = {}

    async def run(self, prediction: Prediction) -> None:
        """See `Backend.run`."""
        made = await self._create(prediction.payload)
        self._remote[prediction.id] = made
        try:
            if prediction.cancel_asked:
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
            except _Missing:
                # Replicate runs only models of its own choice by name, all others by version.
                if not self._version:
                    raise
                self._kind = ""
        return await self._ask(routes.predict(self._version, inputs))

    async def _follow(self, prediction: Prediction, made: dict[str, Any]) -> None:
        # Without a stream, or where it breaks off, what is missing comes with the prediction itself.
        with contextlib.suppress(httpx.HTTPError, NoStreamError):
            await self._stream(prediction, made)
        while made.get("status") not in ENDED:
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
        """A prediction that was created. What is in the way for a while must not lose it, nor have it made again."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return await self._ask(routes.prediction(identifier))
            except Busy:
                continue  # it waited for as long as it was told
            except Unreachable as error:
                if time.monotonic() > deadline:
                    # No Unreachable, upon which it would be run anew.
                    raise CogpressError(f"The prediction was lost from sight: {error}") from None
                await asyncio.sleep(POLL_SECONDS)

    async def _ask(self, call: Call) -> dict[str, Any]:
        try:
            return dict(await self._replicate.ask(call))
        except RefusedError as error:
            if error.status == 404:
                raise _Missing(str(error)) from None
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
            raise CogpressError("Replicate takes no more requests now. Try again in a minute.") from None
        schema = found.get("openapi_schema")
        if not isinstance(schema, dict):
            raise CogpressError(f"The model {self._name} on Replicate has no version that tells its inputs.")
        return schema

    async def _find(self) -> dict[str, Any]:
        """The version that answers, and how it is asked."""
        if self._version:
            found = await self._ask(routes.version(self._name, self._version))
            self._found = True
            return found
        try:
            found = (await self._ask(routes.model(self._name))).get("latest_version") or {}
            self._version, self._kind, self._found = str(found.get("id") or ""), "models", True
            return found
        except _Missing as missing:
            try:
                release = (await self._ask(routes.deployment(self._name)))["current_release"]
            except (_Missing, KeyError):
                raise missing from None
        self._kind, self._found = "deployments", True
        return await self._ask(routes.version(release["model"], release["version"]))

    async def close(self) -> None:
        """See `Backend.close`."""
        await self._replicate.close()
