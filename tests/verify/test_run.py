"""Verification passes what training scored and catches, by name, everything that is not."""

from __future__ import annotations

import functools
import json
import pickle
import shutil
import weakref
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from cogpress import config, phases, pipeline
from cogpress.engines.vllm import Engine
from cogpress.errors import CogpressError
from cogpress.files import write_json
from cogpress.merge import merge
from cogpress.prompts import Row, encode_example
from cogpress.train.run import TRAINED_ON
from cogpress.verify import distributions, forgotten, parity, references
from cogpress.verify import report as verdict
from cogpress.verify import run as verify
from cogpress.verify.report import Check
from cogpress.weights import base, fetch, manifest
from cogpress.weights.filenames import ADAPTER, VERIFICATION, VERIFICATION_PAGE, VERIFICATION_PLOT

ROOT = Path(__file__).resolve().parents[2]
ROWS = 8


@pytest.fixture(scope="module")
def few(settings_verified: config.Config) -> config.Config:
    """The worked example's configuration, to verify with few rows."""
    rows = settings_verified.verify.model_copy(update={"rows": ROWS})
    return settings_verified.model_copy(update={"verify": rows})


@pytest.fixture(scope="module")
def tiny_run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny model as training and merge leave it."""
    folder = tmp_path_factory.mktemp("tiny-run")
    rows = [
        {"prompt": f"Say the number after {one}.", "completion": f"It is {one + 1}, of course."} for one in range(40)
    ]
    (folder / "examples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train = {"max_steps": 6, "batch_size": 4, "rank": 4, "learning_rate": 0.01, "evaluations": 0}
    given = {"base": {"source": str(tiny_base)}, "train": train, "data": {"validation_share": 0.2}}
    settings = config.parse(given, "the test")
    built = pipeline.build(settings, folder / "examples.jsonl", folder / "run", folder, Console(quiet=True))
    return built.weights.parent


@pytest.fixture
def task_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is asked of the engine, and nothing outside of the task: other tests verify that."""
    unchanged = forgotten.General(1.0, 1.0, 0.0, *[["Yes."] * len(forgotten.INSTRUCTIONS)] * 2, vocabulary=100)
    monkeypatch.setattr(verify, "_served", lambda *_: [])
    monkeypatch.setattr(verify, "_before", lambda _: tmp_path)
    monkeypatch.setattr(verify, "_beside", lambda *_: (unchanged, None))


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path) -> Path:
    """The tiny run's weights, to be damaged."""
    return Path(shutil.copytree(tiny_run / "weights", tmp_path / "weights"))


def verify_tiny(folder: Path, run: Path) -> verdict.Verdict:
    return verify.verify(config.Config(), ROOT, folder, Console(), run=run)


def sign_again(folder: Path) -> None:
    """A manifest that fits the changed files, as someone would write who does not know that they are wrong."""
    facts = manifest.read(folder) or {}
    kept = {name: facts[name] for name in ("base", "quantization", "compute_dtype", "merge", "prompt")}
    manifest.write(folder, "weights", kept)


def failures(found: verdict.Verdict) -> dict[str, Check]:
    return {check.name: check for check in found.checks if not check.passed}


@pytest.mark.slow
@pytest.mark.server
def test_the_merge_of_a_run_passes(verified: tuple[Path, verdict.Verdict]) -> None:
    folder, found = verified
    assert failures(found) == {}
    assert found.passed
    names = [check.name for check in found.checks]
    assert names[:5] == ["files", "tokenizer", "chat template", "prompt", "merge"]
    assert found.metrics["mean_kl"] < 0.001
    assert found.metrics["top1_agreement"] > 0.995
    assert found.metrics["score"] == pytest.approx(found.metrics["reference_score"], abs=0.05)
    assert found.metrics["score"] > 0.7
    assert found.metrics["served_agreement"] >= 0.99
    assert found.metrics["served_perplexity"] == pytest.approx(found.metrics["perplexity"], rel=0.02)
    assert found.metrics["concurrent_tokens_per_second"] > found.metrics["stream_tokens_per_second"] > 0
    assert manifest.state(folder) == "verified"
    assert 1 < found.metrics["general_perplexity"] / found.metrics["base_general_perplexity"] < 3
    assert 0.1 < found.metrics["general_kl"] < 1.5
    assert found.metrics["instructions_worse"] <= 0.1
    assert found.metrics["memorized_lines"] == 0
    assert found.metrics["trained_answers_right"] - found.metrics["held_out_answers_right"] < 0.4


@pytest.mark.slow
@pytest.mark.server
def test_the_reference_answers_as_if_every_token_were_generated(
    verified: tuple[Path, verdict.Verdict],
    trained_run: Path,
    settings_verified: config.Config,
    answered: list[dict[str, Any]],
) -> None:
    """Most of its answers are read off the expected ones; the committed ones were all generated."""
    tokenizer, adapter = base.tokenizer(verified[0]), manifest.fingerprint(trained_run / ADAPTER)
    examples = verify.held_out(settings_verified.verify, trained_run, trained_run, settings_verified.prompt)
    known = references.kept(trained_run, adapter, [encode_example(tokenizer, one) for one in examples])
    assert known == [row["answer"] for row in answered[: len(examples)]]


@pytest.mark.slow
@pytest.mark.server
def test_the_report_is_written_and_signed(verified: tuple[Path, verdict.Verdict]) -> None:
    folder, found = verified
    content = json.loads((folder / VERIFICATION).read_text())
    assert content["passed"] is True
    facts = manifest.read(folder) or {}
    assert content["files"] == {name: file["sha256"] for name, file in facts["files"].items()}
    text = (folder / VERIFICATION_PAGE).read_text()
    assert "# Verification: passed" in text
    assert all(digest in text for digest in content["files"].values())
    with Image.open(folder / VERIFICATION_PLOT) as picture:
        assert picture.size[0] > 1000
    manifest.check(folder, facts)  # the report is beside the weights, not among them
    assert found.table().row_count == len(content["checks"])


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "chat_template.jinja", "config.json"])
def test_weights_that_change_afterwards_count_as_unverified(
    verified: tuple[Path, verdict.Verdict], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(verified[0], folder)
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    assert manifest.state(folder) == "changed"
    sign_again(folder)
    assert manifest.state(folder) == "changed"


@pytest.mark.slow
@pytest.mark.usefixtures("task_alone")
def test_the_usual_merge_is_caught(trained_run: Path, few: config.Config, tmp_path: Path) -> None:
    """peft's own merge onto the original weights, saved by transformers' own code."""
    from peft import PeftModel

    copy = Path(shutil.copytree(trained_run / "weights", tmp_path / "weights"))
    adapter = trained_run / "adapter"
    source = fetch.base((manifest.read(adapter) or {})["base"]["source"], ROOT / ".cache")
    merged: Any = PeftModel.from_pretrained(
        base.load(source, "none", dtype=torch.bfloat16), str(adapter)
    ).merge_and_unload()
    merged.save_pretrained(copy)
    sign_again(copy)
    found = verify.verify(few, ROOT, copy, Console(), run=trained_run)
    assert not found.passed
    assert {"merge", "mean KL"} <= failures(found).keys()
    assert found.causes == [
        "The adapter was merged onto the original base, not onto the quantized base that it was trained on. "
        "Merge again with scripts/merge, or set merge: original in model.yaml to allow it."
    ]
    assert manifest.state(copy) == "failed"


@pytest.mark.slow
@pytest.mark.usefixtures("task_alone")
def test_the_usual_merge_passes_where_it_is_configured(trained_run: Path, few: config.Config, tmp_path: Path) -> None:
    adapter = trained_run / "adapter"
    source = fetch.base((manifest.read(adapter) or {})["base"]["source"], ROOT / ".cache")
    merge.merge(source, adapter, tmp_path / "weights", onto="original")
    chosen = few.model_copy(update={"merge": "original"})
    found = verify.verify(chosen, ROOT, tmp_path / "weights", Console(), run=trained_run)
    assert failures(found) == {}
    assert found.metrics["mean_kl"] > 0.003, "more than the faithful merge may have"


@pytest.mark.train
def test_the_usual_merge_is_checked_too(
    tiny_run: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_served", lambda *_: [])
    merge.merge(tiny_base, tiny_run / "adapter", tmp_path / "weights", onto="original")
    flip(tmp_path / "weights", "model.layers.1.mlp.down_proj.weight")
    sign_again(tmp_path / "weights")
    settings = config.Config().model_copy(update={"merge": "original"})
    found = verify.verify(settings, ROOT, tmp_path / "weights", Console(), run=tiny_run)
    assert "merge" in failures(found)


def through_pickles(real: Any, name: str, work: Any, *arguments: Any, **named: Any) -> Any:
    """`phases.run` in this process, with all that would travel to another one pickled and read again."""
    work, arguments = pickle.loads(ForkingPickler.dumps((work, arguments)))  # noqa: S301 - made here
    return pickle.loads(ForkingPickler.dumps(real(name, work, *arguments, **named)))  # noqa: S301


@pytest.mark.train
def test_one_model_is_in_memory_at_a_time(copy: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []
    alive: list[int] = []
    real = base.load

    def load(*given: Any, **named: Any) -> Any:
        alive.append(sum(one() is not None for one in loaded))
        model = real(*given, **named)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(base, "load", load)
    monkeypatch.setattr(phases, "run", partial(through_pickles, phases.run))
    monkeypatch.setattr(verify, "_served", lambda *_: alive.append(sum(one() is not None for one in loaded)) or [])
    (tiny_run / references.REFERENCE).unlink(missing_ok=True)
    found = verify_tiny(copy, tiny_run)
    assert failures(found) == {}
    assert {"KL to the base on general text", "training lines known by heart"} <= {one.name for one in found.checks}
    assert len((tiny_run / TRAINED_ON).read_text().splitlines()) == 32, "all that it was trained on"
    # Reference, candidate, the base where its general text is not measured yet, the reference to answer, the engine.
    assert (set(alive), len(alive) in (4, 5)) == ({0}, True)
    assert not any(one() for one in loaded)


@pytest.mark.train
@pytest.mark.parametrize(("lossy", "speculative"), [(False, "auto"), (True, "auto"), (True, "none")])
def test_a_draft_that_changes_an_answer_fails(
    copy: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, lossy: bool, speculative: str
) -> None:
    """The tiny run comes with a draft; what the engine answers stands for it."""
    seen: list[Any] = []

    def serve(folder: Path, serve: config.Serve, prompts: Any, rows: Any, *_: Any) -> parity.Served:
        seen.append((serve.speculative, rows is None))
        drafted = serve.speculative == "auto"
        answers = [parity.Answer("It", [1, 3 if drafted and lossy else 2], [-0.1, -0.2 - drafted]) for _ in prompts]
        return parity.Served(answers, [], 30.0 if drafted else 10.0, 1.0, 1.0)

    monkeypatch.setattr(parity, "serve", serve)
    monkeypatch.setattr(parity, "compare", lambda *_: parity.Parity(1.0, 0.0, 1.0, 1, []))
    settings = config.parse({"serve": {"speculative": speculative}}, "the test")
    found = verify.verify(settings, ROOT, copy, Console(), run=tiny_run)
    if speculative == "none":
        assert seen == [("none", False)]
        assert "draft" not in {check.name for check in found.checks}
        return
    assert seen == [("auto", False), ("none", True)]
    assert found.metrics["draft_speedup"] == 3
    [check] = [check for check in found.checks if check.name == "draft"]
    assert check.passed is not lossy
    assert ("changes 8 answers" in str(check.value)) is lossy


@pytest.mark.train
def test_distributions_that_fill_the_disk_are_compared_in_parts(
    tiny_run: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row([1, 2, 3 + one, 4], [-100, 2, 3 + one, 4]) for one in range(5)]

    def compared() -> distributions.Divergence:
        loads = {"": partial(distributions.merged_model, tiny_run / "weights")}
        return distributions.compare(partial(distributions.merged_model, tiny_base), loads, rows, 0)[""]

    monkeypatch.setattr(distributions, "BATCH_TOKENS", 8)
    whole = compared()
    monkeypatch.setattr(distributions, "STORED_BYTES", 1)
    assert compared() == whole
    assert whole.tokens == 15
    assert whole.mean_kl > 0


def flip(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = -tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.train
@pytest.mark.parametrize("signed", [False, True], ids=["old manifest", "new manifest"])
def test_one_flipped_tensor_is_caught(copy: Path, tiny_run: Path, signed: bool) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    flip(copy, name)
    if signed:
        sign_again(copy)
    found = verify_tiny(copy, tiny_run)
    assert not found.passed
    if signed:
        assert failures(found)["merge"].cause.startswith(f"{name} is not what the merge gives")
        assert "same top token" in failures(found)
    else:
        assert "model.safetensors is not the file that was written" in failures(found)["files"].cause


@pytest.mark.train
def test_a_swapped_tokenizer_is_caught(copy: Path, tiny_run: Path) -> None:
    content = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, other = "Ġis", "Ġthe"
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    sign_again(copy)
    found = verify_tiny(copy, tiny_run)
    assert list(failures(found)) == ["tokenizer"]
    assert "The tokenizer is not the base's" in found.causes[0]
    assert manifest.state(copy) == "failed"


@pytest.mark.train
def test_another_end_of_answers_is_caught(copy: Path, tiny_run: Path) -> None:
    content = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({**content, "eos_token_id": 0}))
    sign_again(copy)
    found = verify_tiny(copy, tiny_run)
    assert "tokens on which an answer ends" in failures(found)["tokenizer"].cause


@pytest.mark.train
def test_a_changed_chat_template_is_caught(copy: Path, tiny_run: Path) -> None:
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").write_text(template.replace("<|im_start|>assistant", "<|im_start|>Assistant"))
    sign_again(copy)
    found = verify_tiny(copy, tiny_run)
    assert list(failures(found)) == ["chat template"]
    assert "chat template differs" in found.causes[0]


@pytest.mark.train
def test_another_prompt_is_caught(copy: Path, tiny_run: Path) -> None:
    facts = manifest.read(copy) or {}
    write_json(copy / manifest.NAME, {**facts, "prompt": {"system": "", "template": "{question}"}})
    found = verify_tiny(copy, tiny_run)
    assert list(failures(found)) == ["prompt"]


def wrong_engine(instead: Path, _folder: Path, serve: config.Serve, concurrency: int) -> Engine:
    """A real engine that answers wrongly: it has loaded other weights than it was told to."""
    return Engine(instead, serve, concurrency)


@pytest.mark.slow
@pytest.mark.server
def test_an_engine_that_answers_wrongly_is_caught(copy: Path, tiny_run: Path, tiny_base: Path) -> None:
    make = functools.partial(wrong_engine, tiny_base)
    settings = config.parse({"serve": {"max_context": 1024, "cpu_kv_cache_gb": 1}}, "the test")
    found = verify.verify(settings, ROOT, copy, Console(), run=tiny_run, make=make)
    assert {"served tokens agree", "served log-probability difference"} <= failures(found).keys()
    assert "mean KL" not in failures(found)
    assert found.causes[0].startswith("The engine (vllm) answers differently from transformers with the same weights")
    assert manifest.state(copy) == "failed"


def test_what_there_is_nothing_to_compare_with_is_said(tmp_path: Path, tiny_base: Path) -> None:
    settings = config.Config()
    with pytest.raises(CogpressError, match="holds no weights in safetensors"):
        verify.verify(settings, tmp_path, tmp_path, Console())
    with pytest.raises(CogpressError, match=r"No run in .* Name it with --run"):
        verify.verify(settings, tmp_path, tiny_base, Console())
    with pytest.raises(CogpressError, match="holds no adapter"):
        verify.verify(settings, tmp_path, tiny_base, Console(), run=tmp_path)


@pytest.mark.parametrize(
    ("name", "expected", "answer", "right"),
    [
        ("exact", "a", " a\n", True),
        ("exact", "a", "A", False),
        ("json", '{"a": 1, "b": 2}', '{"b":2,"a":1}', True),
        ("json", '{"a": 1}', '{"a": 2}', False),
        ("json", '{"a": 1}', "no JSON", False),
        ("examples.queries:score", '{"limit": 1}', "nonsense", False),
    ],
)
def test_scores(name: str, expected: str, answer: str, right: bool) -> None:
    assert verify.scorer(name)(expected, answer) is right


def test_a_score_that_does_not_exist_is_said() -> None:
    with pytest.raises(CogpressError, match=r"verify\.score names nowhere:nothing"):
        verify.scorer("nowhere:nothing")


def test_state_of_a_folder(tmp_path: Path) -> None:
    assert manifest.state(tmp_path) == "unverified"
    (tmp_path / VERIFICATION).write_text("{")
    assert manifest.state(tmp_path) == "unverified", "a server starts all the same"
    with pytest.raises(CogpressError, match="is no verification report"):
        manifest.read_verification(tmp_path)


def test_a_server_tells_what_its_weights_are(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    facts = manifest.write(tmp_path, "weights", {})
    hashes = {name: file["sha256"] for name, file in facts["files"].items()}
    for passed, files, state in ((True, hashes, "verified"), (False, hashes, "failed"), (True, {}, "changed")):
        write_json(tmp_path / VERIFICATION, {"passed": passed, "files": files})
        assert manifest.state(tmp_path) == manifest.state(tmp_path, facts) == state
        assert state.upper() in manifest.STATE_MESSAGES[state].upper()
