"""Models, versions, files and the account in Replicate's API."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from cogpress.given import parse
from cogpress.playground.catalog import OWNER
from cogpress.playground.files import StoredFile
from cogpress.playground.records import HostedModel, Version
from cogpress.playground.web import HTTPProblem, Parts, base_url, bind, invalid_field, json_response, timestamp
from cogpress.replicate.api import UPLOAD_BYTES

_METADATA = 64 << 10
"""Most characters of a file's metadata, which lists of files have in memory."""

ACCOUNT = {"type": "user", "username": OWNER, "name": "This machine", "github_url": None}


def routes(parts: Parts, webhook_secret: str) -> list[Route]:
    """The routes; those of models, which OpenAI's clients call too, are in the application.

    Args:
        parts: what they work with.
        webhook_secret: by which clients verify webhooks.
    """

    async def secret(_parts: Parts, _request: Request) -> Response:
        """`GET /v1/webhooks/default/secret`."""
        return json_response({"key": webhook_secret})

    return bind(
        parts,
        {
            ("GET", "/v1/models/{owner}/{name}/versions"): versions,
            ("GET", "/v1/models/{owner}/{name}/versions/{id}"): version,
            ("DELETE", "/v1/models/{owner}/{name}/versions/{id}"): delete_version,
            ("GET", "/v1/files"): files,
            ("POST", "/v1/files"): upload,
            ("GET", "/v1/files/{id}"): file,
            ("DELETE", "/v1/files/{id}"): delete_file,
            ("GET", "/v1/files/{id}/download"): download,
            ("GET", "/v1/account"): account,
            ("GET", "/v1/webhooks/default/secret"): secret,
        },
    )


def page(results: list[dict[str, Any]]) -> dict[str, Any]:
    """A list that fits on one page."""
    return {"previous": None, "next": None, "results": results}


def model_json(base: str, model: HostedModel) -> dict[str, Any]:
    """A model in Replicate's form."""
    return {
        "url": f"{base}/",
        "owner": model.owner,
        "name": model.name,
        "visibility": "private",
        **dict.fromkeys(("description", "github_url", "paper_url", "license_url", "cover_image_url")),
        "run_count": 0,
        "default_example": None,
        "latest_version": version_json(model.versions[-1]) if model.versions else None,
    }


def version_json(version: Version) -> dict[str, Any]:
    """A version in Replicate's form, and its label."""
    return {
        "id": version.id,
        "created_at": timestamp(version.created),
        "cog_version": version.cog_version,
        "openapi_schema": version.schema,
        "label": version.label,
    }


def model_of(parts: Parts, request: Request) -> HostedModel:
    """The model in a path.

    Raises:
        NotFound: there is none.
    """
    return parts.catalog.model(f"{request.path_params['owner']}/{request.path_params['name']}")


def version_of(parts: Parts, request: Request) -> Version:
    """The version in a path.

    Raises:
        NotFound: there is none.
    """
    return parts.catalog.version(model_of(parts, request).full_name, request.path_params["id"])


async def versions(parts: Parts, request: Request) -> Response:
    """`GET /v1/models/OWNER/NAME/versions`, the newest first."""
    return json_response(page(list(map(version_json, reversed(model_of(parts, request).versions)))))


async def version(parts: Parts, request: Request) -> Response:
    """`GET /v1/models/OWNER/NAME/versions/ID`."""
    return json_response(version_json(version_of(parts, request)))


async def delete_version(parts: Parts, request: Request) -> Response:
    """`DELETE /v1/models/OWNER/NAME/versions/ID`."""
    parts.catalog.remove_version(version_of(parts, request))
    return Response(status_code=202)


def file_json(base: str, found: StoredFile) -> dict[str, Any]:
    """A file in Replicate's form."""
    return {
        "id": found.id,
        "name": found.name,
        "content_type": found.content_type,
        "size": found.size,
        "etag": found.sha256,
        "checksums": {"sha256": found.sha256},
        "metadata": found.metadata,
        "created_at": timestamp(found.created),
        "expires_at": None,
        "urls": {"get": f"{base}/v1/files/{found.id}"},
    }


async def _file(parts: Parts, request: Request) -> StoredFile:
    found = await parts.files.find(request.path_params["id"])
    if found is None:
        raise HTTPProblem(404, "Not found", "There is no such file, or it was removed.")
    return found


async def upload(parts: Parts, request: Request) -> Response:
    """`POST /v1/files`: a form with a file `content` and, as text or file, JSON `metadata`."""
    async with request.form(max_files=2, max_fields=10) as form:
        content = form.get("content")
        if not isinstance(content, UploadFile):
            raise invalid_field("content", "content must be a file in a multipart form")
        if (content.size or 0) > UPLOAD_BYTES:
            told = f"{content.filename} has {(content.size or 0) / 1e6:,.0f} MB; a file may have up to"
            raise HTTPProblem(413, "Request too large", f"{told} {UPLOAD_BYTES / 1e6:.0f}, as on Replicate.")
        given = form.get("metadata")
        text = (await given.read(_METADATA + 1)).decode(errors="replace") if isinstance(given, UploadFile) else given
        try:
            metadata = parse(text or "{}") if len(text or "") <= _METADATA else None
        except ValueError:
            metadata = None
        if not isinstance(metadata, dict):
            raise invalid_field("metadata", "metadata must be a JSON object of at most 64 KB")
        kind = content.content_type or "application/octet-stream"
        made = await parts.files.add(content.file, content.filename or "", kind, metadata)
    return json_response(file_json(base_url(request), made), 201)


async def files(parts: Parts, request: Request) -> Response:
    """`GET /v1/files`."""
    base = base_url(request)
    return json_response(page([file_json(base, one) for one in await parts.files.all()]))


async def file(parts: Parts, request: Request) -> Response:
    """`GET /v1/files/ID`."""
    return json_response(file_json(base_url(request), await _file(parts, request)))


async def delete_file(parts: Parts, request: Request) -> Response:
    """`DELETE /v1/files/ID`."""
    await parts.files.remove(await _file(parts, request))
    return Response(status_code=204)


async def download(parts: Parts, request: Request) -> Response:
    """`GET /v1/files/ID/download?key=…`: the content, for anyone who has this URL."""
    if not parts.keys.match("file", request.path_params["id"], request.query_params.get("key", "")):
        raise HTTPProblem(404, "Not found", "There is no such file.")
    found = await _file(parts, request)
    return FileResponse(parts.files.path(found), headers=parts.files.headers(found))


async def account(_parts: Parts, _request: Request) -> Response:
    """`GET /v1/account`."""
    return json_response(ACCOUNT)
