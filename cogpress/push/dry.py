"""What a push would run and send, step by step, without running, asking or writing anything.

Knows how it is shown; every command and body is made by who makes it in a push.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from cogpress.cog import program as cog
from cogpress.errors import CogpressError
from cogpress.preflight import machine
from cogpress.push import cases, fuzz, journal, orders, steps
from cogpress.push.steps import Push

_LONGEST = 60

NEW = "(the new version)"
"""Stands for an id that is only known when the version is there."""


def show(push: Push, console: Console) -> None:
    """Print each step with its commands and requests; what was done before and is not done again is said.

    Raises:
        CogpressError: as a push would before its first step.
    """
    console.print(Text("Dry run: nothing is run, asked or written. A push would do this:", "bold"))
    for number, (name, before, lines) in enumerate(_steps(push), 1):
        told = Text("  done before", "green") if before else Text()
        console.print(Text.assemble((f"\n{number}. {name}", "bold"), told))
        for line in lines:
            console.print(Padding(Text(line, "dim" if before else ""), (0, 0, 0, 3)))


def _steps(push: Push) -> Iterator[tuple[str, bool, list[str]]]:
    """Name, whether it was done before with all that it depends on as it is, and what it does."""
    order, settings = push.order, push.settings
    sku = _sku(push)
    login = [" ".join(cog.LOGIN)] if machine.logged_in() is False else []
    named = "" if order.hardware == "auto" else f" --hardware {order.hardware}"
    yield steps.PREFLIGHT, False, [f"scripts/preflight {order.destination}{named}", *login]
    models = {order.test_model: "private", order.destination: order.visibility}
    bodies = [f"POST /v1/models {_json(orders.model_body(name, sku, seen))}" for name, seen in models.items()]
    yield steps.MODELS, False, [f"{body}, where it does not exist" for body in bodies]
    allowed = ", which are allowed" if order.allow_breaking else ", which end the push"
    compared = f"inputs and output, with those of the live version of {order.destination}: breaking changes"
    yield steps.BESIDE, False, [f"compare the project's {compared}{allowed}"]
    image = orders.fingerprint(order.root, settings)
    tested = _before(push, steps.TEST_PUSH, push.push_depends(order.test_model, image, None))
    yield steps.TEST_PUSH, bool(tested), [" ".join(cog.command(order.test_model, settings.push))]
    version = str(tested["version"]) if tested else None
    yield steps.PUSHED, False, [f"compare its {compared}{allowed}"]
    yield from _asked(push, version)
    if trained := settings.push.training:
        place = f"/v1/models/{order.test_model}/versions/{version or NEW}/trainings"
        given = {**trained.input, "train_data": f"({trained.data})"}
        yield (
            steps.TRAINING,
            False,
            [
                f"POST /v1/files with {trained.data}",
                f"POST {place} {_json({'destination': order.test_model, 'input': given})}",
                *(f"{_predict('(the trained version)', case.input)}" for case in trained.tests),
            ],
        )
    done = _before(push, steps.REAL_PUSH, push.push_depends(order.destination, image, version)) if version else {}
    yield steps.REAL_PUSH, bool(done), [" ".join(cog.command(order.destination, settings.push))]
    if wanted := settings.push.deployment:
        body = orders.deployment_body(wanted, order.destination, str(done.get("version") or NEW), sku)
        changed = {key: value for key, value in body.items() if key not in ("name", "model")}
        route = f"PATCH /v1/deployments/(your account)/{wanted.name} {_json(changed)}, where it exists"
        yield steps.DEPLOYMENT, False, [f"POST /v1/deployments {_json(body)}, or", route]


def _asked(push: Push, version: str | None) -> Iterator[tuple[str, bool, list[str]]]:
    settings = push.settings.push
    if settings.tests:
        done = version is not None and bool(_before(push, steps.TESTS, push.tests_depend(version)))
        lines = [
            f"{_predict(version, case.input)}: {', '.join(cases.asks(case)) or 'no error'}" for case in settings.tests
        ]
        yield steps.TESTS, done, lines
    if push.compared_inputs():
        told = "where there is a live version, the inputs of these tests to both versions; equal answers are counted"
        yield steps.SAME, False, [told]
    if made := fuzz.inputs(push.local_schema(), settings.fuzz):
        done = version is not None and bool(_before(push, steps.FUZZ, push.fuzz_depends(version, made)))
        example = orders.example(push.settings)
        after = [] if example is None else [f"{_predict(version, example)}: the first test again"]
        yield steps.FUZZ, done, [*(_predict(version, given) for given in made), *after]
    if settings.parity:
        told = f"POST /v1/predictions for at most {settings.rows} held-out examples, compared with transformers here"
        yield steps.PARITY, False, [told]


def _before(push: Push, name: str, depends: Any) -> dict[str, Any]:
    """The result of a step that was done with the same; empty where it was not."""
    found = push.journal.find(name, journal.key(depends))
    return found.result if found is not None and found.outcome == "passed" else {}


def _predict(version: str | None, given: dict[str, Any]) -> str:
    return f"POST /v1/predictions {_json({'version': version or NEW, 'input': given})}"


def _sku(push: Push) -> str:
    try:
        return orders.machine(push.order, push.settings, ask=False)
    except CogpressError:
        return "(none: name it with --hardware)"


def _json(content: Any) -> str:
    """In ASCII where something in it is not for a terminal; of long texts the beginning and the length."""
    text = json.dumps(_cut(content), ensure_ascii=False)
    return text if text.isprintable() else json.dumps(_cut(content))


def _cut(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _cut(one) for name, one in content.items()}
    if isinstance(content, str) and len(content) > _LONGEST:
        return f"{content[: _LONGEST // 2]} … ({len(content)} characters)"
    return content
