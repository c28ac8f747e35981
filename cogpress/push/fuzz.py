"""Fuzzing: predictions with inputs generated from the model's schema.

The model may refuse an input with a message for the user; it must not crash, hang, or stop answering afterwards.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cogpress.cog import client, schema
from cogpress.config import Fuzz
from cogpress.engines.base import CRASHED
from cogpress.push import testcases
from cogpress.push.testcases import Outcome
from cogpress.replicate import api
from cogpress.replicate.api import RefusedError, Replicate

TEXTS = (
    "",
    " ",
    "word",
    "Zażółć gęślą jaźń 漢字 🦊",
    "a\nb\r\n\tc",
    '"quoted" \\ {braces} [brackets] <tags>',
    "null",
    "-1",
    "e\u0301\u200d\u2028\u202e",
    "long " * 200,
)
"""Values for text inputs."""

FIXED = {"max_tokens": 32}
"""Values of inputs by these names, unless `push.fuzz.fixed` has others: answers need not be long."""

_CRASH = re.compile(r"^(?:\w+\.)*(?P<kind>[A-Z]\w*(?:Error|Exception|Interrupt|Iteration|Exit))\b")
_REFUSALS = {"CogpressError", "ValueError"}
"""A runner refuses an input with one of these; any other exception is a crash."""


def inputs(document: dict[str, Any], settings: Fuzz) -> list[dict[str, Any]]:
    """Inputs for the predictions; the same seed gives the same ones.

    Args:
        document: the model's OpenAPI document.
        settings: how many, from which seed, and which inputs are not generated.
    """
    chance = random.Random(settings.seed)  # not for secrets
    fields = schema.fields(document)
    fixed = {**{name: value for name, value in FIXED.items() if name in fields}, **settings.fixed}
    free = {
        name: field
        for name, field in fields.items()
        if name not in fixed and name not in settings.leave_out and not _special(field)
    }
    made = []
    for _ in range(settings.rounds):
        given = {
            name: _value(field, chance)
            for name, field in free.items()
            if field.get("required") or chance.random() < 0.5
        }
        made.append({**given, **fixed})
    return made


def _special(field: dict[str, Any]) -> bool:
    """Files and secrets are not generated."""
    return field.get("format") in ("uri", "password") or bool(field.get("x-cog-secret"))


def _value(field: dict[str, Any], chance: random.Random) -> Any:
    if "enum" in field:
        return chance.choice(field["enum"])
    kind = field.get("type")
    if kind == "boolean":
        return chance.random() < 0.5
    if kind in ("integer", "number"):
        return _number(field, chance)
    if kind == "array":
        return [_value(field.get("items") or {}, chance) for _ in range(chance.randrange(3))]
    if kind == "object":
        return {}
    least, most = field.get("minLength", 0), field.get("maxLength")
    text = chance.choice(TEXTS)
    text = text + "x" * (least - len(text))
    return text[:most]


def _number(field: dict[str, Any], chance: random.Random) -> Any:
    """A bound, the default, or a value between the bounds; without bounds, near the default."""
    default = field.get("default") or 0
    low, high = field.get("minimum"), field.get("maximum")
    low = low if low is not None else min(default, high if high is not None else default) - 10
    high = high if high is not None else max(default, low) + 10
    whole = field.get("type") == "integer"
    between = chance.randint(int(low), int(high)) if whole else round(chance.uniform(low, high), 3)
    return chance.choice([low, high, default if low <= default <= high else low, between])


def run(
    replicate: Replicate, version: str, asked: Sequence[dict[str, Any]], *, timeout: float, parallel: int
) -> list[Outcome]:
    """Run a prediction for each input and judge it; outcomes in order.

    Args:
        replicate: where.
        version: the pushed version's id.
        asked: the inputs.
        timeout: seconds for each prediction.
        parallel: concurrent predictions.

    Raises:
        CogpressError: Replicate cannot be reached, or refuses.
    """

    def one(numbered: tuple[int, dict[str, Any]]) -> Outcome:
        number, given = numbered
        try:
            made = testcases.predict(replicate, version, given, timeout)
        except RefusedError as error:
            if not error.input:
                raise
            return Outcome(f"fuzz {number}", False, f"its own schema rejects it: {error}")
        fault = _fault(made)
        seconds = testcases.seconds_of(made)
        return Outcome(f"fuzz {number}", fault is None, fault or str(made["status"]), seconds, str(made["id"]))

    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(one, enumerate(asked, 1)))


def _fault(made: dict[str, Any]) -> str | None:
    """The fault of a prediction; None where it succeeded or refused its input with a message for the user."""
    if made.get("status") == "succeeded":
        return None
    error = str(made.get("error") or "")
    if code := api.code_of(made):
        return code
    if made.get("timed_out") or made.get("status") != "failed":
        return error or f"it was {made.get('status')}"
    said = client.said(error).strip()  # not the sentence that stands in for a dead worker's
    crash = _CRASH.match(said)
    if said == CRASHED:
        return f"it crashed: {said}"
    if not said or (crash and crash["kind"] not in _REFUSALS):
        return f"it failed without a message for the user: {(said or error or 'nothing at all')[:200]}"
    return None
