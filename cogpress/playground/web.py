"""What the routes of api/, openai/ and the page share: JSON in and out, pagination, and errors in Replicate's form."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from cogpress.config import Prompt
from cogpress.errors import CogpressError
from cogpress.given import parse
from cogpress.playground import access
from cogpress.playground.catalog import Catalog, NotFound
from cogpress.playground.files import Files
from cogpress.playground.keys import Keys
from cogpress.playground.predictions import Predictions
from cogpress.playground.records import InvalidInput, QueueFullError
from cogpress.playground.servers import ServerPool
from cogpress.playground.sources import Sources
from cogpress.playground.store import Store, UnwritableError
from cogpress.playground.trainings import Trainings

GONE = "There is no such prediction. It was deleted because of its age or number, or the id is incomplete."

LONG_BODY = 1 << 20
"""Characters from which a body is parsed in a thread; shorter ones take a few milliseconds."""

PAGE_SIZE = 100

PAGE_BYTES = 8 << 20
"""A page of a list ends early with rows that have more: inputs and outputs can be large."""


@dataclass
class Parts:
    """The components that routes use."""

    store: Store
    keys: Keys
    pool: ServerPool
    sources: Sources
    catalog: Catalog
    predictions: Predictions
    trainings: Trainings
    files: Files
    title: str = "cogpress"
    token_required: bool = False
    private_webhooks: bool = False
    adapters: list[str] = field(default_factory=list)
    prompt: Prompt = field(default_factory=Prompt)


RETRY = {"Retry-After": "5"}
"""A header for refusals that are temporary."""


class HTTPProblem(Exception):
    """An error response in Replicate's form."""

    def __init__(self, status: int, title: str, detail: str, **more: Any) -> None:
        super().__init__(detail)
        self.body = access.error(status, title, detail, **more)


Handler = Callable[[Parts, Request], Awaitable[Response]]


def bind(parts: Parts, handlers: dict[tuple[str, str], Handler]) -> list[Route]:
    """Routes for handlers by (method, path)."""
    return [Route(path, _endpoint(parts, handler), methods=[method]) for (method, path), handler in handlers.items()]


def _endpoint(parts: Parts, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(parts, request)
        except HTTPProblem as problem:
            return access.problem(problem.body)
        except InvalidInput as error:
            fields = [
                {"type": "required", "field": "input", "description": what}
                if what == f"{name} is required"
                else {
                    "type": "value_error",
                    "field": "input" if name == "input" else f"input.{name}",
                    "description": what,
                }
                for name, what in error.fields
            ]
            return access.problem(invalid(fields).body)
        except NotFound as error:
            return access.problem(access.error(404, "Not found", str(error)))
        except QueueFullError as error:
            return access.problem(access.error(429, "Too many requests", str(error)), RETRY)
        except UnwritableError as error:
            return access.problem(access.error(503, "Unavailable", str(error)))
        except CogpressError as error:
            return access.problem(access.error(422, "Unprocessable", str(error)))

    return endpoint


def invalid(fields: list[dict[str, str]]) -> HTTPProblem:
    """The response to a request with invalid fields, each with its type, field and description."""
    detail = "".join(f"- {one['field']}: {one['description']}\n" for one in fields)
    return HTTPProblem(422, "Input validation failed", detail, invalid_fields=fields)


def invalid_field(field: str, description: str, kind: str = "value_error") -> HTTPProblem:
    """The response to a request with one invalid field."""
    return invalid([{"type": kind, "field": field, "description": description}])


def json_response(body: Any, status: int = 200) -> Response:
    """JSON in UTF-8; a lone surrogate becomes a question mark."""
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    return Response(content, status, media_type="application/json")


async def read_json(request: Request) -> dict[str, Any]:
    """A request's body.

    Raises:
        HTTPProblem: it is not a JSON object.
    """

    content = await request.body() or b"{}"
    try:
        text = content.decode(json.detect_encoding(content), "surrogatepass")
        body = parse(text) if len(text) < LONG_BODY else await asyncio.to_thread(parse, text)
    except ValueError as error:
        raise HTTPProblem(400, "Bad request", f"The body is not valid JSON: {error}.") from None
    if not isinstance(body, dict):
        raise HTTPProblem(400, "Bad request", "The body must be a JSON object.")
    return body


def _http_error(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    titles = {404: "Not found", 405: "Method not allowed", 400: "Bad request"}
    detail = "There is nothing at this address." if status == 404 else str(getattr(error, "detail", ""))
    return access.problem(access.error(status, titles.get(status, "Error"), detail))


def _gone(_request: Request, _error: Exception) -> Response:
    """For a client that left before its request was whole, which is no fault of the server to be logged as one."""
    return Response(status_code=400)


def _too_large(_request: Request, error: Exception) -> Response:
    assert isinstance(error, access.TooLarge)
    return access.problem(error.body)


def _internal_error(_request: Request, _error: Exception) -> Response:
    detail = "The server failed on this request; its log says why."
    return access.problem(access.error(500, "Internal error", detail))


EXCEPTION_HANDLERS: dict[Any, Callable[[Request, Exception], Response]] = {
    HTTPException: _http_error,
    access.TooLarge: _too_large,
    ClientDisconnect: _gone,
    Exception: _internal_error,
}
"""Responses to errors outside the routes' own handlers."""


def string(body: dict[str, Any], name: str, *, required: bool = False) -> str | None:
    """A string in a body.

    Raises:
        HTTPProblem: it is something else, or missing.
    """
    value = body.get(name)
    if (value is None and not required) or isinstance(value, str):
        return value
    raise invalid_field(name, "must be a string")


def client_of(request: Request) -> str:
    """The address, or in IPv6 the network, that a request comes from."""
    return access.client(request.client.host) if request.client else ""


def base_url(request: Request) -> str:
    """This server's address as the client sees it."""
    return f"{request.url.scheme}://{request.headers.get('host', '')}"


def timestamp(seconds: float | None) -> str | None:
    """A time as Replicate writes it, from seconds since the epoch."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


async def paginate(
    parts: Parts, request: Request, table: str, render: Callable[[dict[str, Any]], dict[str, Any]]
) -> Response:
    """A page of a table, the newest first, with the URLs of the pages before and after."""
    direction, place = _parse_cursor(request.query_params.get("cursor"))
    newer = direction == "newer"
    wanted, values = _filters(request, table)
    query = f"SELECT * FROM {table} WHERE seq {'>' if newer else '<'} ? {wanted}ORDER BY seq {'' if newer else 'DESC'}"
    rows, more = await parts.store.read_page(query, place, *values, count=PAGE_SIZE, most_bytes=PAGE_BYTES)
    if newer:
        rows.reverse()
    kept = [(name, value) for name, value in request.query_params.items() if name != "cursor"]
    here = f"{base_url(request)}{request.url.path}?{urlencode([*kept, ('cursor', '')])}"
    after = f"{here}{cursor('older', rows[-1]['seq'])}" if rows and (more or newer) else None
    before = f"{here}{cursor('newer', rows[0]['seq'])}" if rows and (more if newer else place < _END) else None
    return json_response({"previous": before, "next": after, "results": [render(row) for row in rows]})


def _filters(request: Request, table: str) -> tuple[str, list[Any]]:
    """The conditions of `created_after`, `created_before` and, for predictions, `source`, with their values."""
    wanted, values = "", list[Any]()
    for name, sign in (("created_after", ">="), ("created_before", "<")):
        if given := request.query_params.get(name):
            try:
                moment = datetime.fromisoformat(given)
            except ValueError:
                raise HTTPProblem(400, "Bad request", f"{name} must be a time such as 2026-01-31T00:00:00Z.") from None
            wanted += f"AND created {sign} ? "
            values.append((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    if table == "predictions" and (source := request.query_params.get("source")):
        wanted, values = f"{wanted}AND source = ? ", [*values, source]
    return wanted, values


_END = (1 << 63) - 1


def cursor(direction: str, place: int) -> str:
    """A position in a list as text for a URL: `older` or `newer` than a row's number."""
    return base64.urlsafe_b64encode(f"{direction}:{place}".encode()).decode().rstrip("=")


def _parse_cursor(given: str | None) -> tuple[str, int]:
    if not given:
        return "older", _END
    try:
        direction, _, place = base64.urlsafe_b64decode(given + "=" * (-len(given) % 4)).decode().partition(":")
        if direction not in ("older", "newer"):
            raise ValueError
        return direction, max(0, min(int(place), _END))
    except ValueError:
        raise HTTPProblem(400, "Bad request", "The cursor is not valid.") from None


def cursor_place(given: str | None) -> int:
    """The row's number in a cursor; after the newest row if there is none."""
    return _parse_cursor(given)[1]
