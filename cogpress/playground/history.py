"""The page's own routes beside Replicate's API: configuration, searchable history, ratings and their export."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cogpress.options import FormField
from cogpress.playground.export import example, output_text
from cogpress.playground.store import parsed
from cogpress.playground.web import (
    GONE,
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
    rows = await parts.store.read(
        f"SELECT * FROM predictions WHERE {where} AND seq < ? ORDER BY seq DESC LIMIT ?",
        *(*values, cursor_place(asked.get("cursor")), PAGE_SIZE + 1),
    )
    after = None
    if len(rows) > PAGE_SIZE:
        rows = rows[:PAGE_SIZE]
        place = {**dict(asked), "cursor": cursor("older", rows[-1]["seq"])}
        after = f"{base_url(request)}{request.url.path}?{urlencode(place)}"
    results = [_summary(parts.predictions.now(parsed(row))) for row in rows]
    return json_response({"results": results, "next": after, "total": counted[0]["total"]})


def _summary(record: dict[str, Any]) -> dict[str, Any]:
    metrics = record["metrics"] or {}
    measured = ("predict_time", "output_token_count", "tokens_per_second", "time_to_first_token")
    return {
        "id": record["id"],
        "created_at": timestamp(record["created"]),
        **{name: record[name] for name in ("model", "version", "status", "rating", "note")},
        "input_preview": _preview(_input_text(record["input"])),
        "output_preview": _preview(output_text(record["output"]) or (record["error"] or "")),
        **{name: metrics.get(name) for name in measured},
    }


def _input_text(inputs: dict[str, Any] | None) -> str:
    """The main text of an input, without its settings."""
    values = {name: value for name, value in (inputs or {}).items() if isinstance(value, str) and value.strip()}
    for name in ("prompt", "fields", "messages"):
        if name in values:
            return str(values[name])
    return next(iter(values.values()), json.dumps(inputs, ensure_ascii=False) if inputs else "")


def _preview(text: str) -> str:
    text = " ".join(text[: 4 * _PREVIEW].split())
    return text if len(text) <= _PREVIEW else f"{text[: _PREVIEW - 1]}…"


async def _rating(parts: Parts, identifier: str) -> dict[str, Any]:
    found = await parts.store.find(identifier)
    if found is None:
        raise HTTPProblem(404, "Not found", GONE)
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
    rows = await parts.store.read(
        f"SELECT * FROM predictions WHERE {which} ORDER BY seq", *([] if wanted == "all" else [wanted])
    )
    examples = [example(parsed(row), parts.prompt) for row in rows]
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in examples if one is not None]
    headers = {
        "Content-Disposition": f'attachment; filename="examples-{wanted}.jsonl"',
        "X-Left-Out": str(len(rows) - len(lines)),
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
    return Response("".join(lines).encode(errors="replace"), media_type="application/jsonl", headers=headers)
