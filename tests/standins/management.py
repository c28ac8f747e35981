"""What Replicate manages over HTTP and the playground does not: models, deployments and hardware."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cogpress.playground import web
from cogpress.playground.api import resources, routes
from cogpress.playground.catalog import NAME, OWNER
from cogpress.playground.web import HTTPProblem, Parts, invalid_field, json_response, read_json, string, timestamp

HARDWARE = ({"name": "CPU", "sku": "cpu"}, {"name": "T4", "sku": "gpu-t4"}, {"name": "L40S", "sku": "gpu-l40s"})
CHANGEABLE = {"description", "readme", "github_url", "paper_url", "license_url", "weights_url"}
FACTS = ("description", "github_url", "paper_url", "license_url", "cover_image_url", "visibility", "hardware")


@dataclass(frozen=True)
class Deployment:
    """A name for one version, until it is changed."""

    name: str
    model: str
    version: str
    created: float
    hardware: str
    min_instances: int
    max_instances: int
    release: int = 1

    def json(self) -> dict[str, Any]:
        names = ("hardware", "min_instances", "max_instances")
        release = {
            "number": self.release,
            "model": self.model,
            "version": self.version,
            "created_at": timestamp(self.created),
            "created_by": resources.ACCOUNT,
            "configuration": {name: getattr(self, name) for name in names},
        }
        return {"owner": OWNER, "name": self.name, "current_release": release}


class Management:
    """Routes for an application, which come before its own."""

    def __init__(self) -> None:
        self.facts: dict[str, dict[str, Any]] = {}
        """What was said of a model when it was created."""
        self.deployments: dict[str, Deployment] = {}
        self.trainers: set[str] = set()
        """Versions that trainings began from."""

    def routes(self, parts: Parts) -> list[Route]:
        return web.bind(
            parts,
            {
                ("POST", "/v1/models"): self.create_model,
                ("GET", "/v1/models/{owner}/{name}"): self.model,
                ("PATCH", "/v1/models/{owner}/{name}"): self.change_model,
                ("DELETE", "/v1/models/{owner}/{name}/versions/{id}"): self.delete_version,
                ("POST", "/v1/deployments"): self.create_deployment,
                ("GET", "/v1/deployments/local/{name}"): self.deployment,
                ("POST", "/v1/deployments/local/{name}/predictions"): self.predict,
                ("PATCH", "/v1/deployments/local/{name}"): self.change_deployment,
                ("DELETE", "/v1/deployments/local/{name}"): self.delete_deployment,
                ("GET", "/v1/hardware"): self.hardware,
            },
        )

    async def hardware(self, _parts: Parts, _request: Request) -> Response:
        return json_response(list(HARDWARE))

    async def create_model(self, parts: Parts, request: Request) -> Response:
        body = await read_json(request)
        name = f"{string(body, 'owner', required=True)}/{string(body, 'name', required=True)}"
        if name in parts.catalog.models or "deleted" in name:  # the name of a deleted model stays taken
            raise HTTPProblem(409, "Conflict", f"A model named {name} exists already.")
        if body.get("visibility") not in ("public", "private"):
            raise invalid_field("visibility", "visibility must be public or private")
        _check_hardware(body.get("hardware"))
        model = parts.catalog.add_model(name)
        self.facts[name] = {key: body.get(key) for key in FACTS}
        return json_response(resources.model_json(web.base_url(request), model) | self.facts[name], 201)

    async def model(self, parts: Parts, request: Request) -> Response:
        found = resources.model_of(parts, request)
        known = resources.model_json(web.base_url(request), found)
        return json_response(known | self.facts.get(found.full_name, {}))

    async def change_model(self, parts: Parts, request: Request) -> Response:
        found = resources.model_of(parts, request)
        body = await read_json(request)
        if other := sorted(body.keys() - CHANGEABLE):
            raise invalid_field(other[0], f"{other[0]} is changed on the model's page alone")
        self.facts.setdefault(found.full_name, {}).update(body)
        return await self.model(parts, request)

    async def delete_version(self, parts: Parts, request: Request) -> Response:
        found = resources.version_of(parts, request)
        if self.facts.get(found.model, {}).get("visibility") == "public":
            raise HTTPProblem(403, "Forbidden", "Only versions of private models can be deleted.")
        used = [one.name for one in self.deployments.values() if (one.model, one.version) == (found.model, found.id)]
        if used:
            raise HTTPProblem(400, "Bad request", f"The deployment {OWNER}/{used[0]} uses this version.")
        if found.id in self.trainers:
            raise HTTPProblem(400, "Bad request", "Trainings began from this version.")
        return await resources.delete_version(parts, request)

    def _deployment(self, request: Request) -> Deployment:
        name = request.path_params["name"]
        if name not in self.deployments:
            raise HTTPProblem(404, "Not found", f"There is no deployment {OWNER}/{name}.")
        return self.deployments[name]

    async def create_deployment(self, parts: Parts, request: Request) -> Response:
        body = await read_json(request)
        name = str(string(body, "name", required=True))
        if not NAME.fullmatch(name):
            raise invalid_field("name", "name must be letters, digits, dots, dashes and underscores")
        if name in self.deployments:
            raise HTTPProblem(409, "Conflict", f"A deployment named {OWNER}/{name} exists already.")
        model, version = (str(string(body, key, required=True)) for key in ("model", "version"))
        chosen = parts.catalog.version(model, version)
        made = Deployment(name, chosen.model, chosen.id, time.time(), **_configuration(body, {}))
        self.deployments[name] = made
        return json_response(made.json())

    async def deployment(self, _parts: Parts, request: Request) -> Response:
        return json_response(self._deployment(request).json())

    async def predict(self, parts: Parts, request: Request) -> Response:
        found = self._deployment(request)
        request.path_params.update(zip(("owner", "name"), found.model.split("/"), strict=True), id=found.version)
        return await routes.create_by_model(parts, request)

    async def change_deployment(self, parts: Parts, request: Request) -> Response:
        found = self._deployment(request)
        body = await read_json(request)
        version = parts.catalog.version(found.model, string(body, "version") or found.version)
        options = _configuration(body, vars(found))
        changed = replace(found, version=version.id, release=found.release + 1, created=time.time(), **options)
        self.deployments[found.name] = changed
        return json_response(changed.json())

    async def delete_deployment(self, _parts: Parts, request: Request) -> Response:
        found = self._deployment(request)
        if found.max_instances:
            raise HTTPProblem(400, "Bad request", "A deployment has to be offline before it is deleted.")
        del self.deployments[found.name]
        return Response(status_code=204)


def _check_hardware(given: Any) -> str:
    known = [one["sku"] for one in HARDWARE]
    if given not in known:
        errors = [{"pointer": "/hardware", "detail": f"{given!r} is not a known SKU, as GET /v1/hardware lists them"}]
        raise HTTPProblem(400, "Validation failed", errors[0]["detail"], errors=errors)
    return str(given)


def _configuration(body: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"hardware": _check_hardware(body.get("hardware", before.get("hardware")))}
    for name, most in (("min_instances", 5), ("max_instances", 20)):
        value = body.get(name, before.get(name))
        if not isinstance(value, int) or not 0 <= value <= most:
            raise invalid_field(name, f"{name} must be a whole number from 0 to {most}")
        found[name] = value
    if found["min_instances"] > found["max_instances"]:
        raise invalid_field("min_instances", "min_instances must not be more than max_instances")
    return found
