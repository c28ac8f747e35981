"""What all routes share: the parts that they call, JSON in and out, pages of lists, errors in Replicate's form."""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from cogpress.config import Prompt
from cogpress.errors import CogpressError
from cogpress.playground import access
from cogpress.playground.catalog import NotFound
from cogpress.playground.predictions import InvalidInput

if TYPE_CHECKING:
    from cogpress.playground.api.streams import Streams
    from cogpress.playground.api.webhooks import Webhooks
    from cogpress.playground.catalog import Catalog
    from cogpress.playground.files import Files
    from cogpress.playground.predictions import Predictions
    from cogpress.playground.store import Store
    from cogpress.playground.trainings import Trainings

PAGE_SIZE = 100


@dataclass
class Parts:
    """What the routes work with."""

    store: Store
    catalog: Catalog
    predictions: Predictions
    trainings: Trainings
    files: Files
    streams: Streams
    webhooks: Webhooks
    title: str = "cogpress"
    token_required: bool = False
    adapters: list[str] = field(default_factory=list)
    prompt: Prompt = field(default_factory=Prompt)


class Refused(Exception):
    """An answer other than what was asked for, in Replicate's form."""

    def __init__(self, status: int, title: str, detail: str, **more: Any) -> None:
        super().__init__(detail)
        self.body = access.error(status, title, detail, **more)


Handler = Callable[[Parts, Request], Awaitable[Response]]


def endpoint(parts: Parts, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """A handler as Starlette calls it, whose errors are answers."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(parts, request)
        except Refused as refused:
            return problem(refused.body)
        except InvalidInput as invalid:
            return problem(invalid_input(invalid))
        except NotFound as missing:
            return problem(access.error(404, "Not found", str(missing)))
        except CogpressError as wrong:
            return problem(access.error(422, "Unprocessable", str(wrong)))

    return answer


def invalid_input(invalid: InvalidInput) -> dict[str, Any]:
    """The body of the answer to an input that the schema does not allow."""
    fields = [
        {"type": "value_error", "field": "input" if name == "input" else f"input.{name}", "description": what}
        for name, what in invalid.fields
    ]
    detail = "".join(f"- {one['field']}: {one['description']}\n" for one in fields)
    return access.error(422, "Input validation failed", detail, invalid_fields=fields)


def problem(body: dict[str, Any]) -> Response:
    """An error's answer."""
    return answer(body, status=int(body["status"]), media_type="application/problem+json")


def answer(body: Any, status: int = 200, media_type: str = "application/json") -> Response:
    """JSON; half a character, which no text in UTF-8 can hold, becomes a question mark."""
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    return Response(content, status, media_type=media_type)


async def read_json(request: Request) -> dict[str, Any]:
    """A request's body.

    Raises:
        Refused: it is no JSON object.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        body = json.loads(await request.body() or b"{}", parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "Bad request", f"The body is not JSON: {error}.") from None
    if not isinstance(body, dict):
        raise Refused(400, "Bad request", "The body must be a JSON object.")
    return body


def text_of(body: dict[str, Any], name: str, *, required: bool = False) -> str | None:
    """A text in a body.

    Raises:
        Refused: it is something else, or is missing.
    """
    value = body.get(name)
    if (value is None and not required) or isinstance(value, str):
        return value
    raise Refused(422, "Input validation failed", f"- {name}: must be text\n", invalid_fields=[_field(name)])


def _field(name: str) -> dict[str, str]:
    return {"type": "value_error", "field": name, "description": f"{name} must be text"}


def base_of(request: Request) -> str:
    """How the asker reaches this server."""
    return f"{request.url.scheme}://{request.headers.get('host', '')}"


def stamp(seconds: float | None) -> str | None:
    """A time as Replicate writes it."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


async def page_of(
    parts: Parts, request: Request, table: str, render: Callable[[dict[str, Any]], dict[str, Any]]
) -> Response:
    """A page of a list, the newest first, with the addresses of those before and after it."""
    direction, place = _cursor(request.query_params.get("cursor"))
    newer = direction == "newer"
    query = f"SELECT * FROM {table} WHERE seq {'>' if newer else '<'} ? ORDER BY seq {'' if newer else 'DESC'} LIMIT ?"
    rows = await parts.store.read(query, place, PAGE_SIZE + 1)
    more = len(rows) > PAGE_SIZE
    rows = rows[:PAGE_SIZE]
    if newer:
        rows.reverse()
    here = f"{base_of(request)}{request.url.path}?cursor="
    after = f"{here}{cursor('older', rows[-1]['seq'])}" if rows and (more or newer) else None
    before = f"{here}{cursor('newer', rows[0]['seq'])}" if rows and (more if newer else place < _ALL) else None
    return answer({"previous": before, "next": after, "results": [render(row) for row in rows]})


_ALL = (1 << 63) - 1


def cursor(direction: str, place: int) -> str:
    """A place in a list, for an address."""
    return base64.urlsafe_b64encode(f"{direction}:{place}".encode()).decode().rstrip("=")


def _cursor(given: str | None) -> tuple[str, int]:
    if not given:
        return "older", _ALL
    try:
        direction, _, place = base64.urlsafe_b64decode(given + "=" * (-len(given) % 4)).decode().partition(":")
        if direction not in ("older", "newer"):
            raise ValueError
        return direction, max(0, min(int(place), _ALL))
    except ValueError:
        raise Refused(400, "Bad request", "The cursor is none that this server made.") from None


def place_of(given: str | None) -> int:
    """The place after which a list goes on."""
    return _cursor(given)[1]
