"""Inputs made up from a model's schema, and whether the model bears them.

An input may be refused with a sentence; what must not happen is an error of the program itself, a prediction that
never ends, or a model that answers nothing afterwards. The same seed makes the same inputs.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cogpress.cog import client, schema
from cogpress.config import Fuzz
from cogpress.push import testcases
from cogpress.push.testcases import Outcome
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
"""What people and programs put into fields of text."""

FIXED = {"max_tokens": 32}
"""Of inputs by these names, unless `push.fuzz.fixed` says otherwise: answers need not be long."""

_CRASH = re.compile(r"^(?:\w+\.)*(?P<kind>[A-Z]\w*(?:Error|Exception|Interrupt|Iteration|Exit))\b")
_REFUSALS = {"CogpressError", "ValueError"}
"""How a runner refuses an input; every other exception is a fault of it."""


def inputs(document: dict[str, Any], settings: Fuzz) -> list[dict[str, Any]]:
    """The inputs to ask with.

    Args:
        document: the model's OpenAPI document.
        settings: how many, from which seed, and what is not made up.
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
    """Files and secrets are nothing to make up."""
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
    """A bound, the default, or something between; where there is no bound, near the default."""
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
    """Ask with each input, and judge; in order.

    Args:
        replicate: where.
        version: the pushed version's id.
        asked: the inputs.
        timeout: seconds that one prediction may take.
        parallel: predictions at once.

    Raises:
        CogpressError: Replicate can not be asked.
    """

    def one(numbered: tuple[int, dict[str, Any]]) -> Outcome:
        number, given = numbered
        try:
            made = testcases.predict(replicate, version, given, timeout)
        except RefusedError as error:
            if error.status != 422:
                raise
            return Outcome(f"fuzz {number}", False, f"its own schema refuses it: {error}")
        fault = _fault(made)
        return Outcome(f"fuzz {number}", fault is None, fault or str(made["status"]), prediction=str(made["id"]))

    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(one, enumerate(asked, 1)))


def _fault(made: dict[str, Any]) -> str | None:
    """What is wrong with how a prediction ended; None where it succeeded or refused its input with a sentence."""
    if made.get("status") == "succeeded":
        return None
    error = str(made.get("error") or "")
    if made.get("timed_out") or made.get("status") != "failed":
        return error or f"it was {made.get('status')}"
    plain = client.plain_error(error)
    crash = _CRASH.match(plain)
    if not error or (crash and crash["kind"] not in _REFUSALS):
        return f"it failed without a reason that a user can act on: {plain[:200]}"
    return None
