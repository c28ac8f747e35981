"""The local Replicate put together: one ASGI application of the API, the web page and its own routes.

Knows which part answers which path; leaves the answers to the parts.
"""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

PAGE = Path(__file__).parent / "page"

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""The page loads nothing from elsewhere and runs no script that is not a file of its own."""


async def page(_request: Request) -> Response:
    """The one page behind `/`, `/p/ID` and `/compare`."""
    return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)


def routes() -> list[Route | Mount]:
    """What the page is made of."""
    return [
        Route("/", page),
        Route("/p/{id}", page),
        Route("/compare", page),
        Mount("/static", StaticFiles(directory=PAGE, check_dir=False)),
    ]


def application() -> Starlette:
    """The page alone; the API follows."""
    return Starlette(routes=routes())
