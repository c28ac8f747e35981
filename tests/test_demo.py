"""What the README says of the demonstration, on the machine that runs the tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from cogpress.weights import manifest

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.train]

ROOT = Path(__file__).resolve().parents[1]


def test_the_model_has_learnt_the_task(demo_report: dict[str, Any]) -> None:
    assert demo_report["exact_match"]["questions"] >= 60
    assert demo_report["exact_match"]["tuned"] >= 0.95
    assert demo_report["exact_match"]["base"] <= 0.5


def test_the_merge_keeps_what_training_scored(demo_report: dict[str, Any]) -> None:
    assert demo_report["kl_reference_vs_merged"] <= 0.005
    assert demo_report["kl_reference_vs_naive_merge"] > 5 * demo_report["kl_reference_vs_merged"]


def test_the_first_token_comes_soon(demo_report: dict[str, Any]) -> None:
    assert demo_report["ttft_seconds"] <= 0.25


def test_the_report_is_complete(demo_report: dict[str, Any]) -> None:
    for name in (
        "stream_tokens_per_second",
        "concurrent_tokens_per_second",
        "train_seconds",
        "train_tokens_per_second",
        "peak_memory_gb",
    ):
        assert demo_report[name] > 0, name
    assert demo_report["concurrent_streams"] == 16
    assert demo_report["concurrent_tokens_per_second"] > 2 * demo_report["stream_tokens_per_second"]
    assert {"python", "torch", "transformers", "peft", "bitsandbytes", "cog"} <= set(demo_report["versions"])


def test_the_run_is_all_there(demo_report: dict[str, Any]) -> None:
    names = {path.name for path in (ROOT / "runs" / "demo").iterdir()}
    assert {"adapter", "answers.json", "config.json", "data.json", "lengths.png", "loss.png", "metrics.jsonl"} <= names
    facts = manifest.read(ROOT / "runs" / "demo" / "weights")
    assert facts is not None
    manifest.check(ROOT / "runs" / "demo" / "weights", facts)
    assert facts["merge"]["onto"] == "dequantized"
    assert all(Path(name).suffix in (".json", ".safetensors", ".jinja") for name in facts["files"])


def test_run_again_it_reuses_everything_and_leaves_nothing_running(demo_report: dict[str, Any]) -> None:
    again = subprocess.run([sys.executable, ROOT / "scripts" / "demo"], capture_output=True, text=True, check=True)
    assert again.stdout.count("reused") >= 4
    report = json.loads((ROOT / "runs" / "demo" / "report.json").read_text())
    assert report["seconds"] < 60
    assert {key: value for key, value in report.items() if key != "seconds"} == {
        key: value for key, value in demo_report.items() if key != "seconds"
    }
    running = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in running if "cog.server.http" in line and str(ROOT) in line]
