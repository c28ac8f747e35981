"""What Replicate does to a push: rate limits, refusals, error codes, names that are taken, deployments."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cogpress import config
from cogpress.errors import CogpressError
from cogpress.http import UnavailableError
from cogpress.push import deployment, fuzz, summary, testcases
from cogpress.replicate import api, routes
from cogpress.replicate.api import Replicate
from tests.standins.localreplicate import TOKEN
from tests.standins.pushreplicate import PushReplicate

pytestmark = pytest.mark.slow

VERSION = "a" * 64


@pytest.fixture
def replicate(remote: PushReplicate) -> Iterator[Replicate]:
    client = Replicate(TOKEN, remote.url)
    remote.asked()
    yield client
    client.close()
    remote.rate(0)


def judged(replicate: Replicate, **case: Any) -> testcases.Outcome:
    [outcome] = testcases.run(replicate, VERSION, [config.Case(input={}, **case)], str.__eq__, timeout=60, parallel=1)
    return outcome


def test_each_prediction_ends_by_itself(replicate: Replicate, remote: PushReplicate) -> None:
    remote.script({"status": "succeeded", "output": "x"})
    assert judged(replicate).passed
    [asked] = [one for one in remote.asked() if one["method"] == "POST"]
    assert asked["cancel_after"] == f"{60 + int(testcases.CANCEL_SECONDS)}s"
    assert routes.predict(VERSION, {}, cancel_after=0.1).more["headers"] == {"Cancel-After": "5s"}
    assert "headers" not in routes.predict(VERSION, {}).more


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"status": "aborted", "error": "it was too late"}, "it was aborted: it was too late"),
        ({"status": "failed", "error": "Worker died", "logs": "x\nE1001\n"}, "E1001, out of memory"),
        ({"status": "failed", "error": "E6716: did not start"}, "E6716, the model did not start in time"),
        ({"status": "failed", "error": "ValueError: E10012"}, "ValueError: E10012"),
    ],
)
def test_how_a_prediction_ended_is_explained(
    replicate: Replicate, remote: PushReplicate, state: dict[str, Any], says: str
) -> None:
    remote.script({}, {"status": "processing"}, state)
    outcome = judged(replicate)
    assert (outcome.passed, says in outcome.message) == (False, True), outcome.message


def test_fuzz_takes_no_code_of_replicates_for_a_refusal(replicate: Replicate, remote: PushReplicate) -> None:
    remote.script({"status": "failed", "error": "ValueError: no", "logs": "E1001"})
    [outcome] = fuzz.run(replicate, VERSION, [{}], timeout=60, parallel=1)
    assert (outcome.passed, outcome.message[:5]) == (False, "E1001")


def test_a_stream_that_is_cut_fails_the_test(replicate: Replicate, remote: PushReplicate) -> None:
    remote.script({"status": "processing"}, {"status": "succeeded", "output": ["piece", "s"]})
    outcome = judged(replicate, streams=True)
    assert (outcome.passed, "ended without its last event" in outcome.message) == (False, True)


def test_what_ended_before_it_could_be_canceled_fails_the_test(replicate: Replicate, remote: PushReplicate) -> None:
    remote.script({"status": "succeeded", "output": "x"})
    outcome = judged(replicate, cancels=True)
    assert (outcome.passed, "it was succeeded before it could be canceled" in outcome.message) == (False, True)


def test_predictions_come_at_the_rate_that_the_account_gets(replicate: Replicate, remote: PushReplicate) -> None:
    """After the first refusal one by one, whatever `parallel` asks for, and none is lost."""
    remote.rate(0.3)
    for _ in range(5):
        remote.script({"status": "succeeded", "output": "x"})
    cases = [config.Case(input={"n": number}) for number in range(5)]
    began = time.monotonic()
    outcomes = testcases.run(replicate, VERSION, cases, str.__eq__, timeout=60, parallel=5)
    assert [outcome.passed for outcome in outcomes] == [True] * 5
    assert time.monotonic() - began >= 4 * 0.3


def test_a_rate_limit_that_does_not_end_is_told(
    replicate: Replicate, remote: PushReplicate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "RATE_TRIES", 2)
    monkeypatch.setattr(api, "RATE_SECONDS", 0.01)
    remote.fault("POST", "/v1/predictions", 429, 2)
    with pytest.raises(UnavailableError, match=r"rate limit, 2 times in a row. .*6 a minute"):
        replicate.ask(routes.predict(VERSION, {}))


def test_a_turn_is_taken_by_one() -> None:
    rate = api._Rate()
    rate.wait()
    rate.slow(0.05)
    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: rate.wait(), range(4)))
    assert time.monotonic() - began >= 3 * 0.05


def test_missing_credit_is_explained(replicate: Replicate, remote: PushReplicate) -> None:
    told = {"title": "Insufficient credit", "detail": "You have insufficient credit to run this model."}
    remote.fault("POST", "/v1/predictions", 402, told=told)
    with pytest.raises(CogpressError, match=r"no credit or payment method .*insufficient credit.*wait some minutes"):
        judged(replicate)


@pytest.mark.parametrize(
    ("made", "seconds"),
    [
        ({"created_at": "2026-01-01T00:00:00Z", "started_at": "2026-01-01T00:01:30.5Z"}, 90.5),
        ({"created_at": "2026-01-01T00:00:00.123456789Z", "started_at": "2026-01-01T00:00:01.123456789Z"}, 1.0),
        ({"created_at": "2026-01-01T00:00:00Z", "started_at": None}, 0.0),
        ({"created_at": "soon", "started_at": "later"}, 0.0),
    ],
)
def test_the_wait_of_a_prediction(made: dict[str, Any], seconds: float) -> None:
    assert testcases.waited_of(made) == pytest.approx(seconds)


def test_what_is_said_of_a_push_fits_a_terminal() -> None:
    costs = [summary.Cost(12.34), summary.Cost(1234.5, "gpu-a100-large-8x", 0.0112)]
    assert [str(one) for one in costs] == ["12.3 s", "1234.5 s, $13.8264 at gpu-a100-large-8x's price, without starts"]
    assert costs[0].to_dict()["dollars"] is None
    assert summary.cold_boot({}) is None
    assert summary.cold_boot({"outcomes": [{"name": "of an older journal"}]}) is None


def test_the_name_of_a_deleted_model_stays_taken(replicate: Replicate, remote: PushReplicate) -> None:
    with pytest.raises(CogpressError, match="its name is taken: that of a deleted model stays so"):
        replicate.make_model("local/deleted", "private", "cpu")
    replicate.make_model("local/twice", "private", "cpu")
    replicate.make_model("local/twice", "private", "cpu")  # looked at again: there it is
    with pytest.raises(CogpressError, match="not a known SKU"):
        replicate.make_model("local/other", "private", "gpu-of-dreams")


def test_a_file_that_replicate_does_not_take_is_not_sent(
    replicate: Replicate, remote: PushReplicate, tmp_path: Path
) -> None:
    large = tmp_path / "large.jsonl"
    with large.open("wb") as file:
        file.truncate(api.UPLOAD_BYTES + 1)
    with pytest.raises(CogpressError, match=r"large.jsonl has 100 MB, .*up to 100\. Write it as Parquet"):
        replicate.upload(large)
    assert remote.asked() == []


@pytest.fixture
def deployed(replicate: Replicate, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A deployment as Replicate has it, in the place of its routes, with three versions of its model."""
    release = {"model": "local/m", "version": "c2", "configuration": {"hardware": "gpu-t4", "max_instances": 3}}
    answers = {
        "/v1/account": {"username": "local"},
        "/v1/deployments/local/live": {"current_release": release},
        "/v1/models/local/m/versions": {"results": [{"id": name} for name in ("d3", "c2", "b1", "b0")]},
    }
    sent: dict[str, Any] = {}

    def ask(_self: Replicate, call: routes.Call) -> Any:
        if call.method == "PATCH":
            sent.update(call.body)
        return answers[call.route]

    monkeypatch.setattr(Replicate, "ask", ask)
    return sent


LIVE = config.Config(push=config.Push(deployment=config.Deployment(name="live")))


def test_a_deployment_is_switched_off(replicate: Replicate, deployed: dict[str, Any]) -> None:
    assert deployment.disable(replicate, LIVE) == "local/live"
    assert deployed == {"min_instances": 0, "max_instances": 0}
    with pytest.raises(CogpressError, match=r"names no push\.deployment"):
        deployment.disable(replicate, config.Config())


@pytest.mark.parametrize(("wanted", "version"), [(None, "b1"), ("d", "d3"), ("b0", "b0")])
def test_an_earlier_version_is_deployed_again(
    replicate: Replicate, deployed: dict[str, Any], wanted: str | None, version: str
) -> None:
    assert deployment.rollback(replicate, LIVE, wanted) == ("local/live", version)
    assert deployed == {"version": version}


@pytest.mark.parametrize(("wanted", "says"), [("b", "2 versions of local/m begin"), ("x", "No versions")])
def test_a_version_that_is_not_clear_is_not_deployed(
    replicate: Replicate, deployed: dict[str, Any], wanted: str, says: str
) -> None:
    with pytest.raises(CogpressError, match=says):
        deployment.rollback(replicate, LIVE, wanted)
    assert deployed == {}
