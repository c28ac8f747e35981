"""`--dry-run`: the commands and requests of a push, step by step, without running, asking or writing anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from cogpress.cog import program as cog
from cogpress.config import Config
from cogpress.errors import CogpressError
from cogpress.preflight import machine
from cogpress.push import deployment, fuzz, journal, run, testcases
from cogpress.push.run import PushRun
from cogpress.push.target import PushTarget, example, fingerprint
from cogpress.replicate import routes
from cogpress.replicate.api import Replicate
from cogpress.replicate.routes import Call

_LONGEST = 60

NEW = "(the new version)"
"""In the place of an id that is known only when the version exists."""


def show(target: PushTarget, settings: Config, console: Console) -> None:
    """Print each step with its commands and requests; steps that would not run again are marked.

    Raises:
        CogpressError: as a push would before its first step.
    """
    push = PushRun(target, settings, Replicate("none"), console)
    console.print(Text("Dry run: nothing is run, asked or written. A push would do this:", "bold"))
    for number, (name, before, lines) in enumerate(_steps(push), 1):
        told = Text("  done before", "green") if before else Text()
        console.print(Text.assemble((f"\n{number}. {name}", "bold"), told))
        for line in lines:
            console.print(Padding(Text(line, "dim" if before else ""), (0, 0, 0, 3)))


def _steps(push: PushRun) -> Iterator[tuple[str, bool, list[str]]]:
    """Each step's name, whether it is done with everything that it depends on unchanged, and what it does."""
    target, settings = push.target, push.settings
    sku = _sku(push)
    login = [" ".join(cog.LOGIN)] if machine.logged_in() is False else []
    named = (" --cpu" if target.cpu else "") + ("" if target.hardware == "auto" else f" --hardware {target.hardware}")
    yield run.PREFLIGHT, False, [f"scripts/preflight {target.destination}{named}", *login]
    models = {target.test_model: "private", target.destination: target.visibility}
    calls = [routes.create_model(name, seen, sku) for name, seen in models.items()]
    yield run.MODELS, False, [f"{_shown(call)}, where it does not exist" for call in calls]
    allowed = ", which are allowed" if target.allow_breaking else ", which end the push"
    compared = f"inputs and output, with those of the live version of {target.destination}: breaking changes"
    yield run.BESIDE, False, [f"compare the project's {compared}{allowed}"]
    image = fingerprint(target.root, settings, target.file)
    tested = _before(push, run.TEST_PUSH, push.push_depends(target.test_model, image, None))
    yield run.TEST_PUSH, bool(tested), [" ".join(cog.command(target.test_model, settings.push))]
    version = str(tested["version"]) if tested else None
    yield run.PUSHED, False, [f"compare its {compared}{allowed}"]
    yield from _asked(push, version)
    if trained := settings.push.training:
        given = {**trained.input, "train_data": f"({trained.data})"}
        train = routes.train(target.test_model, version or NEW, target.trained_model, given)
        create_trained = routes.create_model(target.trained_model, "private", sku)
        yield (
            run.TRAINING,
            False,
            [
                f"{_shown(create_trained)}, where it does not exist",
                f"POST /v1/files with {trained.data}",
                _shown(train),
                *(_predict("(the trained version)", case.input) for case in trained.tests),
            ],
        )
    done = _before(push, run.REAL_PUSH, push.push_depends(target.destination, image, version)) if version else {}
    yield run.REAL_PUSH, bool(done), [" ".join(cog.command(target.destination, settings.push))]
    if wanted := settings.push.deployment:
        shipped = str(done.get("version") or NEW)
        create = routes.create_deployment(wanted, target.destination, shipped, sku)
        name = f"(your account)/{wanted.name}"
        update = routes.update_deployment(name, version=shipped, **deployment.named(wanted))
        yield run.DEPLOYMENT, False, [f"{_shown(create)}, or", f"{_shown(update)}, where it exists"]
    told = "" if target.page else ", where this push creates it"
    yield run.PAGE, False, [f"PATCH /v1/models/{target.destination} with the weights' card{told}"]
    if target.clean:
        cleaned = [target.test_model] + ([target.trained_model] if trained else [])
        yield run.CLEAN, False, [f"DELETE /v1/models/{name}/versions/... but the tested one" for name in cleaned]


def _asked(push: PushRun, version: str | None) -> Iterator[tuple[str, bool, list[str]]]:
    settings = push.settings.push
    if settings.tests:
        done = version is not None and bool(_before(push, run.TESTS, push.tests_depend(version)))
        asked = ((case.input, ", ".join(testcases.asks(case)) or "no error") for case in settings.tests)
        lines = [f"{_predict(version, given)}: {wanted}" for given, wanted in asked]
        yield run.TESTS, done, lines
    if push.compared_inputs():
        told = "where there is a live version, the inputs of these tests to both versions; equal answers are counted"
        yield run.SAME, False, [told]
    if made := fuzz.inputs(push.local_schema(), settings.fuzz):
        done = version is not None and bool(_before(push, run.FUZZ, push.fuzz_depends(version, made)))
        again = example(push.settings)
        after = [] if again is None else [f"{_predict(version, again)}: the first test again"]
        yield run.FUZZ, done, [*(_predict(version, given) for given in made), *after]
    if settings.parity:
        told = f"POST /v1/predictions for at most {settings.rows} held-out examples, compared with transformers here"
        yield run.PARITY, False, [told]


def _before(push: PushRun, name: str, depends: Any) -> dict[str, Any]:
    """The result of a step that was done and depends on nothing that changed; else empty."""
    found = push.journal.find(name, journal.key(depends))
    return found.result if found is not None and found.outcome == "passed" else {}


def _predict(version: str | None, given: dict[str, Any]) -> str:
    return _shown(routes.predict(version or NEW, given))


def _shown(call: Call) -> str:
    return f"{call.method} {call.route} {_json(call.body)}"


def _sku(push: PushRun) -> str:
    try:
        return push.target.sku(push.settings, ask=False)
    except CogpressError:
        return "(none: name it with --hardware)"


def _json(content: Any) -> str:
    """In ASCII where a character is not printable; of long texts the beginning and the length."""
    text = json.dumps(_cut(content), ensure_ascii=False)
    return text if text.isprintable() else json.dumps(_cut(content))


def _cut(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _cut(one) for name, one in content.items()}
    if isinstance(content, str) and len(content) > _LONGEST:
        return f"{content[: _LONGEST // 2]} … ({len(content)} characters)"
    return content
