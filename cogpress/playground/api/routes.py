"""Predictions and trainings in Replicate's API."""

from __future__ import annotations

import re
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cogpress.playground.api import streams, webhooks
from cogpress.playground.api.resources import version_of
from cogpress.playground.catalog import NotFound
from cogpress.playground.records import Options, Version
from cogpress.playground.store import parsed
from cogpress.playground.web import (
    GONE,
    HTTPProblem,
    Parts,
    base_url,
    bind,
    client_of,
    invalid_field,
    json_response,
    paginate,
    read_json,
    string,
    timestamp,
)

WAIT_SECONDS = 60
"""The longest that a request may wait for a prediction."""


def routes(parts: Parts) -> list[Route]:
    """The routes."""
    return bind(
        parts,
        {
            ("POST", "/v1/predictions"): create_by_version,
            ("GET", "/v1/predictions"): predictions,
            ("GET", "/v1/predictions/{id}"): prediction,
            ("POST", "/v1/predictions/{id}/cancel"): cancel,
            ("POST", "/v1/models/{owner}/{name}/predictions"): create_by_model,
            ("POST", "/v1/models/{owner}/{name}/versions/{id}/predictions"): create_by_model,
            ("POST", "/v1/models/{owner}/{name}/versions/{id}/trainings"): train,
            ("GET", "/v1/trainings"): trainings,
            ("GET", "/v1/trainings/{id}"): training,
            ("POST", "/v1/trainings/{id}/cancel"): cancel_training,
        },
    )


def prediction_json(parts: Parts, base: str, record: dict[str, Any]) -> dict[str, Any]:
    """A prediction in Replicate's form.

    Args:
        parts: for its URLs.
        base: this server's address as the client sees it.
        record: from `Predictions.record` or the store.
    """
    identifier = record["id"]
    urls = {
        "get": f"{base}/v1/predictions/{identifier}",
        "cancel": f"{base}/v1/predictions/{identifier}/cancel",
        "web": f"{base}/p/{identifier}",
    }
    if parts.catalog.streams(record["model"], record["version"]):
        urls["stream"] = base + streams.path(parts.keys, identifier)
    alive = parts.predictions.find(identifier)
    return {
        "id": identifier,
        "model": record["model"],
        "version": record["version"],
        "status": record["status"],
        "input": record["input"],
        "output": record["output"],
        "logs": record["logs"] or "",
        "error": record["error"],
        "metrics": record["metrics"] or {},
        "created_at": timestamp(record["created"]),
        "source": record["source"],
        "data_removed": bool(record["removed"]),
        "urls": urls,
        **_known(record | {"deadline": alive.options.deadline if alive else None}),
    }


def _known(record: dict[str, Any]) -> dict[str, Any]:
    """What Replicate leaves out of an answer as long as there is none of it."""
    found = {
        "started_at": timestamp(record["started"]),
        "completed_at": timestamp(record["completed"]),
        "deadline": timestamp(record.get("deadline")),
        "webhook": record["webhook"],
        "webhook_events_filter": record["events"],
    }
    return {name: value for name, value in found.items() if value is not None}


async def create_by_version(parts: Parts, request: Request) -> Response:
    """`POST /v1/predictions`."""
    body = await read_json(request)
    reference = string(body, "version") or string(body, "model")
    if not reference:
        raise invalid_field("version", "version is required", "required")
    try:
        version = parts.catalog.resolve(reference)
    except NotFound as error:
        raise HTTPProblem(422, "Invalid version or not permitted", str(error)) from None
    return await _create(parts, request, body, version)


async def create_by_model(parts: Parts, request: Request) -> Response:
    """`POST /v1/models/OWNER/NAME/predictions`."""
    name = f"{request.path_params['owner']}/{request.path_params['name']}"
    body = await read_json(request)
    wanted = request.path_params.get("id")
    return await _create(parts, request, body, parts.catalog.resolve(f"{name}:{wanted}" if wanted else name))


async def _create(parts: Parts, request: Request, body: dict[str, Any], version: Version) -> Response:
    inputs = _inputs(body)
    events = body.get("webhook_events_filter")
    hook = string(body, "webhook")
    if hook is None and isinstance(body.get("webhook_completed"), str):  # deprecated, but clients still send it
        hook, events = body["webhook_completed"], ["completed"]
    # History tells what people tried on the page from what programs requested.
    source = "web" if request.headers.get("sec-fetch-site") == "same-origin" else "api"
    options = Options(
        hook,
        await webhooks.check(hook, events, private=parts.private_webhooks),
        base_url(request),
        source,
        client_of(request),
        _deadline(request.headers.get("cancel-after")),
    )
    created = await parts.predictions.create(version, inputs, options)
    if options.deadline is not None:
        parts.predictions.cancel_at(created, options.deadline)
    seconds = _wait(request.headers.get("prefer", ""))
    record = created.record()
    if seconds:
        ended = await created.wait(seconds)
        # After waiting, clients take any status but starting as final.
        record = created.record() if ended else created.record() | {"status": "starting"}
    elif not created.ended:
        record["status"] = "starting"
    return json_response(prediction_json(parts, options.base_url, record), 201 if created.ended else 202)


def _deadline(given: str | None) -> float | None:
    """When a prediction ends at the latest, from a Cancel-After header such as 30s or 5m: 5 seconds or more."""
    if given is None:
        return None
    found = re.fullmatch(r"(\d{1,6})([smh]?)", given.strip())
    seconds = int(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0
    if seconds < 5:
        raise HTTPProblem(400, "Bad request", "Cancel-After must be a time such as 30s or 5m, at least 5s.")
    return time.time() + seconds


def _inputs(body: dict[str, Any]) -> dict[str, Any]:
    inputs = body.get("input", {})
    if not isinstance(inputs, dict):
        raise invalid_field("input", "input must be an object", "type_error")
    return inputs


def _wait(prefer: str) -> float:
    """Seconds to wait, from a Prefer header."""
    for one in prefer.split(","):
        name, equals, value = one.strip().partition("=")
        if name == "wait":
            return float(min(max(int(value[:9]), 1), WAIT_SECONDS)) if equals and value.isdecimal() else WAIT_SECONDS
    return 0


async def predictions(parts: Parts, request: Request) -> Response:
    """`GET /v1/predictions`, the newest first."""
    base = base_url(request)
    return await paginate(
        parts, request, "predictions", lambda row: prediction_json(parts, base, parts.predictions.now(parsed(row)))
    )


async def prediction(parts: Parts, request: Request) -> Response:
    """`GET /v1/predictions/ID`."""
    record = await parts.predictions.record(request.path_params["id"])
    if record is None:
        raise HTTPProblem(404, "Not found", GONE)
    return json_response(prediction_json(parts, base_url(request), record))


async def cancel(parts: Parts, request: Request) -> Response:
    """`POST /v1/predictions/ID/cancel`."""
    alive = parts.predictions.find(request.path_params["id"])
    if alive is not None:
        await parts.predictions.cancel(alive)
    return await prediction(parts, request)


async def train(parts: Parts, request: Request) -> Response:
    """`POST /v1/models/OWNER/NAME/versions/ID/trainings`."""
    version = version_of(parts, request)
    body = await read_json(request)
    hook = string(body, "webhook")
    events = await webhooks.check(hook, body.get("webhook_events_filter"), private=parts.private_webhooks)
    destination = str(string(body, "destination", required=True))
    options = Options(hook, events, base_url(request))
    made = await parts.trainings.create(version, destination, _inputs(body), options)
    return json_response(training_json(options.base_url, made), 201)


def training_json(base: str, record: dict[str, Any]) -> dict[str, Any]:
    """A training in Replicate's form."""
    address = f"{base}/v1/trainings/{record['id']}"
    names = ("id", "model", "version", "destination", "status", "input", "output", "error")
    return {
        **{name: record[name] for name in names},
        "logs": record["logs"] or "",
        "metrics": record["metrics"] or {},
        "created_at": timestamp(record["created"]),
        "source": "api",
        **_known(record),
        "urls": {"get": address, "cancel": f"{address}/cancel", "web": address},
    }


async def trainings(parts: Parts, request: Request) -> Response:
    """`GET /v1/trainings`, the newest first."""
    base = base_url(request)
    return await paginate(parts, request, "trainings", lambda row: training_json(base, parts.trainings.now(row)))


async def training(parts: Parts, request: Request) -> Response:
    """`GET /v1/trainings/ID`."""
    record = await parts.trainings.record(request.path_params["id"])
    if record is None:
        raise HTTPProblem(404, "Not found", "There is no such training.")
    return json_response(training_json(base_url(request), record))


async def cancel_training(parts: Parts, request: Request) -> Response:
    """`POST /v1/trainings/ID/cancel`."""
    await parts.trainings.cancel(request.path_params["id"])
    return await training(parts, request)
