"""Test predictions: run the cases of `model.yaml` on a version on Replicate, and judge them without another model."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jsonschema
from rich.table import Table
from rich.text import Text

from cogpress.cog import client
from cogpress.config import Case, Push
from cogpress.errors import CogpressError
from cogpress.push.journal import RejectedError
from cogpress.replicate import api, routes
from cogpress.replicate.api import RefusedError, Replicate, text_of

CANCEL_SECONDS = 15.0
"""How long a canceled prediction may take to end."""

LATE_SHARE = 0.25
"""Text counts as streamed where it arrives over at least this share of the prediction's run time."""

_SHOWN = 160

Score = Callable[[str, str], bool]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one test prediction.

    Attributes:
        name: of the case.
        passed: whether it met the case's expectations.
        message: why not, or what was seen.
        seconds: the prediction's run time, without a cold start.
        prediction: its id.
        output: its text.
        metrics: of the model.
        waited: seconds before it ran, a cold start included.
    """

    name: str
    passed: bool
    message: str
    seconds: float = 0.0
    prediction: str = ""
    output: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    waited: float = 0.0


class _Wrong(Exception):
    """The prediction does not meet the case's expectations."""


def title(number: int, case: Case) -> str:
    """A case's name, or its number and expectations."""
    return case.name or f"{number}: {', '.join(asks(case)) or 'no error'}"


def asks(case: Case) -> list[str]:
    """A case's expectations, in words."""
    contains = [case.contains] if isinstance(case.contains, str) else list(case.contains)
    found = [
        ("the exact text", case.exact is not None),
        (f"contains {' and '.join(map(repr, contains))}", bool(contains)),
        ("a JSON schema", case.json_schema is not None),
        ("right by the task's score", case.expected is not None),
        (f"an error with {case.error!r}", case.error is not None),
        ("really streams", case.streams),
        ("cancels", case.cancels),
        (f"at most {case.seconds:g} s" if case.seconds else "", case.seconds is not None),
    ]
    return [words for words, asked in found if asked]


def table(outcomes: list[Outcome]) -> Table:
    """Test predictions as a table."""
    made = Table("", "test", "what came", "seconds", box=None, padding=(0, 2, 0, 0), header_style="dim")
    made.columns[3].justify = "right"
    for outcome in outcomes:
        mark = Text("✓", "green") if outcome.passed else Text("✗", "bold red")
        seconds = f"{outcome.seconds:.2f}" if outcome.seconds else ""
        made.add_row(mark, Text(outcome.name), Text(outcome.message, "" if not outcome.passed else "dim"), seconds)
    return made


def judge(outcomes: list[Outcome], what: str, version: str, more: str = "") -> None:
    """Raise where any test failed.

    Raises:
        RejectedError: with the reasons.
    """
    bad = [outcome for outcome in outcomes if not outcome.passed]
    if bad:
        reasons = "; ".join(f"{outcome.name}: {outcome.message}" for outcome in bad[:4])
        raise RejectedError(f"{len(bad)} of {len(outcomes)} {what} failed on version {version[:12]}. {reasons}.{more}")


def run(
    replicate: Replicate,
    version: str,
    cases: Sequence[Case],
    score: Score,
    *,
    timeout: float,
    parallel: int,
    on_end: Callable[[Outcome], None] = lambda _outcome: None,
) -> list[Outcome]:
    """Run and judge all cases; outcomes in their order.

    Args:
        replicate: the client.
        version: the pushed version's id.
        cases: of `model.yaml`.
        score: tells whether an answer matches the expected one.
        timeout: seconds for each prediction, a cold start included.
        parallel: concurrent predictions.
        on_end: called with each outcome.

    Raises:
        CogpressError: Replicate cannot be reached, or refuses.
    """

    def one(numbered: tuple[int, Case]) -> Outcome:
        number, case = numbered
        outcome = _judged(replicate, version, case, title(number, case), score, timeout)
        on_end(outcome)
        return outcome

    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(one, enumerate(cases, 1)))


def _judged(replicate: Replicate, version: str, case: Case, name: str, score: Score, timeout: float) -> Outcome:
    made = create(replicate, version, case.input, timeout)
    identifier = str(made["id"])
    try:
        if case.cancels:
            made = _canceled(replicate, made, timeout)
            return _outcome(name, True, "ended as canceled", made)
        pieces = _streamed(replicate, made, timeout) if case.streams else 0
        made = finished(replicate, made, timeout)
        _check(case, made, score)
    except _Wrong as wrong:
        made = dict(replicate.ask(routes.prediction(identifier)))
        return _outcome(name, False, str(wrong), made)
    message = f"streamed in {pieces} pieces" if pieces else _short(_text(made) or str(made.get("error")))
    return _outcome(name, True, message, made)


def _outcome(name: str, passed: bool, message: str, made: dict[str, Any]) -> Outcome:
    seconds, waited = seconds_of(made), waited_of(made)
    return Outcome(name, passed, message, seconds, str(made["id"]), _text(made), _metrics(made), waited)


def answers(
    replicate: Replicate, version: str, asked: Iterable[dict[str, Any]], settings: Push
) -> list[tuple[str | None, float]]:
    """A version's answer to each input, None where the prediction fails, and the run time in seconds.

    Raises:
        CogpressError: Replicate cannot be reached, or refuses.
    """

    def one(given: dict[str, Any]) -> tuple[str | None, float]:
        try:
            made = predict(replicate, version, given, settings.timeout)
        except RefusedError as error:
            if not error.input:
                raise
            return None, 0.0
        return _text(made) if made.get("status") == "succeeded" else None, seconds_of(made)

    with ThreadPoolExecutor(settings.parallel) as pool:
        return list(pool.map(one, asked))


def create(replicate: Replicate, version: str, given: dict[str, Any], timeout: float) -> dict[str, Any]:
    """A new prediction. A second one, after an answer that was lost, does no harm here.

    Replicate ends it by itself a little after the timeout, if this program cannot any more.
    """
    call = routes.predict(version, given, idempotent=True, cancel_after=timeout + CANCEL_SECONDS)
    return dict(replicate.ask(call))


def predict(replicate: Replicate, version: str, given: dict[str, Any], timeout: float) -> dict[str, Any]:
    """A prediction to its end; see `finished`."""
    return finished(replicate, create(replicate, version, given, timeout), timeout)


def finished(replicate: Replicate, made: dict[str, Any], timeout: float) -> dict[str, Any]:
    """A prediction when it has ended; one that times out is canceled and returned as failed."""
    made = replicate.wait(made, timeout)
    if made.get("status") in ("starting", "processing"):
        replicate.ask(routes.cancel(str(made["id"])))
        error = f"it did not end within {timeout:g} s and was canceled"
        return {**made, "status": "failed", "error": error, "timed_out": True}
    return made


def _check(case: Case, made: dict[str, Any], score: Score) -> None:
    status, text = made.get("status"), _text(made)
    error = client.plain_error(str(made.get("error") or ""))
    if case.error is not None:
        if status != "failed" or made.get("timed_out"):
            raise _Wrong(f"it {_ended(status)}, but should have failed: {_short(text)}")
        if case.error not in error:
            raise _Wrong(f"it failed with another error: {_short(error)}")
    elif status != "succeeded":
        raise _Wrong(f"it {_ended(status)}: {_short(api.code_of(made) or error)}")
    if case.exact is not None and text != case.exact:
        raise _Wrong(f"the text is {_quoted(text)}, not {_quoted(case.exact)}")
    for part in [case.contains] if isinstance(case.contains, str) else case.contains:
        if part not in text:
            raise _Wrong(f"{part!r} is not in {_quoted(text)}")
    if case.json_schema is not None:
        _check_json(case.json_schema, text)
    if case.expected is not None and not score(case.expected, text):
        raise _Wrong(f"the task's score does not accept {_quoted(text)} for {_quoted(case.expected)}")
    if case.seconds is not None and seconds_of(made) > case.seconds:
        raise _Wrong(f"it took {seconds_of(made):.2f} s, more than {case.seconds:g} s")


def _ended(status: Any) -> str:
    return f"was {status}" if status in ("canceled", "aborted") else str(status)


def _check_json(schema: dict[str, Any], text: str) -> None:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise _Wrong(f"it is not JSON ({error}): {_quoted(text)}") from None
    try:
        jsonschema.validate(content, schema)
    except jsonschema.ValidationError as error:
        place = "/".join(map(str, error.absolute_path)) or "the top"
        raise _Wrong(f"it does not match the JSON schema at {place}: {_short(error.message)}") from None
    except jsonschema.SchemaError as error:
        raise CogpressError(f"A json_schema in model.yaml is invalid: {_short(error.message)}. Correct it.") from None


def _streamed(replicate: Replicate, made: dict[str, Any], timeout: float) -> int:
    """The number of a stream's pieces, which must arrive while the prediction runs."""
    pieces: list[str] = []
    arrived: list[float] = []
    running = False
    try:
        for name, data in replicate.stream(made, timeout):
            if name == "output":
                pieces.append(data)
                arrived.append(time.monotonic())
                if len(pieces) == 1:
                    running = replicate.ask(routes.prediction(str(made["id"]))).get("status") in (
                        "starting",
                        "processing",
                    )
            elif name == "error":
                raise _Wrong(f"the stream has an error: {_short(data)}")
    except CogpressError as error:
        raise _Wrong(str(error)) from None
    ended = replicate.wait(made, timeout)
    if ended.get("status") != "succeeded":
        return 0  # the check of the prediction itself reports it
    # Apart from line breaks that only the stream has.
    if "".join("".join(pieces).split()) != "".join(_text(ended).split()):
        raise _Wrong("the stream's text is not the prediction's output")
    if len(pieces) < 2:
        raise _Wrong(f"its text came in {len(pieces)} piece: it does not stream, or the answer is too short to tell")
    if not running and arrived[-1] - arrived[0] < LATE_SHARE * seconds_of(ended):
        raise _Wrong("all of its text came after the prediction had ended, so it does not stream")
    return len(pieces)


def _canceled(replicate: Replicate, made: dict[str, Any], timeout: float) -> dict[str, Any]:
    made = replicate.wait(made, timeout, until=("processing",))
    if made.get("status") != "processing":
        raise _Wrong(f"it was {made.get('status')} before it could be canceled: ask for a longer answer")
    asked = time.monotonic()
    made = replicate.wait(replicate.ask(routes.cancel(str(made["id"]))), CANCEL_SECONDS)
    if made.get("status") not in ("canceled", "aborted"):
        raise _Wrong(f"it was {made.get('status')} {time.monotonic() - asked:.0f} s after it was canceled")
    return made


def seconds_of(made: dict[str, Any]) -> float:
    """A prediction's run time, without a cold start."""
    return float(_metrics(made).get("predict_time") or 0.0)


def waited_of(made: dict[str, Any]) -> float:
    """Seconds from a prediction's creation until it ran; 0 where it did not run."""
    try:
        created, started = (datetime.datetime.fromisoformat(str(made.get(key))) for key in ("created_at", "started_at"))
    except ValueError:
        return 0.0
    return (started - created).total_seconds()


def _metrics(made: dict[str, Any]) -> dict[str, Any]:
    # The log-probabilities of all tokens are too long to show.
    return {name: value for name, value in (made.get("metrics") or {}).items() if name != "logprobs"}


def _text(made: dict[str, Any]) -> str:
    output = made.get("output")
    return "" if output is None else text_of(output)


def _quoted(text: str) -> str:
    """With white space visible, which may be the difference."""
    return repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r} …"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"
