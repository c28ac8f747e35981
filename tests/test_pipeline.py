"""The whole way from examples to weights, on a tiny model."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import bases
from cogpress import config, pipeline, remake
from cogpress.draft import file as draft
from cogpress.errors import CogpressError
from cogpress.plan import architecture
from cogpress.weights import archive, fetch, manifest

pytestmark = pytest.mark.train

QUIET = Console(quiet=True)


def test_a_base_with_experts_is_trained_merged_and_compared_and_says_what_it_leaves_out(
    examples_file: Path, tmp_path: Path
) -> None:
    console = Console(file=io.StringIO(), width=400)
    folder = bases.make("mixtral", tmp_path / "base")
    given = {"base": {"source": str(folder)}, "train": {"max_steps": 2, "rank": 2, "evaluations": 0}}
    built = pipeline.build(
        config.parse(given, "the test"), examples_file, tmp_path / "run", tmp_path / "cache", console
    )
    assert "all-linear leaves out the experts" in console.file.getvalue()  # type: ignore[attr-defined]
    assert built.manifest["merge"]["layers"] == 8
    assert built.merged is not None
    assert built.merged.mean_kl < 0.01


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"model_type": "t5"}, r"hf://google/base \(t5\) has an encoder and a decoder"),
        (
            {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}},
            r"hf://google/base is quantized already \(mxfp4\)",
        ),
    ],
)
def test_a_base_on_the_hub_that_cannot_be_trained_is_refused_before_it_is_downloaded(
    examples_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], reason: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(architecture, "config", lambda text, _cache: asked.append(text) or found)
    monkeypatch.setattr(fetch, "base", lambda *_: pytest.fail("was downloaded"))
    settings = config.parse({"base": {"source": "hf://google/base"}}, "the test")
    with pytest.raises(CogpressError, match=reason):
        pipeline.build(settings, examples_file, tmp_path / "run", tmp_path / "cache", QUIET)
    assert asked == ["hf://google/base"]


def test_a_tar_is_packed_on_request_and_never_outlives_its_weights(
    tiny_base: Path, examples_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    given = {"base": {"source": str(tiny_base)}, "train": {"max_steps": 1, "rank": 4, "evaluations": 0}}
    settings = config.parse(given, "the test")
    built = pipeline.build(settings, examples_file, run, tmp_path / "cache", QUIET)
    assert not (run / "weights.tar").exists()
    tar = pipeline.pack(built.weights, built.training.adapter, QUIET)
    assert tar == run / "weights.tar"
    unpacked = archive.unpack(tar, tmp_path / "unpacked")
    assert len(draft.read(draft.check(unpacked, manifest.fingerprint(run / "adapter"))).keys) > 10
    assert "draft/table.safetensors" in built.manifest["files"]
    assert manifest.fingerprint(unpacked / "adapter") == manifest.fingerprint(run / "adapter")
    assert manifest.fingerprint(fetch.model(tar, tmp_path / "cache").folder) == manifest.fingerprint(run / "weights")
    # The same weights again: the tar stays.
    pipeline.build(settings, examples_file, run, tmp_path / "cache", QUIET)
    assert tar.is_file()
    # Weights that fail are an error, and stay.
    strict = config.parse({**given, "verify": {"mean_kl": 1e-12}}, "the test")
    with pytest.raises(CogpressError, match=r"answer differently from what training scored: mean KL .* stay in .*run"):
        pipeline.build(strict, examples_file, run, tmp_path / "cache", QUIET)
    assert tar.is_file()
    # Other weights: it goes.
    pipeline.build(
        config.parse({**given, "merge": "original"}, "the test"), examples_file, run, tmp_path / "cache", QUIET
    )
    assert json.loads((run / "weights" / "manifest.json").read_text())["merge"]["onto"] == "original"
    assert not tar.exists()


def test_a_draft_is_made_again_and_kept_by_a_merge(tiny_base: Path, examples_file: Path, tmp_path: Path) -> None:
    run, cache = tmp_path / "runs" / "tiny", tmp_path / "cache"
    given = {"base": {"source": str(tiny_base)}, "train": {"max_steps": 1, "rank": 4, "evaluations": 0}}
    settings = config.parse({**given, "data": {"train": str(examples_file)}}, "the test")
    built = pipeline.build(settings, examples_file, run, cache, QUIET)
    made_by = manifest.fingerprint(run / "adapter")
    table = draft.path_in(built.weights)
    first = table.read_bytes()
    table.unlink()
    (built.weights / "verification.json").write_text('{"checks": [], "files": {}}')
    files = {name: known for name, known in built.manifest["files"].items() if not name.startswith("draft/")}
    (built.weights / manifest.NAME).write_text(json.dumps({**built.manifest, "files": files}))
    assert remake.draft_of(tmp_path, built.weights, None, None, QUIET) == table
    assert table.read_bytes() == first
    facts = manifest.read(built.weights) or {}
    manifest.check(built.weights, facts)
    assert facts["files"].keys() == built.manifest["files"].keys(), "no report of another state is among them"
    out = io.StringIO()
    for target, lost in ((built.weights, False), (tmp_path / "other", False), (tmp_path / "third", True)):
        if lost:
            shutil.rmtree(table.parent)
        remake.merge_of(run / "adapter", target, cache, Console(file=out), onto="dequantized")
        assert ("scripts/draft makes one" in " ".join(out.getvalue().split())) is lost
        if not lost:
            assert draft.check(target, made_by) == draft.path_in(target)
        manifest.check(target, manifest.read(target) or {})
