"""Predictions and trainings over HTTP, in Replicate's shapes.

Knows requests and answers; leaves models, deployments and files to `resources`, and everything that happens to the
parts that it calls.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cogpress.playground.api import webhooks
from cogpress.playground.catalog import Version
from cogpress.playground.predictions import ENDED, Options, Prediction
from cogpress.playground.store import parsed
from cogpress.playground.web import Parts, Refused, answer, base_of, endpoint, page_of, read_json, stamp, text_of

GONE = "There is no such prediction: it was deleted, because of its age or their number, or the id is not complete."

WAIT_SECONDS = 60
"""The longest that a request may wait for a prediction."""


def routes(parts: Parts) -> list[Route]:
    """The routes."""
    made = {
        ("POST", "/v1/predictions"): create_by_version,
        ("GET", "/v1/predictions"): predictions,
        ("GET", "/v1/predictions/{id}"): prediction,
        ("POST", "/v1/predictions/{id}/cancel"): cancel,
        ("POST", "/v1/models/{owner}/{name}/predictions"): create_by_model,
        ("POST", "/v1/models/{owner}/{name}/versions/{id}/predictions"): create_by_model,
        ("POST", "/v1/deployments/{owner}/{name}/predictions"): create_by_deployment,
        ("POST", "/v1/models/{owner}/{name}/versions/{id}/trainings"): train,
        ("GET", "/v1/trainings"): trainings,
        ("GET", "/v1/trainings/{id}"): training,
        ("POST", "/v1/trainings/{id}/cancel"): cancel_training,
    }
    return [Route(path, endpoint(parts, handler), methods=[method]) for (method, path), handler in made.items()]


def shape(parts: Parts, base: str, record: dict[str, Any]) -> dict[str, Any]:
    """A prediction as Replicate gives it.

    Args:
        parts: for its addresses.
        base: how the asker reaches this server.
        record: of `Predictions.record` or the store.
    """
    identifier = record["id"]
    urls = {
        "get": f"{base}/v1/predictions/{identifier}",
        "cancel": f"{base}/v1/predictions/{identifier}/cancel",
        "web": f"{base}/p/{identifier}",
    }
    if parts.catalog.streams(record["model"], record["version"]):
        urls["stream"] = base + parts.streams.path(identifier)
    return {
        "id": identifier,
        "model": record["model"],
        "version": record["version"],
        "deployment": record["deployment"],
        "status": record["status"],
        "input": record["input"],
        "output": record["output"],
        "logs": record["logs"] or "",
        "error": record["error"],
        "metrics": record["metrics"] or {},
        "created_at": stamp(record["created"]),
        "started_at": stamp(record["started"]),
        "completed_at": stamp(record["completed"]),
        "source": record["source"],
        "data_removed": bool(record["removed"]),
        "webhook": record["webhook"],
        "webhook_events_filter": record["events"],
        "urls": urls,
    }


async def create_by_version(parts: Parts, request: Request) -> Response:
    """`POST /v1/predictions`."""
    body = await read_json(request)
    reference = text_of(body, "version") or text_of(body, "model")
    if not reference:
        detail = "- version: version is required\n"
        fields = [{"type": "required", "field": "version", "description": "version is required"}]
        raise Refused(422, "Input validation failed", detail, invalid_fields=fields)
    return await _create(parts, request, body, parts.catalog.resolve(reference))


async def create_by_model(parts: Parts, request: Request) -> Response:
    """`POST /v1/models/OWNER/NAME/predictions`."""
    name = f"{request.path_params['owner']}/{request.path_params['name']}"
    body = await read_json(request)
    wanted = request.path_params.get("id")
    return await _create(parts, request, body, parts.catalog.resolve(f"{name}:{wanted}" if wanted else name))


async def create_by_deployment(parts: Parts, request: Request) -> Response:
    """`POST /v1/deployments/OWNER/NAME/predictions`."""
    deployment = parts.catalog.deployment(request.path_params["owner"], request.path_params["name"])
    version = parts.catalog.deployed(deployment)
    return await _create(parts, request, await read_json(request), version, deployment.full_name)


async def _create(
    parts: Parts, request: Request, body: dict[str, Any], version: Version, deployment: str | None = None
) -> Response:
    inputs = _inputs(body)
    events = body.get("webhook_events_filter")
    hook = text_of(body, "webhook")
    if hook is None and isinstance(body.get("webhook_completed"), str):  # its deprecated form
        hook, events = body["webhook_completed"], ["completed"]
    # The page sends its own name, so that history can tell what people tried from what programs asked.
    source = "web" if request.headers.get("sec-fetch-site") == "same-origin" else "api"
    options = Options(deployment, hook, webhooks.check(hook, events), base_of(request), source)
    created = await parts.predictions.create(version, inputs, options)
    seconds = _wait(request.headers.get("prefer", ""))
    record = created.record()
    if seconds:
        ended = await created.wait(seconds)
        # Clients take any other status after waiting for an end.
        record = created.record() if ended else created.record() | {"status": "starting"}
    elif not created.ended:
        record["status"] = "starting"
    return answer(shape(parts, options.base_url, record), 201)


def _inputs(body: dict[str, Any]) -> dict[str, Any]:
    inputs = body.get("input", {})
    if not isinstance(inputs, dict):
        fields = [{"type": "type_error", "field": "input", "description": "input must be an object"}]
        raise Refused(422, "Input validation failed", "- input: input must be an object\n", invalid_fields=fields)
    return inputs


def _wait(prefer: str) -> float:
    """Seconds that a request asks to wait."""
    for one in prefer.split(","):
        name, equals, value = one.strip().partition("=")
        if name == "wait":
            return float(min(max(int(value), 1), WAIT_SECONDS)) if equals and value.isdecimal() else WAIT_SECONDS
    return 0


async def predictions(parts: Parts, request: Request) -> Response:
    """`GET /v1/predictions`: the newest first, without what is long."""
    base = base_of(request)
    return await page_of(
        parts, request, "predictions", lambda row: shape(parts, base, parts.predictions.now(parsed(row)))
    )


async def prediction(parts: Parts, request: Request) -> Response:
    """`GET /v1/predictions/ID`."""
    record = await parts.predictions.record(request.path_params["id"])
    if record is None:
        raise Refused(404, "Not found", GONE)
    return answer(shape(parts, base_of(request), record))


async def cancel(parts: Parts, request: Request) -> Response:
    """`POST /v1/predictions/ID/cancel`."""
    alive: Prediction | None = parts.predictions.find(request.path_params["id"])
    if alive is not None:
        await parts.predictions.cancel(alive)
    return await prediction(parts, request)


async def train(parts: Parts, request: Request) -> Response:
    """`POST /v1/models/OWNER/NAME/versions/ID/trainings`."""
    name = f"{request.path_params['owner']}/{request.path_params['name']}"
    version = parts.catalog.version(name, request.path_params["id"])
    body = await read_json(request)
    hook = text_of(body, "webhook")
    events = webhooks.check(hook, body.get("webhook_events_filter"))
    destination = str(text_of(body, "destination", required=True))
    options = Options(None, hook, events, base_of(request))
    made = await parts.trainings.create(version, destination, _inputs(body), options)
    return answer(training_shape(options.base_url, made), 201)


def training_shape(base: str, record: dict[str, Any]) -> dict[str, Any]:
    """A training as Replicate gives it."""
    address = f"{base}/v1/trainings/{record['id']}"
    names = ("id", "model", "version", "destination", "status", "input", "output", "error")
    return {
        **{name: record[name] for name in names},
        "logs": record["logs"] or "",
        "metrics": record["metrics"] or {},
        "created_at": stamp(record["created"]),
        "started_at": stamp(record["started"]),
        "completed_at": stamp(record["completed"]),
        "source": "api",
        "webhook": record["webhook"],
        "webhook_events_filter": record["events"],
        "urls": {"get": address, "cancel": f"{address}/cancel", "web": address},
    }


async def trainings(parts: Parts, request: Request) -> Response:
    """`GET /v1/trainings`: the newest first."""
    base = base_of(request)
    return await page_of(parts, request, "trainings", lambda row: training_shape(base, parts.trainings.now(row)))


async def training(parts: Parts, request: Request) -> Response:
    """`GET /v1/trainings/ID`."""
    record = await parts.trainings.record(request.path_params["id"])
    if record is None:
        raise Refused(404, "Not found", "There is no such training.")
    return answer(training_shape(base_of(request), record))


async def cancel_training(parts: Parts, request: Request) -> Response:
    """`POST /v1/trainings/ID/cancel`."""
    await parts.trainings.cancel(request.path_params["id"])
    return await training(parts, request)


__all__ = ["ENDED", "routes", "shape", "training_shape"]
