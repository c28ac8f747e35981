"""Small projects with the real Cog's verdict on each: preflight agrees, names each silent loss, and makes Cog's schema.

`corpus.json` holds what differs from its first project: the files, what Cog says where it refuses (`says`), the schema
that it wrote, and what preflight must do where Cog takes a project that it then breaks (`must`: refuse or name).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cogpress.cog import reading, schema
from cogpress.cog.process import CPU_IMAGE, GPU_IMAGE, read_cog_yaml
from cogpress.errors import CogpressError
from cogpress.preflight import run as preflight
from cogpress.preflight.facts import Request, gather
from tests.standins import cogreading, preflightproject

CORPUS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "corpus.json").read_text(encoding="utf-8"))
BASE = CORPUS[0]
OUTSIDE = ("weights", "image", "machine", "replicate")
SCHEMA = {
    "Input": {
        "title": "Input",
        "type": "object",
        "properties": {
            "text": {"default": "hello", "description": "What to say.", "title": "Text", "type": "string", "x-order": 0}
        },
    },
    "Output": {"title": "Output", "type": "string"},
}
"""Of the first project."""


def write(one: dict[str, Any], root: Path) -> Path:
    files = {**BASE["files"], "model.yaml": "serve:\n  engine: transformers\n", **one["files"]}
    for name, text in files.items():
        if text is not None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(text.encode())
    return root


def found(root: Path, outcome: str) -> set[str]:
    facts = gather(Request(root, offline=True))
    return {
        f"{row.topic}: {row.name}: {row.finding.message}"
        for row in preflight.check(facts, OUTSIDE)
        if row.finding.outcome == outcome
    }


@pytest.fixture(scope="module")
def of_the_base(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What the product itself asks of the first project, which Cog takes."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("base")
        answering(folder / "bin", BASE, patch)
        root = write(BASE, folder / "project")
        return {*found(root, "failed"), *found(root, "warning")}


def answering(folder: Path, one: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    patch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    patch.setenv("HF_HUB_OFFLINE", "1")
    preflightproject.cog(folder, says=one.get("says", ""))


@pytest.mark.slow
@pytest.mark.parametrize("one", CORPUS, ids=lambda one: one["name"])
def test_preflight_agrees_with_cog(
    one: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_the_base: set[str]
) -> None:
    answering(tmp_path / "bin", one, monkeypatch)
    root = write(one, tmp_path / "project")
    failed = found(root, "failed") - of_the_base
    if "says" in one or one.get("must") == "refuse":
        assert failed
    elif one.get("must") == "name":
        assert failed or found(root, "warning") - of_the_base
    elif not any(loss for loss in losses(root)):
        assert failed == set()
    if "says" in one and not one["says"].startswith("image build failed"):
        words = one["says"].splitlines()[-1].strip()
        assert any(words in message for message in failed)


def losses(root: Path) -> list[reading.Loss]:
    """What Cog takes of the runner and of the training, and loses."""
    named = read_cog_yaml(root)
    try:
        return [
            loss
            for key, methods in (("run", reading.METHODS), ("train", reading.TRAINING))
            if key in named
            for loss in reading.losses(reading.find(root, named[key].removeprefix("./"), methods))
        ]
    except SyntaxError:
        return []


@pytest.mark.parametrize("one", [one for one in CORPUS if "says" not in one], ids=lambda one: one["name"])
def test_the_schema_is_cogs_wherever_one_is_made(one: dict[str, Any], tmp_path: Path) -> None:
    root = write(one, tmp_path)
    named = read_cog_yaml(root)
    try:
        made = schema.openapi(root, named.get("run") or named.get("predict"), named.get("train"))
    except CogpressError:
        return  # refused, as the SDK or its reading of Cog's parser does
    wanted = {**({} if "run" not in named and "predict" not in named else SCHEMA), **one.get("schema", {})}
    if wanted.pop("x-cog-streaming", False):
        assert made["paths"]["/predictions"]["post"]["x-cog-streaming"] is True
    shown = {name: made["components"]["schemas"].get(name) for name in wanted}
    if any("first letter" in loss.what for loss in losses(root)):
        return  # Cog's own title is broken
    assert shown == wanted


def test_the_stand_in_for_cog_refuses_what_cog_does_and_nothing_else(tmp_path: Path) -> None:
    quick, built = set(), set()
    for number, one in enumerate(CORPUS):
        root = write(one, tmp_path / str(number))
        if cogreading.refusal(root, "run") or cogreading.refusal(root, "train"):
            quick.add(one["name"])
        elif cogreading.build_refusal(root):
            built.add(one["name"])
    late = {one["name"] for one in CORPUS if "image build failed" in one.get("says", "")}
    assert built == late
    assert quick == {one["name"] for one in CORPUS if "says" in one} - late
    own = Path(__file__).resolve().parents[2]
    said = {cogreading.refusal(own, mode, file) for mode in ("run", "train") for file in (GPU_IMAGE, CPU_IMAGE)}
    assert {*said, cogreading.build_refusal(own)} == {""}


def test_most_schemas_are_made(tmp_path: Path) -> None:
    """Refusing is no way to agree."""
    count = 0
    for number, one in enumerate(one for one in CORPUS if "says" not in one):
        root = write(one, tmp_path / str(number))
        named = read_cog_yaml(root)
        try:
            schema.openapi(root, named.get("run") or named.get("predict"), named.get("train"))
            count += 1
        except CogpressError:
            pass
    assert count >= 77
