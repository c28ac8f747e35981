"""The demonstration's parts on a tiny model; `.ci/demo` checks the figures of the demonstration itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from rich.console import Console

from cogpress import demo
from cogpress.weights import manifest
from examples import queries, questions

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.train]

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's files with a tiny model in model.yaml, a few steps and the reference engine."""
    root = tmp_path_factory.mktemp("project")
    for name in ("cog.yaml", "predict.py", "train.py"):
        shutil.copyfile(ROOT / name, root / name)
    for name in ("cogpress", "examples"):
        (root / name).symlink_to(ROOT / name)
    settings = yaml.safe_load((ROOT / "model.yaml").read_text())
    settings["base"]["source"] = str(tiny_base)
    settings["train"] |= {"max_steps": 4, "batch_size": 2, "rank": 4}
    settings["data"]["validation_share"] = 0.2
    settings["serve"] = {"engine": "transformers"}
    (root / "model.yaml").write_text(yaml.safe_dump(settings))
    return root


@pytest.fixture(scope="module")
def runs(project: Path) -> list[tuple[dict[str, Any], str]]:
    """The reports of two demonstrations, one after the other, and what they printed."""
    task = demo.Task(write=questions.write, score=queries.score)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for name, number in (("TRAIN_ROWS", 24), ("QUESTIONS", 6), ("MAX_TOKENS", 24), ("CONCURRENT", 3)):
            patch.setattr(demo, name, number)
        for _ in range(2):
            console = Console(width=80)
            with console.capture() as said:
                report = demo.run(project, task, console, fresh=False)
            found.append((report, said.get()))
    return found


def test_the_report_is_complete(runs: list[tuple[dict[str, Any], str]], project: Path) -> None:
    report, said = runs[0]
    assert report["exact_match"] == {"base": 0.0, "tuned": 0.0, "questions": 6}, "a random model knows nothing"
    for name in (
        "kl_reference_vs_naive_merge",
        "ttft_seconds",
        "stream_tokens_per_second",
        "concurrent_tokens_per_second",
        "train_seconds",
        "train_tokens_per_second",
        "peak_memory_gb",
        "server_ready_seconds",
        "seconds",
    ):
        assert report[name] > 0, name
    assert report["kl_reference_vs_merged"] <= 0.005
    assert report["draft_gain"].keys() == {"1", "3"}
    assert "through its draft" in said
    assert (report["concurrent_streams"], report["train_steps"]) == (3, 4)
    assert {"python", "torch", "transformers", "peft", "bitsandbytes", "cog"} <= set(report["versions"])
    assert "Held-out questions" in said
    assert max(len(line) for line in said.splitlines() if line.startswith(("│", "┃"))) <= 80


def test_the_run_is_all_there(runs: list[tuple[dict[str, Any], str]], project: Path) -> None:
    run = project / "runs" / "demo"
    names = {path.name for path in run.iterdir()}
    assert {"adapter", "answers.json", "config.json", "data.json", "lengths.png", "loss.png", "metrics.jsonl"} <= names
    facts = manifest.read(run / "weights") or {}
    manifest.check(run / "weights", facts)
    assert facts["merge"]["onto"] == "dequantized"
    assert all(Path(name).suffix in (".json", ".safetensors", ".jinja") for name in facts["files"])


def test_run_again_it_reuses_everything_and_leaves_nothing_running(
    runs: list[tuple[dict[str, Any], str]], project: Path
) -> None:
    (first, _), (again, said) = runs
    assert said.count("reused") >= 4
    assert json.loads((project / "runs" / "demo" / "report.json").read_text()) == again
    assert again["seconds"] < first["seconds"]
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    running = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in running if "cog.server.http" in line and str(project) in line]
