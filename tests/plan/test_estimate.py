"""What fits where, ranked, and how it is shown; scripts/plan itself."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import bases
from cogpress import config
from cogpress.errors import CogpressError
from cogpress.plan import architecture, estimate, hardware, memory
from cogpress.plan import report as plan_report
from cogpress.plan.estimate import Estimate
from tests import Script
from tests.standins.architectures import LLAMA3, SMOLLM2, llama


def made(asked: dict[str, Any] | None = None, model: Any = LLAMA3, **sections: Any) -> Estimate:
    settings = config.parse({**sections, "plan": asked or {}}, "test")
    return estimate.make(settings, model, hardware.table())


@pytest.mark.parametrize(("limit", "expected"), [(0, 0), (1, 1), (7, 7), (4095, 4095), (4096, 4096), (9999, 4096)])
def test_the_largest_that_fits_is_found(limit: int, expected: int) -> None:
    assert estimate.largest(lambda number: number <= limit, 4096) == expected


def test_what_fits_is_exactly_what_fits() -> None:
    found = made({"concurrency": 16})
    for row in found.served:
        if row.refused is None:
            allowed = 0.9 * row.machine.gpu_bytes
            how = replace(found.serving, gpus=row.machine.gpus)
            assert memory.serving(LLAMA3, replace(how, concurrency=row.concurrency)).total <= allowed
            assert memory.serving(LLAMA3, replace(how, concurrency=row.concurrency + 1)).total > allowed
            assert row.room == pytest.approx(allowed - row.memory.total)
    for row in found.trained:
        if row.refused is None:
            how = replace(found.training, batch=row.batch + 1)
            assert memory.training(LLAMA3, how).total > row.machine.gpu_bytes


def test_machines_that_fit_come_first_and_the_cheapest_of_them_leads() -> None:
    found = made({"concurrency": 16})
    refused = [row.refused is not None for row in found.served]
    assert refused == sorted(refused)
    for access in ("general", "contract"):
        months = [min(row.serverless.per_month, row.always_on.per_month)  # type: ignore[union-attr]
                  for row in found.served if row.refused is None and row.machine.access == access]  # fmt: skip
        assert months == sorted(months)
    assert found.hardware is not None
    assert found.hardware.sku == "gpu-l40s"
    reasons = {row.machine.sku: str(row.refused) for row in found.served}
    assert "no GPU" in reasons["cpu"]
    assert "lacks" in reasons["gpu-t4"]
    assert {row.machine.gpus for row in found.trained} == {0, 1}


def test_hardware_by_contract_comes_after_what_every_account_may_use_unless_the_account_lists_it() -> None:
    settings = config.parse({"plan": {"concurrency": 4, "scheme": "float16"}}, "test")
    # A machine by contract that is cheaper than all others.
    table = hardware.table(prices={"gpu-h100-4x": 0.000001})
    found = estimate.make(settings, LLAMA3, table)
    fits = [row.machine.access for row in found.served if row.refused is None]
    assert fits == sorted(fits, reverse=True)
    assert found.hardware is not None
    assert found.hardware.access == "general"
    console = Console(width=80, file=io.StringIO())
    console.print(plan_report.tables(found))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text, "nothing is cut at 80 columns"
    assert "gpu-h100-4x †" in text
    assert "gpu-h100 †" not in text
    assert "† for accounts whose contract has it" in text
    own = estimate.make(settings, LLAMA3, hardware.of_account(table, [one.sku for one in table.machines]))
    assert own.hardware is not None
    assert own.hardware.sku == "gpu-h100-4x"


def test_a_machine_whose_host_memory_is_too_small_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("dated: 2027-01-31\nmachines:\n- {sku: lean, name: L, like: gpu-h100, host_memory_gb: 6.9}\n")
    table = hardware.table(path)
    found = estimate.make(config.parse({"plan": {"concurrency": 4}}, "test"), LLAMA3, table)
    # 3 GB a process, and the embedding's 1.05 GB: four times in training, once in serving.
    for rows, about in ((found.trained, 7), (found.served, 7)):
        reasons = {row.machine.sku: row.refused for row in rows}
        assert reasons["lean"] == (
            f"has 7 GB of host memory, and its processes and the tensors on their way to a GPU take about {about}"
        )
        assert reasons["gpu-h100"] is None
    assert any("Host memory: training takes about 7 GB and serving on one GPU 7 GB" in note for note in found.notes)


def test_a_plan_says_where_files_are_larger_than_the_host_memory() -> None:
    large = llama(128256, 8192, 28672, 80, 64, 8, tied=False)
    said = " ".join(made({"concurrency": 4, "scheme": "int4"}, model=large).notes)
    # 70.6 billion parameters in 16 bits; an A100's machine has 144 GB, of which training takes 11.
    assert "Training on gpu-a100-large (144 GB), gpu-h100 (72 GB): the host memory does not hold" in said
    assert "files (141 GB)" in said
    assert "Serving on" not in said
    assert "Training on gpu-t4 (16 GB): the host memory does not hold" in " ".join(made({"concurrency": 4}).notes)
    assert "does not hold" not in " ".join(made({"concurrency": 4}, model=SMOLLM2).notes)


def test_a_gpus_generation_decides() -> None:
    fp8 = {row.machine.sku: row.refused for row in made({"scheme": "fp8", "concurrency": 1}).served}
    assert fp8["gpu-a100-large"] == "does not compute in FP8"
    assert fp8["gpu-l40s"] is None
    # Before Ampere the engine takes float16 by itself, but not where bfloat16 is asked for.
    small = {row.machine.sku: row.refused for row in made(model=SMOLLM2).served}
    assert small["gpu-t4"] is None
    asked = {row.machine.sku: row.refused for row in made(model=SMOLLM2, serve={"dtype": "bfloat16"}).served}
    assert "float16" in str(asked["gpu-t4"])
    assert small["gpu-l40s-2x"] is None, "no two GPUs can share 9 heads, so each has a copy of the model"


def test_how_weights_are_quantized_is_taken_from_them() -> None:
    assert made(model=replace(SMOLLM2, scheme="int4")).serving.scheme == "int4"
    assert made({"scheme": "int8"}, model=replace(SMOLLM2, scheme="int4")).serving.scheme == "int8"
    with pytest.raises(CogpressError, match=r"quantized with mxfp4.*plan\.scheme"):
        made(model=replace(SMOLLM2, scheme="mxfp4"))


def test_a_wrong_question_is_explained() -> None:
    with pytest.raises(CogpressError, match=r"plan\.context is 9000, above the model's 8192"):
        made({"context": 9000})
    with pytest.raises(CogpressError, match="700 together"):
        made({"context": 512})
    with pytest.raises(CogpressError, match="no hardware 'gpu-x'"):
        made({"tokens_per_second": {"gpu-x": 1}})


def test_measured_speeds_are_used_and_marked() -> None:
    found = made({"tokens_per_second": {"gpu-l40s": 1950}, "training_tokens_per_second": {"gpu-l40s": 100},
                  "training_tokens": 36_000, "cold_start_seconds": 0, "concurrency": 16})  # fmt: skip
    [served] = [row for row in found.served if row.machine.sku == "gpu-l40s"]
    assert served.speed is not None
    assert served.speed.measured
    assert served.per_million == pytest.approx(0.000975 / 1950 * 1e6)
    [trained] = [row for row in found.trained if row.machine.sku == "gpu-l40s"]
    assert (trained.seconds, trained.measured) == (360, True)
    assert trained.dollars == pytest.approx(360 * 0.000975)


def test_the_tokens_of_a_training_say_where_they_are_from(tmp_path: Path) -> None:
    def tokens(report: dict[str, Any] | None = None, **train: Any) -> Any:
        return estimate.training_tokens(config.parse({"train": train}, "test"), report or {})

    report = {"train": 90, "validation": 10, "tokens": 20_000, "learnt_tokens": 5_000}
    assert tokens() is None
    assert tokens(max_steps=10, batch_size=4, max_length=100)[0] == 4000
    assert tokens(report, max_steps=10, batch_size=4)[0] == 10 * 4 * 200
    assert tokens(report, epochs=2)[0] == 2 * 90 * 200
    replayed = config.parse({"data": {"replay_share": 0.1}}, "test")
    assert (estimate.training_tokens(replayed, report) or (0,))[0] == 100 * 200, "general text among the rows"
    (tmp_path / "data.json").write_text(json.dumps(report))
    assert estimate.data_report(tmp_path) == report
    assert estimate.data_report(tmp_path / "none") == {}
    found = estimate.make(config.Config(), SMOLLM2, hardware.table(), report=report)
    assert found.training.answers == 0.25


@pytest.mark.slow
def test_a_plan_is_shown_as_tables_json_and_a_picture(tmp_path: Path) -> None:
    found = made({"concurrency": 16})
    console = Console(width=160, file=io.StringIO())
    console.print(plan_report.tables(found))
    plan_report.write(found, tmp_path, console, config.Plan())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("8,030,261,248", "QLoRA (nf4)", "gpu-l40s", "128.0 KiB", "estimated, not measured", "unconfirmed"):
        assert part in text, part
    data = json.loads((tmp_path / plan_report.NAME).read_text())
    assert data["architecture"]["parameters"] == 8_030_261_248
    assert data["served"][0]["machine"] == "gpu-l40s"
    assert data["methods"]["nf4"]["checkpointing"]["total"] > 0
    assert data["hardware"]["dated"] == hardware.table().dated.isoformat()
    assert (tmp_path / plan_report.PICTURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_machine_without_a_price_or_figures_is_still_planned(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "dated: 2027-01-31\nmachines:\n- {sku: new, name: N, gpus: 1, gpu_memory_gb: 90, capability: [9, 0]}\n"
    )
    table = replace(hardware.table(path), machines=(hardware.table(path).machine("new"),), unknown=("newer",))
    found = estimate.make(config.Config(), LLAMA3, table)
    assert found.served[0].refused is None
    assert found.served[0].speed is None
    assert any("newer" in note for note in found.notes)
    console = Console(file=io.StringIO())
    console.print(plan_report.tables(found))
    plan_report.write(found, tmp_path, console, config.Plan())


def test_a_commands_options_go_over_model_yaml() -> None:
    settings = config.parse({"plan": {"concurrency": 4, "tokens_per_second": {"a": 1.0}}}, "test")
    found = plan_report.changed(settings, {"context": 99}, ["gpu-t4=12.5"], "hf://a/b")
    assert (found.plan.context, found.plan.concurrency, found.base.source) == (99, 4, "hf://a/b")
    assert found.plan.tokens_per_second == {"a": 1.0, "gpu-t4": 12.5}
    for wrong in ("gpu-t4", "gpu-t4=fast"):
        with pytest.raises(CogpressError, match="SKU=TOKENS"):
            plan_report.changed(settings, {}, [wrong], None)
    with pytest.raises(CogpressError, match=r"plan\.context"):
        plan_report.changed(settings, {"context": 1}, [], None)


def test_help_names_the_options(script: Script) -> None:
    _, shown, _ = script("plan", "--help")
    for option in ("--scheme", "--context", "--requests-per-hour", "--speed", "--json", "REPLICATE_API_TOKEN"):
        assert option in shown, option


@pytest.mark.slow
def test_the_command_plans_a_config_alone(tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REPLICATE_API_TOKEN", raising=False)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
                    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                    "tie_word_embeddings": True, "max_position_embeddings": 8192})
    )  # fmt: skip

    data = json.loads(script("plan", tmp_path, "--json", "--concurrency", "4", "--speed", "gpu-t4=100")[1])
    assert data["architecture"]["parameters"] == 134_515_008
    assert data["serving"]["concurrency"] == 4
    assert {row["machine"]: row["speed"] and row["speed"]["tokens_per_second"] for row in data["served"]}[
        "gpu-t4"
    ] == 100
    status, shown, error = script("plan", tmp_path, "--out", tmp_path / "out")
    assert status == 0, error
    assert "134,515,008" in shown
    assert {path.name for path in (tmp_path / "out").iterdir()} == {plan_report.NAME, plan_report.PICTURE}
    status, _, error = script("plan", tmp_path, "--scheme", "int3")
    assert (status, "Traceback" in error) == (1, False)
    assert "plan.scheme" in error


def test_words_for_numbers() -> None:
    assert [plan_report.duration(seconds) for seconds in (5, 600, 7200)] == ["5 s", "10 min", "2.0 h"]
    assert [plan_report.dollars(amount) for amount in (1234.5, 2.5, 0.0125)] == ["$1,234", "$2.50", "$0.0125"]


@pytest.mark.slow
def test_a_plan_for_files_says_what_training_would_say_of_their_layers(tmp_path: Path) -> None:
    folder = bases.make("mixtral", tmp_path / "base")
    model = architecture.of(str(folder), tmp_path)
    load = {"input_tokens": 100, "output_tokens": 50}
    settings = config.parse({"base": {"source": str(folder)}, "plan": load}, "the test")
    made = plan_report.of_project(settings, tmp_path, model)
    assert "all-linear leaves out the experts" in made.notes[0]
    asked = {"base": {"source": str(folder)}, "train": {"target_modules": "w1"}}
    with pytest.raises(CogpressError, match="Its experts are fused into single tensors"):
        plan_report.of_project(config.parse(asked, "the test"), tmp_path, model)
