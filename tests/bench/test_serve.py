"""The serving benchmark: what it asks, how it starts both sides, what it judges and what it writes."""

from __future__ import annotations

import io
import itertools
import json
import runpy
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import batch, serve, serve_report, servers, speculative, workloads
from cogpress import config, plots
from cogpress.config import Prompt
from cogpress.errors import CogpressError
from cogpress.prompts import Question, conversation
from cogpress.serve import model as serving
from cogpress.setup import environment
from examples import questions
from tests import Script
from tests.standins.benchserver import TOKEN, FakeReplicate, Reply, Request, StandIn, body, cog_answer, standing_in

ROOT = Path(__file__).resolve().parents[2]


def examples(count: int) -> list[dict[str, Any]]:
    return [{"question": row["question"], "columns": row["columns"]} for row in questions.generate(count, "test", 1)]


@pytest.mark.slow
def test_nothing_is_asked_twice_and_every_run_asks_the_same() -> None:
    loads = workloads.planned(scale=2)
    asked = workloads.questions_of(loads, 3, examples)
    assert asked == workloads.questions_of(loads, 3, examples)
    assert [one.name for one in loads] == [
        "example-1", "example-4", "example-16", "example-32", "example-64", "long-1", "long-8", "open",
    ]  # fmt: skip
    for one in loads:
        assert [len(questions) for questions in asked[one.name]] == [one.requests] * 3
        assert all(len(questions) >= one.streams for questions in asked[one.name])
    every = [json.dumps(one.inputs) for rounds in asked.values() for questions in rounds for one in questions]
    assert len(set(every)) == len(every)


def test_a_long_prompt_begins_otherwise_each_time_and_forces_its_answers_length() -> None:
    one, other = workloads.long_question("a"), workloads.long_question("b")
    assert one == workloads.long_question("a")
    assert one.text[:60] != other.text[:60]
    assert one.inputs == {"prompt": one.text, "max_tokens": 256, "temperature": 0, "min_tokens": 256}
    several = Prompt(system="S", template="{question} {columns}")
    assert one.messages(several)[-1]["content"] == one.text, (
        "as cogpress takes a prompt for a template of several fields"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kinds": ("odd",)}, "There is no load with odd"),
        ({"streams": (0,)}, "There is no load with fewer than one stream"),
        ({"kinds": ("example",), "streams": ()}, "No load is left"),
    ],
)
def test_loads_that_there_are_not(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CogpressError, match=message):
        workloads.planned(**arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Starting and comparing
# ---------------------------------------------------------------------------------------------------------------------


def test_vllms_flags() -> None:
    assert servers.flags(
        {"model": "w", "enforce_eager": True, "trust_remote_code": False, "disable_log_stats": False,
         "max_model_len": None, "speculative_config": {"method": "ngram"}, "gpu_memory_utilization": 0.45}
    ) == [
        "--model", "w", "--enforce-eager", "--no-trust-remote-code", "--speculative-config", '{"method": "ngram"}',
        "--gpu-memory-utilization", "0.45",
    ]  # fmt: skip


def test_the_parts_of_a_start_are_read_from_the_servers_log() -> None:
    seconds = {"fetch": 1.5, "imports": 10.25, "saved": 1.5, "tokenizer": 0.5, "engine": 20.0, "total": 31.0}
    line = serving.cold_start_line(seconds)
    found = servers.cold_start(f"a line\n2026 INFO coglet::setup: {line} source=Stdout\n")
    assert found == pytest.approx(seconds, abs=0.06)
    assert servers.cold_start("nothing") == {}


def test_a_server_that_ends_before_it_is_ready_says_why(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", "print('no room', flush=True); exit(3)"], stdout=output)
    with pytest.raises(
        CogpressError, match=r"ended with exit status 3 before it was ready, and said last: no room\. All"
    ):
        servers._wait_healthy(process, "http://127.0.0.1:9", log)


@pytest.mark.slow
def test_a_project_for_half_the_gpu_is_the_project_but_for_that(tmp_path: Path) -> None:
    from cogpress import config

    made = servers._project(ROOT, tmp_path, 0.45)
    ours, theirs = config.load(made / "model.yaml"), config.load(ROOT / "model.yaml")
    assert ours.serve.gpu_memory_share == 0.45
    assert ours == theirs.model_copy(update={"serve": theirs.serve.model_copy(update={"gpu_memory_share": 0.45})})
    assert (made / "predict.py").resolve().parent == made.resolve()
    code = "from cogpress.engines import base as engine; print(engine.__file__, engine.find('vllm').__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=made, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [f"{made}/cogpress/engines/base.py", f"{made}/cogpress/engines/vllm.py"]


def rounds(**figures: float) -> list[dict[str, float]]:
    usual = {
        "requests": 128.0, "failed": 0.0, "refused": 0.0, "empty": 0.0, "lost": 0.0, "seconds": 10.0, "tokens": 1000.0,
        "prompt_tokens_mean": 90.0, "tokens_per_second": 100.0, "requests_per_second": 2.0,
        "stream_tokens_per_second": 30.0, "latency_p50": 1.0, "late_max": 0.001, "client_share": 0.1,
        **{f"{kind}_p{share}": 0.1 + share / 1000 for kind in ("ttft", "itl") for share in (50, 90, 99)},
    }  # fmt: skip
    return [{**usual, **figures}] * 3


@pytest.mark.parametrize(
    ("figures", "failing"),
    [
        ({}, []),
        ({"tokens_per_second": 97.0, "ttft_p50": 0.165}, []),
        ({"tokens_per_second": 96.0}, ["tokens per second, 1 stream", "tokens per second, 16 streams"]),
        ({"ttft_p50": 0.166}, ["time to first token, 1 stream", "time to first token, 16 streams"]),
        ({"failed": 1.0, "refused": 1.0}, ["nothing lost with 64 streams"]),
        ({"empty": 1.0}, ["nothing lost with 64 streams"]),
    ],
)
def test_the_verdict(figures: dict[str, float], failing: list[str]) -> None:
    measured = {f"example-{n}": {"cogpress": rounds(**figures), "vllm": rounds()} for n in (1, 4, 16, 64)}
    checks = serve_report.verdict(measured)
    assert len(checks) == 5
    assert [check.requirement.partition(":")[0] for check in checks if not check.passed] == failing


def test_one_loss_in_one_round_is_a_loss() -> None:
    three = rounds()
    three[1] = {**three[1], "failed": 1.0}
    [check] = serve_report.verdict({"example-64": {"cogpress": three, "vllm": rounds()}})
    assert not check.passed
    assert check.measured == "383 of 384 answered, 0 refused, 1 failed, 0 empty"


def test_what_was_not_measured_is_not_judged() -> None:
    assert serve_report.verdict({}) == []
    assert len(serve_report.verdict({"example-16": {"cogpress": rounds(), "vllm": rounds()}})) == 2


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", head[16:24])
    return width, height


@pytest.mark.slow
def test_the_picture(tmp_path: Path) -> None:
    def points(speed: float) -> list[dict[str, float]]:
        return [
            {
                "streams": n,
                **rounds(tokens_per_second=speed * n**0.7, ttft_p50=0.05 * n**0.5, ttft_p99=0.09 * n**0.5)[0],
            }
            for n in (1, 4, 16, 32, 64)
        ]

    curves = {"cogpress": points(33), "vLLM's server": points(31), "owner/model": points(60)}
    plots.serving_curves(curves, tmp_path / "serve.png")
    assert png_size(tmp_path / "serve.png") == (1500, 528)


class Comparison:
    """`serve.run` with stand-ins for everything that loads a model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, cog: StandIn, vllm: StandIn) -> None:
        self.folder, self.running, self.fails = folder, 0, False
        self.text = io.StringIO()
        machine = servers.Machine({"max_num_seqs": 64}, {}, [], 0.9)
        monkeypatch.setattr(servers, "in_fresh_process", lambda *_: machine)
        monkeypatch.setattr(serve, "QUIET_SECONDS", 0.0)
        monkeypatch.setattr(servers, "_cogpress", lambda *_: self.server(cog.url))
        monkeypatch.setattr(servers, "_vllm", lambda *_: self.server("" if self.fails else vllm.url))
        (folder / "config.json").write_text("{}")

    @contextmanager
    def server(self, url: str) -> Iterator[str]:
        if not url:
            raise CogpressError("It ended before it was ready.")
        self.running += 1
        try:
            yield url
        finally:
            self.running -= 1

    def run(self, **options: Any) -> dict[str, Any]:
        console = Console(file=self.text, width=110)
        more = {"kinds": ("example", "open"), "streams": (1, 16), "rounds": 2, "warm_disk": False, **options}
        return serve.run(ROOT, self.folder, examples, self.folder / "out" / "serve.json", console, **more)


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Comparison]:
    async def openai(_request: Request) -> Reply:
        text = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
        usage = b'data: {"choices":[],"usage":{"prompt_tokens":100,"completion_tokens":8}}\n\n'
        return 200, "text/event-stream", body(0.01, text, 0.004, text, usage)

    with standing_in(cog_answer(0.01, 0.004)) as cog, standing_in(openai) as vllm:
        made = Comparison(monkeypatch, tmp_path, cog, vllm)
        made.cog, made.vllm = cog, vllm  # type: ignore[attr-defined]
        yield made


@pytest.mark.slow
def test_a_comparison_asks_all_sides_the_same_and_writes_what_it_found(
    comparison: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeReplicate()
    with standing_in(fake.answer) as server:
        fake.url = server.url
        monkeypatch.setenv("REPLICATE_API_TOKEN", TOKEN)
        monkeypatch.setenv("REPLICATE_BASE_URL", server.url)
        report = comparison.run(kinds=("example",), streams=(1,), url="me/mine")
        third = [request for request in server.requests if request.method == "POST"]
    assert comparison.running == 0
    inputs = [request.body["input"] for request in comparison.cog.requests]
    assert inputs[20:] == [request.body["input"] for request in third][20:]
    prompt = config.load(ROOT / "model.yaml").prompt
    asked = [request.body["messages"][-1]["content"] for request in comparison.vllm.requests]
    assert asked[20:] == [
        conversation(Question(fields=json.loads(one["fields"])), prompt)[-1]["content"] for one in inputs[20:]
    ]
    assert len(set(asked)) == len(asked) == 20 + 2 * 12, "after the warm-up, two rounds of different questions"
    out = comparison.folder / "out"
    assert json.loads((out / "serve.json").read_text()) == json.loads(json.dumps(report))
    assert png_size(out / "serve.png")[0] == 1500
    shown = comparison.text.getvalue()
    assert TOKEN not in shown + (out / "serve.json").read_text()
    for words in (
        "me/mine",
        "vLLM's server",
        "example, 1 stream",
        "TTFT (ms)",
        "Verdict",
        "Start and memory",
        "24 / 0",
    ):
        assert words in shown, words


@pytest.mark.slow
def test_a_comparison_measures_each_load_and_judges(comparison: Any) -> None:
    report = comparison.run()
    assert list(report["rounds"]) == ["example-1", "example-16", "open"]
    assert all(len(found) == 2 for sides in report["rounds"].values() for found in sides.values())
    rate = report["settings"]["open_loop_requests_per_second"]
    assert rate == pytest.approx(0.7 * report["rounds"]["example-16"]["cogpress"][0]["requests_per_second"])
    assert len(report["verdict"]) == 4
    assert report["lost"] == {}
    assert {"cogpress", "python", "httpx"} <= report["versions"].keys()
    assert report["machine"]["cores"] >= 1


@pytest.mark.slow
def test_few_streams_are_asked_in_parts_in_an_order_that_alternates(comparison: Any) -> None:
    order: list[str] = []

    def noting(name: str, answer: Any) -> Any:
        async def note(request: Request) -> Reply:
            if request.method == "POST":
                order.append(name)
            reply: Reply = await answer(request)
            return reply

        return note

    for name in ("cog", "vllm"):
        server = getattr(comparison, name)
        server.answer = noting(name, server.answer)
    report = comparison.run(kinds=("example",), streams=(1,))
    runs = [(name, len(list(same))) for name, same in itertools.groupby(order[40:])]
    # Two rounds of 12 questions in 4 parts of 3: c v, v c, c v, v c and so on.
    assert runs == [("cog", 3), *[("vllm", 6), ("cog", 6)] * 3, ("vllm", 6), ("cog", 3)]
    assert [found["requests"] for found in report["rounds"]["example-1"]["cogpress"]] == [12, 12]


@pytest.mark.slow
def test_the_report_says_which_requests_were_lost_and_why(comparison: Any) -> None:
    usual, asked = comparison.cog.answer, []

    async def sometimes_busy(request: Request) -> Reply:
        asked.append(request)
        # After the warm-up, the third of the first round's 12 and the first two of the second's.
        if len(asked) - 20 in (3, 13, 14):
            return (409 if len(asked) - 20 < 14 else 500), "text/plain", body(b"no")
        return await usual(request)

    comparison.cog.answer = sometimes_busy
    report = comparison.run(kinds=("example",), streams=(1,))
    assert report["lost"] == {
        "example-1": {
            "cogpress": {
                "causes": {"HTTP 409": 2, "HTTP 500": 1},
                "requests": [
                    {"round": 1, "request": 3, "cause": "HTTP 409", "error": "The server answers 409: no"},
                    {"round": 2, "request": 1, "cause": "HTTP 409", "error": "The server answers 409: no"},
                    {"round": 2, "request": 2, "cause": "HTTP 500", "error": "The server answers 500: no"},
                ],
            }
        }
    }
    assert "Lost by cogpress, example, 1 stream: 2 for HTTP 409, 1 for HTTP 500" in comparison.text.getvalue()
    assert "24 / 3" in comparison.text.getvalue()


def test_where_a_side_does_not_start_the_other_is_ended(comparison: Any) -> None:
    comparison.fails = True
    with pytest.raises(CogpressError, match=r"^It ended before it was ready\.$"):
        comparison.run()
    assert comparison.running == 0
    assert not (comparison.folder / "out" / "serve.json").exists()


def test_a_side_that_answers_nothing_is_named(comparison: Any) -> None:
    async def broken(_request: Request) -> Reply:
        return 500, "text/plain", body(b"no")

    comparison.vllm.answer = broken
    with pytest.raises(CogpressError, match=r"^vLLM's server answers nothing: The server answers 500: no$"):
        comparison.run()
    assert comparison.running == 0


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CogpressError, match="There are no weights at"):
        serve.run(ROOT, tmp_path, examples, tmp_path / "serve.json", Console(quiet=True))


def test_help_names_the_options(script: Script) -> None:
    _, shown, _ = script("bench", "--help")
    options = ("--rounds", "--loads", "--streams", "--scale", "--quick", "--url", "REPLICATE_API_TOKEN")
    for option in (*options, "speculative", "batch"):
        assert option in shown


@pytest.mark.parametrize(("module", "count"), [(speculative, 64), (batch, 512)])
def test_speculation_and_batches_are_measured_with_held_out_rows(
    module: Any, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[tuple[Any, ...]] = []
    what = module.__name__.rpartition(".")[2]
    monkeypatch.setattr(environment, "enter", lambda: None)
    monkeypatch.setattr(module, "run", lambda *arguments: given.append(arguments))
    monkeypatch.setattr(sys, "argv", ["bench", what, "--weights", str(tmp_path), "--rounds", "5"])
    runpy.run_path(str(ROOT / "scripts" / "bench"))["main"]()
    [(root, weights, rows, out, times, _)] = given
    assert (root, weights, out, times) == (ROOT, tmp_path, ROOT / "runs" / "bench" / f"{what}.json", 5)
    assert len(rows) == count
    assert all(
        row.keys() == {"prompt", "completion"} and row["prompt"].keys() == {"question", "columns"} for row in rows
    )


def test_what_is_taken_of_drafts_is_counted_by_place() -> None:
    counted = Counter({"drafts": 10, "drafted": 40, "1": 10, "2": 6, "3": 0})
    found = speculative._shares(counted, 1, 26)
    assert found == {
        "share per step 1": 2.6,  # 16 of 26 tokens came beside another
        "share taken 1": 0.4,
        "share place 1": 1.0,
        "share place 2": 0.6,
        "share place 3": 0.0,
    }
    assert speculative._shares(counted, 16, 26) == {"share per step 16": 2.6, "share taken 16": 0.4}
    assert speculative._shares(Counter(), 1, 26) == {"share per step 1": 1.0}
