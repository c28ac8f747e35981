"""Quantized weights: what is refused before any work, what they are calibrated with, and what comes out and serves."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import bases
from cogpress import config, demo, plots
from cogpress.cog.process import Server
from cogpress.data import prepare
from cogpress.errors import CogpressError
from cogpress.files import write_json
from cogpress.quantize import calibrate, schemes
from cogpress.quantize import report as comparison
from cogpress.quantize import run as quantize
from cogpress.quantize import worker as compress
from cogpress.setup import environment
from cogpress.setup.environment import QUANTIZE, Environment
from cogpress.train import run as training
from cogpress.verify import distributions
from cogpress.weights import base, manifest
from cogpress.weights.filenames import VERIFICATION
from examples import queries

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tiny_base: Path, examples_file: Path, tmp_path: Path) -> Path:
    """A run's folder as training and merge leave it, with weights that nobody trained."""
    folder = tmp_path / "runs" / "tiny"
    weights = folder / "weights"
    shutil.copytree(tiny_base, weights)
    (weights / manifest.NAME).unlink()
    (weights / "draft").mkdir()
    (weights / "draft" / "table.safetensors").write_bytes(b"a table")
    settings = config.Config().override({"train_data": str(examples_file), "validation_share": 0.25})
    facts = {
        "base": {"source": "the tiny base", "fingerprint": "0"},
        "compute_dtype": "bfloat16",
        "merge": {"onto": "dequantized", "layers": 14, "adapter": "1"},
        "prompt": settings.prompt.model_dump(),
    }
    manifest.write(weights, "weights", facts)
    prepared = prepare.prepare(
        examples_file,
        tokenizer=base.tokenizer(weights),
        prompt=settings.prompt,
        data=settings.data,
        max_length=settings.train.max_length,
        seed=settings.train.seed,
    )
    write_json(folder / "key.json", training.run_key(settings, prepared, ""))
    write_json(folder / "config.json", settings.model_dump(mode="json"))
    return folder


# --- which model, which machine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "size"), [((4096, 14336), 128), ((576, 1536), 64), ((576, 1536, 96), 32), ((32,), 32)]
)
def test_the_largest_group_that_divides_every_width_is_taken(widths: tuple[int, ...], size: int) -> None:
    assert schemes.group_size({f"layer {width}": width for width in widths}) == size


def test_a_model_that_no_group_fits_is_refused_by_the_layer() -> None:
    with pytest.raises(CogpressError, match=r"none of which divides mlp's width of 100\. Choose int8 or fp8"):
        schemes.group_size({"attention": 128, "mlp": 100})


def test_smaller_groups_are_explained() -> None:
    assert schemes.why_group({"a": 128}, 128) == ""
    assert schemes.why_group({"a": 128, "b": 576}, 64) == " (128 does not divide the model's width of 576)"
    assert schemes.why_group({"a": 576, "b": 96}, 32) == " (64 does not divide the model's width of 96)"


def test_widths_are_those_of_all_linear_layers_but_the_output(tiny_base: Path) -> None:
    widths = schemes.linear_widths(tiny_base)
    assert len(widths) == 14
    assert set(widths.values()) == {128, 256}
    assert not [name for name in widths if "head" in name]


def test_convolutions_and_what_sees_are_no_layers_that_are_quantized(tmp_path: Path) -> None:
    hybrid = schemes.linear_widths(bases.make("qwen3_5", tmp_path / "qwen3_5"))
    assert not [name for name in hybrid if "conv" in name]
    assert schemes.group_size(hybrid) == 64
    sees = schemes.linear_widths(bases.make("gemma3", tmp_path / "gemma3"))
    assert all("language_model" in name for name in sees)
    experts = schemes.linear_widths(bases.make("mixtral", tmp_path / "mixtral"))
    assert experts["model.layers.0.mlp.experts.gate_up_proj (512)"] == 512


def test_layers_that_llmcompressor_cannot_write_are_refused_first(tmp_path: Path) -> None:
    """Falcon's linear layers are of its own kind: their weights stay as they are, under a name that no engine loads."""
    with pytest.raises(CogpressError, match="no plain linear layers besides the output layer"):
        schemes.linear_widths(bases.make("falcon", tmp_path / "falcon"))


def test_only_where_smoothing_changes_nothing_else_is_it_used(tiny_base: Path, tmp_path: Path) -> None:
    assert schemes.smoothing(schemes.SCHEMES["int8"], tiny_base) == 0.5
    assert schemes.smoothing(schemes.SCHEMES["int4"], tiny_base) is None
    (tmp_path / "config.json").write_text('{"architectures": ["Gemma3ForCausalLM"]}')
    assert schemes.smoothing(schemes.SCHEMES["int8"], tmp_path) is None


def test_awq_is_refused_without_an_accelerator_and_fp8_explained() -> None:
    with pytest.raises(CogpressError, match=r"awq needs an NVIDIA GPU.*Choose int4"):
        schemes.refuse_here(["int8", "awq"], None)
    schemes.refuse_here(["int8", "int4", "fp8"], None)
    schemes.refuse_here(["awq"], (8, 0))
    assert "Ada or Hopper" in str(schemes.caution("fp8", None))
    assert "16 bits" in str(schemes.caution("fp8", (8, 0)))
    assert schemes.caution("fp8", (9, 0)) is None
    assert schemes.caution("int4", None) is None
    assert [schemes.served_here(name, None) for name in schemes.SCHEMES] == [True, True, False, True]


# --- which weights ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_weights_are_checked_before_anything_else(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    source = calibrate.read_source(run / "weights", None)
    assert source.run == run
    assert source.dtype == "bfloat16"
    with pytest.raises(CogpressError, match=r"holds no weights of cogpress.*scripts/train"):
        calibrate.read_source(tmp_path, None)
    with pytest.raises(CogpressError, match="holds no weights of cogpress"):
        calibrate.read_source(tiny_base, run)
    with pytest.raises(CogpressError, match=r"not a run's folder.*--run"):
        calibrate.read_source(run / "weights", tmp_path)
    with (run / "weights" / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CogpressError, match=r"model\.safetensors is not the file that was written"):
        calibrate.read_source(run / "weights", None)


@pytest.mark.slow
def test_another_runs_weights_are_refused(run: Path) -> None:
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"another")
    with pytest.raises(CogpressError, match="the adapter's hash differs"):
        calibrate.read_source(run / "weights", None)


@pytest.mark.slow
def test_quantized_weights_are_refused_by_name(run: Path) -> None:
    weights = run / "weights"
    facts = manifest.read(weights) or {}
    write_json(weights / manifest.NAME, {**facts, "compression": {"scheme": "int4"}})
    with pytest.raises(CogpressError, match="holds int4 weights already"):
        calibrate.read_source(weights, None)
    write_json(weights / manifest.NAME, facts)
    settings = json.loads((weights / "config.json").read_text())
    write_json(weights / "config.json", {**settings, "quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(CogpressError, match="holds gptq weights already"):
        calibrate.read_source(weights, None)


# --- calibrated with what ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_calibration_rows_are_training_rows_and_no_others(run: Path, tmp_path: Path) -> None:
    source = calibrate.read_source(run / "weights", None)
    prepared = calibrate.prepare(source, tmp_path, None)
    held_out = {tuple(row.input_ids) for row in prepared.validation}
    assert len(held_out) == 10
    every = calibrate.choose_rows(prepared, 1000, 0)
    assert every == [row.input_ids for row in prepared.train]
    chosen = calibrate.choose_rows(prepared, 8, 0)
    assert len({tuple(row) for row in chosen}) == 8
    assert not {tuple(row) for row in every} & held_out
    assert all(row in every for row in chosen)
    assert calibrate.choose_rows(prepared, 8, 0) == chosen
    assert calibrate.choose_rows(prepared, 8, 1) != chosen
    answer = base.tokenizer(source.folder).decode(chosen[0])
    assert re.search(r"Say the number after \d+.*It is \d+, of course\.", answer, re.S), answer


@pytest.mark.slow
def test_examples_that_changed_since_or_are_gone_are_refused(run: Path, examples_file: Path, tmp_path: Path) -> None:
    source = calibrate.read_source(run / "weights", None)
    with examples_file.open("a") as file:
        file.write(json.dumps({"prompt": "More?", "completion": "More."}) + "\n")
    with pytest.raises(CogpressError, match=r"does not give the rows that .* was trained on"):
        calibrate.prepare(source, tmp_path, None)
    examples_file.unlink()
    with pytest.raises(CogpressError, match=r"examples\.jsonl, and they are needed.*--data FILE"):
        calibrate.prepare(source, tmp_path, None)


# --- the worker, played by a program that writes what llmcompressor would ---------------------------------------------

PLAYED = """
import json, pathlib, shutil, sys
isolated, worker, path = sys.argv[1:]
job = json.loads(pathlib.Path(path).read_text())
shutil.copy(path, {seen!r})
print("(3/7): Calibrating:  50%|", flush=True)
for scheme in job["schemes"]:
    if scheme["name"] == {failing!r}:
        sys.exit("RuntimeError: the 7th layer is odd")
    out = pathlib.Path(scheme["out"])
    out.mkdir()
    shutil.copy(pathlib.Path(job["source"]) / "model.safetensors", out)
    for name in ("config.json", "tokenizer_config.json", "recipe.yaml"):
        (out / name).write_text(json.dumps({{"quantization_config": {{"quant_method": "played"}}}}))
    (out / "result.json").write_text(json.dumps({{"llmcompressor": "9", "seconds": 1.5}}))
"""


Play = Callable[..., dict[str, quantize.Quantized]]


@pytest.fixture
def play(run: Path, tmp_path: Path) -> Play:
    """Quantize the run's weights with a worker that only plays; its job is then in `job.json`."""
    root = tmp_path / "root"
    shutil.copytree(ROOT / "requirements", root / "requirements")
    made = Environment(root, QUANTIZE)
    made.python.parent.mkdir(parents=True)
    state = {"state": "complete", "kind": "cpu", "locks": made.digest("cpu")}
    (made.venv / environment.STATE).write_text(json.dumps(state))

    def quantized(*names: str, failing: str = "", **options: Any) -> dict[str, quantize.Quantized]:
        (tmp_path / "job.json").unlink(missing_ok=True)
        script = tmp_path / "played.py"
        script.write_text(PLAYED.format(seen=str(tmp_path / "job.json"), failing=failing))
        made.python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
        made.python.chmod(0o755)
        source = calibrate.read_source(run / "weights", None)
        console = Console(file=(tmp_path / "said").open("w"), width=200)
        return quantize.quantize(
            root, source, names, lambda: calibrate.prepare(source, tmp_path, None), console, **options
        )

    return quantized


@pytest.mark.slow
def test_the_job_says_everything_and_the_folder_keeps_its_sources_settings(
    run: Path, play: Play, tmp_path: Path
) -> None:
    made = play("int8", "int4", "fp8", samples=5)
    job = json.loads((tmp_path / "job.json").read_text())
    assert job["source"] == str(run / "weights")
    assert len(job["rows"]) == 5
    told = {one.pop("name"): {**one, "out": None} for one in job["schemes"]}
    common = {"out": None, "group_size": None, "smoothing": None}
    assert told == {
        "int8": {**common, "algorithm": "gptq", "preset": "W8A8", "smoothing": 0.5},
        "int4": {**common, "algorithm": "gptq", "preset": "W4A16", "group_size": 128},
        "fp8": {**common, "algorithm": "none", "preset": "FP8_DYNAMIC"},
    }

    source = manifest.read(run / "weights") or {}
    for name, one in made.items():
        assert one.folder == run / f"weights-{name}"
        facts = manifest.read(one.folder) or {}
        manifest.check(one.folder, facts)
        assert facts["kind"] == "weights"
        assert facts["files"]["draft/table.safetensors"] == source["files"]["draft/table.safetensors"]
        for fact in ("base", "prompt", "merge", "compute_dtype"):
            assert facts[fact] == source[fact]
        compression = facts["compression"]
        assert compression["source"] == manifest.fingerprint(run / "weights")
        assert (compression["llmcompressor"], compression["seconds"]) == ("9", 1.5)
        assert compression["bytes_before"] == (run / "weights" / "model.safetensors").stat().st_size
        assert compression["group_size"] == (128 if name == "int4" else None)
        assert compression["samples"] == (0 if name == "fp8" else 5)
        settings = json.loads((one.folder / "config.json").read_text())
        assert settings.pop("quantization_config") == {"quant_method": "played"}
        assert settings == json.loads((run / "weights" / "config.json").read_text())
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (one.folder / file).read_bytes() == (run / "weights" / file).read_bytes()
        assert not (one.folder / "recipe.yaml").exists()


@pytest.mark.slow
def test_what_is_done_is_not_done_again(run: Path, play: Play, tmp_path: Path) -> None:
    play("int8")
    (tmp_path / "job.json").unlink()
    assert play("int8")["int8"].reused
    assert not (tmp_path / "job.json").exists()
    assert "reused" in (tmp_path / "said").read_text()
    assert not play("int8", fresh=True)["int8"].reused
    assert not play("int8", seed=7, samples=3)["int8"].reused, "other rows, other weights"
    assert play("int8", seed=7, samples=3)["int8"].reused
    with (run / "weights-int8" / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert not play("int8", seed=7, samples=3)["int8"].reused, "damaged"
    assert [one["name"] for one in json.loads((tmp_path / "job.json").read_text())["schemes"]] == ["int8"]


@pytest.mark.slow
def test_a_worker_that_fails_is_explained_and_leaves_only_what_is_complete(run: Path, play: Play) -> None:
    with pytest.raises(CogpressError) as error:
        play("int8", "int4", failing="int4")
    said = str(error.value)
    assert said.startswith("llmcompressor stopped at int4: see why below.")
    assert "the 7th layer is odd" in said
    assert str(run / "quantize.log") in said
    assert "Traceback" not in said
    assert {path.name for path in run.iterdir()} == {
        "config.json", "key.json", "quantize.log", "weights", "weights-int8"
    }  # fmt: skip
    assert play("int8", "int4")["int8"].reused


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory", 1, "memory ran out"),
        ("OSError: [Errno 28] No space left on device", 1, "the disk is full"),
        ("Loading weights", -9, "it was killed"),
    ],
)
def test_the_usual_causes_are_named(line: str, status: int, said: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(f"started\r(1/7): Calibrating:   0%| 12it/s\n{line}\n")
    text = quantize.explain("int8", status, log)
    assert said in text
    assert text.endswith("  " + line)
    assert "it/s" not in text


def test_how_far_it_is() -> None:
    pace = quantize.Pace(passes=2)
    assert pace.told("Loading", 10.0) == ""
    assert pace.told("(1/31): Calibrating: 10%", 20.0) == "layer 1 of 31, pass 1 of 2"
    assert pace.told("(9/31): x\r(30/31): Propagating: 10%", 50.0) == "layer 30 of 31, pass 1 of 2"
    assert pace.told("(1/31): Calibrating: 10%", 60.0) == "layer 1 of 31, pass 2 of 2"
    assert pace.told("(11/31): Calibrating: 10%", 80.0) == "layer 11 of 31, pass 2 of 2, about 42 s left"
    assert pace.told("(31/31): Calibrating: 10%", 120.0) == "layer 31 of 31, pass 2 of 2"
    assert quantize.Pace(passes=1).told("(4/7): Calibrating: 10%", 0.0) == "layer 4 of 7, about 0 s left"


def test_the_worker_imports_nothing_that_its_environment_lacks() -> None:
    source = Path(compress.__file__).read_text()
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", source, re.M))
    ours = {"torch", "transformers", "llmcompressor", "compressed_tensors"}
    assert imported - ours <= sys.stdlib_module_names | {"__future__"}


@pytest.mark.slow
def test_the_command_refuses_in_one_sentence(run: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "quantize", run / "weights", "--scheme", "awq"]
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    shown = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert shown.returncode == 1
    assert "Error: awq needs an NVIDIA GPU" in shown.stderr
    assert "Traceback" not in shown.stderr


# --- side by side -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_table_the_picture_and_the_figures(run: Path, play: Play, tmp_path: Path) -> None:
    made = play("int4", "fp8")
    folders = {"bfloat16": run / "weights", **{name: one.folder for name, one in made.items()}}
    known = {"bfloat16": {"score": 1.0}, "int4": {"score": 0.5, "mean_kl": 0.01}}
    asked: list[str] = []

    def measure(name: str, folder: Path) -> dict[str, float]:
        asked.append(name)
        assert folder == folders[name]
        return {**known[name], "stream_tokens_per_second": 30.0, "other": 1.0}

    console = Console(record=True, width=120, file=(tmp_path / "said").open("w"))
    found = comparison.compare(folders, measure, run, console, unmeasured=["fp8"])
    assert asked == ["bfloat16", "int4"], "what this machine does not serve is not measured"
    assert [one.score for one in found] == [1.0, 0.5, None]
    assert [one.mean_kl for one in found] == [None, 0.01, None]
    text = console.export_text()
    for shown in ("right answers", "100.0%", "50.0%", "0.01000", "groups of 128", "not served on this machine"):
        assert shown in text
    assert "perplexity" not in text, "nobody measured it"
    saved = json.loads((run / "quantization.json").read_text())
    assert [one["name"] for one in saved] == ["bfloat16", "int4", "fp8"]
    assert saved[0]["bytes"] == manifest.weights_bytes(run / "weights")
    assert (run / "quantization.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_weights_that_failed_verification_are_shown_as_such_and_not_installed(
    run: Path, play: Play, tmp_path: Path
) -> None:
    folder = play("int4")["int4"].folder
    quantize.refuse_failed(folder)
    report = {"passed": False, "files": manifest.signed_files(folder), "checks": [], "metrics": {}}
    write_json(folder / VERIFICATION, report)
    console = Console(record=True, width=120, file=(tmp_path / "said").open("w"))
    comparison.compare({"int4": folder}, lambda _name, _folder: {"score": 0.1}, run, console)
    assert "FAILED verification" in console.export_text()
    with pytest.raises(CogpressError, match=r"failed verification, so it is not installed.*scripts/verify"):
        quantize.refuse_failed(folder)


@pytest.mark.parametrize("figures", [{}, {"score": 0.0}, {"score": 1.0, "mean_kl": 0.0, "stream_tokens_per_second": 5}])
def test_the_picture_is_drawn_with_what_there_is(figures: dict[str, float], tmp_path: Path) -> None:
    plots.quantization([{"name": "int8", "bytes": 10**9, **figures}], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


# --- the real thing ---------------------------------------------------------------------------------------------------

SAMPLES = 16
"""Fewer than by default: enough to see that all works, in seconds."""


@pytest.fixture(scope="module")
def quantized(trained_weights: Path, cache: Path) -> dict[str, quantize.Quantized]:
    """The trained weights in three schemes, by llmcompressor itself; made again only when what makes them changes."""
    source = calibrate.read_source(trained_weights, None)
    return quantize.quantize(
        ROOT,
        source,
        ["int8", "int4", "fp8"],
        lambda: calibrate.prepare(source, ROOT, None),
        Console(),
        out=cache / "quantized",
        samples=SAMPLES,
    )


@pytest.mark.slow
@pytest.mark.train
def test_real_weights_shrink_and_stay_close_to_what_was_trained(
    quantized: dict[str, quantize.Quantized], trained_weights: Path
) -> None:
    source = calibrate.read_source(trained_weights, None)
    rows = calibrate.prepare(source, ROOT, None).validation[:16]
    candidates = {name: partial(distributions.merged_model, one.folder) for name, one in quantized.items()}
    found = distributions.compare(partial(distributions.merged_model, trained_weights), candidates, rows, 0)
    for name, share in (("int8", 0.62), ("int4", 0.43), ("fp8", 0.62)):
        compression = quantized[name].facts["compression"]
        assert compression["bytes_after"] < share * compression["bytes_before"]
        assert found[name].mean_kl < (0.005 if name == "int8" else 0.05), (name, found[name])
        assert found[name].top1_agreement > 0.98, (name, found[name])
    assert quantized["int4"].facts["compression"]["group_size"] == 64
    settings = json.loads((quantized["int4"].folder / "config.json").read_text())
    assert settings["quantization_config"]["ignore"] == ["lm_head"]


@pytest.mark.slow
@pytest.mark.server
def test_quantized_weights_serve_and_still_know_the_task(
    quantized: dict[str, quantize.Quantized],
    trained_weights: Path,
    answered: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    lines = (trained_weights.parent / "data" / "test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:24]]
    with Server(ROOT, weights=str(quantized["int8"].folder), log=tmp_path / "log") as server:
        server.wait_ready()
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda row: demo.ask(server.url, row).text, rows))
    same = sum(queries.score(known["answer"], answer) for known, answer in zip(answered, answers, strict=False))
    assert same >= 20, answers
