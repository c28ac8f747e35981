"""The whole way from examples to weights, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from cogpress import config, pipeline
from cogpress.draft import file as draft
from cogpress.weights import archive, fetch, manifest

pytestmark = pytest.mark.train

QUIET = Console(quiet=True)


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
    # Other weights: it goes.
    pipeline.build(
        config.parse({**given, "merge": "original"}, "the test"), examples_file, run, tmp_path / "cache", QUIET
    )
    assert json.loads((run / "weights" / "manifest.json").read_text())["merge"]["onto"] == "original"
    assert not tar.exists()
