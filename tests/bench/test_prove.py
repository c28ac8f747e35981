"""Every part of `scripts/prove` runs on a CPU with a tiny model, and the page says what it is of."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import prove
from bench.prove import Row
from cogpress import phases

ROOT = Path(__file__).resolve().parents[2]


def test_a_page_without_a_gpu_says_so() -> None:
    rows = [Row("loss", "1e-3", "≤ 1e-2", True), Row("peak", "9 GB", "≤ 8 GB", False), Row("base", "random")]
    of_a_cpu, of_a_gpu = (prove.written(rows, gpu=gpu) for gpu in (False, True))
    assert "No GPU was to be had" in of_a_cpu
    assert "No GPU" not in of_a_gpu
    for page in (of_a_cpu, of_a_gpu):
        assert "| loss | 1e-3 | ≤ 1e-2 | yes |\n| peak | 9 GB | ≤ 8 GB | NO |\n| base | random |  |  |\n" in page


@pytest.mark.train
def test_every_part_runs(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert base_folder.is_dir()  # which is fetched
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(prove, "TOKENS", 4)

    def here(name: str, work: Callable[..., Any], *given: Any, console: Any = None, tick: Any = None) -> Any:
        """A phase in this process, which saves a start for each."""
        more = {key: value for key, value in (("console", console), ("tick", tick)) if value is not None}
        if phases.meter is None:
            return work(*given, **more)
        with phases.meter() as found:
            result = work(*given, **more)
        phases.measured.append((name, found[0]))
        return result

    monkeypatch.setattr(phases, "run", here)
    page = tmp_path / "gpu.md"
    rows = {row.what: row for row in prove.run(ROOT, tmp_path / "work", "tiny", 2, Console(file=io.StringIO()), page)}
    assert phases.meter is None
    assert rows["rows of a batch"].measured == "packed"
    assert rows["loss of a batch, relative to float32 on the CPU"].holds
    assert rows["cosine of its gradients"].holds
    for name in ("training", "reference", "comparison"):
        assert float(rows[f"{name}: peak"].measured.split()[0]) > 0
    assert float(rows["merge: mean KL to what training scored"].measured) < 0.01
    assert json.loads((tmp_path / "work" / "prove.json").read_text())["gpu"] is False
    assert "| context that is served | 8,192 |" in page.read_text()


@contextmanager
def thousand() -> Any:
    found = [0]
    yield found
    found[0] = 1000


@pytest.mark.slow
def test_a_phase_that_is_measured_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr(phases, "measured", [])
    monkeypatch.setattr(phases, "meter", thousand)
    assert phases.run("training", os.getpid) != os.getpid()
    assert phases.measured == [("training", 1000)]
