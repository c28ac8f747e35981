"""Send webhooks of predictions and trainings: signed, filtered, throttled and retried.

Each follows its prediction as any reader does, so a slow receiver slows nobody.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpcore
import httpx

from cogpress import source
from cogpress.errors import CogpressError
from cogpress.playground.records import Prediction

EVENTS = ("start", "output", "logs", "completed")

EVERY_SECONDS = 0.5
"""Shortest time between `output` and `logs` webhooks."""

TRIES = 6
"""Attempts for `completed`; others get one, because later ones include what they held."""

FIRST_WAIT = 0.5
"""Seconds before the second attempt; doubles for each later one."""


class _PrivateError(httpcore.ConnectError):
    """A webhook would reach this machine or its network."""


async def resolve(host: str, port: int) -> list[str]:
    """A host's IP addresses.

    Raises:
        OSError: it has none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


async def _public(host: str, port: int) -> list[str]:
    """As `resolve`.

    Raises:
        OSError: it has none.
        _PrivateError: one of them is not on the internet.
    """
    found = await resolve(host, port)
    if not all(map(source.is_public, found)):
        raise _PrivateError(host)
    return found


class _PublicOnly(httpcore.AnyIOBackend):
    """Connects to the addresses that were checked: a name may have another one a moment later."""

    async def connect_tcp(self, host: str, port: int, *args: Any, **more: Any) -> httpcore.AsyncNetworkStream:
        try:
            addresses = await _public(host, port)
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from None
        for address in addresses[:-1]:
            try:
                return await super().connect_tcp(address, port, *args, **more)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await super().connect_tcp(addresses[-1], port, *args, **more)


async def check(url: Any, events: Any, *, private: bool) -> tuple[str, ...] | None:
    """Validate a request's webhook; returns the events that it asks for.

    Args:
        url: of the receiver; None for none.
        events: which it gets; None for all.
        private: whether it may be plain http, and on this machine or its network.

    Raises:
        CogpressError: it is not such a URL, or an event does not exist.
    """
    if url is not None:
        try:
            parts = urlsplit(url) if isinstance(url, str) else None
            good = parts is not None and parts.scheme in ("http", "https") and bool(parts.hostname)
            host, port = httpx.URL(url if good else "").host, parts.port if parts else None
        except (ValueError, httpx.InvalidURL):
            good = False
        if not good:
            raise CogpressError("webhook must be an http or https URL.")
        try:
            if not private and parts is not None:
                if parts.scheme != "https":
                    raise _PrivateError(host)
                await _public(host, port or 443)
        except OSError:
            raise CogpressError(f"webhook names the host {host[:200]}, which cannot be found. Check the URL.") from None
        except _PrivateError:
            raise CogpressError(
                "webhook must be an https URL on the internet. Set playground.private_webhooks in model.yaml to allow "
                "http, this machine and its network."
            ) from None
    if events is None:
        return None
    if not isinstance(events, list) or not all(event in EVENTS for event in events):
        raise CogpressError(f"webhook_events_filter must be a list of {', '.join(EVENTS)}.")
    return tuple(events)


class Webhooks:
    """Sends webhooks."""

    def __init__(self, secret: bytes, *, private: bool) -> None:
        """Sends nothing yet.

        Args:
            secret: signs them.
            private: whether receivers may be on this machine or its network.
        """
        self._secret = secret
        transport = httpx.AsyncHTTPTransport(trust_env=False)
        if not private:
            tls = httpx.create_ssl_context(trust_env=False)
            transport._pool = httpcore.AsyncConnectionPool(tls, network_backend=_PublicOnly())
        # A redirect could lead anywhere.
        self._http = httpx.AsyncClient(transport=transport, timeout=10, follow_redirects=False, trust_env=False)

    @property
    def key(self) -> str:
        """The secret in the form that receivers verify with."""
        return f"whsec_{base64.b64encode(self._secret).decode()}"

    async def follow(self, prediction: Prediction, render: Callable[[Prediction], dict[str, Any]]) -> None:
        """Send a prediction's webhooks until it has ended.

        Args:
            prediction: with a webhook.
            render: makes the body.
        """
        url, wanted = prediction.options.webhook, prediction.options.webhook_events or EVENTS
        if url is None:
            return
        while not prediction.ended and prediction.status != "processing":
            await prediction.changed(len(prediction.frames))
        if "start" in wanted and prediction.started_at is not None:
            await self.send(url, {**render(prediction), "status": "processing"}, tries=1)
        outputs = logs = 0
        while not prediction.ended:
            frames = len(prediction.frames)
            new_outputs = len(prediction.output) if isinstance(prediction.output, list) else 0
            new_logs = len(prediction.logs)
            if ("output" in wanted and new_outputs > outputs) or ("logs" in wanted and new_logs > logs):
                await asyncio.gather(self.send(url, render(prediction), tries=1), asyncio.sleep(EVERY_SECONDS))
            outputs, logs = new_outputs, new_logs
            await prediction.changed(frames)
        if "completed" in wanted:
            await self.send(url, render(prediction), tries=TRIES)

    async def send(self, url: str, body: dict[str, Any], *, tries: int) -> bool:
        """Send one webhook; whether it was accepted.

        Args:
            url: of the receiver.
            body: the prediction or training.
            tries: most attempts. Their id stays the same, so that a receiver can drop duplicates.
        """
        content = json.dumps(body).encode()
        # One id an event, however often it is sent.
        name = f"msg_{hashlib.sha256(body['id'].encode() + content).hexdigest()[:24]}"
        for number in range(tries):
            if number:
                await asyncio.sleep(FIRST_WAIT * 2 ** (number - 1))
            headers = {"Content-Type": "application/json", **self.signed(name, content)}
            try:
                # The body of the answer is not read: it may never end.
                async with self._http.stream("POST", url, content=content, headers=headers) as answer:
                    pass
            except (httpx.HTTPError, httpx.InvalidURL):
                continue
            if answer.status_code < 300:
                return True
            if answer.status_code < 500 and answer.status_code not in (408, 425, 429):
                return False  # rejected for good
        return False

    def signed(self, name: str, content: bytes) -> dict[str, str]:
        """The headers by which a receiver verifies the sender and the time."""
        stamp = str(int(time.time()))
        digest = hmac.new(self._secret, f"{name}.{stamp}.".encode() + content, hashlib.sha256).digest()
        signature = f"v1,{base64.b64encode(digest).decode()}"
        return {"webhook-id": name, "webhook-timestamp": stamp, "webhook-signature": signature}

    async def close(self) -> None:
        """Drop pending requests."""
        await self._http.aclose()
