"""A run's folder: nothing but a run is deleted or replaced, and a finished run is known again by what it learnt."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cogpress import config, pipeline
from cogpress.data.prepare import Prepared, Report
from cogpress.errors import CogpressError
from cogpress.prompts import Row
from cogpress.train import run as training

QUIET = Console(quiet=True)


def project(folder: Path) -> Path:
    (folder / "model.yaml").write_text("data: {train: examples.jsonl}\n")
    (folder / "examples.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return folder


def key(**train: Any) -> dict[str, Any]:
    rows = [Row([1, 2, 3], [-100, 2, 3])]
    settings = config.Config().override(train)
    return training.run_key(settings, Prepared(rows, [], [], [], Report()), "base")


@pytest.mark.parametrize("linked", [False, True])
def test_fresh_deletes_a_run_and_says_so(tmp_path: Path, linked: bool) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "key.json").write_text(json.dumps(key()))
    (run / "notes.txt").write_text("mine")
    named = run
    if linked:
        named = tmp_path / "link"
        named.symlink_to(run)
    said = io.StringIO()
    training.discard(named, Console(file=said))
    assert not run.exists()
    assert f"Deleting {named}" in said.getvalue().replace("\n", "")


@pytest.mark.parametrize("content", ["", "{}", "[]", "not JSON", '{"key": 1}'])
def test_fresh_deletes_no_other_folder(tmp_path: Path, content: str) -> None:
    mine = tmp_path / "documents"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    if content:
        (mine / "key.json").write_text(content)
    with pytest.raises(CogpressError, match="is not a run of cogpress"):
        pipeline.from_inputs(project(tmp_path), {}, run=mine, fresh=True, console=QUIET)
    assert (mine / "thesis.txt").read_text() == "years"


def test_fresh_leaves_what_there_is_before_a_training(tmp_path: Path) -> None:
    for name in ("data.json", "held-out.jsonl"):
        (tmp_path / name).touch()
    training.discard(tmp_path, QUIET)
    training.discard(tmp_path / "none", QUIET)
    assert (tmp_path / "data.json").exists()


@pytest.mark.parametrize("name", ["adapter", "checkpoints"])
def test_a_training_replaces_only_a_training(tmp_path: Path, name: str) -> None:
    mine = tmp_path / "mine"
    (mine / name).mkdir(parents=True)
    (mine / name / "file").write_text("years")
    with pytest.raises(CogpressError, match=f"holds {name}, but no run"):
        pipeline.from_inputs(project(tmp_path), {}, run=mine, console=QUIET)
    assert [path.name for path in mine.iterdir()] == [name], "nothing was written either"
    (mine / "key.json").write_text(json.dumps(key()))
    training.check_folder(mine)


def test_a_run_is_known_by_what_it_learnt() -> None:
    assert key() == key(evaluations=9)
    for name, value in {"rank": 4, "learning_rate": 0.1, "seed": 3, "epochs": 2.0, "batch_size": 2}.items():
        assert training._differences(key(), key(**{name: value})) == [f"train.{name}"]
    younger = key()
    del younger["train"]["dropout"]
    assert training._differences(younger, key()) == []
    assert training._differences(younger, key(dropout=0.1)) == ["train.dropout"]
    older = key()
    older["train"] |= {"evaluations": 4, "max_length": 64}
    assert training._differences(older, key()) == []
    assert training._differences({**key(), "base": "another"}, key()) == ["base"]
