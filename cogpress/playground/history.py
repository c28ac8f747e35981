"""The page's own routes beside Replicate's API: configuration, searchable history, ratings and their export."""

from __future__ import annotations

import json
import re
import tempfile
from typing import Any
from urllib.parse import urlencode

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from cogpress.options import FormField
from cogpress.playground.export import example
from cogpress.playground.records import Prediction
from cogpress.playground.store import INPUT_BREAK, parsed, searched_input, searched_output
from cogpress.playground.web import (
    GONE,
    PAGE_BYTES,
    HTTPProblem,
    Parts,
    base_url,
    bind,
    cursor,
    cursor_place,
    json_response,
    read_json,
    timestamp,
)

PAGE_SIZE = 50
_PREVIEW = 200
_IN_MEMORY = 1 << 20  # bytes
_NOTE, _CORRECTION = 10_000, 100_000
"""Most characters."""

_FILTERS = ("status", "model", "version")


def routes(parts: Parts) -> list[Route]:
    """The routes."""
    return bind(
        parts,
        {
            ("GET", "/playground/api/config"): config,
            ("GET", "/playground/api/history"): history,
            ("PUT", "/playground/api/predictions/{id}/rating"): rate,
            ("GET", "/playground/api/predictions/{id}/rating"): rating,
            ("GET", "/playground/api/export"): export,
        },
    )


async def config(parts: Parts, request: Request) -> Response:
    """The models to try; without a required token, only that it is required."""
    facts = {"title": parts.title, "base_url": base_url(request), "token_required": parts.token_required}
    if not request.scope.get("authorized"):
        return json_response({**facts, "models": [], "adapters": []})
    models = [
        {
            "owner": model.owner,
            "name": model.name,
            "versions": [
                {"id": one.id, "label": one.label, "created_at": timestamp(one.created), "verified": one.verified}
                for one in reversed(model.versions)
            ],
        }
        for model in parts.catalog.models.values()
        if model.versions
    ]
    fields = {name: _example(one) for name, one in parts.prompt.fields.items()}
    return json_response({**facts, "models": models, "adapters": parts.adapters, "fields": fields})


def _example(field: FormField) -> Any:
    """A field's example as its control shows it: a list one item a line; None where it has none."""
    return "\n".join(field.example) if isinstance(field.example, list) else field.example


_METRICS = ("predict_time", "output_token_count", "tokens_per_second", "time_to_first_token")
_SHOWN = ("id", "model", "version", "status", "rating", "note", *_METRICS)
_SUMMARY = f"""SELECT seq, created, id, model, version, status, rating, note,
    {", ".join(f"json_extract(metrics, '$.{name}') AS {name}" for name in _METRICS)},
    substr(search.input, 1, {4 * _PREVIEW}) AS asked, substr(search.output, 1, {4 * _PREVIEW}) AS answered,
    substr(iif(json_valid(error), json_extract(error, '$'), error), 1, {4 * _PREVIEW}) AS failure
    FROM predictions LEFT JOIN search ON search.rowid = seq"""
"""What a line of the list shows, and no more: inputs and outputs can have megabytes."""


async def history(parts: Parts, request: Request) -> Response:
    """Predictions, the newest first, filtered by words, state, model, version and rating."""
    asked = request.query_params
    conditions, values = ["1"], list[Any]()
    for name in _FILTERS:
        if asked.get(name):
            conditions.append(f"{name} = ?")
            values.append(asked[name])
    if asked.get("rating"):
        if asked["rating"] not in ("good", "bad", "none"):
            raise HTTPProblem(422, "Unprocessable", "rating must be good, bad or none.")
        conditions.append("rating IS NULL" if asked["rating"] == "none" else "rating = ?")
        values += [] if asked["rating"] == "none" else [asked["rating"]]
    words = re.findall(r"\w+", asked.get("q", ""))
    if words:
        conditions.append("seq IN (SELECT rowid FROM search WHERE search MATCH ?)")
        values.append(" ".join(f'"{word}"*' for word in words))
    elif asked.get("q", "").strip():
        conditions.append("0")  # nothing but punctuation, which is not indexed
    where = " AND ".join(conditions)
    counted = await parts.store.read(f"SELECT count(*) AS total FROM predictions WHERE {where}", *values)
    rows, more = await parts.store.read_page(
        f"{_SUMMARY} WHERE {where} AND seq < ? ORDER BY seq DESC",
        *(*values, cursor_place(asked.get("cursor"))),
        count=PAGE_SIZE,
    )
    after = None
    if more:
        place = {**dict(asked), "cursor": cursor("older", rows[-1]["seq"])}
        after = f"{base_url(request)}{request.url.path}?{urlencode(place)}"
    results = [_summary(row, parts.predictions.find(row["id"])) for row in rows]
    return json_response({"results": results, "next": after, "total": counted[0]["total"]})


def _summary(row: dict[str, Any], alive: Prediction | None) -> dict[str, Any]:
    """A line of the list, from a row of `_SUMMARY`, brought up to date if its prediction is in memory."""
    shown = {name: row[name] for name in _SHOWN}
    asked, answered = row["asked"] or "", row["answered"] or row["failure"] or ""
    if alive is not None:
        shown |= {"status": alive.status, **{name: alive.metrics.get(name) for name in _METRICS}}
        asked, answered = searched_input(alive.input), searched_output(alive.output) or alive.error or ""
    return {
        "created_at": timestamp(row["created"]),
        **shown,
        "input_preview": _preview(asked.partition(INPUT_BREAK)[0]),
        "output_preview": _preview(answered),
    }


def _preview(text: str) -> str:
    text = " ".join(text[: 4 * _PREVIEW].split())
    return text if len(text) <= _PREVIEW else f"{text[: _PREVIEW - 1]}…"


async def _rating(parts: Parts, identifier: str) -> dict[str, Any]:
    rows = await parts.store.read("SELECT rating, note, correction FROM predictions WHERE id = ?", identifier)
    if not rows:
        raise HTTPProblem(404, "Not found", GONE)
    [found] = rows
    return {"rating": found["rating"], "note": found["note"] or "", "correction": found["correction"]}


async def rating(parts: Parts, request: Request) -> Response:
    """The rating of an answer."""
    return json_response(await _rating(parts, request.path_params["id"]))


async def rate(parts: Parts, request: Request) -> Response:
    """Rate an answer good or bad, with a note and the right answer."""
    identifier = request.path_params["id"]
    await _rating(parts, identifier)
    body = await read_json(request)
    value, note, correction = body.get("rating"), body.get("note") or "", body.get("correction")
    if value not in ("good", "bad", None):
        raise HTTPProblem(422, "Unprocessable", "rating must be good, bad or null.")
    for name, text, most in (("note", note, _NOTE), ("correction", correction or "", _CORRECTION)):
        if not isinstance(text, str) or len(text) > most:
            raise HTTPProblem(422, "Unprocessable", f"{name} must be a string of at most {most:,} characters.")
    await parts.store.write(
        "UPDATE predictions SET rating = ?, note = ?, correction = ? WHERE id = ?",
        *(value, note or None, correction or None, identifier),
    )
    return json_response(await _rating(parts, identifier))


async def export(parts: Parts, request: Request) -> Response:
    """Rated answers as a JSONL file for `train.py`; the header X-Left-Out counts those without a right answer."""
    wanted = request.query_params.get("rating", "all")
    if wanted not in ("good", "bad", "all"):
        raise HTTPProblem(422, "Unprocessable", "rating must be good, bad or all.")
    which = "rating IS NOT NULL" if wanted == "all" else "rating = ?"
    values = [] if wanted == "all" else [wanted]
    place, left_out, more = 0, 0, True
    spool = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - closed once it is sent
    while more:
        rows, more = await parts.store.read_page(
            f"SELECT * FROM predictions WHERE {which} AND seq > ? ORDER BY seq",
            *(*values, place),
            count=PAGE_SIZE,
            most_bytes=PAGE_BYTES,
        )
        for row in rows:
            place, one = row["seq"], example(parsed(row), parts.prompt)
            left_out += one is None
            if one is not None:
                spool.write((json.dumps(one, ensure_ascii=False) + "\n").encode(errors="replace"))
    headers = {
        "Content-Disposition": f'attachment; filename="examples-{wanted}.jsonl"',
        "X-Left-Out": str(left_out),
        "Content-Length": str(spool.tell()),
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
    spool.seek(0)
    closed = BackgroundTask(spool.close)
    blocks = iter(lambda: spool.read(_IN_MEMORY), b"")
    return StreamingResponse(blocks, media_type="application/jsonl", headers=headers, background=closed)
