"""The benchmark of the local Replicate: over the real Cog runtime with a light runner, and its verdict."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from bench import playground
from cogpress.errors import CogpressError
from tests.standins.localreplicate import ROOT

RUNNER = """
import asyncio, json, sys
from typing import Optional
sys.path.insert(0, {root!r})
import cog
from cog import BaseRunner, ConcatenateIterator, Input
from cogpress.cog import streaming

class Runner(BaseRunner):
    def setup(self, weights: Optional[cog.Path] = None) -> None:
        streaming.install()

    async def chunks(self, question, max_tokens, record):
        record("input_token_count", 3)
        for number in range(min(max_tokens, 20)):
            await asyncio.sleep(0.005)
            yield f"{{question}} {{number}} "
        record("output_token_count", min(max_tokens, 20))

    @cog.streaming
    @cog.concurrent(max=256)  # more than there are streams: the runtime frees a slot a moment after its answer
    async def run(
        self,
        fields: str = Input(description="The template's values."),
        max_tokens: int = Input(description="At most.", default=16),
        temperature: float = Input(description="Not used.", default=1.0),
    ) -> ConcatenateIterator[str]:
        return streaming.stream(self.chunks(json.loads(fields)["question"], max_tokens, self.scope.record_metric))
"""


@pytest.mark.slow
def test_both_ways_are_measured_in_turn_and_nothing_stays(tmp_path: Path) -> None:
    (tmp_path / "cog.yaml").write_text('build:\n  python_version: "3.12"\nrun: "predict.py:Runner"\n')
    (tmp_path / "predict.py").write_text(RUNNER.format(root=str(ROOT)))
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "playground").symlink_to(ROOT / "scripts" / "playground")
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    asked: list[int] = []

    def examples(count: int) -> list[dict[str, Any]]:
        asked.append(count)
        return [{"question": f"which {number}?"} for number in range(count)]

    said = io.StringIO()
    out = tmp_path / "bench" / "playground.json"
    console = Console(file=said, width=120)
    report = playground.run(tmp_path, weights, examples, out, console, rounds=2, requests={1: 4, 16: 16})
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before
    assert asked == [2 * 2 * 4 + (2 * 2 + 2) * 16]  # nothing is asked twice
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    for name, tokens in (("streams-1", 4 * playground.ALONE_TOKENS), ("streams-16", 16 * 20)):
        for way in (playground.DIRECT, playground.THROUGH):
            found = report["rounds"][name][way]
            assert [(one["lost"], one["tokens"]) for one in found] == [(0, tokens)] * 2
    assert len(report["verdict"]) == 2
    text = said.getvalue()
    orders = [line.partition(": ")[0].rpartition(", ")[2] for line in text.splitlines() if "16 streams, round" in line]
    assert orders == ["Cog server", "through the local Replicate", "through the local Replicate", "Cog server"]
    assert "its processor time" in text


@pytest.mark.parametrize(
    ("later", "ratio", "passed"), [(0.010, 0.97, True), (0.011, 1.0, False), (0.0, 0.96, False), (-0.002, 1.1, True)]
)
def test_the_verdict_is_of_pairs_of_rounds(later: float, ratio: float, passed: bool) -> None:
    # The machine is twice as fast in the second round, for both ways.
    speeds, times = (100.0, 200.0, 110.0), (0.2, 0.1, 0.18)
    measured = {
        "streams-1": {
            "direct": [{"ttft_p50": one} for one in times],
            "local": [{"ttft_p50": one + later} for one in times],
        },
        "streams-16": {
            "direct": [{"tokens_per_second": one} for one in speeds],
            "local": [{"tokens_per_second": one * ratio} for one in speeds],
        },
    }
    checks = playground.verdict(measured)
    assert all(check.passed for check in checks) is passed
    assert [check.measured for check in checks] == [f"{1000 * later:+.1f} ms", f"{ratio:.3f}"]


def test_weights_that_are_not_there_are_said(tmp_path: Path) -> None:
    with pytest.raises(CogpressError, match="no weights"):
        playground.run(tmp_path, tmp_path, lambda _: [], tmp_path / "out.json", Console(quiet=True))
