"""`predict.py` with a trained model in the real runtime and engine."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from cogpress.cog import client
from cogpress.cog.process import Server
from cogpress.engines import grammar
from cogpress.errors import CogpressError
from cogpress.weights import archive, fetch, manifest
from examples import queries, questions

pytestmark = [pytest.mark.server, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[1]
LONG = {"prompt": "x", "max_tokens": 1500, "min_tokens": 1500}
"""A prediction that would run for half a minute and more."""


@pytest.fixture
def server(trained_server: Server) -> Server:
    return trained_server


@pytest.fixture(scope="module")
def rows() -> list[questions.Row]:
    return questions.generate(32, "test", seed=0)


def fields(row: questions.Row) -> str:
    return json.dumps({"question": row["question"], "columns": row["columns"]})


def answer(server: Server, row: questions.Row, **more: Any) -> str:
    return "".join(client.predict(server.url, {"fields": fields(row), "max_tokens": 160, **more})["output"])


def busy_share(server: Server, seconds: float) -> float:
    """Share of one core that the server's processes use over so many seconds."""
    assert server._process is not None
    leader = psutil.Process(server._process.pid)
    family = [leader, *leader.children(recursive=True)]
    before = sum(sum(process.cpu_times()[:2]) for process in family)
    time.sleep(seconds)
    return float(sum(sum(process.cpu_times()[:2]) for process in family) - before) / seconds


def idle(server: Server) -> bool:
    """Whether the engine stops computing soon: nothing it was asked for is left in it."""
    return any(busy_share(server, 0.5) < 0.5 for _ in range(16))


def test_the_log_says_where_the_time_of_the_start_went(server: Server) -> None:
    assert server.log is not None
    line = re.search(r"Ready to answer after ([\d.]+) s: (.*);.* saved ([\d.]+) s\.", server.log.read_text())
    assert line is not None
    parts = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+) s", line[2])}
    assert list(parts) == ["fetch", "check", "imports", "tokenizer", "engine"]
    assert sum(parts.values()) - float(line[3]) == pytest.approx(float(line[1]), rel=0.25, abs=1)
    assert "First token of the first answer after" in server.log.read_text()


def test_the_engine_has_lower_priority_than_the_api(server: Server) -> None:
    assert server._process is not None
    leader = psutil.Process(server._process.pid)
    family = [leader, *leader.children(recursive=True)]
    engine = [process for process in family if process.name().startswith("VLLM")]
    threads = [thread.id for process in engine for thread in process.threads()]
    assert len(engine) == 1, "the engine computes in its own process"
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {max(grammar.NICENESS, leader.nice())}
    runner = engine[0].parent()
    assert runner is not None
    assert runner in family
    assert runner.nice() == leader.nice()
    assert {len(os.sched_getaffinity(thread.id)) for thread in runner.threads()} == {1}


def test_text_streams_long_before_it_ends(server: Server, rows: list[questions.Row]) -> None:
    pieces = [event.text for event in client.stream(server.url, {"fields": fields(rows[0])}) if event.kind == "output"]
    assert len(pieces) > 10
    assert "".join(pieces) == answer(server, rows[0])
    long = client.stream(server.url, LONG, "long")
    assert any(event.kind == "output" for event in long)
    assert client.cancel(server.url, "long")
    assert list(long)[-1].data["status"] == "canceled", "there was text before its end"


def test_sixteen_streams_are_batched_and_answered_as_by_transformers(
    server: Server, rows: list[questions.Row], answered: list[dict[str, Any]]
) -> None:
    alone = [answer(server, row) for row in rows[:4]]
    all_run = threading.Barrier(16)

    def begun(_: int) -> None:
        with closing(client.stream(server.url, LONG)) as events:  # type: ignore[type-var]
            assert any(event.kind == "output" for event in events)
            all_run.wait(120)  # one after the other they would take longer

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(begun, range(16)))
        found = list(pool.map(lambda row: answer(server, row), rows[:16]))
    assert found[:4] == alone
    same = sum(text == one["answer"] for one, text in zip(answered[:16], found, strict=True))
    assert same >= 15, "where two tokens are nearly as likely, rounding may decide"


def test_metrics(server: Server, rows: list[questions.Row]) -> None:
    metrics = client.predict(server.url, {"fields": fields(rows[0]), "max_tokens": 160})["metrics"]
    assert metrics["input_token_count"] > 30
    assert metrics["output_token_count"] > 10
    assert 0 < metrics["time_to_first_token"] < metrics["predict_time"]
    assert metrics["tokens_per_second"] > 1
    assert metrics["finish_reason"] == "stop"


def test_cancel_stops_the_engine(server: Server) -> None:
    events = client.stream(server.url, LONG, identifier="to-be-canceled")
    assert next(event for event in events if event.kind == "output")
    assert client.cancel(server.url, "to-be-canceled")
    assert idle(server)
    # Text that was on its way may come first.
    assert next(event for event in events if event.kind == "completed").data["status"] == "canceled"


def test_a_dropped_connection_stops_the_engine(server: Server) -> None:
    streams = [client.stream(server.url, LONG) for _ in range(4)]
    for events in streams:
        assert next(event for event in events if event.kind == "output")
    for events in streams:
        events.close()  # type: ignore[attr-defined]
    assert idle(server)


def test_no_character_is_split_and_chunks_sum_to_the_text(server: Server) -> None:
    inputs = {"prompt": "日本語 🦙 ünïcödé", "temperature": 1.5, "seed": 3, "max_tokens": 200, "min_tokens": 150}
    chunks = [event.text for event in client.stream(server.url, inputs) if event.kind == "output"]
    whole = "".join(client.predict(server.url, inputs)["output"])
    assert "".join(chunks) == whole
    # A replacement character at the end of a chunk would be the first half of a split one.
    assert not any(chunk.endswith("\ufffd") and not whole.endswith("\ufffd") for chunk in chunks[:-1])
    named = {"question": "average 温度 per 都市🦙", "columns": ["温度", "都市🦙", "gpu.util"]}
    text = "".join(
        event.text
        for event in client.stream(server.url, {"fields": json.dumps(named, ensure_ascii=False), "max_tokens": 120})
        if event.kind == "output"
    )
    assert "\ufffd" not in text


def test_the_same_seed_gives_the_same_answer(server: Server) -> None:
    inputs = {"prompt": "Tell a story.", "temperature": 2.0, "max_tokens": 40}
    answers = {seed: client.predict(server.url, {**inputs, "seed": seed})["output"] for seed in (11, 12, 13)}
    assert len(set(map(str, answers.values()))) > 1
    assert client.predict(server.url, {**inputs, "seed": 13})["output"] == answers[13]


def test_stop_ends_the_answer_and_is_left_out(server: Server, rows: list[questions.Row]) -> None:
    whole = answer(server, rows[0])
    cut = answer(server, rows[0], stop='"op"')
    assert cut == whole[: whole.index('"op"')]
    assert answer(server, rows[0], stop='["nowhere", "calculations"]') == whole[: whole.index("calculations")]


def test_length_limits(server: Server) -> None:
    prediction = client.predict(server.url, {"prompt": "Count.", "max_tokens": 5, "min_tokens": 5})
    assert prediction["metrics"]["output_token_count"] == 5
    assert prediction["metrics"]["finish_reason"] == "length"


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(server: Server) -> None:
    with pytest.raises(CogpressError, match=r"prompt is 9\d\d\d tokens long and the context 8192"):
        client.predict(server.url, {"prompt": "word " * 9000})


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "nothing to answer"),
        ({"fields": "{}"}, "lacks question, columns"),
        ({"messages": "[1]"}, "Message 1"),
        ({"temperature": 9, "prompt": "a"}, "temperature"),
        ({"top_p": 0, "prompt": "a"}, "top_p"),
        ({"max_tokens": 0, "prompt": "a"}, "max_tokens"),
    ],
)
def test_bad_inputs_are_explained(server: Server, inputs: dict[str, Any], said: str) -> None:
    with pytest.raises(CogpressError, match=said):
        client.predict(server.url, inputs)


def test_a_conversation_is_continued(server: Server, rows: list[questions.Row]) -> None:
    template = f"{rows[0]['question']}\nColumns:\n" + "\n".join(rows[0]["columns"])
    messages = json.dumps([{"role": "user", "content": template}])
    assert "".join(client.predict(server.url, {"messages": messages, "max_tokens": 160})["output"]) == answer(
        server, rows[0]
    )


@pytest.mark.parametrize(
    ("form", "fits"),
    [
        ({"json_schema": (ROOT / "examples" / "query.schema.json").read_text()}, lambda text: queries.normalize(text)),
        ({"regex": "[A-Z]{3}-[0-9]{4}"}, lambda text: re.fullmatch("[A-Z]{3}-[0-9]{4}", text)),
        ({"choices": '["red", "green"]'}, lambda text: text in ("red", "green")),
        ({"grammar": 'root ::= "SELECT " [a-z]{3}'}, lambda text: re.fullmatch("SELECT [a-z]{3}", text)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_answers_follow_a_form(server: Server, rows: list[questions.Row], form: dict[str, str], fits: Any) -> None:
    texts = [answer(server, row, temperature=1.0, seed=1, **form) for row in rows[:4]]
    assert all(fits(text) for text in texts), texts


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"json_schema": '{"type": "nothing"}'}, "json_schema cannot be enforced: .*nothing"),
        ({"regex": "(a"}, "regex cannot be used"),
        ({"choices": "yes"}, "choices is not JSON"),
        ({"regex": "a", "grammar": 'root ::= "a"'}, "can have only one form"),
        ({"tools": '[{"function": {"name": "f"}}]'}, "chat template knows no tools"),
        ({"thinking": True}, "no switch for reasoning"),
        ({"adapter": "sql"}, "model.yaml lists no adapters"),
        ({"logit_bias": '{"an unlikely llama": 1}'}, "Name one token"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_impossible_inputs_are_refused_before_anything_is_generated(
    server: Server, inputs: dict[str, Any], said: str
) -> None:
    with pytest.raises(CogpressError, match=said):
        client.predict(server.url, {"prompt": "a", **inputs})


def test_log_probabilities_come_as_metrics(server: Server) -> None:
    inputs = {"prompt": "Say yes.", "max_tokens": 4, "min_tokens": 4, "logprobs": 2, "logit_bias": '{"yes": 100}'}
    prediction = client.predict(server.url, inputs)
    assert "".join(prediction["output"]) == "yesyesyesyes"
    found = prediction["metrics"]["logprobs"]
    assert [one["token"] for one in found] == ["yes"] * 4
    assert all(one["logprob"] <= 0 and 2 <= len(one["top"]) <= 3 for one in found)
    assert all(one["top"] == sorted(one["top"], key=lambda top: -top["logprob"]) for one in found)


def test_a_tar_of_weights_is_served(trained_weights: Path, tmp_path: Path) -> None:
    tar = archive.pack(trained_weights, tmp_path / "weights.tar")
    assert manifest.fingerprint(fetch.model(tar, tmp_path).folder) == manifest.fingerprint(trained_weights)


def test_training_through_cogs_endpoint_gives_weights_that_are_served(
    tiny_base: Path, examples_file: Path, tmp_path: Path
) -> None:
    root = tmp_path / "project"
    root.mkdir()
    for name in ("cog.yaml", "predict.py", "train.py"):
        shutil.copyfile(ROOT / name, root / name)
    (root / "model.yaml").write_text("name: test\n")
    (root / "cogpress").symlink_to(ROOT / "cogpress")
    data = base64.b64encode(examples_file.read_bytes()).decode()
    inputs = {
        "train_data": f"data:application/jsonl;base64,{data}",
        "base_model": str(tiny_base),
        "max_steps": 3,
        "batch_size": 2,
        "rank": 2,
        "max_length": 128,
    }
    with Server(root, mode="train", log=tmp_path / "train.log") as server:
        server.wait_ready(120)
        with pytest.raises(CogpressError, match="rank"):
            client.train(server.url, {**inputs, "rank": 0})
        output = client.train(server.url, inputs)["output"]["weights"]
    tar = tmp_path / "weights.tar"
    tar.write_bytes(base64.b64decode(output.partition(",")[2]))
    folder = fetch.model(tar, root / ".cache").folder
    assert (folder / "manifest.json").is_file()
    assert list(folder.glob("*.safetensors"))
