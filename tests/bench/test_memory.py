"""The memory benchmark's own measuring and judging, without a model."""

from __future__ import annotations

import io
import json
import mmap
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import memory as bench
from cogpress.errors import CogpressError
from cogpress.plan.memory import Memory, Serving, Training


@pytest.mark.slow
def test_a_peak_is_seen_and_what_is_freed_leaves() -> None:
    before = bench.resident()
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # not what the heap has kept
    with bench.peak(every=0.001) as found, mmap.mmap(-1, 80_000_000, flags=private) as held:
        held.write(b"x" * 80_000_000)
        deadline = time.monotonic() + 60
        while found[0] - before < 60_000_000 and time.monotonic() < deadline:
            time.sleep(0.01)  # a busy machine lets the one who looks wait
    assert found[0] - before > 60_000_000
    bench.tidy()
    assert bench.resident() - before < 40_000_000


def test_a_prediction_is_compared_with_and_without_the_frame() -> None:
    found = bench.compared("case", Serving(), Memory(weights=800.0, overhead=250.0), 1000.0, 200.0)
    assert found["error"] == pytest.approx(0.05)
    assert found["own_error"] == pytest.approx(850 / 800 - 1)
    json.dumps(found)


@pytest.mark.slow
@pytest.mark.parametrize(("measured", "passes"), [(1.1, True), (1.3, False)])
def test_predictions_that_are_far_off_fail(
    measured: float, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stand_in(function: Any, *arguments: Any) -> Any:
        if function is bench.checkpoint.make:
            return tmp_path, tmp_path
        how = arguments[1]
        kind = "train" if isinstance(how, Training) else "serve"
        return bench.compared(kind, how, Memory(weights=1e9), measured * 1e9, 0.0)

    monkeypatch.setattr(bench, "in_fresh_process", stand_in)
    monkeypatch.setattr(bench.fetch, "base", lambda *_: tmp_path)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "")
    out = tmp_path / "memory.json"
    console = Console(file=io.StringIO())
    if passes:
        bench.run(out, tmp_path, tmp_path, console)
    else:
        with pytest.raises(CogpressError, match=r"A prediction is off by 23%; the limit is 15%"):
            bench.run(out, tmp_path, tmp_path, console)
    cases = json.loads(out.read_text())["cases"]
    assert {case["model"] for case in cases} == {"135 M", "1.1 B"}
    if passes:
        bench.run(out, tmp_path, tmp_path, console, quick=True)
        assert {case["model"] for case in json.loads(out.read_text())["cases"]} == {"135 M"}
    assert {"train", "serve"} >= {case["case"] for case in cases} >= {"train"}
