"""The gate's benchmark: what it makes, that it goes on where it was, and a spoilt model that is stopped."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from bench import gate, small

ROOT = Path(__file__).resolve().parents[2]


def test_twenty_good_ones_and_twenty_spoilt_ones_are_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def judged(model: gate.Model, *_: Path) -> list[str]:
        made.append(model.name)
        return [] if model.good else ["mean KL"]

    monkeypatch.setattr(gate, "judged", judged)
    monkeypatch.setattr(small, "make", lambda folder, _root: folder)
    out = io.StringIO()
    console = Console(file=out, width=100)
    gate.run(tmp_path / "gate.json", ROOT, console, only=5)
    assert len(made) == 5
    found = gate.run(tmp_path / "gate.json", ROOT, console)
    assert len(made) == len(set(made)) == len(found) == 40
    assert Counter(one["good"] for one in found.values()) == {True: 20, False: 20}
    assert "spoilt" in out.getvalue()


@pytest.mark.train
def test_weights_with_a_number_that_is_none_are_stopped_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "TRAIN", {**gate.TRAIN, "max_steps": 2})
    monkeypatch.setattr(gate, "ROWS", 40)
    monkeypatch.setattr(gate, "HELD_OUT", 8)
    base_folder = small.make(tmp_path / "base", ROOT, steps=2)
    spoilt = next(model for model in gate.models() if model.name == "not a number in one layer")
    found = gate.judged(spoilt, base_folder, tmp_path / "work", tmp_path)
    assert found, "stopped"
    assert all(isinstance(one, str) for one in found)
