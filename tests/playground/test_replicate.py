"""Replicate's API over the real Cog runtime."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import httpx
import pytest
from starlette.requests import Request

from cogpress.cog.process import Server
from cogpress.playground.api import resources
from cogpress.playground.web import HTTPProblem
from tests import wait_until
from tests.standins.localreplicate import SLOTS, Local

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def local(echo: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    with Local(echo.root, [("echo", echo.url)], data=tmp_path_factory.mktemp("data")) as local:
        yield local


def events(url: str, **headers: str) -> list[tuple[str, str, str]]:
    """(name, id, data) of each event of a stream, to its end."""
    found = []
    with httpx.stream("GET", url, headers=headers, timeout=60, trust_env=False) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        text = b"".join(response.iter_raw()).decode()
    for event in text.split("\n\n")[:-1]:
        lines = [line.partition(": ") for line in event.split("\n")]
        named = {name: value for name, _, value in lines if name in ("event", "id")}
        found.append((named["event"], named["id"], "\n".join(value for name, _, value in lines if name == "data")))
    return found


def text_of(found: list[tuple[str, str, str]]) -> str:
    return "".join(data for name, _, data in found if name == "output")


def test_a_prediction_has_replicates_shape(local: Local) -> None:
    made = local.create({"prompt": "word", "count": 3}, wait=True)
    assert re.fullmatch("[a-z0-9]{26}", made["id"])
    assert made["status"] == "succeeded"
    assert made["output"] == ["word0 ", "word1 ", "word2 "]
    assert made["input"] == {"prompt": "word", "count": 3}
    assert made["logs"] == "said it all\n"
    assert made["error"] is None
    assert made["model"] == "local/echo"
    assert made["source"] == "api"
    assert made["data_removed"] is False
    assert made["metrics"]["input_token_count"] == 1
    assert made["metrics"]["output_token_count"] == 3
    assert 0 < made["metrics"]["predict_time"] <= made["metrics"]["total_time"]
    assert made["metrics"]["time_to_first_token"] > 0
    for name in ("created_at", "started_at", "completed_at"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", made[name])
    assert made["created_at"] <= made["started_at"] <= made["completed_at"]
    assert made["urls"]["get"] == f"{local.url}/v1/predictions/{made['id']}"
    assert local.get(made["id"]) == made


def test_text_streams_before_it_ends(local: Local) -> None:
    made = local.create({"count": 1000, "delay": 0.05}, stream=True)
    assert made["status"] == "starting"
    with httpx.stream("GET", made["urls"]["stream"], trust_env=False, timeout=60) as response:
        next(response.iter_raw())
    assert local.get(made["id"])["status"] == "processing"
    local.ask("POST", f"/v1/predictions/{made['id']}/cancel")
    assert text_of(events(made["urls"]["stream"])).startswith("word0 word1 ")


def test_a_reader_that_comes_back_goes_on_where_it_was(local: Local) -> None:
    made = local.create({"count": 6}, wait=True)
    all_of_them = events(made["urls"]["stream"])
    assert sorted(name for name, _, _ in all_of_them) == ["done", "logs", *["output"] * 6]
    later = events(made["urls"]["stream"], **{"Last-Event-ID": all_of_them[2][1]})
    assert later == all_of_them[3:]
    assert events(made["urls"]["stream"], **{"Last-Event-ID": "nonsense"}) == all_of_them


@pytest.mark.parametrize(
    "text", ["a\nb\n\n c", " lead", "\r\nx\ry", "🦙 ünï\u2028c\x85d", "", "data: x\n\nevent: done\n"]
)
def test_any_text_arrives(local: Local, text: str) -> None:
    made = local.create({"prompt": f"raw:{text}", "count": 2}, wait=True)
    assert made["output"] == [f"raw:{text}"] * 2
    found = events(made["urls"]["stream"])
    assert [data for name, _, data in found if name == "output"] == [
        "raw:" + text.replace("\r\n", "\n").replace("\r", "\n")
    ] * 2


def test_a_stream_needs_its_key(local: Local) -> None:
    made = local.create({}, wait=True)
    wrong = made["urls"]["stream"][:-1] + ("0" if made["urls"]["stream"][-1] != "0" else "1")
    assert httpx.get(wrong).status_code == 404
    assert httpx.get(f"{local.url}/v1/stream/{made['id']}/").status_code == 404


def test_a_failure_is_told_without_the_runtimes_words(local: Local) -> None:
    made = local.create({"prompt": "fail"}, wait=True)
    assert (made["status"], made["error"]) == ("failed", "ValueError: bad things happen")
    names = [(name, data) for name, _, data in events(made["urls"]["stream"])]
    assert names[-2] == ("error", '{"detail": "ValueError: bad things happen"}')
    assert names[-1] == ("done", '{"reason": "error"}')


def test_bad_input_is_refused_when_asked(local: Local) -> None:
    answer = local.ask("POST", "/v1/models/local/echo/predictions", {"input": {"count": 0, "delay": "x"}})
    assert answer.status_code == 422
    body = answer.json()
    assert body["title"] == "Input validation failed"
    assert {one["field"] for one in body["invalid_fields"]} == {"input.count", "input.delay"}
    assert "0 is less than the minimum of 1" in body["detail"]
    unknown = local.ask("POST", "/v1/predictions", {"version": "nothing", "input": {}}).json()
    assert unknown["title"] == "Invalid version or not permitted"


@pytest.mark.parametrize(
    ("method", "route", "content", "status"),
    [
        ("GET", "/v1/predictions/nothing", b"", 404),
        ("POST", "/v1/predictions", b"{", 400),
        ("POST", "/v1/predictions", b"[]", 400),
        ("POST", "/v1/predictions", b'{"version": "nothing", "input": {}}', 422),
        ("POST", "/v1/predictions", b'{"input": {}}', 422),
        ("POST", "/v1/predictions", b'{"version": "echo", "input": {"count": NaN}}', 400),
        ("POST", "/v1/predictions", b'{"version": "echo", "input": []}', 422),
        ("POST", "/v1/predictions", b'{"version": "echo", "input": {}, "webhook": "ftp://x"}', 422),
        ("POST", "/v1/predictions", b'{"version": "echo", "webhook": "http://x", "webhook_events_filter": ["x"]}', 422),
        ("POST", "/v1/predictions", b"[" * 100_000, 400),
        ("GET", "/v1/predictions?cursor=nonsense", b"", 400),
        ("GET", "/v1/models/local/nothing", b"", 404),
        ("GET", "/v1/files/nothing", b"", 404),
        ("GET", "/v1/trainings/nothing", b"", 404),
        ("GET", "/v1/nothing", b"", 404),
        ("DELETE", "/v1/account", b"", 405),
        ("POST", "/v1/files", b"x", 422),
    ],
)
def test_errors_have_replicates_shape(local: Local, method: str, route: str, content: bytes, status: int) -> None:
    answer = httpx.request(
        method, local.url + route, content=content, headers={"Content-Type": "application/json"}, trust_env=False
    )
    assert answer.status_code == status, answer.text
    assert {"title", "detail", "status"} <= answer.json().keys()
    assert answer.json()["status"] == status
    assert "Traceback" not in answer.text


def test_null_inputs_are_left_out(local: Local) -> None:
    made = local.create({"prompt": "a", "count": 1, "system_prompt": None}, wait=True)
    assert made["status"] == "succeeded"
    assert made["input"] == {"prompt": "a", "count": 1}


def test_an_input_that_the_model_does_not_have_is_named_in_the_logs(local: Local) -> None:
    made = local.create({"prompt": "word", "count": 1, "max_new_tokens": 5}, wait=True)
    assert made["status"] == "succeeded"
    assert made["logs"].startswith("Not used, as the model has no such input: max_new_tokens.\n")


def test_secrets_are_neither_shown_nor_stored(local: Local) -> None:
    made = local.create({"count": 1, "key": "a very secret key"}, wait=True)
    assert made["status"] == "succeeded"
    assert made["input"]["key"] == "[REDACTED]"
    files = [path for path in local.data.iterdir() if path.is_file()]
    assert not any(b"a very secret key" in path.read_bytes() for path in files)


def test_more_than_there_are_slots_wait_their_turn(local: Local) -> None:
    made = [local.create({"prompt": str(number), "count": 5, "delay": 0.02}) for number in range(4 * SLOTS)]
    ended = [local.wait(one["id"]) for one in made]
    assert [one["status"] for one in ended] == ["succeeded"] * len(made)
    assert all("".join(one["output"]).count(str(number)) >= 5 for number, one in enumerate(ended))
    begun = [one["started_at"] for one in ended]
    assert max(begun[: SLOTS // 2]) < min(begun[-SLOTS // 2 :])


def test_cancel_while_running_and_while_waiting(local: Local) -> None:
    running = [local.create({"count": 10_000, "delay": 0.05}) for _ in range(SLOTS)]
    assert wait_until(lambda: all("started_at" in local.get(one["id"]) for one in running))
    waiting = local.create({"count": 1000, "delay": 0.05})
    time.sleep(0.5)
    assert local.get(waiting["id"])["status"] == "starting"
    answer = local.ask("POST", f"/v1/predictions/{waiting['id']}/cancel")
    assert answer.json()["status"] == "canceled"
    for one in running:
        assert local.ask("POST", f"/v1/predictions/{one['id']}/cancel").json()["status"] == "canceled"
    assert events(running[0]["urls"]["stream"])[-1][::2] == ("done", '{"reason": "canceled"}')
    assert local.create({"count": 1}, wait=True)["status"] == "succeeded"
    assert local.ask("POST", "/v1/predictions/nothing/cancel").status_code == 404


def test_cancel_at_once(local: Local) -> None:
    """The runtime loses a cancellation that arrives before the runner began."""
    for _ in range(5):
        made = local.create({"count": 1000, "delay": 0.05})
        assert local.ask("POST", f"/v1/predictions/{made['id']}/cancel").json()["status"] == "canceled"


def test_waiting_ends_when_the_time_is_up(local: Local) -> None:
    started = time.monotonic()
    answer = local.ask(
        "POST",
        "/v1/models/local/echo/predictions",
        {"input": {"count": 1000, "delay": 0.1}},
        headers={"Prefer": "wait=1"},
    )
    assert time.monotonic() - started > 0.9
    assert answer.json()["status"] == "starting"
    local.ask("POST", f"/v1/predictions/{answer.json()['id']}/cancel")


def test_an_answer_says_what_there_is_and_no_more(local: Local) -> None:
    """201 for a prediction that is complete and 202 before; what there is none of is absent, not null."""
    route, body = "/v1/models/local/echo/predictions", {"input": {"count": 50, "delay": 0.1}}
    answer = local.ask("POST", route, body)
    absent = {"started_at", "completed_at", "deadline", "webhook", "webhook_events_filter"}
    assert (answer.status_code, answer.json()["status"]) == (202, "starting")
    assert not absent & {name for name, value in answer.json().items() if value is None}
    assert not {"completed_at", "webhook"} & answer.json().keys()
    local.ask("POST", f"/v1/predictions/{answer.json()['id']}/cancel")
    assert local.get(answer.json()["id"])["completed_at"]
    answer = local.ask("POST", route, {"input": {"count": 1}}, headers={"Prefer": "wait"})
    assert (answer.status_code, answer.json()["status"]) == (201, "succeeded")


def test_a_prediction_ends_at_its_deadline(local: Local) -> None:
    body = {"input": {"count": 10_000, "delay": 0.1}}

    def until(seconds: int) -> dict[str, Any]:
        made = local.ask("POST", "/v1/models/local/echo/predictions", body, headers={"Cancel-After": f"{seconds}s"})
        return dict(made.json())

    answer = until(10)
    assert answer["deadline"] > answer["created_at"]
    # One that has not begun by then is aborted: every slot is held for longer than it may wait.
    others = [local.create(body["input"]) for _ in range(SLOTS)]
    assert wait_until(lambda: sum("started_at" in local.get(one["id"]) for one in (answer, *others)) == SLOTS)
    late = until(5)
    ended = local.wait(answer["id"], 60)
    assert ended["status"] == "canceled"
    assert "its deadline has passed" in ended["logs"]
    assert 0 < ended["metrics"].get("predict_time", 5) < 50
    aborted = local.wait(late["id"], 60)
    assert (aborted["status"], "started_at" in aborted, aborted["output"]) == ("aborted", False, None)
    assert events(aborted["urls"]["stream"])[-1][0] == "done"
    for one in others:
        local.ask("POST", f"/v1/predictions/{one['id']}/cancel")
    for wrong in ("4s", "soon", "5 s", "-5s", ""):
        refused = local.ask("POST", "/v1/models/local/echo/predictions", body, headers={"Cancel-After": wrong})
        assert (refused.status_code, "Cancel-After" in refused.json()["detail"]) == (400, True), wrong


def test_a_file_that_replicate_would_refuse_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where `playground.max_input_mb` allows more."""
    monkeypatch.setattr(resources, "UPLOAD_BYTES", 10)
    form = httpx.Request("POST", "http://local/v1/files", files={"content": ("large.jsonl", b"x" * 11)})
    headers = [(name.lower().encode(), value.encode()) for name, value in form.headers.items()]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": form.read()}

    with pytest.raises(HTTPProblem, match=r"large\.jsonl has .* as on Replicate") as refused:
        asyncio.run(resources.upload(cast(Any, None), Request({"type": "http", "headers": headers}, receive)))
    assert refused.value.body["status"] == 413


def test_a_list_is_filtered(local: Local) -> None:
    early, late = (local.create({"count": 1}, wait=True) for _ in range(2))

    def listed(**filters: str) -> list[str]:
        found = local.ask("GET", "/v1/predictions", params=filters)
        assert found.status_code == 200, found.text
        return [one["id"] for one in found.json()["results"]]

    assert listed(created_after=late["created_at"])[-1] == late["id"]
    assert late["id"] not in listed(created_before=late["created_at"])
    assert early["id"] in listed(created_before=late["created_at"], source="api")
    assert listed(source="web") == []
    assert local.ask("GET", "/v1/predictions?created_after=yesterday").status_code == 400


def test_sixty_four_streams_at_once_lose_nothing(local: Local) -> None:
    def stream(number: int) -> str:
        made = local.create({"prompt": f"p{number}-", "count": 200, "delay": 0.002})
        return text_of(events(made["urls"]["stream"]))

    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(stream, range(64)))
    for number, text in enumerate(texts):
        assert text == "".join(f"p{number}-{step} " for step in range(200))


def test_models_and_versions(local: Local) -> None:
    found = local.ask("GET", "/v1/models/local/echo").json()
    latest = found["latest_version"]
    assert latest["openapi_schema"]["components"]["schemas"]["Output"]["x-cog-array-type"] == "iterator"
    assert latest["cog_version"] == "0.23.1"
    assert re.fullmatch("[0-9a-f]{64}", latest["id"])
    assert local.ask("GET", f"/v1/models/local/echo/versions/{latest['id']}").json() == latest
    assert local.ask("GET", "/v1/models/local/echo/versions").json()["results"][-1] == latest
    both = local.ask("GET", "/v1/models").json()
    assert both["object"] == "list"
    assert both["data"][0]["id"] == both["results"][0]["owner"] + "/" + both["results"][0]["name"]
    for body in ({"version": latest["id"]}, {"version": f"local/echo:{latest['id']}"}, {"version": "local/echo"}):
        made = local.ask("POST", "/v1/predictions", {**body, "input": {"count": 1}}, headers={"Prefer": "wait"}).json()
        assert (made["status"], made["version"]) == ("succeeded", latest["id"])
    lost = local.ask("POST", "/v1/predictions", {"version": "local/echo:", "input": {"count": 1}})
    assert (lost.status_code, lost.json()["title"]) == (422, "Invalid version or not permitted")


def test_files_as_inputs_and_safe_downloads(local: Local) -> None:
    answer = httpx.post(
        f"{local.url}/v1/files",
        files={"content": ("a<b>.html", b"<script>x</script>", "text/html")},
        data={"metadata": '{"a": 1}'},
    )
    assert answer.status_code == 201
    file = answer.json()
    assert (file["size"], file["content_type"], file["metadata"]) == (18, "text/html", {"a": 1})
    made = local.create({"file": file["urls"]["get"], "count": 1}, wait=True)
    assert made["output"] == ["raw:<script>x</script>"], made["error"]
    assert made["input"]["file"] == file["urls"]["get"]
    data_url = local.create({"file": "data:text/plain;base64,aGVsbG8=", "count": 1}, wait=True)
    assert data_url["output"] == ["raw:hello"]
    assert httpx.get(f"{file['urls']['get']}/download").status_code == 404
    assert local.ask("GET", f"/v1/files/{file['id']}").json() == file
    assert local.ask("GET", "/v1/files").json()["results"] == [file]
    long = json.dumps({"a": "x" * 70_000})
    for parts in ({"data": {"metadata": long}}, {"files": {"metadata": ("m.json", long)}}):
        files = {"content": ("a", b"x"), **parts.get("files", {})}
        refused = httpx.post(f"{local.url}/v1/files", files=files, data=parts.get("data"))
        assert (refused.status_code, "at most 64 KB" in refused.text) == (422, True)
    assert local.ask("DELETE", f"/v1/files/{file['id']}").status_code == 204
    assert local.ask("GET", f"/v1/files/{file['id']}").status_code == 404


@pytest.mark.slow
def test_one_of_many_is_found_and_pages_have_all(local: Local) -> None:
    """Listed by following the pages both ways."""
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda n: local.create({"prompt": f"needle{n}x", "count": 1}, wait=True), range(220)))
    url, seen, pages = "/v1/predictions", [], []
    while url:
        page = local.ask("GET", url.removeprefix(local.url)).json()
        assert len(page["results"]) <= 100
        seen += [one["id"] for one in page["results"]]
        pages.append(page)
        url = page["next"]
    assert len(seen) == len(set(seen)) >= 220
    assert {one["id"] for one in made} <= set(seen)
    back = local.ask("GET", pages[2]["previous"].removeprefix(local.url)).json()
    assert [one["id"] for one in back["results"]] == [one["id"] for one in pages[1]["results"]]
    assert pages[0]["previous"] is None
    found = local.ask("GET", "/playground/api/history?q=needle177x&status=succeeded&rating=none").json()
    assert (found["total"], found["results"][0]["input_preview"]) == (1, "needle177x")
    assert found["results"][0]["output_preview"] == "needle177x0"
    everything = local.ask("GET", "/playground/api/history?q=needle").json()
    assert (everything["total"], len(everything["results"])) == (220, 50)
    assert len(local.ask("GET", everything["next"].removeprefix(local.url)).json()["results"]) == 50
    assert local.ask("GET", "/playground/api/history?q=%22%27)%20OR%20*").status_code == 200


def test_ratings_and_their_export(local: Local) -> None:
    good = local.create({"prompt": "good one", "count": 1}, wait=True)
    bad = local.create({"prompt": "bad one", "count": 1, "system_prompt": "Be brief."}, wait=True)
    wrong = local.create({"prompt": "worse one", "count": 1}, wait=True)

    def rate(made: dict[str, Any], **body: Any) -> httpx.Response:
        return local.ask("PUT", f"/playground/api/predictions/{made['id']}/rating", body)

    assert rate(good, rating="good", note="just so").json() == {
        "rating": "good",
        "note": "just so",
        "correction": None,
    }
    rate(bad, rating="bad", note="", correction="right")
    rate(wrong, rating="bad", note="no idea")
    assert rate(wrong, rating="nice").status_code == 422
    assert local.ask("GET", "/playground/api/history?rating=bad").json()["total"] == 2
    answer = local.ask("GET", "/playground/api/export?rating=all")
    assert answer.headers["x-left-out"] == "1"
    assert "attachment" in answer.headers["content-disposition"]
    assert [json.loads(line) for line in answer.text.splitlines()] == [
        {"prompt": "good one", "completion": "good one0 "},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "bad one"},
                {"role": "assistant", "content": "right"},
            ]
        },
    ]
    rate(good, rating=None)
    assert local.ask("GET", "/playground/api/export?rating=good").text == ""


def test_a_slow_reader_slows_nobody(local: Local) -> None:
    made = local.create({"prompt": "x" * 1000, "count": 5000})
    with httpx.stream("GET", made["urls"]["stream"], trust_env=False, timeout=60) as slow:
        parts = slow.iter_raw(1)
        next(parts)
        assert len(text_of(events(made["urls"]["stream"]))) > 5_000_000
        assert local.create({"count": 3}, wait=True)["status"] == "succeeded"
        assert sum(map(len, parts)) > 5_000_000
