"""Models, versions, deployments, files, hardware and the account over HTTP, in Replicate's shapes.

Knows requests and answers; leaves what they are to `catalog` and `files`.
"""

from __future__ import annotations

import functools
import hmac
import json
import subprocess
import time
from dataclasses import replace
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from cogpress.playground.catalog import NAME, OWNER, Deployment, Model, Version
from cogpress.playground.files import File
from cogpress.playground.openai import routes as openai
from cogpress.playground.web import Parts, Refused, answer, base_of, endpoint, read_json, stamp, text_of

_FACTS = ("description", "github_url", "paper_url", "license_url", "cover_image_url")
_INSTANCES = 10


def routes(parts: Parts) -> list[Route]:
    """The routes."""
    made = {
        ("GET", "/v1/models"): models,
        ("QUERY", "/v1/models"): search,
        ("POST", "/v1/models"): create_model,
        ("GET", "/v1/models/{owner}/{name}"): model,
        ("DELETE", "/v1/models/{owner}/{name}"): delete_model,
        ("GET", "/v1/models/{owner}/{name}/versions"): versions,
        ("GET", "/v1/models/{owner}/{name}/versions/{id}"): version,
        ("DELETE", "/v1/models/{owner}/{name}/versions/{id}"): delete_version,
        ("GET", "/v1/deployments"): deployments,
        ("POST", "/v1/deployments"): create_deployment,
        ("GET", "/v1/deployments/{owner}/{name}"): deployment,
        ("PATCH", "/v1/deployments/{owner}/{name}"): change_deployment,
        ("DELETE", "/v1/deployments/{owner}/{name}"): delete_deployment,
        ("GET", "/v1/files"): files,
        ("POST", "/v1/files"): upload,
        ("GET", "/v1/files/{id}"): file,
        ("DELETE", "/v1/files/{id}"): delete_file,
        ("GET", "/v1/files/{id}/download"): download,
        ("GET", "/v1/hardware"): hardware,
        ("GET", "/v1/account"): account,
        ("GET", "/v1/collections"): collections,
        ("GET", "/v1/webhooks/default/secret"): webhook_secret,
    }
    return [Route(path, endpoint(parts, handler), methods=[method]) for (method, path), handler in made.items()]


def model_shape(base: str, found: Model) -> dict[str, Any]:
    """A model as Replicate gives it."""
    return {
        "url": f"{base}/",
        "owner": found.owner,
        "name": found.name,
        "visibility": found.facts.get("visibility", "private"),
        **{name: found.facts.get(name) for name in _FACTS},
        "run_count": 0,
        "default_example": None,
        "latest_version": version_shape(found.versions[-1]) if found.versions else None,
    }


def version_shape(found: Version) -> dict[str, Any]:
    """A version as Replicate gives it."""
    return {
        "id": found.id,
        "created_at": stamp(found.created),
        "cog_version": found.cog_version,
        "openapi_schema": found.schema,
        "label": found.label,
    }


def _page(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {"previous": None, "next": None, "results": results}


def _model(parts: Parts, request: Request) -> Model:
    name = f"{request.path_params['owner']}/{request.path_params['name']}"
    if name not in parts.catalog.models:
        raise Refused(404, "Not found", f"There is no model {name[:100]}. GET /v1/models lists them.")
    return parts.catalog.models[name]


async def models(parts: Parts, request: Request) -> Response:
    """`GET /v1/models`, for Replicate's clients and OpenAI's at once: each finds its keys."""
    base = base_of(request)
    found = list(parts.catalog.models.values())
    return answer({**_page([model_shape(base, one) for one in found]), "object": "list", "data": openai.entries(parts)})


async def search(parts: Parts, request: Request) -> Response:
    """`QUERY /v1/models`: those whose name or description has the text of the body in it."""
    # The JavaScript client sends the text as JSON, the Python client as it is.
    wanted = (await request.body()).decode(errors="replace").strip().strip('"').lower()
    base = base_of(request)
    found = [
        one
        for one in parts.catalog.models.values()
        if wanted in f"{one.full_name} {one.facts.get('description') or ''}".lower()
    ]
    return answer(_page([model_shape(base, one) for one in found]))


async def create_model(parts: Parts, request: Request) -> Response:
    """`POST /v1/models`."""
    body = await read_json(request)
    owner, name = str(text_of(body, "owner", required=True)), str(text_of(body, "name", required=True))
    if f"{owner}/{name}" in parts.catalog.models:
        raise Refused(409, "Conflict", f"A model named {owner}/{name} exists already.")
    if body.get("visibility") not in ("public", "private"):
        raise _invalid("visibility", "visibility must be public or private")
    _check_sku(body.get("hardware"))
    facts = {key: text_of(body, key) for key in _FACTS}
    facts |= {"visibility": body["visibility"], "hardware": body["hardware"]}
    return answer(model_shape(base_of(request), parts.catalog.model_or_new(owner, name, facts)), 201)


def _invalid(field: str, description: str) -> Refused:
    fields = [{"type": "value_error", "field": field, "description": description}]
    return Refused(422, "Input validation failed", f"- {field}: {description}\n", invalid_fields=fields)


def _check_sku(given: Any) -> str:
    known = [one["sku"] for one in machines()]
    if given not in known:
        raise _invalid("hardware", f"hardware must be one of {', '.join(known)}, as GET /v1/hardware lists them")
    return str(given)


async def model(parts: Parts, request: Request) -> Response:
    """`GET /v1/models/OWNER/NAME`."""
    found = _model(parts, request)
    counted = await parts.store.read("SELECT count(*) AS runs FROM predictions WHERE model = ?", found.full_name)
    return answer(openai.entry(found) | model_shape(base_of(request), found) | {"run_count": counted[0]["runs"]})


async def delete_model(parts: Parts, request: Request) -> Response:
    """`DELETE /v1/models/OWNER/NAME`."""
    found = _model(parts, request)
    if found.versions:
        raise Refused(400, "Bad request", "Only a model without versions can be deleted. Delete its versions first.")
    parts.catalog.remove_model(found)
    return Response(status_code=204)


async def versions(parts: Parts, request: Request) -> Response:
    """`GET /v1/models/OWNER/NAME/versions`: the newest first."""
    return answer(_page([version_shape(one) for one in reversed(_model(parts, request).versions)]))


async def version(parts: Parts, request: Request) -> Response:
    """`GET /v1/models/OWNER/NAME/versions/ID`."""
    return answer(version_shape(parts.catalog.version(_model(parts, request).full_name, request.path_params["id"])))


async def delete_version(parts: Parts, request: Request) -> Response:
    """`DELETE /v1/models/OWNER/NAME/versions/ID`."""
    found = parts.catalog.version(_model(parts, request).full_name, request.path_params["id"])
    used = [
        one.full_name
        for one in parts.catalog.deployments.values()
        if (one.model, one.version) == (found.model, found.id)
    ]
    if used:
        raise Refused(400, "Bad request", f"The deployment {used[0]} uses this version. Change or delete it first.")
    parts.catalog.remove_version(found)
    return Response(status_code=202)


def deployment_shape(found: Deployment) -> dict[str, Any]:
    """A deployment as Replicate gives it."""
    names = ("hardware", "min_instances", "max_instances")
    return {
        "owner": found.owner,
        "name": found.name,
        "current_release": {
            "number": found.release,
            "model": found.model,
            "version": found.version,
            "created_at": stamp(found.created),
            "created_by": _account(),
            "configuration": {name: getattr(found, name) for name in names},
        },
    }


async def deployments(parts: Parts, _request: Request) -> Response:
    """`GET /v1/deployments`."""
    return answer(_page([deployment_shape(one) for one in parts.catalog.deployments.values()]))


async def create_deployment(parts: Parts, request: Request) -> Response:
    """`POST /v1/deployments`."""
    body = await read_json(request)
    name = str(text_of(body, "name", required=True))
    if not NAME.fullmatch(name):
        raise _invalid("name", "name must be letters, digits, dots, dashes and underscores")
    if f"{OWNER}/{name}" in parts.catalog.deployments:
        raise Refused(409, "Conflict", f"A deployment named {OWNER}/{name} exists already.")
    chosen = parts.catalog.version(
        str(text_of(body, "model", required=True)), str(text_of(body, "version", required=True))
    )
    made = Deployment(OWNER, name, chosen.model, chosen.id, time.time(), **_configuration(body, {}))
    parts.catalog.save_deployment(made)
    return answer(deployment_shape(made), 201)


def _configuration(body: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"hardware": _check_sku(body.get("hardware", before.get("hardware")))}
    for name, least in (("min_instances", 0), ("max_instances", 1)):
        value = body.get(name, before.get(name, least))
        if not isinstance(value, int) or not least <= value <= _INSTANCES:
            raise _invalid(name, f"{name} must be a whole number from {least} to {_INSTANCES}")
        found[name] = value
    if found["min_instances"] > found["max_instances"]:
        raise _invalid("min_instances", "min_instances must not be more than max_instances")
    return found


async def deployment(parts: Parts, request: Request) -> Response:
    """`GET /v1/deployments/OWNER/NAME`."""
    found = parts.catalog.deployment(request.path_params["owner"], request.path_params["name"])
    return answer(deployment_shape(found))


async def change_deployment(parts: Parts, request: Request) -> Response:
    """`PATCH /v1/deployments/OWNER/NAME`: each change is a release."""
    found = parts.catalog.deployment(request.path_params["owner"], request.path_params["name"])
    body = await read_json(request)
    chosen = parts.catalog.version(found.model, text_of(body, "version") or found.version)
    changed = replace(found, version=chosen.id, release=found.release + 1, created=time.time())
    for name, value in _configuration(body, vars(found)).items():
        setattr(changed, name, value)
    parts.catalog.save_deployment(changed)
    return answer(deployment_shape(changed))


async def delete_deployment(parts: Parts, request: Request) -> Response:
    """`DELETE /v1/deployments/OWNER/NAME`."""
    parts.catalog.remove_deployment(parts.catalog.deployment(request.path_params["owner"], request.path_params["name"]))
    return Response(status_code=204)


def file_shape(base: str, found: File) -> dict[str, Any]:
    """A file as Replicate gives it."""
    return {
        "id": found.id,
        "name": found.name,
        "content_type": found.content_type,
        "size": found.size,
        "etag": found.sha256,
        "checksums": {"sha256": found.sha256},
        "metadata": found.metadata,
        "created_at": stamp(found.created),
        "expires_at": None,
        "urls": {"get": f"{base}/v1/files/{found.id}"},
    }


async def _file(parts: Parts, request: Request) -> File:
    found = await parts.files.find(request.path_params["id"])
    if found is None:
        raise Refused(404, "Not found", "There is no such file, or it was removed.")
    return found


async def upload(parts: Parts, request: Request) -> Response:
    """`POST /v1/files`: the part `content` of a form, and `metadata` as JSON, which may be a part with a file name."""
    async with request.form(max_files=2, max_fields=10) as form:
        content = form.get("content")
        if not isinstance(content, UploadFile):
            raise _invalid("content", "content must be a file in a multipart form")
        given = form.get("metadata")
        text = (await given.read()).decode(errors="replace") if isinstance(given, UploadFile) else given
        try:
            metadata = json.loads(text) if text else {}
        except ValueError:
            metadata = None
        if not isinstance(metadata, dict):
            raise _invalid("metadata", "metadata must be a JSON object")
        kind = content.content_type or "application/octet-stream"
        made = await parts.files.add(content.file, content.filename or "", kind, metadata)
    return answer(file_shape(base_of(request), made), 201)


async def files(parts: Parts, request: Request) -> Response:
    """`GET /v1/files`."""
    base = base_of(request)
    return answer(_page([file_shape(base, one) for one in await parts.files.all()]))


async def file(parts: Parts, request: Request) -> Response:
    """`GET /v1/files/ID`."""
    return answer(file_shape(base_of(request), await _file(parts, request)))


async def delete_file(parts: Parts, request: Request) -> Response:
    """`DELETE /v1/files/ID`."""
    await parts.files.remove(await _file(parts, request))
    return Response(status_code=204)


async def download(parts: Parts, request: Request) -> Response:
    """`GET /v1/files/ID/download?key=…`: the content, for whoever was given this address."""
    key = request.query_params.get("key", "")
    if not hmac.compare_digest(key.encode(), parts.files.key(request.path_params["id"]).encode()):
        raise Refused(404, "Not found", "There is no such file.")
    found = await _file(parts, request)
    return FileResponse(parts.files.place(found), headers=parts.files.headers(found))


@functools.cache
def machines() -> tuple[dict[str, str], ...]:
    """What this machine has, as Replicate lists hardware."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        names = []
    gpus = [{"name": f"{name.strip()} of this machine", "sku": f"gpu-{place}"} for place, name in enumerate(names)]
    return ({"name": "CPU of this machine", "sku": "cpu"}, *gpus)


async def hardware(_parts: Parts, _request: Request) -> Response:
    """`GET /v1/hardware`."""
    return answer(list(machines()))


def _account() -> dict[str, Any]:
    return {"type": "user", "username": OWNER, "name": "This machine", "github_url": None}


async def account(_parts: Parts, _request: Request) -> Response:
    """`GET /v1/account`."""
    return answer(_account())


async def collections(_parts: Parts, _request: Request) -> Response:
    """`GET /v1/collections`: there are none."""
    return answer(_page([]))


async def webhook_secret(parts: Parts, _request: Request) -> Response:
    """`GET /v1/webhooks/default/secret`."""
    return answer({"key": parts.webhooks.key})
