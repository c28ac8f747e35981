"""What the web page needs beyond Replicate's API: its configuration, history with search, ratings, and their export.

Knows requests and answers; leaves tables to `store`.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cogpress.config import Prompt
from cogpress.errors import CogpressError
from cogpress.playground.api.routes import GONE
from cogpress.playground.store import parsed
from cogpress.playground.web import Parts, Refused, answer, base_of, cursor, endpoint, place_of, read_json, stamp
from cogpress.prompts import Question, conversation

PAGE_SIZE = 50
_PREVIEW = 200
_NOTE = 10_000
_FILTERS = {"status": "status", "model": "model", "version": "version"}


def routes(parts: Parts) -> list[Route]:
    """The routes."""
    made = {
        ("GET", "/playground/api/config"): config,
        ("GET", "/playground/api/history"): history,
        ("PUT", "/playground/api/predictions/{id}/rating"): rate,
        ("GET", "/playground/api/predictions/{id}/rating"): rating,
        ("GET", "/playground/api/export"): export,
    }
    return [Route(path, endpoint(parts, handler), methods=[method]) for (method, path), handler in made.items()]


async def config(parts: Parts, request: Request) -> Response:
    """What there is to try; without the token, where one is required, only that it is."""
    facts = {"title": parts.title, "base_url": base_of(request), "token_required": parts.token_required}
    if not request.scope.get("authorized"):
        return answer({**facts, "models": [], "adapters": []})
    models = [
        {
            "owner": model.owner,
            "name": model.name,
            "description": model.facts.get("description"),
            "versions": [
                {"id": one.id, "label": one.label, "created_at": stamp(one.created), "verified": one.verified}
                for one in reversed(model.versions)
            ],
        }
        for model in parts.catalog.models.values()
        if model.versions
    ]
    return answer({**facts, "models": models, "adapters": parts.adapters})


async def history(parts: Parts, request: Request) -> Response:
    """Predictions, the newest first, found by their words and filtered."""
    asked = request.query_params
    conditions, values = ["1"], list[Any]()
    for name, column in _FILTERS.items():
        if asked.get(name):
            conditions.append(f"{column} = ?")
            values.append(asked[name])
    if asked.get("rating"):
        if asked["rating"] not in ("good", "bad", "none"):
            raise Refused(422, "Unprocessable", "rating must be good, bad or none.")
        conditions.append("rating IS NULL" if asked["rating"] == "none" else "rating = ?")
        values += [] if asked["rating"] == "none" else [asked["rating"]]
    words = re.findall(r"\w+", asked.get("q", ""))
    if words:
        conditions.append("seq IN (SELECT rowid FROM search WHERE search MATCH ?)")
        values.append(" ".join(f'"{word}"*' for word in words))
    elif asked.get("q", "").strip():
        conditions.append("0")  # nothing but punctuation, which is not searched for
    where = " AND ".join(conditions)
    counted = await parts.store.read(f"SELECT count(*) AS total FROM predictions WHERE {where}", *values)
    rows = await parts.store.read(
        f"SELECT * FROM predictions WHERE {where} AND seq < ? ORDER BY seq DESC LIMIT ?",
        *(*values, place_of(asked.get("cursor")), PAGE_SIZE + 1),
    )
    after = None
    if len(rows) > PAGE_SIZE:
        rows = rows[:PAGE_SIZE]
        place = {**dict(asked), "cursor": cursor("older", rows[-1]["seq"])}
        after = f"{base_of(request)}{request.url.path}?{urlencode(place)}"
    results = [_line(parts.predictions.now(parsed(row))) for row in rows]
    return answer({"results": results, "next": after, "total": counted[0]["total"]})


def _line(record: dict[str, Any]) -> dict[str, Any]:
    metrics = record["metrics"] or {}
    measured = ("predict_time", "output_token_count", "tokens_per_second", "time_to_first_token")
    return {
        "id": record["id"],
        "created_at": stamp(record["created"]),
        **{name: record[name] for name in ("model", "version", "status", "rating", "note")},
        "input_preview": _preview(_asked(record["input"])),
        "output_preview": _preview(_text(record["output"]) or (record["error"] or "")),
        **{name: metrics.get(name) for name in measured},
    }


def _asked(inputs: dict[str, Any] | None) -> str:
    """What an input asks, without its settings: the first of its texts."""
    values = {name: value for name, value in (inputs or {}).items() if isinstance(value, str) and value.strip()}
    for name in ("prompt", "fields", "messages"):
        if name in values:
            return str(values[name])
    return next(iter(values.values()), json.dumps(inputs, ensure_ascii=False) if inputs else "")


def _text(output: Any) -> str:
    if isinstance(output, list):
        return "".join(one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in output)
    return output if isinstance(output, str) else "" if output is None else json.dumps(output, ensure_ascii=False)


def _preview(text: str) -> str:
    text = " ".join(text[: 4 * _PREVIEW].split())
    return text if len(text) <= _PREVIEW else f"{text[: _PREVIEW - 1]}…"


async def _rating(parts: Parts, identifier: str) -> dict[str, Any]:
    found = await parts.store.find(identifier)
    if found is None:
        raise Refused(404, "Not found", GONE)
    return {"rating": found["rating"], "note": found["note"] or "", "correction": found["correction"]}


async def rating(parts: Parts, request: Request) -> Response:
    """What somebody thought of an answer."""
    return answer(await _rating(parts, request.path_params["id"]))


async def rate(parts: Parts, request: Request) -> Response:
    """Say whether an answer is good, why, and what would have been right."""
    identifier = request.path_params["id"]
    await _rating(parts, identifier)
    body = await read_json(request)
    value, note, correction = body.get("rating"), body.get("note") or "", body.get("correction")
    if value not in ("good", "bad", None):
        raise Refused(422, "Unprocessable", "rating must be good, bad or null.")
    for name, text in (("note", note), ("correction", correction or "")):
        if not isinstance(text, str) or len(text) > _NOTE * (1 if name == "note" else 10):
            raise Refused(422, "Unprocessable", f"{name} must be text, and not a book.")
    await parts.store.write(
        "UPDATE predictions SET rating = ?, note = ?, correction = ? WHERE id = ?",
        *(value, note or None, correction or None, identifier),
    )
    return answer(await _rating(parts, identifier))


async def export(parts: Parts, request: Request) -> Response:
    """Rated answers as examples that `train.py` reads: good ones as they are, bad ones as they were corrected."""
    wanted = request.query_params.get("rating", "all")
    if wanted not in ("good", "bad", "all"):
        raise Refused(422, "Unprocessable", "rating must be good, bad or all.")
    which = "rating IS NOT NULL" if wanted == "all" else "rating = ?"
    rows = await parts.store.read(
        f"SELECT * FROM predictions WHERE {which} ORDER BY seq", *([] if wanted == "all" else [wanted])
    )
    lines, left_out = [], 0
    for row in rows:
        made = example(parsed(row), parts.prompt)
        if made is None:
            left_out += 1
        else:
            lines.append(json.dumps(made, ensure_ascii=False) + "\n")
    headers = {
        "Content-Disposition": f'attachment; filename="examples-{wanted}.jsonl"',
        "X-Left-Out": str(left_out),
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
    return Response("".join(lines).encode(errors="replace"), media_type="application/jsonl", headers=headers)


def example(record: dict[str, Any], form: Prompt) -> dict[str, Any] | None:
    """A rated prediction as a row of training data; None where there is no right answer or nothing that was asked.

    Args:
        record: of the store.
        form: the project's prompt, which training puts around a row's prompt but not around messages.
    """
    inputs = record["input"] or {}
    right = record["correction"] if record["rating"] == "bad" else record["correction"] or _text(record["output"])
    if not right or not right.strip() or (record["rating"] == "good" and record["status"] != "succeeded"):
        return None
    system = inputs.get("system_prompt")
    try:
        if inputs.get("messages"):
            messages = json.loads(inputs["messages"]) if isinstance(inputs["messages"], str) else inputs["messages"]
            if system:
                messages = conversation(Question(messages=messages, system=system), form)
            # As a prompt, because the assistant's earlier answers in it are not what was rated, and must not be learnt.
            return {"prompt": messages, "completion": right}
        if inputs.get("fields"):
            fields = json.loads(inputs["fields"]) if isinstance(inputs["fields"], str) else inputs["fields"]
            if not isinstance(fields, dict):
                return None
            return _row(Question(fields=fields, system=system), form, right)
    except (ValueError, TypeError, KeyError, IndexError, CogpressError):
        return None  # the model refused it too
    prompt = inputs.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        return None
    return _row(Question(prompt, system=system), form, right)


def _row(question: Question, form: Prompt, right: str) -> dict[str, Any]:
    """A row of training data; a system text of its own is kept by writing the whole conversation."""
    if not question.system:
        return {"prompt": question.text if question.fields is None else question.fields, "completion": right}
    return {"messages": [*conversation(question, form), {"role": "assistant", "content": right}]}
